"""Where prompts stand: one class per style."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

from offpolicy.data.texts.formats.form import PromptStyle, Seen
from offpolicy.data.texts.formats.values import prompt_in
from offpolicy.data.texts.messages import Fault, differing_keys, read_text, said, turn_key
from offpolicy.data.texts.rendering import Message, Text
from offpolicy.data.texts.tool_turns import common_length

TURN = "\n\nAssistant:"  # where answers begin in written-out dialogues
Parted = tuple[Text, Text | None, tuple[Text, ...]]  # prompt, another prompt of the rejected side, answers


class LeadingTurns(PromptStyle):
    """All turns but the last one."""

    name, words, place = "messages", "prompt is all but the last turn", "messages"

    def fits(self, seen: Seen) -> bool:
        own = seen.kind.name == "singles" and seen.style == "chat" and "prompt" not in seen.columns
        return own or seen.kind.answers == ("messages",)

    def part(self, values: dict[str, Any], answers: tuple[Text, ...], chat: bool, counts: Counter[str]) -> Parted:
        name = "messages" if "messages" in values else "completion"
        turns = cast(list[Message], answers[0])
        if not turns or turns[-1]["role"] != "assistant":
            raise Fault(name, "last_role" if turns else "empty", answers[0])
        if not turns[:-1]:
            raise Fault(name, "no_prompt", turns)
        return turns[:-1], None, (turns[-1:],)


class OwnForEachSide(PromptStyle):
    """One column for the prompt of each side."""

    name, words = "two", "a prompt for each side"
    columns, place, apart, for_each_side = ("prompt_chosen", "prompt_rejected"), "prompt_chosen", True, True

    def fits(self, seen: Seen) -> bool:
        return seen.kind.name == "pairs" and all(name in seen.columns for name in self.columns)

    def part(self, values: dict[str, Any], answers: tuple[Text, ...], chat: bool, counts: Counter[str]) -> Parted:
        chosen, rejected = (prompt_in(values, name, chat) for name in self.columns)
        return chosen, rejected, answers


class InColumn(PromptStyle):
    """A column of its own."""

    name, words, columns, apart = "explicit", "prompt in a column of its own", ("prompt",), True

    def fits(self, seen: Seen) -> bool:
        return "prompt" in seen.columns

    def part(self, values: dict[str, Any], answers: tuple[Text, ...], chat: bool, counts: Counter[str]) -> Parted:
        return prompt_in(values, "prompt", chat), None, answers


class SharedTurns(PromptStyle):
    """The leading turns that both conversations of a pair share."""

    name, words, place = "implicit", "prompt is the common beginning of both sides", "chosen"

    def fits(self, seen: Seen) -> bool:
        return seen.kind.name == "pairs" and seen.style == "chat"

    def part(self, values: dict[str, Any], answers: tuple[Text, ...], chat: bool, counts: Counter[str]) -> Parted:
        chosen, rejected = (cast(list[Message], answer) for answer in answers)
        at = shared_turns(chosen, rejected)
        asked = self.asked(values, chosen, chosen[:at], chat)
        if asked is not None:
            return asked, None, (chosen[at:], rejected)
        prompt = chosen[:at]
        if not prompt:
            raise Fault("chosen", "no_beginning", chosen[at])
        if values.get("system") and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": str(values["system"])}, *prompt]
        return prompt, None, (chosen[at:], rejected[at:])

    def asked(self, values: dict[str, Any], chosen: list[Message], prompt: list[Message], chat: bool) -> Text | None:
        """The prompt where it is another one than the shared turns."""
        return None


class AgainInColumn(SharedTurns):
    """A column of text, and again the leading turns of both conversations, if these are no answers alone."""

    name, words = "mixed", "prompt in a column and again in the conversations"
    columns, place = ("prompt",), "prompt"

    def fits(self, seen: Seen) -> bool:
        return super().fits(seen) and "prompt" in seen.columns and seen.types["prompt"] == "text"

    def asked(self, values: dict[str, Any], chosen: list[Message], prompt: list[Message], chat: bool) -> Text | None:
        question = read_text(values["prompt"], "prompt")
        if not prompt and chosen[0]["role"] == "assistant":
            return prompt_in(values, "prompt", chat)  # the conversations hold the answers alone
        if not any(str(question).strip() in m["content"] for m in prompt):
            raise Fault("prompt", "prompt_mismatch", question)
        return None


class SharedText(PromptStyle):
    """The text that both sides begin with, to the word in which they part."""

    name, words, place = "implicit", "prompt is the common beginning of both sides", "chosen"

    def fits(self, seen: Seen) -> bool:
        return seen.kind.name == "pairs" and seen.style == "text"

    def part(self, values: dict[str, Any], answers: tuple[Text, ...], chat: bool, counts: Counter[str]) -> Parted:
        """Before the word in which the sides part, so that no answer begins inside a word or is empty."""
        chosen, rejected = (cast(str, answer) for answer in answers)
        at = common_length(chosen, rejected)
        sides = (chosen, rejected)
        inside = any(at == len(side) or not side[at].isspace() for side in sides)
        if inside:  # back to the beginning of this word
            counts["common beginnings of the sides were cut back to a word"] += at > 0 and not chosen[at - 1].isspace()
            while at and not chosen[at - 1].isspace():
                at -= 1
        while at and chosen[at - 1].isspace():  # the space belongs to the answer
            at -= 1
        if not at:
            raise Fault("chosen", "no_beginning", chosen)
        return chosen[:at], None, (chosen[at:], rejected[at:])


class Dialogue(PromptStyle):
    """Written-out turns, to the last ``\\n\\nAssistant:`` that both sides share with everything before it."""

    name, words, place = "dialogue", "written-out dialogues, split at the last common '\\n\\nAssistant:'", "chosen"

    def fits(self, seen: Seen) -> bool:
        """Whether most rows are written-out dialogues."""
        if seen.kind.name != "pairs" or seen.style != "text":
            return False
        sides = [seen.source.column(seen.columns[name]) for name in ("chosen", "rejected")]
        marked = sum(bool(c and r) and TURN in c and TURN in r for c, r in zip(*sides))
        return 2 * marked > len(sides[0])

    def part(self, values: dict[str, Any], answers: tuple[Text, ...], chat: bool, counts: Counter[str]) -> Parted:
        chosen, rejected = (cast(str, answer) for answer in answers)
        at = chosen.rfind(TURN, 0, common_length(chosen, rejected))
        if at < 0:
            raise Fault("chosen", "no_turn", chosen)
        at += len(TURN)
        counts["dialogues part before their last turn, so their answers hold several turns"] += (
            TURN in chosen[at:] or TURN in rejected[at:]
        )
        return chosen[:at], None, (chosen[at:], rejected[at:])


STYLES: tuple[PromptStyle, ...] = (  # the first that fits is taken
    LeadingTurns(),
    OwnForEachSide(),
    AgainInColumn(),
    InColumn(),
    SharedTurns(),
    Dialogue(),
    SharedText(),
)


def shared_turns(chosen: list[Message], rejected: list[Message]) -> int:
    """How many leading turns two conversations share, with an answer left in each.

    Raises:
        Fault: a side is empty or does not end with the assistant, or the sides part in a turn that says the same.
    """
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns:
            raise Fault(name, "empty", turns)
        if turns[-1]["role"] != "assistant":
            raise Fault(name, "last_role", turns[-1])
    shared = min(len(chosen), len(rejected)) - 1
    at = next((i for i in range(shared) if turn_key(chosen[i]) != turn_key(rejected[i])), shared)
    if at < shared and chosen[at]["role"] in ("user", "system") and said(chosen[at]) == said(rejected[at]):
        raise Fault("rejected", "other_keys", differing_keys(chosen[at], rejected[at]))
    return at
