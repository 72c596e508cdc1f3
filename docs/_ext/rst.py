"""The few forms of reStructuredText that made pages have."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from itertools import groupby

from docstrings import escaped

FORMULA = re.compile(r"[=·Σ∇∈]|\blog\b|‖")
LABEL = re.compile(r"(L|J|A|V|loss|[A-Z][\w⁰-ₜ, ()-]{1,40}:)(\s|$)")


def heading(text: str, mark: str) -> str:
    return f"{text}\n{mark * (2 * len(text))}\n"  # some letters are wider than others


def code(text: str) -> str:
    """A block that is shown as it stands."""
    return ".. code-block:: text\n\n" + textwrap.indent(textwrap.dedent(text), "   ") + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], widths: str = "auto") -> str:
    """A table of cells, each of them reStructuredText on one line."""
    lines = [".. list-table::", "   :header-rows: 1", f"   :widths: {widths}", ""]
    for row in (head, *rows):
        lines += [f"   {'* -' if at == 0 else '  -'} {cell or ' '}" for at, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def piped_table(block: str) -> str:
    """A table whose columns are set apart by ``|``; a row without a first cell goes on with the one above."""
    rows: list[list[str]] = []
    for line in block.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if set("".join(cells)) <= {"-"} and rows and len(rows) == 1:
            continue
        if not cells[0] and rows:
            rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], cells, strict=True)]
        else:
            rows.append(cells)
    head, *body = [[escaped(cell) for cell in row] for row in rows]
    return table(head, body)


def is_formula(block: str) -> bool:
    """Whether a block of a docstring is made of equations, which keep their lines."""
    lines = block.splitlines()
    if all(line.startswith("  ") for line in lines):
        return True
    return bool(LABEL.match(lines[0]) and FORMULA.search(block) and sum(bool(LABEL.match(one)) for one in lines) > 1)


def prose(docstring: str) -> str:
    """A docstring as reStructuredText: paragraphs, equations as code, tables and lists."""
    return "\n\n".join(part for block in re.split(r"\n\s*\n", docstring.strip("\n")) for part in shown(block)) + "\n"


def shown(block: str) -> list[str]:
    """A block between empty lines; where indented lines follow or precede others, each kind by itself."""
    first = block.lstrip()
    if first.startswith("|"):
        return [piped_table(block)]
    if first.startswith("==="):
        return [textwrap.dedent(block)]
    if first.startswith("- "):
        return [escaped(textwrap.dedent(block))]
    if is_formula(block):
        return [code(block)]
    runs = ["\n".join(lines) for _, lines in groupby(block.splitlines(), lambda line: line.startswith("  "))]
    return [escaped(block)] if len(runs) == 1 else [part for run in runs for part in shown(run)]
