"""Right answers in the layouts of other libraries, prompts and demonstrations as conversations, prompts alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from made_data import problem_data as opened

from offpolicy.data.names import resolve
from offpolicy.data.texts.answers import OR, alternatives, joined_answers, right_answers
from offpolicy.data.texts.messages import Fault
from offpolicy.data.texts.problems import BOXED, sketch_problems
from offpolicy.data.texts.sequences import token_ids
from offpolicy.errors import DataError, UsageError
from offpolicy.language.rl.verifiers import exact, final_number


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    from made_tokenizers import made_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    made = copy.deepcopy(made_tokenizer())
    made.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>"
        "{% endif %}{% if tools %}!{% endif %}"
    )
    made.save_pretrained(folder)
    return str(folder)


def text(data: Any, row: int, side: int = 0) -> str:
    ids = token_ids(data.replay, data.replay.tables["problems"][row, side])
    return data.tokenizer.decode(ids).removeprefix("<s>").removesuffix("</s>")


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        ("2", ["2"]), (2, ["2"]), (8.5, ["8.5"]), (None, []), (float("nan"), []),
        (["3", "4"], ["3", "4"]), (["3", None, "3", " "], ["3"]), ([3, 4.5], ["3", "4.5"]), ([], []),
        ({"target": ["2"]}, ["2"]), ({"target": "2"}, ["2"]), ({"ground_truth": {"target": ["a", "b"]}}, ["a", "b"]),
        ({"style": "rule", "ground_truth": "2"}, ["2"]), ({"style": None, "answer": "2"}, ["2"]),
        ('{"style": "rule", "ground_truth": "2"}', ["2"]), ('{"target": ["2", "3"]}', ["2", "3"]),
        ('["3", "4"]', ["3", "4"]), ("[1, 2]", ["[1, 2]"]), ('{"name": "Ada"}', ['{"name": "Ada"}']),
        ("['3', '4']", ["3", "4"]), ("{'style': 'rule', 'ground_truth': '2'}", ["2"]), ("array", ["array"]),
        ("{1, 2}", ["{1, 2}"]), ("[", ["["]), ("a" + OR + "b", ["a b"]),
    ],
)  # fmt: skip
def test_right_answers(value: Any, answers: list[str]) -> None:
    assert right_answers(value, "answer") == answers


@pytest.mark.parametrize(
    "value",
    [
        True,
        b"2",
        {"a": 1},
        {"target": 24, "numbers": [1, 2]},
        [["3"]],
        [{"a": 1}],
        [True],
        float("inf"),
        {"target": {}},
    ],
)
def test_right_answers_that_no_text_can_equal(value: Any) -> None:
    with pytest.raises(Fault) as caught:
        assert right_answers(value, "answer") == ["never a text of Python"]
    assert caught.value.args[1] == "answer_kind"
    for text in ('{"style": "rule"}', "{x"):
        with pytest.raises(Fault):
            right_answers(text, "reward_model")


def test_each_of_several_right_answers_is_right(tokenizer: str, tmp_path: Path) -> None:
    assert alternatives(joined_answers(["3", "4"])) == ["3", "4"] and alternatives(None) == []
    data = opened(tmp_path, [{"prompt": "a root?", "answer": ["3", "4"]}, {"prompt": "b", "answer": "5"}], tokenizer)
    first, second = map(str, data.replay.tables["problems/answer"])
    assert [exact("", x, first) for x in ("3", "4", "34", "5")] == [1.0, 1.0, 0.0, 0.0] and second == "5"
    assert final_number("", "#### 4", first) == 1.0 and final_number("", "#### 4", ["3", "4"]) == 1.0
    assert "several right answers" in data.replay.meta["notes"][0]
    assert "answer '3' or '4'" in sketch_problems(resolve(str(tmp_path / "problems.jsonl"), language=True))


def test_layouts_of_other_libraries(tokenizer: str, tmp_path: Path) -> None:
    """verl and Search-R1, as Parquet pads and as JSON text; objects without a right answer are named, not printed."""
    verl = {
        "data_source": "x",
        "prompt": [user("1+1?")],
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"split": "train", "index": 0, "answer": "so #### 2"},
    }
    search = {"prompt": [user("1+1?")], "reward_model": {"ground_truth": {"target": ["2", "two"]}, "style": "rule"}}
    for row, found in (
        (verl, "2"),
        (verl | {"reward_model": json.dumps(verl["reward_model"])}, "2"),
        (verl | {"answer": None}, "2"),
        (search, joined_answers(["2", "two"])),
        (verl | {"reward_model": {"ground_truth": "so\n#### 2"}}, "2"),
        ({"question": "1+1?", "golden_answers": ["2", "two"]}, joined_answers(["2", "two"])),
    ):
        data = opened(tmp_path, [row], tokenizer)
        assert data.replay.tables["problems/answer"].tolist() == [found]
    countdown = {"prompt": "a", "reward_model": {"style": "rule", "numbers": [1, 2]}}
    with pytest.raises(DataError, match=r"`reward_model` has a right answer of a kind .* or an object with"):
        opened(tmp_path, [countdown], tokenizer)
    data = opened(tmp_path, [countdown], tokenizer, columns={"answer": None})
    assert data.replay.source_column("reward_model") == [countdown["reward_model"]]


def test_answers_in_the_box_of_solutions(tokenizer: str, tmp_path: Path) -> None:
    """MATH: no column of answers, and the policy is asked for a box."""
    row = {"problem": "a?", "level": "1", "solution": r"It is $\boxed{\frac{1}{2}}$."}
    data = opened(tmp_path, [row, row | {"solution": r"\boxed{1} or \boxed{2}"}], tokenizer)
    assert data.replay.tables["problems/answer"].tolist() == [r"\frac{1}{2}", "2"]
    assert text(data, 0) == BOXED.replace("{prompt}", "a?") and data.replay.meta["reward"] == "math"
    with pytest.raises(DataError, match=r"without a marked answer .* in 1 row .*first: row 1"):
        opened(tmp_path, [row, row | {"solution": r"\boxed{1"}], tokenizer)
    data = opened(tmp_path, [row | {"answer": "x"}], tokenizer)  # a column of answers wins
    assert data.replay.tables["problems/answer"].tolist() == ["x"] and data.replay.meta["reward"] == "exact"


def test_prompts_are_read_as_those_of_pairs(tokenizer: str, tmp_path: Path) -> None:
    asked = "<user>a<assistant>"
    for prompt in (
        [user("a")],
        [user([{"type": "text", "text": "a"}])],
        [{"from": "human", "value": "a"}],
        user("a"),
        json.dumps([user("a")]),
    ):
        data = opened(tmp_path, [{"prompt": prompt, "answer": "7"}] * 2, tokenizer)
        assert [text(data, 0), text(data, 1)] == [asked] * 2
    row = {"prompt": "a", "answer": "7", "system": "be brief", "tools": [{"name": "f"}]}
    assert text(opened(tmp_path, [row], tokenizer), 0) == "a"
    data = opened(tmp_path, [row], tokenizer, columns={"system": "system"})
    assert text(data, 0) == "<system>be brief<user>a<assistant>!"
    assert text(opened(tmp_path, [row | {"prompt": [user("a")]}], tokenizer), 0) == asked + "!"


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([[user("a"), assistant("b")]] * 2, "ends with a turn of the assistant"),
        ([[user("a")], "b"], "`prompt` holds text in row 1 and messages in row 0"),
        ([[user("a")], []], "no text or turn"),
        ([[user("a")], [user(" ")]], "no text or turn"),
        ([[user("a")], [user([{"type": "image", "url": "x"}])]], "Images are not read"),
        ([5, 6], "`prompt` holds int 5"),
    ],
)
def test_prompts_that_are_refused(prompts: list[Any], words: str, tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        opened(tmp_path, [{"prompt": prompt, "answer": "7"} for prompt in prompts], tokenizer)


def test_a_demonstration_does_not_hold_its_question(tokenizer: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": "1+1?", "answer": "2", "solution": [user("1+1?"), assistant("so 2")]},
        {
            "prompt": "1+1?",
            "answer": "2",
            "solution": [{"role": "system", "content": "x"}, user("1+1?"), assistant("2")],
        },
        {"prompt": "1+1?", "answer": "2", "solution": assistant("2")},
    ]
    data = opened(tmp_path, rows, tokenizer)
    assert [text(data, row, 1) for row in range(3)] == ["so 2", "2", "2"]
    asked = [user("a"), assistant("b"), user("1+1?")]
    rows = [{"prompt": asked, "answer": "2", "solution": some} for some in ([*asked, assistant("2")], [assistant("2")])]
    data = opened(tmp_path, rows, tokenizer)
    assert [text(data, row, 1) for row in range(2)] == ["2", "2"]
    for solution, words in (
        ([user("2+2?"), assistant("4")], "a conversation with a turn that is not in the prompt"),
        ([user("1+1?")], "a last turn that is not the assistant's"),
        (["2"], "expected a demonstration, as text or messages"),
    ):
        with pytest.raises(DataError, match=words):
            opened(tmp_path, [{"prompt": "1+1?", "answer": "2", "solution": solution}], tokenizer)
    long = "how much is one and one?"
    with pytest.raises(DataError, match="the prompt repeated in the answer"):
        opened(tmp_path, [{"prompt": long, "answer": "2", "solution": f"{long} 2"}], tokenizer)


def test_the_test_set_is_found_in_conversations(tokenizer: str, tmp_path: Path, monkeypatch: Any) -> None:
    from offpolicy.data.texts import problems

    monkeypatch.setattr(problems, "known_test", lambda: frozenset([problems.question_hash("secret?")]))
    for prompt in ("secret?", [user("secret?")], [{"role": "system", "content": "x"}, user("secret?")]):
        with pytest.raises(DataError, match="a question of the test set"):
            opened(tmp_path, [{"prompt": prompt, "answer": "1"}], tokenizer)


def test_prompts_alone(tokenizer: str, tmp_path: Path) -> None:
    """Right answers may be missing altogether, and then no row is faulty; where some rows have one, the others are."""
    data = opened(tmp_path, [{"prompt": "a", "level": [1]}, {"prompt": "b", "answer": None}], tokenizer)
    assert data.replay.tables["problems/answer"].tolist() == ["", ""] and data.replay.meta["problems"] == 2
    assert data.replay.source_column("level") == [[1], None]
    with pytest.raises(DataError, match="`answer` has nothing"):
        opened(tmp_path, [{"prompt": "a", "answer": "1"}, {"prompt": "b"}], tokenizer)
    with pytest.raises(UsageError, match="`columns` names 'anwser'"):
        opened(tmp_path, [{"prompt": "a"}], tokenizer, columns={"anwser": "b"})
