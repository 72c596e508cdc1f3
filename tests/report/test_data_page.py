"""The page of a data set: what is measured, what is warned of, and that any kind of data gives one."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_data import walks
from made_tokenizers import made_tokenizer

from offpolicy.data import survey as surveys
from offpolicy.data.__main__ import main
from offpolicy.data.names import resolve
from offpolicy.data.replay import Replay
from offpolicy.data.survey import survey
from offpolicy.data.texts.survey import survey_texts, unlike

HOSTILE = "<script>alert(1)</script>"


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Words(HTMLParser):
    """The text of a page, and whether anything in it looks outside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.scripts, self.outside = "", 0, False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.outside |= any(
            name in ("src", "href", "xlink:href") and not str(value).startswith("#") for name, value in attrs
        )

    def handle_data(self, data: str) -> None:
        self.words += data


def page_of(path: Path) -> str:
    found = Words(path.read_text())
    assert found.scripts == 1 and not found.outside  # our own script, and no file or address
    return found.words


def show(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["show", *arguments])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


# -- control -----------------------------------------------------------------------------------------------------------


def test_steps_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten episodes of four steps on a line, the second a copy of the first; half of the actions lie on a bound."""
    obs = np.stack([np.repeat(np.arange(10.0), 4), np.zeros(40)], 1).astype(np.float32)
    obs[4:8] = obs[:4]
    action = np.tile(np.float32([2.0, -2.0, 0.5, 0.25]), 10)[:, None]
    terminated = np.zeros(40, bool)
    terminated[7] = True
    data = Replay(
        {"obs": obs, "action": action, "reward": np.ones(40, np.float32), "terminated": terminated},
        episode_end=np.arange(40) % 4 == 3,
        meta={"action_low": [-2.0], "action_high": [2.0], "max_episode_steps": 3},
    )
    found = survey(data)
    assert found.on_low is not None and found.on_high is not None and found.coverage is not None
    assert found.on_low.tolist() == [0.25] and found.on_high.tolist() == [0.25]
    assert found.repeated_episodes == 1 and found.repeated_rows == 4 and found.constant == [1]
    assert found.terminated.tolist() == [i == 1 for i in range(10)]
    # the moving column has its own scale: neighbours are one step of the line away, copies are none
    spread = float(np.std(obs[:, 0], dtype=np.float64))
    assert sorted({round(float(x) * spread, 3) for x in found.coverage.nearest}) == [0.0, 1.0]
    for words in ("50% of the values of action 0", "1 of 10 episodes repeat", "never change: 1", "is 1, which tells",
                  "The data have 10 episodes", "4 steps, and the environment allows 3"):  # fmt: skip
        assert any(words in one for one in found.doubts), words
    del data.steps["reward"]
    assert any("There are no rewards" in one for one in survey(data).doubts)
    monkeypatch.setattr(surveys, "ROWS", 12)  # of large data some episodes, spread over all
    some = survey(data)
    assert (some.episodes, some.rows, len(some.length)) == (3, 12, 10)


def test_a_page_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("walk.npz", **walks(60, terminated=np.arange(60) % 6 == 5))
    others = {"reward": np.zeros(40), "action": np.arange(40) % 3, "episode_end": np.arange(40) % 8 == 7}
    np.savez("moves.npz", **walks(40, **others))
    code, out = show(capsys, "walk.npz", "--html")
    assert code == 0 and "page         walk-data.html" in out
    words = page_of(tmp_path / "walk-data.html")
    for wanted in ("10 episodes were ended by their environment", "All 60 steps of 10 episodes", "on the lowest",
                   "to the nearest of 60 that belongs to another episode", "The two axes hold"):  # fmt: skip
        assert wanted in words, wanted
    assert show(capsys, "moves.npz", "--html", f"{HOSTILE[:8]}.html")[0] == 0
    words = page_of(tmp_path / f"{HOSTILE[:8]}.html")
    assert "Every reward looked at is 0" in words and "35.00%" in words  # of three actions, 14 of 40 times the first


# -- texts -------------------------------------------------------------------------------------------------------------


def test_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """40 pairs of which the longer answer is preferred, one twice and one turned round; prompts of two parts."""
    rows = [{"prompt": f"Question {i}?", "chosen": f" yes {i} indeed", "rejected": f" no {i}"} for i in range(40)]
    rows += [rows[0], {"prompt": "Question 1?", "chosen": " no 1", "rejected": " yes 1 indeed"}]
    rows += [
        {"prompt": HOSTILE, "chosen": " a" * 40, "rejected": " b"},
        {"prompt": "x", "chosen": "", "rejected": " b"},
    ]
    lines(tmp_path / "data" / "train.jsonl", rows)
    lines(tmp_path / "data" / "test.jsonl", [*rows[2:4], {"prompt": "new", "chosen": " a", "rejected": " b"}])
    found = survey_texts(resolve(tmp_path / "data"), tokenizer=made_tokenizer(), max_length=60)
    assert found.kind == "pairs" and found.unit == "tokens" and (found.rows, found.kept) == (44, 43)
    assert found.longer == (42, 43) and found.overlap == {"test": 2} and found.beyond == 1
    assert found.counts["rows that repeat an earlier one"] == 1
    assert found.counts["pairs that another one contradicts"] == 1
    for words in ("longer answer is preferred in 98% of the 43", "1 rows repeat", "prefer what another pair",
                  "in test too", "more than 60 tokens", "1 of 44 rows would be dropped"):  # fmt: skip
        assert any(words in one.replace("1 of 43 rows repeat", "1 rows repeat") for one in found.doubts), words
    code, out = show(capsys, str(tmp_path / "data"), "--html", str(tmp_path / "pairs.html"))
    assert code == 0 and "warning      The longer answer" in out
    words = page_of(tmp_path / "pairs.html")
    assert "Characters, before anything is cut." in words and "pass --tokenizer DIR" in words
    assert re.search(r"2 of 43", words) and "the columns do not say" in words


def test_lists_singles_and_stored_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lists = [{"prompt": f"p{i}", "completions": ["a b", "c d", "e f"], "scores": [3, 1, 2]} for i in range(40)]
    found = survey_texts(resolve(lines(tmp_path / "lists.jsonl", lists)))
    assert found.first is not None and found.first.tolist() == [40, 0, 0]
    assert any("at place 1 of 3 in 100% of the lists; by chance it would be 33%" in one for one in found.doubts)
    singles = [{"prompt": f"p{i}", "completion": f"say {i}", "label": i < 3} for i in range(30)]
    path = lines(tmp_path / "singles.jsonl", singles)
    found = survey_texts(resolve(path))
    assert (found.kind, found.wanted) == ("singles", 3) and any("3 of 30 answers are wanted" in x for x in found.doubts)
    made_tokenizer().save_pretrained(tmp_path / "tokenizer")
    tokenizer = str(tmp_path / "tokenizer")
    assert main(["convert", str(path), str(tmp_path / "stored"), "--tokenizer", tokenizer]) == 0
    assert show(capsys, str(tmp_path / "stored"), "--html", str(tmp_path / "stored.html"))[0] == 0
    words = page_of(tmp_path / "stored.html")
    assert "3 of 30 answers are wanted" in words and "more than the 1,024 tokens" in words
    assert unlike(20, 30, 0.5) is False and unlike(25, 30, 0.5) and not unlike(9, 10, 0.5)  # too near, far, too few


def test_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Problems of a file: one without an answer, one twice, and one that the held-out file has too."""
    rows = [{"question": f"What is {i}+1?", "answer": str(i + 1)} for i in range(9)]
    path = lines(tmp_path / "problems.jsonl", [*rows, rows[0], {"question": "Why?", "answer": None}])
    held = lines(tmp_path / "held.jsonl", [rows[4], {"question": "Else?", "answer": "1"}])
    found = survey_texts(resolve(path), eval_data=str(held))
    assert found.kind == "problems" and found.unanswered == 1 and found.overlap == {str(held): 1}
    assert show(capsys, str(path), "--html", str(tmp_path / "p.html"), "--eval_data", str(held))[0] == 0
    words = page_of(tmp_path / "p.html")
    for wanted in ("1 of 11 rows have no right answer", "1 of 10 rows repeat", "512 tokens of a prompt fit"):
        assert wanted in words, wanted
    code, out = show(capsys, str(path), "--eval_data", str(held))
    assert code == 2 and "expected texts and --html" in out
    code, out = show(capsys, str(path), "--html", str(path / "inside.html"))
    assert code == 3 and "Choose a folder you may write to" in out and "Traceback" not in out
