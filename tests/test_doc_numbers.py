"""Numbers of the README and of docs/ name the commands that make them, and docs/reproduce.md lists these commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scripts import ROOT

MADE = {"api", "methods", "objectives"}  # folders of pages that the site makes from the code
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.parent.name not in MADE)]
TABLE = re.compile(r"(?:^\|.*\|\n)+", re.MULTILINE)
NUMBER = re.compile(r"[*~−-]?\d")
COMMAND = re.compile(r"python (?:-m offpolicy|examples/|tests/)")
SCRIPT = re.compile(r"(?:python|bash) ((?:examples|tests)/\S+\.(?:py|sh))")


def is_of_numbers(table: str) -> bool:
    """Whether most cells beside the first column and below the head begin with a number."""
    cells = [cell.strip() for row in table.splitlines()[2:] for cell in re.split(r"(?<!\\)\|", row)[2:-1]]
    filled = [cell for cell in cells if cell]
    return len(filled) > 0 and sum(bool(NUMBER.match(cell)) for cell in filled) > 0.6 * len(filled)


def sections_of_tables(text: str) -> list[tuple[str, str]]:
    """Each table of numbers with what its section says before it."""
    found = []
    for table in TABLE.finditer(text):
        if is_of_numbers(table[0]):
            before = text[: table.start()]
            found.append((table[0].splitlines()[0], re.split(r"^#+ ", before, flags=re.MULTILINE)[-1]))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_of_numbers_name_their_command(page: Path) -> None:
    for head, before in sections_of_tables(page.read_text()):
        assert COMMAND.search(before), f"{page.name}: the section says no command before the table {head}"


def test_scripts_that_are_named_exist_and_those_of_results_can_be_repeated() -> None:
    listed = (ROOT / "docs" / "reproduce.md").read_text()
    for page in PAGES:
        text = page.read_text()
        for script in SCRIPT.findall(text):
            assert (ROOT / script).is_file(), f"{page.name} names {script}, which is not there"
        for _, before in sections_of_tables(text):
            missing = [script for script in SCRIPT.findall(before) if script not in listed]
            assert not missing, f"docs/reproduce.md does not list {missing}, which {page.name} names"


def test_a_table_of_numbers_is_told_from_one_of_words() -> None:
    numbers = "| a | b |\n|---|---|\n| x | 1.5 ± 0.1 |\n| y | −3 |\n"
    words = "| a | b | c |\n|---|---|---|\n| x | 5 | a number |\n| y | | none |\n"
    assert sections_of_tables("## One\n`python examples/a.py`\n## Two\n" + numbers) == [("| a | b |", "Two\n")]
    assert not sections_of_tables(words)
