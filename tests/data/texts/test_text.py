"""Texts: what each format becomes, which rows are refused and with what words, and what is held out."""

import contextlib
import gzip
import io
import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_tokenizers import made_tokenizer
from scripts import run_python

from offpolicy.data.names import describe, resolve
from offpolicy.data.replay import Replay
from offpolicy.data.sources import open_source
from offpolicy.data.texts.module import TextData, report, samples
from offpolicy.data.texts.opening import open_texts
from offpolicy.data.texts.parts import split_by_prompt
from offpolicy.data.texts.sequences import ScoredGroupView
from offpolicy.errors import DataError, UsageError
from offpolicy.language.generation import prompts_of

Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write(folder: Path, rows: Rows, name: str = "pairs.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def read(folder: Path, rows: Rows, *, chat: bool = False, kind: str = "byte_level", **options: Any) -> Replay:
    return open_texts(write(folder, rows), tokenizer=made_tokenizer(kind, chat), **options)


def decoded(replay: Replay, chat: bool = False) -> list[tuple[str, ...]]:
    """The rows of the index table as texts, without BOS and EOS."""
    tokenizer, token = made_tokenizer(chat=chat), replay.steps["token"]
    table = replay.tables["pairs" if "pairs" in replay.tables else "singles"]

    def text(episode: int) -> str:
        ids = token[replay.start[episode] : replay.start[episode] + replay.length[episode]].astype(int)
        return tokenizer.decode(ids).replace("<s>", "").replace("</s>", "")

    return [tuple(text(episode) for episode in row) for row in table]


def say(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def pair(**changes: Any) -> dict[str, Any]:
    return {"prompt": "What is 2 + 2?", "chosen": " It is 4", "rejected": " It is 8", **changes}


USER, GOOD, BAD = say("user", "Hello there"), say("assistant", "I am fine"), say("assistant", "no")
CHAT = ("<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n", "I am fine<|im_end|>\n", "no<|im_end|>\n")
PLAIN = ("What is 2 + 2?", " It is 4", " It is 8")
SCORES = {"score_chosen": 8.0, "score_rejected": 2.0}

# -- formats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "texts", "format"),
    [
        (pair(), PLAIN, "preference pairs, plain text, prompt in a column of its own"),
        (
            {"chosen": "What is 2 + 2? It is 4", "rejected": "What is 2 + 2? It is 8"},
            ("What is 2 + 2? It is", " 4", " 8"),
            "preference pairs, plain text, prompt is the common beginning of both sides",
        ),
        (
            {"chosen": "\n\nHuman: 2?\n\nAssistant: It is 4", "rejected": "\n\nHuman: 2?\n\nAssistant: It is 8"},
            ("\n\nHuman: 2?\n\nAssistant:", " It is 4", " It is 8"),
            "preference pairs, plain text, written-out dialogues",
        ),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, CHAT, "messages, prompt in a column of its own"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHAT, "pairs, messages, prompt is the common beginning"),
        (
            {"prompt": "Hello there", "prompt_id": "a1", "chosen": [USER, GOOD], "rejected": [USER, BAD],
             "messages": [USER, GOOD], **SCORES},
            CHAT,
            "pairs, messages, prompt in a column and again in the conversations",
        ),
        (
            {"prompt": "Hello there", "chosen": [GOOD], "rejected": [BAD]},
            CHAT,
            "prompt in a column and again in the conversations",
        ),
        ({"prompt": [USER], "chosen": "I am fine", "rejected": "no"}, CHAT, "preference pairs, messages"),
        (
            {"prompt": "Hello there", "completions": ["maybe", "I am fine", "no"], "scores": [0, 3.5, -1]},
            ("Hello there", "I am fine", "no"),
            "lists of scored answers, plain text",
        ),
        (
            {"prompt": [USER], "completions": [[BAD], [GOOD]], "ratings": [1, 2]},
            CHAT,
            "lists of scored answers, messages, prompt in a column of its own; columns prompt, completions, scores =",
        ),
        ({"prompt": "2 + 2?", "completion": " 4", "label": True}, ("2 + 2?", " 4"), "single answers, plain text"),
        ({"prompt": [USER], "completion": [GOOD], "label": False}, CHAT[:2], "single answers, messages"),
        ({"completion": [USER, GOOD], "label": 1}, CHAT[:2], "answers, messages, prompt is all but the last turn"),
        ({"messages": [USER, GOOD]}, CHAT[:2], "answers, messages, prompt is all but the last turn"),
    ],
)  # fmt: skip
def test_formats(tmp_path: Path, row: dict, texts: tuple[str, ...], format: str) -> None:
    """Two rows of each, so that no column is empty; the second is the same with its keys in another order."""
    chat = "im_start" in texts[0]
    replay = read(tmp_path, [row, dict(reversed(row.items()))], chat=chat)
    expected = texts if len(texts) == 2 else (texts[0], texts[1], texts[0], texts[2])
    assert decoded(replay, chat) == [expected, expected]
    assert format in replay.meta["format"] and replay.meta["rows"] == 2 and replay.meta["source"] == "text"
    table = "pairs" if len(texts) == 3 else "singles"
    np.testing.assert_array_equal(replay.tables[f"{table}/row"], [0, 1])
    if "label" in row:
        np.testing.assert_array_equal(replay.tables["singles/label"], [bool(row["label"])] * 2)
    if "score_chosen" in row:
        assert replay.tables["pairs/score_chosen"][0] == 8 and "prompt_id" in replay.meta["format"].split("not read")[1]


