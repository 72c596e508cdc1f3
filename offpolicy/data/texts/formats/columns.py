"""Columns of texts: their names here and in the source, and the one type of their values."""

from __future__ import annotations

from offpolicy.data.texts.formats.faults import listing
from offpolicy.data.texts.formats.source import Source
from offpolicy.data.texts.messages import kind_of, shorten, unpack_lists
from offpolicy.errors import DataError, UsageError, nearest

NAMES = (
    *("prompt", "chosen", "rejected", "completion", "label", "messages", "completions", "scores"),
    *("score_chosen", "score_rejected", "weight", "system", "tools", "chat_template_kwargs"),
    *("prompt_chosen", "prompt_rejected", "agreement"),
)
WORDS = {"text": "text", "chat": "messages"}  # a type of values, in messages


def named_columns(source: Source, columns: dict[str, str | None]) -> dict[str, str]:
    """Our name → the source's, of the columns that are there."""
    for ours, theirs in columns.items():
        if ours not in NAMES:
            turned = f' The other way round: \'{{"{theirs}": "{ours}"}}\'.' if theirs in NAMES else ""
            raise UsageError(
                f"`columns` names '{ours}'; expected our names as keys: {', '.join(NAMES)}."
                f"{turned or nearest(ours, NAMES)}"
            )
        if theirs is not None and theirs not in source.names:
            raise DataError(
                f"{source.where} has no column '{theirs}', which `columns` gives as {ours}; it has "
                f"{listing(source.names)}.{nearest(theirs, source.names)}"
            )
    plain = {n: n for n in NAMES if n in source.names and n != "system" and n not in columns.values()}
    if "scores" not in source.names and "ratings" in source.names:
        plain["scores"] = "ratings"
    for ours, other in (("prompt_chosen", "chosen_prompt"), ("prompt_rejected", "rejected_prompt")):
        if ours not in source.names and other in source.names:
            plain[ours] = other
    return {ours: theirs for ours, theirs in {**plain, **columns}.items() if theirs is not None}


def missing_column(source: Source, name: str) -> str:
    """The message about a column that is not there."""
    close = suggestion(source, name) or f' Say which column it is: --data.columns \'{{"{name}": "…"}}\'.'
    return f"{source.where} has no column '{name}'; found {listing(source.names)}.{close}"


def suggestion(source: Source, name: str) -> str:
    """A suggestion for the column that is probably meant."""
    free = [n for n in source.names if n not in NAMES]
    part = [n for n in free if name in n.lower()]
    guess = part[0] if part else nearest(name, free).partition("'")[2].partition("'")[0]
    return f" If it is '{guess}', pass --data.columns '{{\"{name}\": \"{guess}\"}}'." if guess in free else ""


def scan(source: Source, name: str) -> str:
    """The one type of a column, "text" or "chat".

    Raises:
        DataError: it holds another type, or both.
    """
    first: dict[str, int] = {}
    for row, value in enumerate(source.column(name)):
        first.setdefault(kind_of(value), row)
    return _one_kind(source, name, first)


def scan_lists(source: Source, name: str) -> str:
    """The one type of the values in a column of lists; raises as :func:`scan`."""
    first: dict[str, int] = {}
    for row, values in enumerate(unpack_lists(source.column(name))):
        if values is not None and not isinstance(values, list):
            raise DataError(
                f"{source.where}: `{name}` holds {shorten(values)} in row {row}; expected a list of answers there."
            )
        for value in values or []:
            first.setdefault(kind_of(value), row)
    return _one_kind(source, name, first)


def _one_kind(source: Source, name: str, first: dict[str, int]) -> str:
    kinds = {kind: row for kind, row in first.items() if kind != "none"}
    for kind, row in kinds.items():
        if kind not in WORDS:
            raise DataError(
                f"{source.where}: `{name}` holds {kind} in row {row}; expected text, or messages such as "
                '{"role": "user", "content": "…"}. Convert the column.'
            )
    if len(kinds) > 1:
        raise DataError(
            f"{source.where}: `{name}` holds text in row {kinds['text']} and messages in row {kinds['chat']}; expected "
            "one of them in all rows. Convert the column."
        )
    return next(iter(kinds), "text")
