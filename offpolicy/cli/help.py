"""Help made from what options are: the fields, arguments and docstrings of classes and functions.

Nothing here is a copy of a default, so that no number can be out of date.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

WIDTH = 118


class Option(NamedTuple):
    """An option as its class or function has it.

    Attributes:
        name: of the argument or field.
        default: its value when nobody gives one; ``inspect.Parameter.empty`` for one that has to be given.
        text: what the docstring says of it.
    """

    name: str
    default: Any
    text: str


def documented(*objects: Any) -> dict[str, str]:
    """What the "Args" of docstrings say, by name; the first object that speaks of a name counts."""
    found: dict[str, str] = {}
    for one in objects:
        doc = inspect.cleandoc(one.__doc__ or "")
        section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", doc, re.M | re.S)
        for name, text in re.findall(r"^    (\w+): (.*?)(?=^    \S|\Z)", section[1] if section else "", re.M | re.S):
            found.setdefault(name, " ".join(text.split()))
    return found


def options_of(thing: Any, instead: Mapping[str, Any] | None = None) -> list[Option]:
    """The options of a class or function, with the options that ``**kwargs`` of a class stand for.

    Args:
        thing: a class, a dataclass or a function.
        instead: defaults that take the place of its own.
    """
    classes = [c for c in thing.__mro__ if "__init__" in vars(c)] if isinstance(thing, type) else [thing]
    parameters: dict[str, inspect.Parameter] = {}
    for one in classes:
        signature = inspect.signature(one).parameters
        parameters = {**parameters, **{n: p for n, p in signature.items() if n not in parameters}}
        if not any(p.kind is p.VAR_KEYWORD for p in signature.values()):
            break
    texts = documented(*classes)
    return [
        Option(name, (instead or {}).get(name, p.default), texts.get(name, ""))
        for name, p in parameters.items()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]


def option_lines(group: str, options: Iterable[Option], *, short: bool = False) -> list[str]:
    """Lines for each option: its name on the command line, what it is, and its default in brackets.

    Args:
        group: of the options, as ``run`` in ``--run.eval_every``.
        options: in the order in which they are shown.
        short: the first clause alone, which is one line.
    """
    lines = []
    for name, default, text in options:
        head = f"  --{group}.{name}"
        text = re.sub(r":\w+:`([^`]*)`|``", r"\1", text)
        text = re.split(r"[,;.] |\.$", text)[0] if short else text
        shown = "to be given" if default is inspect.Parameter.empty else default
        lines += textwrap.wrap(
            f"{head:<30} {text} ({shown})", WIDTH, subsequent_indent=" " * 31, break_on_hyphens=False,
            break_long_words=False,
        )  # fmt: skip
    return lines
