"""Text of others in files of ours: HTML, CSV and LaTeX in which names of runs and folders are nothing but names."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "–": "--",
    "τ": r"$\tau$",
}
LONG = 90  # letters of a cell that is broken into lines
FORMULA = ("=", "+", "-", "@")  # what a cell begins with that a spreadsheet computes


class Markup(str):
    """HTML that was made here; every other text is escaped."""


def escaped(part: Any) -> Markup:
    """Text as HTML; markup stays as it is."""
    if isinstance(part, Markup):
        return part
    return Markup(html.escape("" if part is None else str(part).encode(errors="replace").decode()))


def tag(name: str, *parts: Any, **attributes: Any) -> Markup:
    """An HTML element: its parts, which are escaped unless they are markup, and attributes, ``class_`` for class."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{''.join(map(escaped, parts))}</{name}>")


def html_table(head: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str = "") -> Markup:
    """A table whose columns can be sorted; a cell may be a pair of what is shown and the number it is sorted by."""
    body = []
    for row in rows:
        cells = []
        for i, cell in enumerate(row):
            shown, key = cell if isinstance(cell, tuple) else (cell, None)
            named = {"scope": "row"} if i == 0 else {"class_": "long" if len(str(shown)) > LONG else None}
            cells.append(tag("th" if i == 0 else "td", shown, data_key=key, **named))
        body.append(tag("tr", *cells))
    heads = tag("tr", *(tag("th", one, scope="col") for one in head))
    table = tag("table", tag("thead", heads), tag("tbody", *body), class_="sortable")
    told = tag("p", caption, class_="soft") if caption else Markup("")  # outside of what scrolls
    return Markup(told + tag("div", table, class_="wide"))


def csv_cell(value: Any) -> Any:
    """A value as a cell; text that a spreadsheet would compute begins with an apostrophe."""
    if isinstance(value, str):
        value = " ".join(value.encode(errors="replace").decode().splitlines())
        return f"'{value}" if value.lstrip().startswith(FORMULA) or value.startswith("\t") else value
    return value


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, columns as in the first row."""
    buffer = io.StringIO()
    if rows:
        writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
    return buffer.getvalue()


def latex_text(value: Any) -> str:
    """Text as LaTeX shows it, whatever signs it has."""
    return "".join(LATEX.get(sign, sign) for sign in str(value).encode(errors="replace").decode() if sign.isprintable())


def latex_table(head: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str, below: Iterable[str] = ()) -> str:
    """A table for the package booktabs; a cell ending in an asterisk, among the best of its row, is bold."""

    def cell(value: Any) -> str:
        text = str(value)
        return rf"\textbf{{{latex_text(text[:-1])}}}" if text.endswith("*") else latex_text(text)

    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        rf"\caption{{{latex_text(caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        " & ".join(map(latex_text, head)) + r" \\",
        r"\midrule",
        *(" & ".join(map(cell, row)) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"% {latex_text(note)}" for note in below),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"