@pytest.mark.parametrize(
    ("row", "columns", "texts"),
    [
        (
            {"conversations": [{"from": "human", "value": "Hello there"}],
             "chosen": {"from": "gpt", "value": "I am fine"}, "rejected": {"from": "gpt", "value": "no"}},
            {"prompt": "conversations"},
            CHAT,
        ),
        (
            {"conversations": [{"from": "human", "value": "Hello there"}, {"from": "gpt", "value": "I am fine"}]},
            {"messages": "conversations"},
            CHAT[:2],
        ),
        (
            {"system": "yes", "question": "Hello there", "chosen_response": "I am fine", "rejected_response": "no"},
            {"prompt": "question", "chosen": "chosen_response", "rejected": "rejected_response", "system": "system"},
            ("<|im_start|>system\nyes<|im_end|>\n" + CHAT[0], *CHAT[1:]),
        ),
        ({"question": "2 + 2?", "answer": " 4"}, {"prompt": "question", "completion": "answer"}, ("2 + 2?", " 4")),
        (
            {"prompt": "Hello there", "s": "yes", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            {"system": "s"},
            ("<|im_start|>system\nyes<|im_end|>\n" + CHAT[0], *CHAT[1:]),
        ),
        (
            {"a": [USER], "b": [USER], "chosen": "I am fine", "rejected": "no"},
            {"prompt_chosen": "a", "prompt_rejected": "b"},
            CHAT,
        ),
        (
            {"prompt": "unlike", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            {"prompt": None},
            CHAT,
        ),
    ],
)  # fmt: skip
def test_columns_rename(tmp_path: Path, row: dict, columns: dict, texts: tuple[str, ...]) -> None:
    chat = "im_start" in texts[0]
    replay = read(tmp_path, [row], chat=chat, columns=columns)
    found = decoded(replay, chat)[0]
    assert (found if len(texts) == 2 else (found[0], found[1], found[3])) == texts
    for ours, theirs in columns.items():
        assert theirs is None or f"{ours} = {theirs}" in replay.meta["format"] or ours == theirs


def test_two_prompts(tmp_path: Path) -> None:
    row = {"prompt_chosen": "What is 2 + 2?", "chosen": " 4", "prompt_rejected": "What is 4 + 4?", "rejected": " 8"}
    other = {**row, "prompt_chosen": "What is 4 + 4?", "prompt_rejected": "Hello"}
    replay = read(tmp_path, [row, other, {**row, "prompt_chosen": "yes", "prompt_rejected": "no"}])
    assert decoded(replay)[0] == ("What is 2 + 2?", " 4", "What is 4 + 4?", " 8")
    train, held = split_by_prompt(replay, 0.5)
    assert held is not None and not {p for r in decoded(train) for p in r[::2]} & {
        p for r in decoded(held) for p in r[::2]
    }


@pytest.mark.slow
def test_a_detection_does_not_depend_on_the_process() -> None:
    """A string prompt with conversations is read the same whatever the hash seed of strings is."""
    row = {"prompt": "Hello there", **D, "messages": [USER, GOOD], **SCORES, "id": 5}
    code = (
        "from collections import Counter; from offpolicy.data.texts.formats import *; "
        f"row = {row}; source = Source('here', 1, list(row), lambda name: [row[name]]); form = detect(source); "
        "print(form, *records(source, form, Faults('here', 1), Counter()))"
    )
    seed = {"PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    result = run_python("-c", code, **seed)
    here = io.StringIO()
    with contextlib.redirect_stdout(here):
        exec(code, {})
    assert result.stdout == here.getvalue() and "I am fine" in result.stdout


def test_what_a_row_says_to_the_template(tmp_path: Path) -> None:
    tokenizer = made_tokenizer(chat=True)
    usual = tokenizer.chat_template
    rows = [{**C, "tools": json.dumps([{"name": "add"}])}, {**C, "chat_template_kwargs": {"mood": "kind"}}]
    try:
        tokenizer.chat_template = "{{ mood }}{% if tools %}{{ tools[0].name }}{% endif %}" + usual
        replay = read(tmp_path, rows, chat=True, chat_template_kwargs={"mood": "rude"})
    finally:
        tokenizer.chat_template = usual
    assert [row[0].partition("<")[0] for row in decoded(replay, chat=True)] == ["rudeadd", "kind"]


# -- where a prompt ends that stands in both sides ---------------------------------------------------------------------

HH = "\n\nHuman: why?\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Q: hi\nA: Hello there", "Q: hi\nA: Hell no", ("Q: hi\nA:", " Hello there", " Hell no")),
        ("Q: yes", "Q: yes and more", ("Q:", " yes", " yes and more")),
        ("Q: yes and more", "Q: yes", ("Q:", " yes and more", " yes")),
        ("Q: is it so", "Q: is it", ("Q: is", " it so", " it")),
        ("Q: a  b", "Q: a  c", ("Q: a", "  b", "  c")),
        (HH + " Hello there", HH + " Hell no", (HH, " Hello there", " Hell no")),
        (HH + " yes", HH + " yes and more", (HH, " yes", " yes and more")),
        (HH + " a\n\nHuman: b\n\nAssistant: c", HH + " a\n\nHuman: b\n\nAssistant: d",
         (HH + " a\n\nHuman: b\n\nAssistant:", " c", " d")),
        (HH + " a\n\nHuman: b\n\nAssistant: c", HH + " a\n\nHuman: x\n\nAssistant: d",
         (HH, " a\n\nHuman: b\n\nAssistant: c", " a\n\nHuman: x\n\nAssistant: d")),
    ],
)  # fmt: skip
def test_no_answer_begins_inside_a_word_or_is_empty(
    tmp_path: Path, chosen: str, rejected: str, expected: tuple
) -> None:
    replay = read(tmp_path, [{"chosen": chosen, "rejected": rejected}])
    row = decoded(replay)[0]
    assert (row[0], row[1], row[3]) == expected
    if expected[1].count("Assistant:"):
        assert replay.meta["notes"] == ["dialogues part before their last turn, so their answers hold several turns: 1"]


