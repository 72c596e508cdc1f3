"""What a format is made of: a kind of answers and a style of prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from offpolicy.data.texts.formats.source import Record, Source
from offpolicy.data.texts.rendering import Text


@dataclass(frozen=True)
class Seen:
    """What is known of a source when its style of prompts is decided.

    Attributes:
        source: the rows.
        columns: our name → the source's, of the columns that are there.
        types: our name → "text" or "chat", of columns that hold texts.
        kind: of answers.
        style: of answers, "text" or "chat".
    """

    source: Source
    columns: Mapping[str, str]
    types: Mapping[str, str]
    kind: AnswerKind
    style: str


class AnswerKind:
    """What the answers of a row are.

    Attributes:
        name: "pairs", "lists" or "singles".
        words: the same for a person.
        answers: columns that must be there.
        numbers: columns of numbers that may be.
    """

    name: ClassVar[str]
    words: ClassVar[str]
    answers: ClassVar[tuple[str, ...]]
    numbers: ClassVar[tuple[str, ...]] = ()

    def fits(self, columns: Mapping[str, str]) -> bool:
        """Whether the columns belong to this kind."""
        raise NotImplementedError

    def read(self, row: int, values: dict[str, Any], form: Format, counts: Counter[str]) -> Iterator[Record]:
        """The records of a row, whose values go by our names. Raises ``Fault`` where there is none."""
        raise NotImplementedError

    def arrange(self, made: list[Record], row: int, strategy: str, gap: float, counts: Counter[str]) -> list[Record]:
        """The records of a row as they are trained on; ``strategy`` and ``gap`` say how lists become pairs."""
        return made


class PromptStyle:
    """Where the prompt of a row stands.

    Attributes:
        name: of the style.
        words: the same for a person.
        columns: that the prompt is read from; none where it stands in the answers.
        place: the column that a fault in the prompt is told of.
        for_each_side: whether each side has its own, so that an answer to two prompts is a pair.
        apart: whether the answers hold no turn of the prompt, so that one that begins with it repeats it.
    """

    name: ClassVar[str]
    words: ClassVar[str]
    columns: ClassVar[tuple[str, ...]] = ()
    place: ClassVar[str] = "prompt"
    apart: ClassVar[bool] = False
    for_each_side: ClassVar[bool] = False

    def fits(self, seen: Seen) -> bool:
        """Whether the prompts of a source stand there."""
        raise NotImplementedError

    def part(
        self, values: dict[str, Any], answers: tuple[Text, ...], chat: bool, counts: Counter[str]
    ) -> tuple[Text, Text | None, tuple[Text, ...]]:
        """Prompt and answers of a row.

        Args:
            values: of the row, by our names.
            answers: as they were read.
            chat: whether rows are messages.
            counts: what a person should know, by sentence.

        Returns:
            The prompt; the prompt of the rejected side, None where both sides have the same; and the answers alone.
        """
        raise NotImplementedError


@dataclass
class Format:
    """What was decided about a source.

    Attributes:
        kind: of answers.
        style: "text" or "chat".
        prompt: where prompts stand.
        columns: our name → the source's.
        unused: columns that are not read.
    """

    kind: AnswerKind
    style: str
    prompt: PromptStyle
    columns: dict[str, str]
    unused: list[str]

    @property
    def chat(self) -> bool:
        """Whether rows are messages."""
        return self.style == "chat"

    def __str__(self) -> str:
        style = {"text": "plain text", "chat": "messages"}[self.style]
        columns = ", ".join(ours if ours == theirs else f"{ours} = {theirs}" for ours, theirs in self.columns.items())
        unused = f"; not read: {', '.join(self.unused)}" if self.unused else ""
        return f"{self.kind.words}, {style}, {self.prompt.words}; columns {columns}{unused}"
