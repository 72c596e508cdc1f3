"""Every command and every Python block of the README and of each page of docs/ runs, in order, in an empty folder (with
fewer updates)."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from commands import run_commands
from scripts import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?P<skip><!-- not run:[^\n]*-->\n)?```(?P<kind>bash|python)\n(?P<text>.*?)```", re.DOTALL)
SHORT = ["--trainer.max_steps", "8", "--run.eval_every", "4", "--run.eval_episodes", "1"]


def blocks(page: Path) -> list[tuple[str, str]]:
    found = BLOCK.finditer(page.read_text())
    return [(m["kind"], m["text"]) for m in found if not m["skip"]]


def commands(text: str) -> list[list[str]]:
    """The `python` commands of a shell block; installing and pytest are what runs this test."""
    words = [shlex.split(part, comments=True) for line in text.splitlines() for part in line.split("&&")]
    return [w for w in words if w and w[0] == "python"]


def is_short(command: list[str]) -> bool:
    """Whether the command itself asks for few updates or iterations."""
    limits = {"--trainer.max_steps": 12, "--model.iterations": 3}
    return any(o in command and int(command[command.index(o) + 1]) <= most for o, most in limits.items())


def test_the_two_set_up_commands_are_what_ci_relies_on() -> None:
    text = (ROOT / "README.md").read_text()
    assert "pip install -e . && python -m offpolicy.fit\n" in text
    assert "pip install -e '.[test]' && pytest -n auto --dist loadgroup\n" in text
    assert "pip install --quiet --disable-pip-version-check -e '.[test]'" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_commands_and_code_run(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if page.stem == "README":
        request.getfixturevalue("drawn")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    todo = []
    for kind, text in blocks(page):
        for command in [["-c", text]] if kind == "python" else [words[1:] for words in commands(text)]:
            train = command[:2] == ["-m", "offpolicy.fit"] and not is_short(command)
            longer = ["--trainer.max_steps", "12"] if train and "--ckpt_path" in command else []
            todo.append([*command, *SHORT, *longer] if train else command)
    assert len(todo) >= (8 if page.stem == "README" else 1)
    run_commands(todo, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_headings(page: Path) -> None:
    """Every relative link leads to a file and a heading that exist; no page has two headings of one name."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    own = anchors(page)
    assert len(own) == len(set(own))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def anchors(page: Path) -> list[str]:
    """The headings of a page as links name them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
