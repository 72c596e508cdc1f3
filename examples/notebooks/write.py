"""Write the scripts of this folder as Jupyter notebooks: each ``# %%`` begins a cell, and its words stand above it.

usage: python examples/notebooks/write.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NAMES = ("control", "preference", "rl")


def cells(text: str) -> list[dict[str, Any]]:
    """The cells of a script: its docstring, then for each part the words and the code."""
    head, *parts = text.split("\n# %% ")
    made = [cell("markdown", head.strip().strip('"'))]
    for part in parts:
        lines = part.split("\n")
        words = [lines.pop(0)]
        while lines and lines[0].startswith("# "):
            words.append(lines.pop(0)[2:])
        made += [
            cell("markdown", " ".join(words)),
            cell("code", "\n".join(lines).replace("  # noqa: E402", "").strip()),
        ]
    return made


def cell(kind: str, text: str) -> dict[str, Any]:
    more: dict[str, Any] = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True), **more}


def notebook(text: str) -> dict[str, Any]:
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells(text), "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (out / f"{name}.ipynb").write_text(json.dumps(notebook((HERE / f"{name}.py").read_text()), indent=1))
        print(out / f"{name}.ipynb")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
