"""The format of a source, decided from its columns and the types in all its rows."""

from __future__ import annotations

from collections.abc import Mapping

from offpolicy.data.raw import IN_A_TABLE
from offpolicy.data.texts.formats.columns import (
    NAMES,
    WORDS,
    missing_column,
    named_columns,
    scan,
    scan_lists,
    suggestion,
)
from offpolicy.data.texts.formats.faults import listing
from offpolicy.data.texts.formats.form import AnswerKind, Format, PromptStyle, Seen
from offpolicy.data.texts.formats.kinds import KINDS
from offpolicy.data.texts.formats.prompts import STYLES
from offpolicy.data.texts.formats.source import Source
from offpolicy.errors import DataError, UsageError

TEXTS = ("prompt", "prompt_chosen", "prompt_rejected", "chosen", "rejected", "completion", "messages")
TEMPLATE = ("system", "tools", "chat_template_kwargs")  # what a row may say to the chat template
EXPECTED = "chosen and rejected (pairs), completions and scores (lists), completion (single answers) or messages"


def detect(source: Source, columns: Mapping[str, str | None] | None = None) -> Format:
    """Decide the format from the columns and the types in all rows.

    Args:
        source: the rows.
        columns: our name → the source's name where they differ, None for a column to leave out.

    Raises:
        UsageError: ``columns`` names something unknown.
        DataError: a column is missing, or holds values of a wrong or of different types.
    """
    found = named_columns(source, dict(columns or {}))
    types = {ours: scan(source, found[ours]) for ours in TEXTS if ours in found}
    kind = _kind(source, found)
    if kind.name == "lists":
        types["completions"] = scan_lists(source, found["completions"])
    style = _style_of_answers(source, found, types, kind)
    prompt = _prompt_style(Seen(source, found, types, kind, style))
    if style == "text" and any(types.get(name) == "chat" for name in prompt.columns):
        style = "chat"  # answers in plain text become turns of the assistant
    if "system" in found:
        if not prompt.columns:
            raise UsageError("`columns` names a system message, but there is no prompt column it could go before.")
        style = "chat"
    used = {*prompt.columns, *kind.answers, *kind.numbers} & found.keys()
    used |= {*TEMPLATE} & found.keys() if style == "chat" else set()
    taken = {ours: found[ours] for ours in NAMES if ours in used}
    return Format(kind, style, prompt, taken, [name for name in source.names if name not in taken.values()])


def _kind(source: Source, found: Mapping[str, str]) -> AnswerKind:
    """The kind of answers, whose columns are all there."""
    kind = next((one for one in KINDS if one.fits(found)), None)
    if kind is None and _holds_numbers_alone(source):
        raise DataError(
            f"{source.where} has the columns {listing(source.names)}, all of numbers; expected texts. {IN_A_TABLE}"
        )
    if kind is None:
        raise DataError(
            f"{source.where} has the columns {listing(source.names)}; expected {EXPECTED}."
            f"{suggestion(source, EXPECTED)} "
            'Rename the columns, or say which they are, as in --data.columns \'{"chosen": "better"}\'.'
        )
    for name in kind.answers:
        if name not in found:
            raise DataError(missing_column(source, name))
    return kind


def _holds_numbers_alone(source: Source) -> bool:
    """Whether the first row has a number in every column, as text too."""
    firsts = [next(iter(source.column(name)), None) for name in source.names]
    return bool(firsts) and all(_is_number(value) for value in firsts)


def _is_number(value: object) -> bool:
    if not isinstance(value, str):
        return isinstance(value, (int, float))
    try:
        float(value)
    except ValueError:
        return False
    return True


def _style_of_answers(source: Source, found: Mapping[str, str], types: Mapping[str, str], kind: AnswerKind) -> str:
    """The one type of all answers."""
    names = [name for name in kind.answers if name in types]
    if len({types[name] for name in names}) > 1:
        first, second = kind.answers
        raise DataError(
            f"{source.where}: `{found[first]}` holds {WORDS[types[first]]} and `{found[second]}` "
            f"{WORDS[types[second]]}; expected the same in both. Write both the same way."
        )
    if kind.answers == ("messages",) and types["messages"] == "text":
        raise DataError(f"{source.where}: `{found['messages']}` holds text; expected a list of messages.")
    return types[names[0]]


def _prompt_style(seen: Seen) -> PromptStyle:
    prompt = next((one for one in STYLES if one.fits(seen)), None)
    if prompt is None:
        raise DataError(missing_column(seen.source, "prompt"))
    return prompt
