"""The three notebooks run as scripts, and the notebooks written from them hold the same code."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
from commands import run_commands
from scripts import ROOT

FOLDER = ROOT / "examples" / "notebooks"
NAMES = ("control", "preference", "rl")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebooks_run(name: str, tmp_path: Path) -> None:
    """They stand anywhere: what they import of the examples is found by the library's place."""
    shutil.copy(FOLDER / f"{name}.py", tmp_path)
    run_commands([[str(tmp_path / f"{name}.py")]], tmp_path)


def test_notebooks_hold_the_code_of_the_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import write

    write.main(tmp_path)
    for name in NAMES:
        cells = json.loads((tmp_path / f"{name}.ipynb").read_text())["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        script = ast.parse((FOLDER / f"{name}.py").read_text())
        assert ast.dump(ast.parse(code)) == ast.dump(ast.Module(script.body[1:], []))  # all but the docstring
        assert cells[0]["cell_type"] == "markdown" and len(cells) >= 9
