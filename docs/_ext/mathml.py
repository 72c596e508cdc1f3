"""Formulas become MathML when the site is built, so that pages need no script and no network."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


def mathml(latex: str, node: nodes.Node, display: str) -> str:
    """The MathML of a formula. What cannot be converted is a warning, which ends a build with ``-W``."""
    try:
        made = convert(latex.strip(), display=display)
    except Exception as error:  # latex2mathml has errors of many kinds
        logger.warning("formula that is no LaTeX: %s (%s)", latex, error, location=node)
        return f"<code>{nodes.unescape(latex)}</code>"
    if "\\" in made:
        logger.warning("formula with a command that MathML does not know: %s", latex, location=node)
    return made


def inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(mathml(node.astext(), node, "inline"))
    raise nodes.SkipNode


def block(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="formula">{mathml(node.astext(), node, "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
