"""Verifiers: functions that score an answer to a prompt, some of them by an answer that is known to be right.

A verifier is called as ``verifier(prompt, answer, reference)`` with texts, ``reference`` None where the data have
none, and returns a number, or None where it cannot judge.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from offpolicy.errors import UsageError, nearest

Verifier = Callable[[str, str, str | None], float | None]


def final_number(prompt: str, answer: str, reference: str | None) -> float | None:
    """1 where the number after the last ``####`` equals that of the reference, else 0 (GSM8K, arXiv:2110.14168).

    None without a reference, or when the reference has no such number.
    """
    expected = read_final_number(reference or "")
    return None if expected is None else float(read_final_number(answer) == expected)


def read_final_number(text: str) -> Decimal | None:
    """The number after the last ``####`` of a text: ``#### 1,234.50`` is 1234.5. None when there is none."""
    found = re.findall(r"####\s*(?:[$€£]\s*)?([-+−]?\s*[$€£]?\s*[\d,]*\.?\d+)", text)
    if not found:
        return None
    try:
        return Decimal(re.sub(r"[,\s$€£]", "", found[-1]).replace("−", "-"))
    except InvalidOperation:
        return None


VERIFIERS: dict[str, Verifier] = {"final_number": final_number}


def resolve_verifier(name: str) -> Verifier:
    """A verifier by name, or a function of the user by import path ``package.module.function``.

    Raises:
        UsageError: there is none.
    """
    if name in VERIFIERS:
        return VERIFIERS[name]
    module, _, attribute = name.replace(":", ".").rpartition(".")
    if not module:
        raise UsageError(
            f"no verifier is called '{name}'; expected one of {', '.join(VERIFIERS)}, or an import path "
            f"package.module.function.{nearest(name, VERIFIERS)}"
        )
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise
        raise UsageError(
            f"`verifier` is '{name}', but there is no module '{error.name}' in this folder or on the Python path; "
            "expected package.module.function. Run from the folder that holds it, or install it."
        ) from None
    except AttributeError:
        raise UsageError(f"`verifier` is '{name}', but {module} has no '{attribute}'; expected a function.") from None
    if not callable(found):
        raise UsageError(f"`verifier` is '{name}', a {type(found).__name__}; expected a function.")
    return found


def choose_verifier(references: list[str | None]) -> Verifier | None:
    """The verifier that fits the references of a data set: ``final_number`` when all have one, else None."""
    return final_number if references and all(read_final_number(r or "") is not None for r in references) else None
