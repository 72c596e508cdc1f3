"""Messages: how the turns of any source are read, what makes two of them the same, and conversations kept as text.

A turn keeps every key that its source gives it, since a chat template may write any of them. Keys without a value are
absent, and arguments of tool calls are objects whether the source has them as objects or as JSON text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any, cast

from offpolicy.data.texts.rendering import Message, Text, lone_surrogate

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}
ROLES |= {"observation": "tool", "function_response": "tool"}
BOOKKEEPING = frozenset(  # keys of a turn that say something about it and are never part of its text
    {"id", "message_id", "msg_id", "uuid", "index", "timestamp", "created", "created_at", "create_time", "updated_at"}
    | {"time", "date", "weight", "loss", "mask", "train", "trainable", "token_count", "num_tokens"}
)
NUMPY = re.compile(r"\s*(array\(\s*)?\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:")  # str() of an array of turns


class Fault(Exception):
    """A row that cannot be trained on: column, kind and what was found."""


class WrongType(Exception):
    """A value that no row may have: what it is, what was expected and what to do."""


# -- reading -----------------------------------------------------------------------------------------------------------


def kind_of(value: Any) -> str:
    """'text', 'chat' (messages, or one message), 'none', or the name of another type."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return "text"
    messages = [value] if isinstance(value, Mapping) else value
    if isinstance(messages, list) and all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in messages):
        return "chat"
    return f"{type(value).__name__} {shorten(value)}"


def read_text(value: Any, name: str) -> Text:
    """Text as it is, or messages with our keys; ``name`` is the column, for errors.

    Raises:
        Fault: nothing is there, or a turn without role or content.
        WrongType: a turn whose content is no text.
    """
    if value is None:
        raise Fault(name, "none", "None")
    if isinstance(value, str):
        return value
    return [message(m, name) for m in ([value] if isinstance(value, Mapping) else value)]


def read_prompt(value: Any, name: str, *, chat: bool, system: Any = None) -> Text:
    """A prompt: text, or with ``chat`` the turns up to the answer; a ``system`` message goes before them.

    Raises:
        Fault: it is empty, or its last turn is the assistant's.
        WrongType: a turn whose content is no text.
    """
    prompt = read_text(value, name)
    if not prompt:
        raise Fault(name, "no_prompt", prompt)
    if not chat:
        return prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system:
        turns = [{"role": "system", "content": str(system)}, *turns]
    if turns[-1]["role"] == "assistant":
        raise Fault(name, "last_prompt_role", turns[-1])
    return turns


def message(raw: Mapping[str, Any], name: str) -> Message:
    """A turn with ``role`` and ``content`` as text, and its other keys that have a value."""
    turn = {k: v for k, v in raw.items() if v is not None and k not in ("from", "value", "tool_calls")}
    if calls := _calls(raw.get("tool_calls"), name):
        turn["tool_calls"] = calls
    role = next((raw[k] for k in ("role", "from") if raw.get(k) is not None), None)
    content = next((raw[k] for k in ("content", "value") if raw.get(k) is not None), None)
    if role is None or (content is None and not calls and "function_call" not in turn):
        raise Fault(name, "none", dict(raw))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise WrongType(f"`{name}` has a message with {shorten(content)}; expected text. Images are not read.")
        content = "".join(cast(list[str], parts))
    if content is not None and not isinstance(content, str):
        raise WrongType(f"`{name}` has a message with {shorten(content)} as content; expected text. Convert it.")
    role = str(role).lower()
    if role == "function_call" and isinstance(call := _of_json(content or ""), dict) and "name" in call:
        return turn | {
            "role": "assistant",
            "content": "",
            "tool_calls": _calls({"type": "function", "function": call}, name),
        }
    return turn | {"role": ROLES.get(role, role), "content": content or ""}


