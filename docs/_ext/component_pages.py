"""Pages of the policy-gradient objective: its components by slot, and the published variants made of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import rst
from docstrings import escape_docstring, escaped
from method_pages import shown

from offpolicy.cli.help import options_of
from offpolicy.losses import policy_gradient
from offpolicy.losses.components import COMPONENTS
from offpolicy.losses.variants import VARIANTS
from offpolicy.losses.variants.choosing import spec_words


def pages() -> dict[str, str]:
    """File name → page."""
    slots = {slot: slot_page(slot, components) for slot, components in COMPONENTS.items() if components}
    return slots | {"index": index(list(slots)), "variants": variants()}


def slot_page(slot: str, components: dict[str, Callable[..., Any]]) -> str:
    parts = [rst.heading(f"Components of {slot}", "=")]
    for name, thing in components.items():
        words = inspect.cleandoc(thing.__doc__ or "").partition("\nArgs:")[0].partition("\nAttributes:")[0]
        rows = [
            [f"``{one.name}``", f"``{shown(one.default)}``", escaped(one.text)]
            for one in options_of(thing)
            if one.name != "self"
        ]
        parts += [rst.heading(name, "-"), rst.prose(words)]
        parts += [rst.table(["parameter", "default", "meaning"], rows)] if rows else []
    return "\n".join(parts)


def index(slots: list[str]) -> str:
    rows = [[f":doc:`{slot} <{slot}>`", ", ".join(f"``{name}``" for name in COMPONENTS[slot])] for slot in slots]
    lines = inspect.cleandoc(policy_gradient.__doc__ or "").split("\n")
    escape_docstring(None, "module", "", policy_gradient, None, lines)
    parts = [
        rst.heading("The policy-gradient objective", "="),
        "\n".join(lines),
        "",
        rst.table(["slot", "components"], rows),
        f":doc:`Published variants <variants>`: {len(VARIANTS)} choices of components, ``--model.variant NAME``.\n",
        ".. toctree::\n   :hidden:\n\n   variants\n" + "".join(f"   {slot}\n" for slot in slots),
    ]
    return "\n".join(parts)


def variants() -> str:
    rows = []
    for one in VARIANTS.values():
        paper = (
            f"`{one.paper} <https://arxiv.org/abs/{one.paper}>`__" if one.paper[:4].isdigit() else escaped(one.paper)
        )
        parts = ", ".join(f"{slot} ``{spec_words(spec) or 'none'}``" for slot, spec in one.parts.items())
        told = "; ".join(part for part in (one.differs, one.unverified and f"unverified: {one.unverified}") if part)
        rows.append(
            [f"``{one.name}``", escaped(one.title), paper, escaped(one.formula), parts, one.tested, escaped(told)]
        )
    head = ["name", "title", "paper", "what differs from GRPO", "components", "tested by", "paper, code and doubts"]
    return "\n".join(
        [
            rst.heading("Published variants", "="),
            "``--model.variant NAME`` of GRPO takes these components. ``hand`` stands for known answers by the "
            "formula, ``code`` for the authors' code.\n",
            rst.table(head, rows),
        ]
    )
