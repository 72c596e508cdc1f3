"""Problems: what is read from which columns, two-digit sums, GSM8K, held-out parts, faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_data import problem_data as opened

from offpolicy.data.names import describe, resolve
from offpolicy.data.replay import Replay
from offpolicy.data.texts.problems import ProblemData, known_test, question_hash, step_column
from offpolicy.data.texts.sequences import token_ids
from offpolicy.data.texts.sums import addition
from offpolicy.errors import DataError, UsageError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tiny import make_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return str(folder)


def text(data: ProblemData, row: int, side: int) -> str:
    assert data.replay is not None
    ids = token_ids(data.replay, data.replay.tables["problems"][row, side])
    return data.tokenizer.decode(ids).replace(" ", "")


def test_two_digit_sums(tokenizer: str) -> None:
    train, test = addition("train"), addition("test")
    assert train.rows == 9600 and test.rows == 400 and not set(train.column("prompt")) & set(test.column("prompt"))
    for prompt, answer, carry in zip(test.column("prompt"), test.column("answer"), test.column("carry")):
        a, b = int(prompt[:2]), int(prompt[3:5])
        assert answer == f"{a + b:03d}" and prompt[2] == "+" and prompt[5:] == "=" and carry == (a % 10 + b % 10 > 9)
    assert resolve("Addition").kind == "language" and "made here" in describe(resolve("addition"))
    assert "openai/gsm8k:main" in describe(resolve("GSM8K"))


def test_columns_answers_and_demonstrations(tokenizer: str, tmp_path: Path) -> None:
    """GSM8K's own layout, demonstrations apart, demonstrations alone, and the layout of verl."""
    gsm = {"question": "a + b", "answer": "it is <<1+1=2>>2.\n#### 1,002", "hard": True}
    data = opened(tmp_path, [gsm, gsm | {"question": "b", "hard": False}], tokenizer)
    assert data.replay is not None and data.replay.tables["problems/answer"].tolist() == ["1,002", "1,002"]
    assert "<unk>" in text(data, 0, 1) and "1+1" not in text(data, 0, 1) and text(data, 0, 1).endswith("</s>")
    assert data.replay.tables["problems/hard"].tolist() == [True, False]
    apart = [{"prompt": "a", "solution": "x y", "answer": 7}, {"prompt": "b", "solution": None, "answer": 8.5}]
    data = opened(tmp_path, apart, tokenizer)
    assert data.replay is not None and data.replay.tables["problems/answer"].tolist() == ["7", "8.5"]
    assert data.replay.tables["problems"].tolist() == [[0, 2], [1, -1]] and data.replay.meta["demonstrations"] == 1
    alone = opened(tmp_path, [{"prompt": "a", "completion": "so #### 5"}], tokenizer)
    assert alone.replay is not None and alone.replay.tables["problems/answer"].tolist() == ["5"]
    verl = {
        "prompt": "a",
        "target": [{"role": "assistant", "content": "so 5"}],
        "reward_model": {"style": "rule", "ground_truth": "5"},
    }
    data = opened(tmp_path, [verl], tokenizer)
    assert data.replay is not None and data.replay.tables["problems/answer"].tolist() == ["5"]
    assert text(data, 0, 1) == "so5</s>"
    data = opened(tmp_path, [{"q": "a", "prompt": "z", "a": "1"}], tokenizer, columns={"prompt": "q", "answer": "a"})
    assert text(data, 0, 0) == "<s>a"
    data = opened(tmp_path, [{"prompt": "a", "answer": "1"}], tokenizer, template="so: {prompt} = ")
    assert text(data, 0, 0) == "<s>so<unk>a="


def test_demonstrations_go_on_where_the_prompt_opened_the_thinking(tmp_path: Path) -> None:
    from made_tokenizers import made_tokenizer

    made_tokenizer().save_pretrained(tmp_path / "bytes")
    row = {"prompt": "a", "solution": "<think>so</think>5", "answer": 5}
    for template, wanted in (("{prompt}<think>\n", "so</think>5</s>"), ("{prompt}", "<think>so</think>5</s>")):
        data = opened(tmp_path, [row], str(tmp_path / "bytes"), template=template)
        assert text(data, 0, 1) == wanted


def test_log_probabilities_of_the_demonstrator(tokenizer: str, tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "answer": "1", "solution": "cd", "solution_logps": [-1.0, -2.0, -0.5]},
            {"prompt": "a", "answer": "1", "solution": "c", "solution_logps": None}]  # fmt: skip
    data = opened(tmp_path, rows, tokenizer)
    assert data.replay is not None
    first, second = data.replay.tables["problems"][:, 1]
    assert step_column(data.replay, first, "logp").tolist() == [-1.0, -2.0, -0.5]
    assert np.isnan(step_column(data.replay, second, "logp")).all()
    odd: tuple[Any, ...] = ([-1.0, -2.0, 0.5], [-1.0, -2.0, -1e39], [-1.0, -2.0, "a"], [[-1.0], -2.0, None], "-1", {})
    for given in ([-1.0, -2.0], *odd):
        rows[0]["solution_logps"] = given
        with pytest.raises(DataError, match=r"`solution_logps` has .*\d numbers for 3 tokens"):
            opened(tmp_path, rows, tokenizer)


