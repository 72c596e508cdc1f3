"""What users give as options, in whatever clothes it comes: NumPy numbers, whole floats, paths with a tilde.

Nothing heavy is imported here, not even NumPy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from offpolicy.errors import UsageError

MAX_SEED = 2**63 - 1  # what torch and our own generator take
HALF = ("16", "16-mixed", "16-true", "float16", "fp16", "half", "transformer-engine-float16")
TEXTS = ("separator", "template")  # options whose value is text of a user's data: it may be empty or begin with a tilde


def plain(value: Any) -> Any:
    """A NumPy number, or an array or tensor of no dimension, as Python's own number; anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def as_whole(value: Any) -> Any:
    """A number without a fraction as an int (np.int64(3), 4.0); anything else as it is."""
    value = plain(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def whole(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """A whole number that the user gave as ``name``.

    Raises:
        UsageError: it has a fraction, is no number, or is not in ``low … high``.
    """
    found = as_whole(value)
    if not isinstance(found, int) or isinstance(found, bool):
        raise UsageError(f"`{name}` is {value!r}; expected a whole number.")
    if (low is not None and found < low) or (high is not None and found > high):
        limit = f"at least {low}" if high is None else f"a whole number in [{low}, {high}]"
        raise UsageError(f"`{name}` is {found}; expected {limit}. Change it or leave it out.")
    return found


def seed_number(value: Any, name: str = "seed") -> int:
    """A seed, in [0, 2⁶³). Raises :class:`UsageError`."""
    return whole(name, value, 0, MAX_SEED)


def is_whole_type(annotation: Any) -> bool:
    """Whether an option written with this type takes whole numbers: ``int`` or ``int | None``."""
    if annotation is int:
        return True
    return str(annotation).replace("typing.", "").replace(" ", "").strip("'") in ("int", "int|None", "Optional[int]")


def tidy(options: MutableMapping[str, Any], types: Mapping[str, Any]) -> None:
    """Make numbers Python's own and whole where an option's type asks for it, and expand tildes, in place."""
    for name, value in list(options.items()):
        kind = str(types.get(name, "")).replace(" ", "").strip("'")
        found = as_whole(value) if is_whole_type(types.get(name, "")) else plain(value)
        if isinstance(found, (list, tuple)):
            each = as_whole if kind.startswith(("tuple[int", "list[int")) else plain
            found = type(found)(map(each, found)) if type(found) in (list, tuple) else found
        if isinstance(found, str) and name not in TEXTS:
            found = expanded(found)
        if found is not value:
            options[name] = found


def whole_fields(options: Any, group: str) -> None:
    """Make the fields for whole numbers ints, in whatever form they were given. Raises :class:`UsageError`."""
    for field in fields(options):
        value = getattr(options, field.name)
        if is_whole_type(field.type) and value is not None:
            object.__setattr__(options, field.name, whole(f"{group}.{field.name}", value))


def refuse_half(precision: Any) -> None:
    """Answer float16, under any of its names, in which small gradients become 0 and nothing here scales the loss.

    Raises:
        UsageError: it is asked for.
    """
    if str(plain(precision)).removeprefix("torch.").lower() in HALF:
        raise UsageError(
            f"precision '{precision}' needs loss scaling, which methods do not do; use 'bf16-mixed' or '32-true'."
        )


def expanded(text: str) -> str:
    """``~/folder`` and ``~name/folder`` as paths; other texts, and homes of nobody, as they are."""
    return os.path.expanduser(text) if text.startswith("~") else text


def place(name: str, value: str | os.PathLike[str]) -> Path:
    """The path that the user gave as ``name``, with its tilde expanded.

    Raises:
        UsageError: it is empty (an unset variable of the shell would mean the folder at hand), or no path.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise UsageError(f"`{name}` is {value!r}; expected a path.")
    text = os.fspath(value)
    if not text.strip():
        raise UsageError(f"`{name}` is empty; expected a path. Pass one, or leave it out.")
    return Path(expanded(text))


def refuse_empty(argv: Iterable[str]) -> None:
    """Answer ``--name=`` and empty words on a command line, which unset variables of the shell leave.

    Raises:
        UsageError: there is one.
    """
    before = ""
    for word in argv:
        name, equals, value = word.partition("=")
        empty = not word.strip() or (word.startswith("--") and bool(equals) and not value.strip())
        option = name if word.startswith("--") else before
        if empty and option.replace("-", "_").rpartition(".")[2].strip("_") not in TEXTS:
            named = f"{option} has no value" if option else "an argument is empty"
            raise UsageError(f"{named}; expected a value. Pass one, or leave the option out.")
        before = word if word.startswith("--") and not equals else ""
