"""Docstrings are plain text with ``literals`` and roles; what reStructuredText would take for markup is escaped."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

KEPT = re.compile(r"``.*?``|(?::[\w:]+:)?`[^`]*`|https?://\S+", re.DOTALL)
MARKUP = re.compile(r"[*|\\]|(?<=[\w)\]])_(?=[^\w]|$)")
RULE = re.compile(r"^\s*[=-]{3,}[=\s-]*$")


def escaped(text: str) -> str:
    """The text as reStructuredText that shows it as it stands; literals, roles and tables keep their meaning."""
    parts, at = [], 0
    for kept in KEPT.finditer(text):
        parts += [MARKUP.sub(r"\\\g<0>", text[at : kept.start()]), kept[0]]
        at = kept.end()
    return "".join([*parts, MARKUP.sub(r"\\\g<0>", text[at:])])


def escape_docstring(app: Sphinx | None, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    if any(RULE.match(line) for line in lines):  # a table, whose columns have to stay where they are
        lines[:] = [re.sub(r"(?<![*\w])[*](?=[,\w])", "∗", line) for line in lines]
    else:
        lines[:] = escaped("\n".join(lines)).split("\n")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", escape_docstring, priority=100)  # before napoleon makes fields of it
    return {"parallel_read_safe": True, "parallel_write_safe": True}
