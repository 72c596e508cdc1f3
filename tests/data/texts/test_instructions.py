"""Instructions that answers satisfy or break, and the pairs of prompts made of them."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from offpolicy.data.__main__ import main
from offpolicy.data.texts.formats import Record
from offpolicy.data.texts.instructions import (
    MAKERS,
    Instruction,
    _further,
    bullets,
    instructed,
    inter,
    intra,
    make_instructions,
)
from offpolicy.errors import UsageError

ANSWERS = (
    "It rains. Take an umbrella, perhaps two!",
    "42",
    "- one\n- two\n\nThat is all",
    "SHOUTING HELPS NOBODY",
    "однако нет",
    "...",
)


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
@pytest.mark.parametrize("answer", ANSWERS)
def test_what_an_instruction_says_is_so(maker: object, answer: str) -> None:
    """For every kind and answer, over many draws: satisfied instructions hold, and broken ones do not."""
    for seed in range(20):
        for satisfied in (True, False):
            made = maker(answer, satisfied, Random(seed))  # type: ignore[operator]
            assert not made or (isinstance(made, Instruction) and made.check(answer) is satisfied)


def test_every_kind_can_be_made() -> None:
    for maker in MAKERS:
        both = [all(maker(answer, side, Random(0)) for side in (True, False)) for answer in ANSWERS]
        assert any(both), maker


def test_pairs_of_prompts() -> None:
    """Of one answer to two prompts, and of two answers under two prompts; a chat has them in the user's last turn."""
    record = Record(3, "What now?", (ANSWERS[0], ANSWERS[2]))
    for seed in range(10):
        row = intra(record, Random(seed), 3)
        assert row is not None and row["chosen"] == row["rejected"] == ANSWERS[0]
        assert row["prompt_chosen"] != row["prompt_rejected"]
        assert all(row[name].endswith("\nWhat now?") for name in ("prompt_chosen", "prompt_rejected"))
        row = inter(record, Random(seed), 3)
        assert row is not None and row["prompt_rejected"] == "What now?" and row["rejected"] == ANSWERS[2]
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    told = instructed(chat, [Instruction("Be brief.", bool)])
    assert told == [chat[0], {"role": "user", "content": "Be brief.\nq"}] and chat[1]["content"] == "q"


def test_an_answer_with_stars_has_a_list_and_a_conversation_without_a_user_is_told_too() -> None:
    """What a list is marked by is not said, as any bullet counts."""
    for satisfied in (True, False):
        made = bullets("* one\n* two", satisfied, Random(0))
        assert made is not None and "-" not in made.text and made.check("• one") is satisfied
    assert instructed([{"role": "system", "content": "s"}], [Instruction("Be brief.", bool)])[0]["content"] == (
        "Be brief.\ns"
    )


def test_made_rows_keep_weights_and_words_to_the_template(tmp_path: Path) -> None:
    source, out = tmp_path / "pairs.jsonl", tmp_path / "made.jsonl"
    pair = {"prompt": "What now? ", "chosen": ANSWERS[0], "rejected": ANSWERS[2], "weight": 2.0}
    source.write_text(json.dumps(pair) + "\n")
    make_instructions(str(source), out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["weight"] for row in rows] == [2.0] * 3
    told = _further(Record(0, "q", ("a", "b"), None, {}, {"tools": [{"name": "f"}], "brief": True}))
    assert told == {"tools": [{"name": "f"}], "chat_template_kwargs": {"brief": True}}


def test_a_file_of_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "pairs.jsonl", tmp_path / "made.jsonl"
    rows = [{"prompt": "What now? ", "chosen": ANSWERS[0], "rejected": ANSWERS[2]}] * 3
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["make", "instructions", "--from", str(source), "--out", str(out)]) == 0
    words = "9 pairs (3 as they are, 3 one answer to two prompts, 3 two answers under two prompts)"
    assert words in capsys.readouterr().out
    assert make_instructions(str(source), tmp_path / "again.jsonl").total() == 9
    assert out.read_text() == (tmp_path / "again.jsonl").read_text()
    with pytest.raises(UsageError, match="exists"):
        make_instructions(str(source), out)
    assert main(["make", "instructions", "--out", str(tmp_path / "x")]) == 2
    assert main(["make", "pendulum-stitch-v0", "--from", str(source)]) == 2
