"""Messages and help lead to headings that exist, and the page of errors quotes messages that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scripts import ROOT

from offpolicy.cli.entry import say
from offpolicy.cli.pages import DOCS, TOPICS, page_for
from offpolicy.data.__main__ import main as data_command

FAQ = (ROOT / "docs" / "faq.md").read_text()
QUOTED = dict(re.findall(r"^### (.+)\n\n> `(.+)`$", FAQ, re.M))  # heading → part of a message


def test_frequent_errors_are_the_messages_of_the_code() -> None:
    code = "".join(path.read_text() for path in (ROOT / "offpolicy").rglob("*.py") if path.name != "pages.py")
    assert len(QUOTED) >= 20
    assert not [part for part in QUOTED.values() if part not in code]


def test_links_of_messages_are_headings_of_the_page() -> None:
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-"): part for title, part in QUOTED.items()}
    assert {topic: anchors.get(topic) for topic in TOPICS.values()} == {topic: part for part, topic in TOPICS.items()}


def test_an_error_ends_with_its_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert say("runs/a is being trained by process 7", 2) == 2
    assert capsys.readouterr().err.splitlines()[1] == f"More: {DOCS}faq.md#trained-by-another-process"
    say("something else", 2)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert page_for("no message") == ""


def test_the_commands_of_data_say_the_page_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "robot.csv").write_text("x,push,reward\n0,1,2\n")
    assert data_command(["show", str(tmp_path / "robot.csv")]) == 3
    assert capsys.readouterr().err.splitlines()[1] == f"More: {DOCS}faq.md#steps-in-a-csv-file"


def test_the_remedy_that_a_message_names_works_in_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1", "good": "2", "bad": "3"}\n')
    assert data_command(["show", str(rows)]) == 3
    assert "--data.columns" in capsys.readouterr().err
    columns = '{"prompt": "question", "chosen": "good", "rejected": "bad"}'
    assert data_command(["show", str(rows), "--data.columns", columns]) == 0
    assert data_command(["show", str(rows), f"--data.columns={columns}"]) == 0
    assert "1 rows give 1" in capsys.readouterr().out
    assert data_command(["show", str(rows), "--data.colums", columns]) == 2