def _calls(value: Any, name: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects."""
    value = _of_json(value) if isinstance(value, str) and value.strip() else value
    calls = [value] if isinstance(value, Mapping) else value or []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise WrongType(f"`{name}` has the tool calls {shorten(value)}; expected a list of objects. Convert them.")
    return [_call(call) for call in calls]


def _call(raw: Mapping[str, Any]) -> dict[str, Any]:
    call = {k: v for k, v in raw.items() if v is not None}
    if isinstance(call.get("function"), Mapping):
        call["function"] = _call(call["function"])
    if isinstance(call.get("arguments"), str) and isinstance(found := _of_json(call["arguments"]), dict):
        call["arguments"] = found
    return call


def _of_json(text: str) -> Any:
    """What a JSON text says, or None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def check_characters(text: Text | None, name: str) -> None:
    """Raise :class:`Fault` where a text holds half of a surrogate pair, which no tokenizer takes."""
    for part in [text] if isinstance(text, str) else [turn["content"] for turn in text or []]:
        if found := lone_surrogate(part):
            raise Fault(name, "surrogate", found)


# -- comparing ---------------------------------------------------------------------------------------------------------


def turn_key(turn: Message) -> tuple[str, str, str]:
    """What two turns must have in common to be the same: role, content, and all else that a template may write."""
    return *said(turn), _rest(turn)


def said(turn: Message) -> tuple[str, str]:
    """Who says what."""
    return turn["role"], turn["content"].strip()


def _rest(turn: Message) -> str:
    if len(turn) == 2:  # nothing but role and content, as mostly
        return ""
    others = {k: v.strip() if isinstance(v, str) else v for k, v in turn.items() if k not in ("role", "content")}
    kept = {k: v for k, v in others.items() if k not in BOOKKEEPING and v not in ("", [], {}, None)}
    return json.dumps(kept, sort_keys=True, default=str) if kept else ""


def differing_keys(a: Message, b: Message) -> dict[str, list[Any]]:
    """The keys beside role and content in which two turns differ, with both values."""
    names = [k for k in {**a, **b} if k not in ("role", "content", *BOOKKEEPING) and a.get(k) != b.get(k)]
    return {k: [a.get(k), b.get(k)] for k in names}


def same(a: Text, b: Text) -> bool:
    """Whether two answers say the same, white space at their ends aside."""
    if isinstance(a, str) or isinstance(b, str):
        return isinstance(a, str) and isinstance(b, str) and a.strip() == b.strip()
    return [*map(turn_key, a)] == [*map(turn_key, b)]


def blank(text: Text) -> bool:
    """Whether a text, or the turns of an answer, say nothing."""
    if isinstance(text, str):
        return not text.strip()
    return all(not m["content"].strip() and not m.get("tool_calls") and not m.get("function_call") for m in text)


# -- conversations kept as text ----------------------------------------------------------------------------------------


def unpack(values: list[Any], name: str) -> tuple[list[Any], str]:
    """A column in which conversations stand as JSON, or as Python writes lists, with its messages read.

    Args:
        values: the column.
        name: its name, for words and errors.

    Returns:
        The column, and a sentence for the person: what was read, or which rows were not, as most of them are text.
        Empty where there is nothing to say.

    Raises:
        WrongType: most rows are conversations that NumPy printed, which cannot be read back.
    """
    texts = [(row, value) for row, value in enumerate(values) if isinstance(value, str) and value.strip()]
    suspects = [(row, value) for row, value in texts if value.lstrip()[:1] in ("[", "{", "a")]
    read = {row: turns for row, value in suspects if (turns := _conversation(value)) is not None}
    found = sum(turns != [] for turns in read.values())
    if not found:
        printed = [row for row, value in suspects if NUMPY.match(value)]
        if 2 * len(printed) > len(texts):
            raise WrongType(
                f"`{name}` holds conversations as Python or NumPy prints them (row {printed[0]}: "
                f"{shorten(values[printed[0]])}), which cannot be read back; expected messages. Write them with "
                "json.dumps, or keep the data as Parquet or JSON lines."
            )
        return values, ""
    if 2 * len(read) <= len(texts):
        return values, (
            f"rows whose `{name}` is a conversation written as text, taken as plain text since most rows are: {found:,}"
        )
    values = [read.get(row, value) for row, value in enumerate(values)]
    return values, f"`{name}` holds conversations written as text (JSON); they were read as messages: {found:,}"


def _conversation(text: str) -> list[Any] | None:
    """The messages that a text is in JSON or in Python's notation, [] for an empty list; None for any other text."""
    found = _of_json(text)
    if found is None and text.lstrip()[:2] in ("[{", "{'", "[]") and "'" in text:
        try:
            found = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    turns = [found] if isinstance(found, Mapping) else found
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) and _is_turn(turn) for turn in turns):
        return None
    return turns


def _is_turn(value: Mapping[str, Any]) -> bool:
    """Whether an object is a message beyond doubt, and no other JSON that a text may hold."""
    if isinstance(value.get("role"), str):
        return "content" in value or "tool_calls" in value
    return isinstance(value.get("from"), str) and "value" in value


def unpack_lists(values: list[Any]) -> list[Any]:
    """A column of lists; a list that stands as JSON text, as in CSV files, is read."""

    def read(value: Any) -> Any:
        found = _of_json(value) if isinstance(value, str) else None
        return found if isinstance(found, list) else value

    return [read(value) for value in values]


def shorten(value: Any) -> str:
    """A value in at most 60 characters, for messages."""
    text = " ".join((value if isinstance(value, str) else repr(value)).split())
    text = repr(text) if isinstance(value, str) and value != "None" else text
    return text if len(text) <= 60 else text[:57] + "…"
