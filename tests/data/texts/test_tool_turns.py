"""Turns of tools inside answers: the model reads them, and neither learns nor is judged by them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_messages import Rows, answer, call, user, with_template, write

from offpolicy.data.replay import Replay
from offpolicy.data.texts.opening import open_texts
from offpolicy.data.texts.preview import samples
from offpolicy.data.texts.sequences import SCORED, PairView, SingleView, is_scored, token_ids
from offpolicy.errors import DataError
from offpolicy.language.layout import pair_layout, single_layout
from offpolicy.language.reference import texts_digest

SYSTEM_MARKS = (  # a turn of a tool under its own role
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls %}{{ '(' + c.function.name + ')' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GROUPED = (  # as Qwen has it: several results in one turn of the user, and <think> in the last turn alone
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool>\n' + m.content + '\n</tool>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}{{ '(' + c.function.name + ')' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDED = SYSTEM_MARKS + "{% if not add_generation_prompt %}{{ '</s>' }}{% endif %}"  # something ends a conversation
CLOSED = (  # as DeepSeek has it: the results are closed before the next turn, or at the end
    "{% set ns = namespace(open=false) %}{% for m in messages %}{% if m.role == 'tool' %}{{ '[' + m.content + ']' }}"
    "{% set ns.open = true %}{% else %}{% if ns.open %}{{ '!' }}{% set ns.open = false %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls %}{{ '(' + c.function.name + ')' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if ns.open %}{{ '!' }}{% endif %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def result(content: str = "5", role: str = "tool") -> dict[str, Any]:
    return {"role": role, "content": content}


def asked(*turns: dict[str, Any]) -> dict[str, Any]:
    """A pair whose chosen answer calls a tool before it says so."""
    return {"prompt": [user()], "chosen": [*turns, answer("good")], "rejected": [answer("bad")]}


CALL = answer("see", tool_calls=[call({"x": 1})])


def opened(folder: Path, rows: Rows, template: str = SYSTEM_MARKS, **options: Any) -> tuple[Replay, Any]:
    tokenizer = with_template(template)
    return open_texts(write(folder / "a.jsonl", rows), tokenizer=tokenizer, **options), tokenizer


def parts(replay: Replay, tokenizer: Any, text: int) -> tuple[str, str]:
    """What of an answer is scored, and what is not."""
    ids, scored = token_ids(replay, text), is_scored(replay, text)
    return tokenizer.decode(ids[scored]), tokenizer.decode(ids[~scored])


HEAD = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "turns", "learned", "read"),
    [
        (SYSTEM_MARKS, [CALL, result()], "see(add)<|im_end|>\ngood<|im_end|>\n",
         f"<|im_start|>tool\n5<|im_end|>\n{HEAD}"),
        (SYSTEM_MARKS, [CALL, result(), result("6"), answer(""), result("7")],
         "see(add)<|im_end|>\n<|im_end|>\ngood<|im_end|>\n",
         "<|im_start|>tool\n5<|im_end|>\n<|im_start|>tool\n6<|im_end|>\n" + HEAD
         + f"<|im_start|>tool\n7<|im_end|>\n{HEAD}"),
        (SYSTEM_MARKS, [CALL, result(role="ipython")], "see(add)<|im_end|>\ngood<|im_end|>\n",
         f"<|im_start|>ipython\n5<|im_end|>\n{HEAD}"),
        (GROUPED, [CALL, result(), result("6")], "see(add)<|im_end|>\n<think>\n\n</think>\n\ngood<|im_end|>\n",
         f"<|im_start|>user\n<tool>\n5\n</tool>\n<tool>\n6\n</tool><|im_end|>\n{HEAD}"),
        (GROUPED, [answer("<b> 5"), result()], "<b> 5<|im_end|>\n<think>\n\n</think>\n\ngood<|im_end|>\n",
         f"<|im_start|>user\n<tool>\n5\n</tool><|im_end|>\n{HEAD}"),
        (ENDED, [CALL, result()], "see(add)<|im_end|>\ngood<|im_end|>\n</s>",
         f"<|im_start|>tool\n5<|im_end|>\n{HEAD}"),
        (CLOSED, [CALL, result()], "see(add)<|im_end|>\ngood<|im_end|>\n", f"[5]!{HEAD}"),
    ],
)  # fmt: skip
def test_what_tools_say_is_not_scored(tmp_path: Path, template: str, turns: Rows, learned: str, read: str) -> None:
    """With all that the template writes up to the next words of the assistant."""
    replay, tokenizer = opened(tmp_path, [asked(*turns)], template)
    prompt, chosen, _, rejected = replay.tables["pairs"][0].tolist()
    assert parts(replay, tokenizer, chosen) == (learned, read)
    assert is_scored(replay, rejected).all() and is_scored(replay, prompt).all()
    (note,) = replay.meta["notes"]
    assert note == "rows have turns of tools in their answers; what the tools say is read, and not learned: 1"
    shown = samples(replay, tokenizer, 1)
    assert f"⟦{read[:4]}" in shown and f"{len(tokenizer.encode(learned))} tokens scored" in shown


def test_scored_tokens_alone_enter_a_forward_pass(tmp_path: Path) -> None:
    """Pairs, with a shared prompt and without, and singles: the tokens and the lengths of the answers are those that
    the model writes; nothing moves in the rows."""
    rows = [asked(CALL, result()), asked()]
    replay, tokenizer = opened(tmp_path, rows)
    bound = PairView().bind(replay)
    batch = bound.gather(np.arange(2))
    scored = [int(is_scored(replay, text).sum()) for text in (*bound.index[:, 1], *bound.index[:, 3])]
    assert bound.scored[:, 1].tolist() == scored[:2] and bound.scored[0, 1] < bound.lengths[0, 1]
    for shared in (False, True):
        layout = pair_layout(batch, 0, shared_prompt=shared)
        assert layout.length.tolist() == scored
        first = layout.target[layout.answer == 0]
        assert tokenizer.decode(first) == "see(add)<|im_end|>\ngood<|im_end|>\n"
        before = layout.input_ids.view(-1)[layout.predict[layout.answer == 0]]
        assert tokenizer.decode(before[-4:])[:1] == "\n"  # the assistant's next words follow its own beginning
        assert layout.real_tokens == int(bound.lengths.sum() - shared * bound.lengths[:, 2].sum())
    singles = SingleView(rejected=True).bind(replay)
    layout = single_layout(singles.gather(np.arange(4)), 0, prompt_too=True)
    assert layout.length[:4].tolist() == [scored[0], scored[2], scored[1], scored[3]]


def test_data_without_tools_are_as_before(tmp_path: Path) -> None:
    """No column more, and a digest that names the column where it is there."""
    plain, _ = opened(tmp_path, [asked(), asked(answer("look"))])
    assert list(plain.steps) == ["token"] and not plain.meta["notes"]
    tools, _ = opened(tmp_path, [asked(CALL, result())])
    bare = Replay({"token": tools.steps["token"]}, start=tools.start, length=tools.length, tables=tools.tables)
    assert SCORED in tools.steps and tools.fingerprint() != bare.fingerprint()
    assert texts_digest(PairView().bind(tools)) != texts_digest(PairView().bind(bare))
    bare.save(tmp_path / "own")
    assert PairView().bind(open_texts(tmp_path / "own", tokenizer=None)).scored[0, 1] == bare.length[1]
    tools.save(tmp_path / "tools")
    again = open_texts(tmp_path / "tools", tokenizer=None)
    assert again.fingerprint() == tools.fingerprint() and again.steps[SCORED].dtype == bool


def test_equal_tokens_from_a_tool_and_from_the_model_are_two_texts(tmp_path: Path) -> None:
    rows = [asked(CALL, result()), asked(CALL, {**result(), "role": "assistant"})]
    template = SYSTEM_MARKS.replace("m.role + '\n'", "'turn\n'").replace("assistant\n", "turn\n")
    replay, _ = opened(tmp_path, rows, template)
    first, second = replay.tables["pairs"][:, 1]
    assert first != second and token_ids(replay, first).tolist() == token_ids(replay, second).tolist()
    assert not is_scored(replay, first).all() and is_scored(replay, second).all()


def test_an_answer_cut_within_its_tools_is_a_fault(tmp_path: Path) -> None:
    rows = [asked(result("what a tool says at the very beginning, and at length"))]
    with pytest.raises(DataError, match=r"of which truncation leaves nothing.*all of them of tools"):
        opened(tmp_path, rows, max_length=30, max_prompt_length=10)


@pytest.mark.parametrize("refuses", [True, False])
def test_a_template_that_hides_the_place_of_a_tool_is_told(tmp_path: Path, refuses: bool) -> None:
    """One that takes no conversation that ends with a tool, and one that writes all turns in another order."""
    guard = "{% if messages[-1].role == 'tool' %}{{ raise_exception('no') }}{% endif %}"
    turned = SYSTEM_MARKS.replace("in messages", "in messages[::-1]")
    with pytest.raises(DataError, match="`answers` has a turn of a tool whose place in the text cannot be told"):
        opened(tmp_path, [asked(CALL, result())], guard + SYSTEM_MARKS if refuses else turned)
