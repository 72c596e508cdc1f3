"""Rows as text: plain text as it stands, conversations as the chat template of the tokenizer writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from offpolicy.data.texts.tool_turns import TOOL_ROLES, Message, Place, tool_places, tool_runs
from offpolicy.errors import DataError

Text = str | list[Message]  # plain text, or a conversation


@dataclass
class Row:
    """A prompt with the answers to it, all plain text or all messages; ``template`` goes to the chat template."""

    prompt: Text
    answers: Sequence[Text]
    template: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Rendered:
    """A row as text: the prompt, the prompt with each answer, and where in these the tools speak."""

    prompt: str = ""
    answers: list[str] = field(default_factory=list)
    tools: list[list[Place]] = field(default_factory=list)
    fault: str = ""
    where: str = "answers"
    found: str = ""

    def all(self) -> list[str]:
        """Every text of which tokens are wanted."""
        parts = [text[:at] for text, places in zip(self.answers, self.tools) for place in places for at in place]
        return [self.prompt, *self.answers, *parts]


def render(row: Row, tokenizer: Any) -> Rendered:
    """The texts of a row, or why there are none."""
    found = _plain(row) if isinstance(row.prompt, str) else _written(row, tokenizer)
    for number, text in enumerate([] if found.fault else [found.prompt, *found.answers]):
        if broken := lone_surrogate(text):
            return Rendered(fault="surrogate", where="answers" if number else "prompt", found=broken)
    return found


def _plain(row: Row) -> Rendered:
    prompt, answers = cast(str, row.prompt), cast(Sequence[str], row.answers)
    return Rendered(prompt, [prompt + answer for answer in answers])


def _written(row: Row, tokenizer: Any) -> Rendered:
    """A conversation as the chat template writes it, or what the template says against it."""
    if not tokenizer.chat_template:
        raise DataError(
            f"the data are messages and the tokenizer {tokenizer.name_or_path} has no chat template; expected one that "
            "says how turns are written. Use the tokenizer of a chat model, or pass plain text."
        )
    prompt: list[Message] = row.prompt  # type: ignore[assignment]
    answers = [_ended(answer, tokenizer.eos_token or "") for answer in row.answers]  # type: ignore[arg-type]
    write = _writer([*prompt, *(turn for answer in answers for turn in answer)], row.template, tokenizer)
    try:
        found = Rendered(write(prompt, add_generation_prompt=True), [write([*prompt, *one]) for one in answers])
    except Exception as error:  # templates raise their own errors, and any of Python
        said = " ".join(str(error).split())[:200] or type(error).__name__
        return Rendered(fault="template", found=said)
    if any(next(tool_runs(answer), None) for answer in answers):
        try:
            found.tools = [tool_places(write, prompt, one, text) for one, text in zip(answers, found.answers)]
        except Exception:  # a template may refuse a conversation that ends with a call or a tool
            first = next(turn for answer in answers for turn in answer if turn["role"] in TOOL_ROLES)
            return Rendered(fault="tool_turns", found=str(first))
    return found


def _ended(answer: list[Message], eos: str) -> list[Message]:
    """An answer without EOS at the end of its last turn, which the template writes."""
    last = answer[-1]
    if eos and last["content"].endswith(eos):
        last = {**last, "content": last["content"].removesuffix(eos)}
    return [*answer[:-1], last]


def _writer(turns: Iterable[Message], template: Mapping[str, Any], tokenizer: Any) -> Callable[..., str]:
    """What writes turns as text; arguments of calls as the chat template wants them in a row that has calls."""
    calls = any(isinstance(turn, dict) and turn.get("tool_calls") for turn in turns)
    as_text = calls and _writes_calls(tokenizer, bool(template.get("tools"))) == "text"

    def write(messages: Sequence[Message], **options: Any) -> str:
        messages = [_with_text_arguments(m) for m in messages] if as_text else list(messages)
        return tokenizer.apply_chat_template(messages, tokenize=False, **template, **options)

    return write


# What a chat template does with tool calls, by template and whether there are tools: it writes their arguments given as
# an "object" or as "text" (JSON), or "nothing" of them.
_CALLS: dict[tuple[str, bool], str] = {}
CALLS = ("tool_calls", "function_call", "tool_call_id", "reasoning_content")  # keys of turns that templates may write


def written(tokenizer: Any, names: Iterable[str]) -> set[str]:
    """The names among these, of keys of turns and of template options, that the chat template uses."""
    source = str(tokenizer.chat_template)
    found = {name for name in names if re.search(rf"\b{name}\b", source)}
    return found - {"tool_calls"} if "tool_calls" in found and _writes_calls(tokenizer, False) == "nothing" else found


def _writes_calls(tokenizer: Any, tools: bool) -> str:
    """Which arguments of tool calls the chat template wants, found by having it write a call."""
    key = str(tokenizer.chat_template), tools
    if key not in _CALLS:
        as_object, as_text = (_probe(tokenizer, given, tools) for given in ({"key_": "value_"}, '{"key_": "value_"}'))
        if "value_" in as_object and "{'key_'" not in as_object:
            _CALLS[key] = "object"
        elif "value_" in as_text and '\\"key_' not in as_text:
            _CALLS[key] = "text"
        else:
            _CALLS[key] = "nothing" if as_object and "name_" not in as_object else "object"
    return _CALLS[key]


def _probe(tokenizer: Any, arguments: Any, tools: bool) -> str:
    """A conversation with a call as the chat template writes it; "" where it refuses."""
    function = {"name": "name_", "arguments": arguments}
    call = {"id": "a1b2c3d4e", "type": "function", "function": function}  # nine letters, as some templates ask for
    known = {"type": "function", "function": {"name": "other", "description": "", "parameters": {}}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **({"tools": [known]} if tools else {}))
    except Exception:  # templates raise their own errors, and any of Python
        return ""


def _with_text_arguments(turn: Message) -> Message:
    """A turn with the arguments of its tool calls as JSON text."""
    if not turn.get("tool_calls"):
        return turn

    def changed(call: Mapping[str, Any]) -> dict[str, Any]:
        call = dict(call)
        if isinstance(call.get("function"), Mapping):
            call["function"] = changed(call["function"])
        if isinstance(call.get("arguments"), Mapping):
            call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
        return call

    return {**turn, "tool_calls": [changed(call) for call in turn["tool_calls"]]}


def lone_surrogate(text: str) -> str:
    """The place in a text at which half of a surrogate pair stands, "" where there is none."""
    if text.isascii():
        return ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[max(0, error.start - 20) : error.end + 10]
    return ""
