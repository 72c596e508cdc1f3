"""What ``--model.help objective`` and ``--model.help variants`` print: parts of an objective, and published choices."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable

WIDTH = 118
TOPICS = ("objective", "variants")


def topic_text(topic: str) -> str:
    """The page of a topic of ``TOPICS``."""
    return {"objective": objective_text, "variants": variants_text}[topic]()


def objective_text() -> str:
    """The parts of the policy-gradient objective by slot, each with the first sentence of what it says of itself."""
    from offpolicy.losses.components import COMPONENTS

    lines = ["The slots of --model.objective '{SLOT: NAME}', or '{SLOT: {name: NAME, PARAMETER: …}}':"]
    for slot, known in COMPONENTS.items():
        lines += ["", f"{slot}"]
        lines += _listed((name, first_sentence(kind) + _parameters(kind)) for name, kind in known.items())
    lines += ["", "A part may be an import path package.module.callable of your own.", _DOCS]
    return "\n".join(lines) + "\n"


def variants_text() -> str:
    """Published variants, each with its paper and what it changes."""
    from offpolicy.losses.variants import VARIANTS

    def told(paper: str) -> str:
        return f"arXiv:{paper}" if paper[:1].isdigit() else paper

    own, methods = ([row for row in VARIANTS.values() if bool(row.method) is other] for other in (False, True))
    lines = ["Variants of GRPO, --model.variant NAME:", ""]
    lines += _listed((row.name, f"{row.title} ({told(row.paper)}): {row.formula}") for row in own)
    lines += ["", "Methods of their own, --model NAME:", ""] if methods else []
    lines += _listed((row.method, f"{row.title} ({told(row.paper)}): {row.formula}") for row in methods)
    return "\n".join([*lines, "", _DOCS]) + "\n"


_DOCS = "Papers, defaults, what was checked against what: docs/objective.md"


def first_sentence(kind: Callable[..., object]) -> str:
    """The first sentence of a docstring, on one line."""
    text = " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=[.])\s(?=[A-Z(])", text)[0].rstrip(".")


def _parameters(kind: Callable[..., object]) -> str:
    names = [name for name in inspect.signature(kind).parameters if name != "self"]
    return f" [{', '.join(names)}]" if names else ""


def _listed(rows: Iterable[tuple[str, str]]) -> list[str]:
    found = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, WIDTH - 20, break_on_hyphens=False) or [""]
        found.append(f"  {name:<17} {wrapped[0]}")
        found += [" " * 20 + line for line in wrapped[1:]]
    return found
