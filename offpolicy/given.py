"""What users give as options, in whatever clothes it comes: NumPy numbers, whole floats, paths with a tilde.

Nothing heavy is imported here, not even NumPy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

from offpolicy.errors import UsageError

LARGEST = 3.4028234e38  # number of float32, in which what users give is kept
MAX_SEED = 2**63 - 1  # what torch and our own generator take
MOST_SEEDS = 10_000  # of one run, so that a misspelt range is answered
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


def seed_numbers(value: Any, name: str = "seeds") -> tuple[int, ...]:
    """Several seeds, in the order in which they were given.

    Args:
        value: text such as "0..7" (both ends), "0,3,5" or "0..3,7"; one number, or numbers to go through.

    Raises:
        UsageError: one is no whole number in [0, 2⁶³), stands there twice, or a range has its larger end first.
    """
    shown = value if isinstance(value, (str, range)) or not isinstance(value, Iterable) else tuple(value)
    items = _in_text(shown, name) if isinstance(shown, str) else shown if isinstance(shown, Iterable) else (shown,)
    items = tuple(islice(map(as_whole, items), MOST_SEEDS + 1))
    if len(items) > MOST_SEEDS:
        raise UsageError(f"`{name}` is {shown!r}; expected at most {MOST_SEEDS:,} seeds. Start several runs.")
    wrong = not items or any(not isinstance(one, int) or isinstance(one, bool) or one < 0 for one in items)
    if wrong or len(set(items)) < len(items):
        twice = next((one for i, one in enumerate(items) if one in items[:i]), None)
        found = f"{shown!r}" + ("" if wrong else f", which has {twice} twice")
        raise UsageError(f"`{name}` is {found}; expected whole numbers ≥ 0, each once, such as 0..7 or 0,3,5.")
    return tuple(seed_number(one, name) for one in items)


def _in_text(text: str, name: str) -> Iterator[Any]:
    """The numbers of "0..3,7"; whatever is none is given back as it is."""
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*\.\.\s*(\d+)\s*", part)
        if ends is None:
            yield int(part) if part.strip().isdecimal() else part
        elif int(ends[1]) > int(ends[2]):
            raise UsageError(
                f"`{name}` is {text!r}, and the range {part.strip()} is empty; expected the smaller number first, as "
                f"in {ends[2]}..{ends[1]}."
            )
        else:
            yield from range(int(ends[1]), int(ends[2]) + 1)


def seeds_text(seeds: Iterable[int]) -> str:
    """Seeds as :func:`seed_numbers` reads them: (0, 1, 2, 7) is "0..2,7"."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ",".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


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
