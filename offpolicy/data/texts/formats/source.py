"""Rows as a reader finds them, and the records that they become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from offpolicy.data.texts.rendering import Text


@dataclass
class Source:
    """Rows as a reader found them.

    Attributes:
        where: file, folder or name, for messages.
        rows: how many there are.
        names: of the columns.
        column: ``column(name)`` gives the values of a column, None where a row has none; conversations are
            messages.
        meta: facts for the data report.
        notes: what a person should know, filled while columns are read.
        doubts: what may be a mistake, filled while columns are read.
        text_only: whether all values are text, numbers too, as in CSV files.
        others: names of further parts of the same set, which ``read`` takes as ``split``.
    """

    where: str
    rows: int
    names: list[str]
    column: Callable[[str], list[Any]]
    meta: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    text_only: bool = False
    others: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Record:
    """A prompt with its answers.

    ``answers`` holds chosen and rejected, or one answer. ``rejected_prompt`` is set where the sides have different
    prompts. ``facts`` are numbers by name; the score of an answer may be a list of them.
    """

    row: int
    prompt: Text
    answers: tuple[Text, ...]
    rejected_prompt: Text | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)
