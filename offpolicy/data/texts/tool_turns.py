"""Turns of tools inside an answer, which the model reads and never writes: where they stand in the written text.

A chat template writes a conversation as one text, so a turn is found by writing the conversation up to it. The
place of the tools ends where the assistant's own next words begin: the model does not write the head of its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Message = dict[str, Any]
TOOL_ROLES = ("tool", "function", "ipython")  # the usual name, OpenAI's earlier name, and Llama 3's
Place = tuple[int, int]  # first character, and the one after the last


def tool_runs(answer: Sequence[Message]) -> Iterator[Place]:
    """First turn of each run of turns of tools, and the turn after its last."""
    first = None
    for i, turn in enumerate([*answer, {}]):
        is_tool = turn.get("role") in TOOL_ROLES
        if is_tool and first is None:
            first = i
        elif not is_tool and first is not None:
            yield first, i
            first = None


def tool_places(
    write: Callable[..., str], prompt: Sequence[Message], answer: Sequence[Message], whole: str
) -> list[Place]:
    """The characters of a conversation that belong to the tools.

    Args:
        write: turns → their text; takes ``add_generation_prompt``.
        prompt, answer: the turns.
        whole: their text.

    Raises:
        LookupError: the template writes a conversation so that a turn of a tool cannot be told from the others.
    """
    found = []
    for first, after in tool_runs(answer):
        through = [*prompt, *answer[:after]]
        end_of_tools = _end_in(whole, write(through), through[-1])
        last = [*prompt, *answer[:first]]
        begin = _end_in(whole, write(last), last[-1])
        end = common_length(whole, write(through, add_generation_prompt=True))
        if not begin <= end_of_tools <= end:
            raise LookupError
        found.append((begin, end))
    return found


def _end_in(whole: str, part: str, last: Message) -> int:
    """Where the text of the first turns ends in the text of all turns.

    A template may write more into a turn while it is the last one, such as ``<think>`` and its end.
    """
    same = common_length(part, whole)
    more = next((n for n in range(len(part) - same + 1) if whole.startswith(part[same + n :], same)), 0)
    while more and same and part[same - 1] == part[same + more - 1]:  # as early as it may begin
        same -= 1
    for text in _said(last):
        at = part.rfind(text)
        if more and at >= 0 and at < same + more and same < at + len(text):
            raise LookupError  # the template leaves out what the turn says
    return len(part) - more


def _said(turn: Message) -> list[str]:
    """Texts of a turn that every template writes: its content, and the names of its calls."""
    calls = [call.get("function", call) for call in turn.get("tool_calls") or []]
    names = [call["name"] for call in calls if isinstance(call, Mapping) and call.get("name")]
    return [text for text in (turn["content"].strip(), *names) if text]


def common_length(a: str, b: str) -> int:
    """Length of the common beginning, by bisection."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
