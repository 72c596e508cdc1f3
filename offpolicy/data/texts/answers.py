"""Right answers and demonstrations of problems, as the sources write them."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from offpolicy.data.texts.messages import Fault, WrongType, kind_of, read_text, said
from offpolicy.data.texts.numbers import last_mark
from offpolicy.data.texts.rendering import Message, Text

OR = "\x1e"  # between right answers of which each is right, in the one text that a table holds
PRINTED = re.compile(r"\s*(?:[\[{]\s*'|array\(\[)")  # str() of a list, an object or an array
HOLDERS = ("target", "targets", "answer", "answers", "golden_answers", "value", "text", "aliases")


# -- right answers -----------------------------------------------------------------------------------------------------


def right_answers(value: Any, column: str) -> list[str]:
    """The right answers in a value, each of which is right; [] for none.

    Text and numbers are an answer, lists are alternatives, and objects hold theirs as ``ground_truth``, or under the
    one key they have (:data:`HOLDERS`); objects and lists of texts may stand as text, in JSON or as Python prints them.

    Args:
        value: of a row.
        column: where it stands, for errors.

    Raises:
        Fault: of another kind, such as an object without a right answer.
    """
    if value is None or value != value:
        return []
    if isinstance(value, str):
        found = _unpacked(value, column)
        if found is None and column == "reward_model" and value.lstrip()[:1] == "{":
            raise Fault(column, "answer_kind", value)
        if isinstance(found, Mapping) and (column == "reward_model" or _holder(found)):
            return right_answers(found, column)
        if isinstance(found, list) and found and all(isinstance(one, str) for one in found):
            return right_answers(found, column)
        return [value.replace(OR, " ").strip()]
    if isinstance(value, Mapping) and (key := _holder(value)):
        return right_answers(value[key], column)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        if any(not isinstance(one, str | int | float | Decimal | None) for one in value):
            raise Fault(column, "answer_kind", value)
        return list(dict.fromkeys(text for one in value for text in right_answers(one, column) if text))
    finite = isinstance(value, int) or (isinstance(value, float | Decimal) and math.isfinite(value))
    if isinstance(value, bool) or not finite:
        raise Fault(column, "answer_kind", value)
    return [str(value)]


def _holder(value: Mapping[str, Any]) -> str | None:
    """The key of an object under which its right answer stands."""
    known = [key for key, one in value.items() if one is not None]
    if "ground_truth" in known:
        return "ground_truth"
    return known[0] if len(known) == 1 and known[0] in HOLDERS else None


def _unpacked(text: str, column: str) -> Any:
    """What a text holds as JSON, or as Python prints it; None for any other text."""
    if text.lstrip()[:1] not in ("{", "[", "a"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if not PRINTED.match(text):
        return None
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise Fault(column, "answer_kind", text) from None


def joined_answers(answers: Iterable[str]) -> str:
    """Right answers as one text; "" for none."""
    return OR.join(answers)


def alternatives(reference: str | Sequence[str] | None) -> list[str]:
    """The right answers that a text of :func:`joined_answers` holds; [] for None."""
    if reference is None:
        return []
    return reference.split(OR) if isinstance(reference, str) else list(reference)


def after_mark(text: str) -> str | None:
    """What a solution marks as the answer, after ``####`` or in its last box."""
    mark = last_mark(text)
    return mark.content.strip() or None if mark is not None and mark.whole else None


# -- demonstrations ----------------------------------------------------------------------------------------------------


def demonstration(value: Any, column: str, prompt: Text | None) -> str | None:
    """The text of a demonstration: plain, or what the assistant says after the prompt in a conversation.

    Args:
        value: of a row.
        column: where it stands, for errors.
        prompt: of the row, None where that is faulty itself.

    Raises:
        Fault: the conversation does not end with the assistant, or is about something else.
        WrongType: it is neither text nor a conversation.
    """
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if kind_of(value) not in ("text", "chat"):
        raise WrongType(
            f"`{column}` holds {kind_of(value)}; expected a demonstration, as text or messages. Convert it, or leave "
            "it out with --data.columns '{\"solution\": null}'."
        )
    text = read_text(value, column)
    if not isinstance(text, str):
        text = _said_last(text, column, prompt)
    elif isinstance(prompt, str) and len(prompt.strip()) >= 16 and text.lstrip().startswith(prompt.strip()):
        raise Fault(column, "repeated", text)
    return without_annotations(text) if text.strip() else None


def _said_last(turns: list[Message], column: str, prompt: Text | None) -> str:
    if not turns:
        return ""
    if turns[-1]["role"] != "assistant":
        raise Fault(column, "last_role", turns[-1])
    first = max((i + 1 for i, turn in enumerate(turns) if turn["role"] != "assistant"), default=0)
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    before, known = ([said(turn) for turn in some if turn["role"] != "system"] for some in (turns[:first], asked))
    if prompt is not None and before != known[len(known) - len(before) :]:
        raise Fault(column, "other_question", turns[max(0, first - 1)])
    return "\n".join(turn["content"] for turn in turns[first:])


def without_annotations(solution: str) -> str:
    """A GSM8K solution without its calculator annotations ``<<…>>``."""
    return re.sub(r"<<[^<>]*>>", "", solution)