def test_held_out_problems(tokenizer: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} + 1", "answer": str(i + 1)} for i in range(50)]
    data = opened(tmp_path, rows, tokenizer, eval_fraction=0.2)
    again = opened(tmp_path, [*rows[::-1], {"prompt": "0 + 1", "answer": "1"}], tokenizer, eval_fraction=0.2)
    assert data.replay is not None and data.eval_replay is not None and again.eval_replay is not None
    assert len(data.eval_replay.tables["problems"]) == 10
    sides = [set(r.tables["problems/prompt_hash"]) for r in (data.replay, data.eval_replay, again.eval_replay)]
    assert not sides[0] & sides[1] and sides[1] == sides[2]  # by prompt, whatever the order and repetitions
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[3]) + "\n")
    with pytest.raises(DataError, match="1 of the 1 held-out problems are in the training data"):
        opened(tmp_path, rows, tokenizer, eval_data=str(tmp_path / "test.jsonl"))


def test_nobody_trains_on_the_test_set_of_gsm8k(tokenizer: str, tmp_path: Path) -> None:
    question = (
        "Janet’s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for her "
        "friends every day with four. She sells the remainder at the farmers' market daily for $2 per fresh duck "
        "egg. How much in dollars does she make every day at the farmers' market?"
    )
    assert len(known_test()) == 1319 and question_hash("  " + question.replace(" ", "\n")) in known_test()
    rows = [{"question": question, "answer": "#### 18"}] + [
        {"question": f"a{i}", "answer": "#### 1"} for i in range(19)
    ]
    with pytest.raises(DataError, match="a question of the test set in 1 row"):
        opened(tmp_path, rows, tokenizer)
    data = opened(tmp_path, rows, tokenizer, on_bad="drop")
    assert data.replay is not None and data.replay.meta["problems"] == 19


FAULTY: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "", "answer": "1"}, "no text or turn"),
    ({"prompt": "a", "answer": None}, "`answer` has nothing"),
    ({"prompt": "a", "answer": " "}, "`answer` has no text"),
    ({"prompt": "a" * 40, "answer": "1"}, "41 tokens, and room for 30"),
]


@pytest.mark.parametrize("row, words", FAULTY)
def test_faulty_rows(row: dict[str, Any], words: str, tokenizer: str, tmp_path: Path) -> None:
    good = [{"prompt": f"{i}", "answer": "1"} for i in range(19)]
    with pytest.raises(DataError) as caught:
        opened(tmp_path, [*good, row], tokenizer, max_prompt_length=30)
    assert words in str(caught.value) and "row 19" in str(caught.value) and "on_bad drop" in str(caught.value)
    data = opened(tmp_path, [*good, row], tokenizer, max_prompt_length=30, on_bad="drop")
    assert data.replay is not None and data.replay.meta["problems"] == 19
    assert "1 of 20 rows were dropped" in data.replay.meta["warnings"][0]


def test_impossible_data(tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a prompt .* and an answer"):
        opened(tmp_path, [{"ask": "a", "answer": "b"}], tokenizer)
    with pytest.raises(DataError, match=r"`completion` has a solution without a marked answer .* in 1 row"):
        opened(tmp_path, [{"prompt": "a", "completion": "no mark"}], tokenizer)
    with pytest.raises(UsageError, match="Did you mean 'answer'"):
        opened(tmp_path, [{"prompt": "a", "answer": "b"}], tokenizer, columns={"anwser": "b"})
    with pytest.raises(UsageError, match=r"with {prompt} in it"):
        ProblemData("addition", template="no place")
    with pytest.raises(DataError, match="holds no problems"):
        ProblemData("pendulum-stitch-v0", tokenizer=tokenizer).load()
    ended = ProblemData("addition", tokenizer=tokenizer)
    ended.tokenizer.eos_token = None
    with pytest.raises(DataError, match="has no EOS token"):
        ended.load()


def test_a_replay_of_problems_is_stored_and_opened(tokenizer: str, tmp_path: Path) -> None:
    data = opened(tmp_path, [{"prompt": "a", "answer": "é", "solution": "b", "odd": True}], tokenizer)
    assert data.replay is not None
    data.replay.save(tmp_path / "saved")
    again = Replay.load(tmp_path / "saved")
    assert again.fingerprint() == data.replay.fingerprint()
    assert again.tables["problems/answer"].tolist() == ["é"] and again.tables["problems/odd"].tolist() == [True]


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"prompt": "a\ud83d"}, "prompt"),
        ({"prompt": [{"role": "user", "content": "a\ud83d"}]}, "prompt"),
        ({"answer": "\ud83d"}, "answer"),
        ({"answer": ["1", "\ud83d"]}, "answer"),
        ({"solution": "a\ud83d"}, "solution"),
    ],
)
def test_half_of_a_surrogate_pair_is_a_fault(
    change: dict[str, Any], column: str, tokenizer: str, tmp_path: Path
) -> None:
    rows = [{"prompt": f"a {i}", "answer": "1", "solution": "b"} for i in range(12)]
    rows.append({**rows[0], **change})
    if not isinstance(rows[-1]["prompt"], str):
        rows = rows[-1:]
    with pytest.raises(DataError, match=f"`{column}` has half of a surrogate pair.*row {len(rows) - 1}: ") as error:
        opened(tmp_path, rows, with_template(tokenizer, tmp_path))
    str(error.value).encode()
    if len(rows) > 1:
        kept = opened(tmp_path, rows, tokenizer, on_bad="drop").replay
        assert kept is not None and len(kept.tables["problems"]) == 12


def with_template(tokenizer: str, folder: Path) -> str:
    """The tokenizer with a chat template."""
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(tokenizer)
    made.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    made.save_pretrained(folder / "chat")
    return str(folder / "chat")