# -- faulty rows -------------------------------------------------------------------------------------------------------

C = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
D = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
S = {"prompt": "2 + 2?", "completion": " 4", "label": True}
L = {"prompt": "2 + 2?", "completions": [" 4", " 8"], "scores": [1, 0]}
I = {"chosen": "Q: yes", "rejected": "Q: no"}  # noqa: E741
H = {"chosen": HH + " yes", "rejected": HH + " no"}
EMPTY = "has no text in 1 row (first: row 12: {}), expected an answer with more than white space"
EQUAL = "`rejected` has two equal answers (white space at their ends aside) in 1 row (first: row 12: {}"
ROWS: list[tuple[str, dict, dict, str]] = [
    ("F3 repeats the prompt", C, {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
     "`chosen` has the prompt repeated in the answer in 1 row (first: row 12: {'role': 'user', 'content': 'Hello there"
     "'}), expected the answer alone; where every row repeats it, pass --data.columns '{\"prompt\": null}'"),
    ("F1 repeats the prompt", pair(), {"chosen": "What is 2 + 2? It is 4", "rejected": "What is 2 + 2? It is 8"},
     "`chosen` has the prompt repeated in the answer in 1 row (first: row 12: 'What is 2 + 2? It is 4')"),
    ("a single repeats its prompt", S, {"prompt": "What is 2 + 2 here?", "completion": "What is 2 + 2 here? 4"},
     "`completion` has the prompt repeated in the answer"),
    ("F2 equal", I, {"rejected": "Q: yes"}, EQUAL.format("'Q: yes'")),
    ("F1 equal", pair(), {"rejected": " It is 4"}, EQUAL.format("' It is 4'".replace("' ", "'"))),
    ("F1 equal but for space", pair(), {"rejected": "It is 4 \n"}, EQUAL.format("'It is 4'")),
    ("hh equal", H, {"rejected": H["chosen"]}, EQUAL.format("'Human: why? Assistant: yes'")),
    ("chat equal", C, {"rejected": [GOOD]}, EQUAL.format("[{'role': 'assistant', 'content': 'I am fine'}]")),
    ("F4 equal", D, {"rejected": D["chosen"]}, "`rejected` has two equal answers"),
    ("F1 empty", pair(), {"chosen": ""}, "`chosen` " + EMPTY.format("''")),
    ("F1 only white space", pair(), {"rejected": " \n "}, "`rejected` " + EMPTY.format("''")),
    ("F3 []", C, {"chosen": []}, "`chosen` " + EMPTY.format("[]")),
    ("F4 []", D, {"rejected": []}, "`rejected` " + EMPTY.format("[]")),
    ("chat without content", C, {"chosen": [say("assistant", " ")]}, "`chosen` has no text in 1 row"),
    ("F2 both empty", I, {"chosen": "", "rejected": ""}, "`chosen` " + EMPTY.format("''")),
    ("hh empty answer", H, {"rejected": HH}, "`rejected` has no text in 1 row"),
    ("None", pair(), {"chosen": None}, "`chosen` has nothing (None) in 1 row (first: row 12: None), expected text"),
    ("None in the prompt", pair(), {"prompt": None}, "`prompt` has nothing (None) in 1 row"),
    ("None in a message", C, {"chosen": [say("assistant", None)]}, "`chosen` has nothing (None) in 1 row"),
    ("prompt []", C, {"prompt": []}, "`prompt` has no text or turn in 1 row (first: row 12: []), expected a prompt"),
    ("prompt ''", pair(), {"prompt": ""}, "`prompt` has no text or turn in 1 row (first: row 12: '')"),
    ("the user ends F4", D, {"chosen": [USER, GOOD, USER]}, "`chosen` has a last turn that is not the assistant's"),
    ("the user ends F3", C, {"rejected": [say("user", "why?")]}, "`rejected` has a last turn that is not the assist"),
    ("the user inside an answer", C, {"rejected": [BAD, say("user", "why?"), BAD]},
     "`rejected` has an answer that holds a turn of the user or system in 1 row"),
    ("F4 parts at a turn of the user", D,
     {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, say("user", "x"), BAD]},
     "`chosen` has an answer that holds a turn of the user or system"),
    ("a turn that is not learned from", C, {"chosen": [{**GOOD, "weight": 0}]}, "`chosen` has an answer that a `weigh"
     "t` other than 1, or `loss`, `train` or `trainable` false, leaves out of training, in 1 row"),
    ("a turn that is not trained", D, {"rejected": [USER, {**BAD, "train": False}]}, "`rejected` has an answer that a"),
    ("prompt ends with the assistant", C, {"prompt": [USER, GOOD]}, "`prompt` has a prompt that ends with a turn of"),
    ("other system messages", D,
     {"chosen": [say("system", "a"), USER, GOOD], "rejected": [say("system", "b"), USER, BAD]},
     "`chosen` has no common prefix with the rejected side, from which a prompt could be inferred, in 1 row (first: row"
     " 12: {'role': 'system', 'content': 'a'}), expected a prompt in both"),
    ("F5 with another prompt", {**D, "prompt": "Hello there"}, {"prompt": "else"},
     "`prompt` has a text that does not occur in the conversations in 1 row (first: row 12: 'else')"),
    ("F2 without a beginning", {**I, "question": "q"}, {"chosen": "yes", "rejected": "no"}, "has no common p"
     "refix with the rejected side, from which a prompt could be inferred, in 1 row (first: row 12: 'yes'), expected a "
     "prompt in both, or the name of the prompt column (--data.columns '{\"prompt\": \"…\"}') from question"),
    ("hh without a turn", H, {"chosen": "yes", "rejected": "no"}, "has sides without a common '\\n\\nAssis"),
    ("NaN score", {**pair(), **SCORES}, {"score_rejected": math.nan},
     "`score_rejected` has a score or weight that is not a finite number in 1 row (first: row 12: nan), expected"),
    ("score as text", {**pair(), **SCORES}, {"score_chosen": "8"}, "`score_chosen` has a score or weight that is"),
    ("scores of other length", L, {"scores": [1]}, "`scores` has scores that do not fit the answers in 1 row"),
    ("one score", L, {"scores": [1, None]}, "`scores` has scores that do not fit the answers in 1 row"),
    ("no list", L, {"completions": None}, "`completions` has nothing (None) in 1 row"),
    ("no label", S, {"label": None}, "`label` has no label in 1 row (first: row 12: None), expected true or false"),
    ("empty single", S, {"completion": ""}, "`completion` " + EMPTY.format("''")),
    ("the template refuses", C, {"prompt": [say("wizard", "why?")]},
     "`answers` has turns that the chat template refuses in 1 row (first: row 12: 'unknown role wizard')"),
    ("only the end", pair(), {"chosen": "</s>"}, "`answers` has no text in 1 row (first: row 12: 'no token but the"),
    ("equal tokens", pair(), {"rejected": " It is 4</s>"}, "`answers` has two equal answers"),
]  # fmt: skip


