"""Values of single columns: prompts, answers, numbers, and what rows say to the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, cast

from offpolicy.data.texts.formats.source import Source
from offpolicy.data.texts.messages import Fault, WrongType, blank, read_prompt, shorten, turn_key, unpack_lists
from offpolicy.data.texts.rendering import Message, Text
from offpolicy.errors import DataError
from offpolicy.given import LARGEST

NUMBERS = ("score_chosen", "score_rejected", "weight", "agreement")


def typed_column(source: Source, ours: str, theirs: str) -> list[Any]:
    """A column, with lists that stand as text read, and numbers too where all values are text."""
    values = source.column(theirs)
    if ours in ("completions", "scores"):
        return unpack_lists(values)
    if source.text_only and ours in (*NUMBERS, "label"):
        return [_number(value) for value in values]
    return values


def _number(text: Any) -> Any:
    """The number or truth value that a text is; None for no text, and other text as it is."""
    words = {"true": True, "false": False, "": None}
    plain = str(text).strip().lower()
    if plain in words:
        return words[plain]
    try:
        return float(plain)
    except ValueError:
        return text


def prompt_in(values: Mapping[str, Any], name: str, chat: bool) -> Text:
    """The prompt in the column ``name``; with ``chat`` as turns, after the system message of the row."""
    return read_prompt(values[name], name, chat=chat, system=values.get("system"))


def checked_answer(prompt: Text, answer: Text, name: str, chat: bool, apart: bool) -> Text:
    """An answer that is one: text, or with ``chat`` turns that the assistant ends.

    Args:
        prompt: what it answers.
        answer: as read.
        name: of the column.
        chat: whether rows are messages.
        apart: whether the prompt stands in a column of its own, so that an answer that begins with it repeats it.

    Raises:
        Fault: it says nothing, repeats the prompt, holds turns of others, or says that it is not learned from.
    """
    if not chat:
        if blank(answer):
            raise Fault(name, "empty", answer)
        return answer
    turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    if not turns or blank(turns[-1:]):
        raise Fault(name, "empty", turns)
    asked = cast(list[Message], prompt)
    if apart and [*map(turn_key, turns[: len(asked)])] == [*map(turn_key, asked)]:
        raise Fault(name, "repeated", turns[0])
    if turns[-1]["role"] != "assistant":
        raise Fault(name, "last_role", turns[-1])
    if any(m["role"] in ("user", "system") for m in turns):
        raise Fault(name, "other_turn", turns)
    if marked := next((m for m in turns if m["role"] == "assistant" and left_out(m)), None):
        raise Fault(name, "left_out", marked)
    return turns


def left_out(turn: Message) -> bool:
    """Whether a turn says of itself that it is not learned from, or not as the others are."""
    return turn.get("weight", 1) != 1 or any(turn.get(name) is False for name in ("loss", "train", "trainable"))


def as_number(value: Any) -> float | None:
    """A finite number, which columns can keep as float32; None for anything else."""
    value = float(value) if isinstance(value, Decimal) else value
    return float(value) if isinstance(value, int | float) and abs(value) <= LARGEST else None


def numbers_in(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """The numbers in the columns, as far as these are there. Raises :class:`Fault` for a value that is no number."""
    facts = {}
    for name in names:
        if name not in values:
            continue
        value = as_number(values[name])
        if value is None:
            raise Fault(name, "nan", "None" if values[name] is None else values[name])
        if name == "weight" and value < 0:
            raise Fault(name, "negative", value)
        if name == "agreement" and not 0 <= value <= 1:
            raise Fault(name, "share", value)
        facts[name] = value
    return facts


def label_of(value: Any, column: str) -> float:
    """Whether an answer is wanted, 1 or 0; ``column`` is the source's, for messages."""
    if value is None:
        raise Fault("label", "label", "None")
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise DataError(
            f"`{column}` holds {shorten(value)}; expected true for a wanted and false for an unwanted "
            "answer. Convert the column."
        )
    return float(value)


def template_options(values: Mapping[str, Any], row: int) -> dict[str, Any]:
    """What a row says to the chat template: tools, and arguments of its own."""
    options = _object(values.get("chat_template_kwargs"), "chat_template_kwargs", row)
    if options and not isinstance(options, Mapping):
        raise WrongType(f"`chat_template_kwargs` is {shorten(options)}; expected an object. Correct it.")
    result = {k: v for k, v in (options or {}).items() if v is not None}
    tools = _object(values.get("tools"), "tools", row)
    tools = [tools] if isinstance(tools, Mapping) else tools
    if tools and not isinstance(tools, list):
        raise WrongType(f"`tools` is {shorten(tools)}; expected a list of objects. Correct it.")
    if tools:
        result["tools"] = [_object(tool, "tools", row) for tool in tools]
    return result


def _object(value: Any, name: str, row: int) -> Any:
    """A value that may stand as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise DataError(f"`{name}` of row {row} is {shorten(value)}; expected JSON. Correct it.") from None