@pytest.mark.parametrize(("good", "change", "words"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_faulty_rows_stop_the_load_or_are_dropped_and_counted(
    tmp_path: Path, good: dict, change: dict, words: str
) -> None:
    rows = [good] * 12 + [{**good, **change}] + [good] * 7
    chat = isinstance(good.get("chosen"), list)
    with pytest.raises(DataError) as error:
        read(tmp_path, rows, chat=chat)
    message = str(error.value)
    assert words in message and "\n" not in message
    assert message.startswith("pairs.jsonl: 1 of 20 rows cannot be trained on: ") and "`--data.on_bad drop`" in message
    replay = read(tmp_path, rows, chat=chat, on_bad="drop")
    table = "pairs" if "pairs" in replay.tables else "singles"
    assert len(replay.tables[table]) == 19 and 12 not in replay.tables[f"{table}/row"]
    assert sum(replay.meta["dropped"].values()) == 1
    assert words in replay.meta["warnings"][0] and words in report(replay)
    assert replay.meta["warnings"][0].startswith("1 of 20 rows were dropped: ")


def test_marks_of_turns_that_are_learned_from_or_asked_change_nothing(tmp_path: Path) -> None:
    marked = {"prompt": [{**USER, "weight": 0}], "chosen": [{**GOOD, "weight": 1, "loss": 0.0}], "rejected": [BAD]}
    plain = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    texts = [read(tmp_path, [row], chat=True).steps["token"].tolist() for row in (marked, plain)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"truncation": "keep_start", "max_length": 20}, "an answer of which truncation leaves nothing in 1"),
        ({"truncation": "keep_end", "max_length": 10}, "room for it; raise --data.max_length"),
        ({"max_length": 12, "max_prompt_length": 10}, "answers that are equal after truncation in 1 row (first: row 2"),
    ],
)  # fmt: skip
def test_answers_lost_to_truncation(tmp_path: Path, options: dict, words: str) -> None:
    long = pair(prompt="What is 2 + 2? " * 20, chosen=" It is so that it is 4", rejected=" It is so that it is 8")
    with pytest.raises(DataError) as error:
        read(tmp_path, [pair(chosen=" 4", rejected=" 8"), pair(chosen=" yes", rejected=" no"), long], **options)
    assert words in str(error.value)


def test_all_reasons_come_at_once_with_their_first_rows(tmp_path: Path) -> None:
    rows = [pair() for _ in range(40)]
    for i in (3, 7, 30):
        rows[i]["chosen"] = ""
    rows[5]["rejected"] = rows[5]["chosen"]
    with pytest.raises(DataError) as error:
        read(tmp_path, rows)
    assert "4 of 40 rows cannot be trained on: `chosen` has no text in 3 rows (first: row 3: '', then 7, 30)" in str(
        error.value
    )
    assert "`rejected` has two equal answers" in str(error.value)
    with pytest.raises(
        DataError, match=r"4 of 40 rows are faulty, more than the share of 0.05 that may be dropped.*max_bad"
    ):
        read(tmp_path, rows, on_bad="drop", max_bad=0.05)
    assert len(read(tmp_path, rows, on_bad="drop").tables["pairs"]) == 36
    with pytest.raises(DataError, match="no row is left, as all 2 are faulty"):
        read(tmp_path, [pair(chosen="")] * 2, on_bad="drop", max_bad=1.0)
    with pytest.raises(UsageError, match="`on_bad` is 'dorp'; expected 'error' or 'drop'"):
        read(tmp_path, rows, on_bad="dorp")


# -- columns and types: always an error --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "a", "chosen": "b"}], "has no column 'rejected'; found prompt, chosen. Say which column it is"),
        (
            [{"prompt": "a", "chosen": "b", "rejected_response": "c"}],
            "has no column 'rejected'; found prompt, chosen, rejected_response. If it is 'rejected_response', pass "
            '--data.columns \'{"rejected": "rejected_response"}\'',
        ),
        (
            [{"prompt": "a", "completions": ["b"], "points": [1]}],
            "has no column 'scores'; found prompt, completions, points",
        ),
        ([{"completion": "a", "label": True}], "has no column 'prompt'; found completion, label"),
        ([{"prompt": "a", "label": True}], "has no column 'completion'"),
        ([{"question": "a", "answer": "b"}], "has the columns question, answer; expected chosen and rejected (pairs)"),
        ([pair(), pair(chosen=5)], "`chosen` holds int 5 in row 1; expected text, or messages such as"),
        ([pair(), pair(prompt=["a"])], "`prompt` holds list ['a'] in row 1; expected text, or messages"),
        ([pair(), pair(chosen=[GOOD])], "`chosen` holds text in row 0 and messages in row 1; expected one of them"),
        ([pair(chosen=[GOOD])], "`chosen` holds messages and `rejected` text; expected the same in both"),
        ([{"messages": "a"}], "`messages` holds text; expected a list of messages"),
        ([{**L, "completions": "a"}], "`completions` holds 'a' in row 0; expected a list of answers"),
        ([{**S, "label": "good"}], "`label` holds 'good'; expected true for a wanted and false for an unwanted answer"),
        ([{**C, "chosen": [say("assistant", [{"type": "image"}])]}], "expected text. Images are not read"),
        ([{**C, "chosen": [say("assistant", 5)]}], "`chosen` has a message with 5 as content; expected text"),
        ([{**C, "tools": "{"}], "`tools` of row 0 is '{'; expected JSON"),
        ([C], "has no chat template; expected one that says how turns are written"),
    ],
)
def test_wrong_columns_and_types(tmp_path: Path, rows: Rows, words: str) -> None:
    for on_bad in ("error", "drop"):
        with pytest.raises(DataError) as error:
            read(tmp_path, rows, chat=words.startswith("`tools`"), on_bad=on_bad)
        assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"columns": {"chosn": "chosen"}}, "`columns` names 'chosn'; expected our names as keys"),
        ({"columns": {"question": "prompt"}}, 'The other way round: \'{"prompt": "question"}\''),
        (
            {"columns": {"chosen": "chosn"}},
            "no column 'chosn', which `columns` gives as chosen; it has prompt, chosen, rej",
        ),
        ({"columns": {"system": "prompt", "prompt": None}}, "no prompt column it could go before"),
        ({"split": "train"}, "`split` is 'train', but"),
        ({"truncation": "middle"}, "`truncation` is 'middle'"),
        ({"pair_strategy": "best_vs_wrost"}, "Did you mean 'best_vs_worst'?"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises((UsageError, DataError)) as error:
        read(tmp_path, [pair()], **options)
    assert words in str(error.value)


def test_parts_of_a_message_that_are_text_are_joined(tmp_path: Path) -> None:
    parts = say("assistant", [{"type": "text", "text": "I am "}, {"type": "text", "text": "fine"}])
    assert decoded(read(tmp_path, [{**C, "chosen": [parts]}], chat=True), chat=True)[0][1] == CHAT[1]


# -- what is odd but allowed is counted --------------------------------------------------------------------------------


def test_notes_and_warnings(tmp_path: Path) -> None:
    rows = [
        pair(**SCORES),
        pair(**SCORES),
        pair(chosen=" It is 8", rejected=" It is 4", score_chosen=1.0, score_rejected=2.0),
        pair(prompt="<s>Hello</s> there", **SCORES),
        pair(prompt="yes", chosen=" 4</s> 4", **SCORES),
        pair(prompt="yes", rejected="yes, no", **SCORES),
        pair(prompt="no ", chosen="It", rejected="is", **SCORES),
        pair(prompt="no no no no no no no no", **SCORES),
    ]
    meta = read(tmp_path, rows, max_length=12, max_prompt_length=5).meta
    for warning in (
        "rows that repeat another row: 1",
        "pairs that are there in both orders, so their labels contradict each other: 2",
        "prompts that hold the text of a special token, which becomes that token: 1",
        "rows with the text of a special token in an answer, such as an early end: 1",
    ):
        assert warning in meta["warnings"]
    for note in (
        "chosen answers have a lower score than the rejected: 1",
        "answers begin with their prompt, on one side only: 1",
        "rows have a token that spans prompt and answer; it counts to the answer: 1",
    ):
        assert note in meta["notes"]
    assert any("prompts were cut" in note for note in meta["notes"])
    loose = [pair(chosen="It is 4", rejected="no")]
    assert (
        "prompts run into their answers without white space (--data.separator puts some there): 1"
        in read(tmp_path, loose).meta["notes"]
    )
    spaced = read(tmp_path, loose, separator="\\n")  # as a shell passes it
    assert decoded(spaced)[0][1] == "\nIt is 4" and not spaced.meta["notes"]
    chat = read(tmp_path, [pair()], chat=True).meta
    assert "rows are plain text, for which the tokenizer's chat template is not used: 1" in chat["notes"]


def test_a_template_that_ends_nothing_or_renders_prompts_otherwise_is_warned_of(tmp_path: Path) -> None:
    tokenizer = made_tokenizer("no_bos", chat=True)
    usual = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        warnings = read(tmp_path, [C], chat=True, kind="no_bos").meta["warnings"]
        assert any("writes no special token after answers" in w for w in warnings)
        tokenizer.chat_template = usual.replace("assistant\n' }}", "assistant\n<think>' }}")
        warnings = read(tmp_path, [C], chat=True, kind="no_bos").meta["warnings"]
        assert any("ends prompts with '<think>', which is missing where an answer follows" in w for w in warnings)
    finally:
        tokenizer.chat_template = usual


# -- lists of scored answers -------------------------------------------------------------------------------------------

LIST = {"prompt": "2 + 2?", "completions": [" a", " b", " c", " d", " e"], "scores": [1, 5, 3, 5, None]}


@pytest.mark.parametrize(
    ("strategy", "gap", "pairs"),
    [
        ("best_vs_worst", 0.0, ["ba"]),
        ("adjacent", 0.0, ["dc", "ca"]),  # b and d tie
        ("all_pairs", 0.0, ["bc", "ba", "dc", "da", "ca"]),
        ("all_pairs", 2.5, ["ba", "da"]),
    ],
)
def test_pair_strategies(tmp_path: Path, strategy: str, gap: float, pairs: list[str]) -> None:
    replay = read(tmp_path, [LIST], pair_strategy=strategy, min_score_gap=gap)
    assert [(row[1] + row[3]).replace(" ", "") for row in decoded(replay)] == pairs
    scores = dict(zip("abcd", [1, 5, 3, 5]))
    assert replay.tables["pairs/score_chosen"].tolist() == [scores[p[0]] for p in pairs]
    assert replay.tables["pairs/score_rejected"].tolist() == [scores[p[1]] for p in pairs]
    assert "answers in lists left out, as they have no score: 1" in replay.meta["notes"]
    if strategy != "best_vs_worst":
        assert "pairs of lists left out, as their scores are equal: 1" in replay.meta["notes"]
    assert any("min_score_gap" in note for note in replay.meta["notes"]) == (gap > 0)


def test_best_vs_random_does_not_depend_on_the_process(tmp_path: Path) -> None:
    rows = [{**LIST, "prompt": f"{i} + 2?"} for i in range(12)]
    first, again = (read(tmp_path, rows, pair_strategy="best_vs_random") for _ in range(2))
    assert first.fingerprint() == again.fingerprint()
    assert {row[3] for row in decoded(first)} == {" a", " c"} and {row[1] for row in decoded(first)} == {" b"}


def test_lists_as_single_answers(tmp_path: Path) -> None:
    replay = read(tmp_path, [LIST, {**LIST, "prompt": "4 + 4?"}], pair_strategy="none")
    assert replay.tables["singles/score"].tolist() == [1, 5, 3, 5] * 2
    assert replay.tables["singles/group"].tolist() == [0] * 4 + [1] * 4


def test_a_weight_of_a_list_counts_for_its_pairs_and_for_its_group(tmp_path: Path) -> None:
    rows = [{**LIST, "weight": 2.0}, {**LIST, "prompt": "4 + 4?", "weight": 0.5}]
    assert read(tmp_path, rows).tables["pairs/weight"].tolist() == [2.0, 0.5]
    bound = ScoredGroupView().bind(read(tmp_path, rows, pair_strategy="none"))
    assert bound.facts["weight"].tolist() == [2.0, 0.5]
    with pytest.raises(DataError, match="negative weight"):
        read(tmp_path, [{**LIST, "weight": -1.0}])


def test_lists_of_which_one_answer_is_left_are_counted(tmp_path: Path) -> None:
    replay = read(tmp_path, [LIST, {**LIST, "prompt": "4 + 4?"}], pair_strategy="none")
    keep = np.array([0, 1, 2, 3, 4])
    replay.tables = {name: column[keep] for name, column in replay.tables.items()}
    bound = ScoredGroupView().bind(replay)
    assert len(bound) == 1 and "1 prompts have one scored answer left" in bound.notes[0]


def test_the_reference_of_a_scored_list_is_its_best_answer(tmp_path: Path) -> None:
    """Of equal ones the first; where answers have several scores, none is the best."""
    replay = read(tmp_path, [LIST, {**LIST, "prompt": "4 + 4?"}], pair_strategy="none")
    best = [made_tokenizer("byte_level", False).decode(p.reference).strip() for p in prompts_of(replay)]
    assert [one.replace("</s>", "") for one in best] == ["b", "b"]
    several = {**LIST, "scores": [[1, 2], [3, 4], [5, 6], None, [0, 1]]}
    replay = read(tmp_path, [several], pair_strategy="none")
    assert [p.reference for p in prompts_of(replay)] == [None]


def test_a_prompt_that_is_cut_beside_another_is_a_fault(tmp_path: Path) -> None:
    """What tells two prompts apart stands in front of them, where cutting begins."""
    long = "word " * 30
    prompts = {"prompt_chosen": f"in capitals: {long}", "prompt_rejected": f"{long}now"}
    rows = [{**prompts, "chosen": "YES", "rejected": "YES"}]
    assert len(read(tmp_path, rows).tables["pairs"]) == 1
    with pytest.raises(DataError, match=r"pair with two prompts.*raise --data\.max_length"):
        read(tmp_path, rows, max_length=24, max_prompt_length=16)


def test_min_score_gap_of_pairs(tmp_path: Path) -> None:
    rows = [pair(**SCORES), pair(prompt="Hello", score_chosen=3.0, score_rejected=2.5)]
    replay = read(tmp_path, rows, min_score_gap=1.0)
    assert len(replay.tables["pairs"]) == 1
    assert "pairs left out, as their scores differ by less than min_score_gap: 1" in replay.meta["notes"]
    with pytest.raises(
        DataError,
        match="gives nothing to train on: pairs left out, as their scores differ by less than min_score_gap: 2",
    ):
        read(tmp_path, rows, min_score_gap=100.0)


# -- files, folders, hub -----------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = [pair(), {**pair(), "prompt": "Wörter ✓", "rejected": " no"}]
    expected = read(tmp_path, rows).fingerprint()
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.json").write_text(json.dumps(rows), "utf-8")
    (tmp_path / "b.json").write_text("\ufeff" + text + "\n", "utf-8")
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name, writer in (("a.arrow", pyarrow.ipc.new_stream), ("b.arrow", pyarrow.ipc.new_file)):
        with writer(str(tmp_path / name), table.schema) as file:
            file.write_table(table)
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "two")
    files = ["a.jsonl.gz", "a.json", "b.json", "a.parquet", "a.arrow", "b.arrow", "one", "two"]
    for file in files:
        replay = open_texts(tmp_path / file, tokenizer=made_tokenizer())
        assert replay.fingerprint() == expected, file
        assert replay.meta["file"].startswith(str(tmp_path / file)) and ("sha256" in replay.meta) == ("." in file)
    assert open_texts(tmp_path / "two", tokenizer=made_tokenizer(), split="test").meta["pairs"] == 1
    with pytest.raises(DataError, match=r"has no split 'tset'; it has train, test. Did you mean 'test'\?"):
        open_texts(tmp_path / "two", tokenizer=made_tokenizer(), split="tset")
    with pytest.raises(DataError, match="is one table without splits"):
        open_texts(tmp_path / "one", tokenizer=made_tokenizer(), split="test")
    module = TextData(str(tmp_path / "two"), eval_data=f"{tmp_path / 'two'}@test")
    module.bind_tokenizer(made_tokenizer())
    module.load()
    assert module.eval_replay is not None and module.eval_replay.meta["pairs"] == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt"\n', r"a.jsonl, line 2 is no JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n\n[1]\n', r"row 1 is \[1\]; expected an object"),
        ("a.json", b"[1]", "item 0 is 1; expected an object"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.jsonl", b"\xff\xfe", "cannot be read as UTF-8, as it is written in UTF-16"),
        ("a.jsonl.gz", b"no", "cannot be read"),
        ("a.parquet", b"no", "a.parquet cannot be read"),
        ("a.arrow", b"no", "a.arrow cannot be read"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        open_texts(tmp_path / name, tokenizer=made_tokenizer())


def test_names_of_the_hub_are_for_language_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target = resolve("trl-lib/ultrafeedback_binarized", language=True)
    assert (target.kind, target.path, target.location()) == ("language", None, None)
    assert "looked up on the Hugging Face hub" in describe(target)
    assert resolve("some/pairs-v2", language=True).kind == "language" and resolve("some/pairs-v2").kind == "minari"
    with pytest.raises(UsageError, match="no data set is called"):
        resolve("trl-lib/ultrafeedback_binarized")
    with pytest.raises(UsageError, match="does not exist"):
        resolve("data/pairs.jsonl", language=True)
    assert resolve("hopper-medium-v2", language=True).kind == "d4rl"
    write(tmp_path, [pair()])
    with pytest.raises(UsageError, match=r"expected control data.*For texts choose a method of language models"):
        open_source("pairs.jsonl")
    with pytest.raises(DataError, match="pendulum-stitch-v0 holds control data without pairs or answers"):
        open_texts("pendulum-stitch-v0", tokenizer=made_tokenizer())


def test_without_a_network_the_error_comes_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    began = time.monotonic()
    with pytest.raises(DataError) as error:
        open_texts("org/pairs", tokenizer=made_tokenizer())
    assert time.monotonic() - began < 10
    assert "was taken for a data set of the Hugging Face hub" in str(error.value)
    assert "the hub does not answer" in str(error.value) and "pass a local file" in str(error.value)
    with pytest.raises(DataError, match="downloading is off"):
        open_texts("org/pairs", tokenizer=made_tokenizer(), download=False)


def test_a_reachable_hub_is_asked_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from offpolicy.data.texts import hub as hf

    asked: list[tuple] = []

    def load(*arguments: object) -> Any:
        asked.append(arguments)
        return datasets.DatasetDict({"train_prefs": datasets.Dataset.from_list([pair()])})

    monkeypatch.setattr(hf, "hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    replay = open_texts("org/pairs:small", tokenizer=made_tokenizer())
    assert asked == [("org/pairs", "small")] and replay.meta["file"] == "hub:org/pairs:small (train_prefs)"


# -- the store ---------------------------------------------------------------------------------------------------------


def test_equal_texts_are_stored_once_in_the_smallest_type(tmp_path: Path) -> None:
    rows = [pair(), pair(rejected=" no"), pair(prompt="Hello"), pair(weight=1)]
    for row in rows:
        row.setdefault("weight", 2)
    replay = read(tmp_path, rows)
    assert replay.num_episodes == 5  # two prompts, three answers
    assert replay.steps["token"].dtype == np.uint16 and replay.tables["pairs"].dtype == np.int64
    assert replay.tables["pairs/weight"].tolist() == [2, 2, 2, 1]
    assert replay.meta["lengths"]["prompt"][-1] == replay.length[replay.tables["pairs"][:, 0]].max()
    shared = replay.tables["pairs"]
    assert (shared[:, 0] == shared[:, 2]).all()


def many(prompts: int, each: int = 2) -> Rows:
    return [pair(prompt=f"{p} + {p}?", rejected=f" {a + 1}1") for a in range(each) for p in range(prompts)]


def test_no_prompt_is_on_both_sides(tmp_path: Path) -> None:
    replay = read(tmp_path, many(40))
    train, held = split_by_prompt(replay, 0.2)
    assert held is not None and (len(train.tables["pairs"]), len(held.tables["pairs"])) == (64, 16)
    assert not {row[0] for row in decoded(train)} & {row[0] for row in decoded(held)}
    assert sorted(decoded(train) + decoded(held)) == sorted(decoded(replay))
    for part in (train, held):
        rows = part.tables["pairs/row"]
        assert decoded(part) == [decoded(replay)[row] for row in rows]
        assert set(part.tables["pairs"].ravel()) == set(range(part.num_episodes))
    _, again = split_by_prompt(read(tmp_path, many(50)), 0.2)
    lost = {row[0] for row in decoded(held)} - {row[0] for row in decoded(again)}  # type: ignore[arg-type]
    assert len(lost) <= 4  # prompts stay on their side when others come, but for the last places
    assert split_by_prompt(read(tmp_path, many(1)), 0.2)[1] is None
    assert len(split_by_prompt(read(tmp_path, many(2)), 0.01)[1].tables["pairs"]) == 2  # type: ignore[union-attr]


def test_the_data_module(tmp_path: Path) -> None:
    module = TextData(write(tmp_path, many(20)), eval_fraction=0.1)
    with pytest.raises(UsageError, match=r"no tokenizer is known for the texts.*--data.tokenizer DIR"):
        module.load()
    module.bind_tokenizer(made_tokenizer())
    module.prepare_data()
    module.setup("fit")
    replay = module.load()
    assert replay is module.replay and module.tokenizer is made_tokenizer()
    assert len(replay.tables["pairs"]) == 36 and len(module.eval_replay.tables["pairs"]) == 4  # type: ignore[union-attr]
    assert next(iter(module.train_dataloader())) == 0 and module.state_dict() == {"version": 0}
    assert module.change_every == 0 and module.options["eval_fraction"] == 0.1
    with pytest.raises(DataError, match=r"differs from .* of the policy"):
        module.bind_tokenizer(made_tokenizer("bpe"))
    whole = TextData(write(tmp_path, many(20)), eval_fraction=0.0)
    whole.bind_tokenizer(made_tokenizer())
    assert len(whole.load().tables["pairs"]) == 40 and whole.eval_replay is None
    assert TextData.of(replay).load() is replay
    for wrong in ({"eval_fraction": 1.0}, {"max_bad": 2.0}, {"show": -1}):
        with pytest.raises(UsageError, match="expected a value in"):
            TextData("a.jsonl", **wrong)  # type: ignore[arg-type]


def test_held_out_data_of_its_own(tmp_path: Path) -> None:
    rows = many(4)
    module = TextData(write(tmp_path, rows[:3]), eval_data=write(tmp_path, rows[2:], "held.jsonl"), separator=" ")
    module.bind_tokenizer(made_tokenizer())
    assert len(module.load().tables["pairs"]) == 3
    assert module.eval_replay is not None and len(module.eval_replay.tables["pairs"]) == 6
    overlap = "held-out rows with a prompt that is in the training data too: 4 of 6"
    assert overlap in module.eval_replay.meta["warnings"] and overlap not in module.replay.meta["warnings"]  # type: ignore[union-attr]


def test_a_converted_folder_needs_the_same_tokenizer(tmp_path: Path) -> None:
    made = read(tmp_path, many(5))
    made.save(tmp_path / "folder")
    made_tokenizer().save_pretrained(tmp_path / "tokenizer")
    module = TextData(str(tmp_path / "folder"), tokenizer=str(tmp_path / "tokenizer"), eval_fraction=0.0)
    assert module.load().fingerprint() == made.fingerprint()
    other = TextData(str(tmp_path / "folder"))
    other.bind_tokenizer(made_tokenizer("metaspace"))
    with pytest.raises(DataError, match=r"was tokenised with .* which differs from .* Convert the texts again"):
        other.load()


def test_what_a_person_is_shown(tmp_path: Path) -> None:
    replay = read(tmp_path, [pair(), {**pair(), "prompt": "Hello"}])
    shown = samples(replay, made_tokenizer(), 1)
    assert "pair 0 (row 0)" in shown and "pair 1" not in shown
    assert "<s>What is 2 + 2? ▶  It is 4</s>" in shown and "<s>What is 2 + 2? ▶  It is 8</s>" in shown
    chosen = replay.tables["pairs"][0, 1]
    first = replay.steps["token"][replay.start[chosen] :][: replay.length[chosen]][:5].tolist()
    assert f"▶ {first} …, {replay.length[chosen]} tokens scored" in shown
    text = report(replay)
    for words in ("2 pairs over 2 prompts, from 2 rows", "columns prompt, chosen, rejected", "median/95 %/largest"):
        assert words in text
    single = read(tmp_path, [S, {**S, "completion": " 5", "label": False}])
    assert "2 prompts with an answer (1 wanted, 1 unwanted)" in report(single)
    assert "single 0 (row 0)" in samples(single, made_tokenizer())


# -- the command line --------------------------------------------------------------------------------------------------


def test_show_and_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from offpolicy.data.__main__ import main

    file, out = write(tmp_path, many(3)), str(tmp_path / "out")
    made_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert main(["show", file]) == 0
    shown = capsys.readouterr().out
    assert "pairs: 6 rows give 6: preference pairs, plain text" in shown and "'0 + 0?' ▶ ' It is 4'" in shown
    assert main(["show", file, "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    assert "<s>0 + 0? ▶  It is 4</s>" in capsys.readouterr().out
    assert main(["convert", file, out]) == 2 and "Pass --tokenizer DIR" in capsys.readouterr().err
    assert main(["convert", file, out, "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    assert main(["show", out]) == 0 and "6 pairs over 3 prompts" in capsys.readouterr().out
    names = ["--columns", '{"prompt": "q"}', "--tokenizer", str(tmp_path / "tokenizer")]
    assert main(["show", file, *names]) == 3 and "no column 'q'" in capsys.readouterr().err
    assert main(["show", file, "--columns", "q"]) == 2 and "expected JSON" in capsys.readouterr().err


def test_show_and_convert_take_the_strategy_of_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three scored answers are one pair by the default, three pairs of all, and three answers without pairs."""
    from offpolicy.data.__main__ import main

    file = write(tmp_path, [{"prompt": "p", "completions": [" a", " b", " c"], "scores": [1.0, 2.0, 3.0]}] * 2)
    made_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for given, count in (([], 2), (["--pair_strategy", "all_pairs"], 6), (["--pair_strategy", "none"], 6)):
        assert main(["show", file, *given]) == 0 and f"2 rows give {count}" in capsys.readouterr().out
        page = ["--html", str(tmp_path / "page.html")]
        assert main(["show", file, *given, *page]) == 0 and f"  {count} of 2: " in capsys.readouterr().out
        out = str(tmp_path / f"out{len(given)}{given[-1:]}")
        assert main(["convert", file, out, "--tokenizer", str(tmp_path / "tokenizer"), *given]) == 0
        tables = Replay.load(out).tables
        assert len(tables["singles" if "none" in given else "pairs"]) == count
    assert main(["show", file, "--pair_strategy", "best"]) == 2 and "best_vs_worst" in capsys.readouterr().err
