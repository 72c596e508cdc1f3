"""Problems put into other words than those of their data: other templates, or with a hint."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from offpolicy.data.columns import to_numpy
from offpolicy.data.texts.formats import Source
from offpolicy.data.texts.numbers import MARK
from offpolicy.data.texts.problem_rows import Problem, read_problems
from offpolicy.data.texts.rendering import Row
from offpolicy.data.texts.tokens import Limits, encode
from offpolicy.errors import DataError, nearest


class OtherWords(NamedTuple):
    """What a problem is put into.

    Attributes:
        text: with {prompt} in it, and {hint} where the hint stands.
        hint: the share of the words of the solution that is shown, in (0, 1), of which what follows "####" or \\boxed
            is no part; or the column of the data that holds the hint; None for no hint. 1 shows the whole solution, in
            a text that stands for itself, outside the template of the data.
        option: that asks for it, for messages.
    """

    text: str
    hint: float | str | None
    option: str


@dataclass(frozen=True)
class Telling:
    """How rows of a source became prompts.

    Attributes:
        reopen: gives the source.
        named: our name → the source's.
        tokenizer: of the prompts.
        template: that the data put prompts into.
        chat, chat_template_kwargs, longest: as of :class:`offpolicy.data.texts.problems.ProblemData`.
    """

    reopen: Callable[[], Source]
    named: dict[str, str]
    tokenizer: Any
    template: str
    chat: bool
    chat_template_kwargs: Mapping[str, Any]
    longest: int

    def prompts(self, rows: np.ndarray, words: Sequence[OtherWords]) -> list[list[np.ndarray | None]]:
        """Tokens of these rows of the source in each of the words; None where a problem has no hint.

        Raises:
            DataError: a prompt is no plain text, or too long; no such column.
        """
        source = self.reopen()
        known = list(read_problems(source, self.named))
        problems = [known[row] for row in rows.tolist()]
        for row, problem in zip(rows.tolist(), problems):
            if not isinstance(problem.prompt, str):
                raise DataError(
                    f"`{words[0].option}` puts prompts into other words, and row {row} has turns of a conversation; "
                    "expected prompts of plain text. Leave the option out."
                )
        return [self._tokens(rows, problems, self._hints(source, rows, problems, one), one) for one in words]

    @cached_property
    def _known(self) -> list[Problem]:
        return list(read_problems(self.reopen(), self.named))

    def behind(self, rows: Sequence[int], hints: Sequence[str], text: str) -> list[np.ndarray | None]:
        """Tokens of these rows of the source, each with a hint of its own; None for what cannot be put to a policy.

        The source is read once, and its texts stay in memory.

        Args:
            rows, hints: equally many.
            text: with {prompt} and {hint} in it.
        """
        words = OtherWords(text, 0.0, "hints")
        asked = [self._row(self._known[row], hint, words) for row, hint in zip(rows, hints, strict=True)]
        found = encode(asked, self.tokenizer, Limits(1 << 30, truncation="keep_end"))
        return [None if one.fault or not len(one.prompt) else one.prompt for one in found]

    def _hints(self, source: Source, rows: np.ndarray, problems: Sequence[Problem], words: OtherWords) -> list[str]:
        if words.hint is None:
            return [""] * len(problems)
        if words.hint == 1:
            return [problem.solution or "" for problem in problems]
        if not isinstance(words.hint, str):
            return [beginning(problem.solution, words.hint) for problem in problems]
        if words.hint not in source.names:
            raise DataError(
                f"`{words.option}` takes hints from the column '{words.hint}', and {source.where} has "
                f"{', '.join(source.names)}; expected one of them.{nearest(words.hint, source.names)}"
            )
        column = source.column(words.hint)
        return ["" if column[row] is None else str(column[row]).strip() for row in rows.tolist()]

    def _tokens(
        self, rows: np.ndarray, problems: Sequence[Problem], hints: Sequence[str], words: OtherWords
    ) -> list[np.ndarray | None]:
        told = [bool(hint) or words.hint is None for hint in hints]
        asked = [self._row(problem, hint, words) for problem, hint, one in zip(problems, hints, told) if one]
        found = encode(asked, self.tokenizer, Limits(1 << 30, truncation="keep_end"))
        tokens = [next(found) if one else None for one in told]
        for row, one in zip(rows.tolist(), tokens):
            if one is not None and (one.fault or not 0 < len(one.prompt) <= self.longest):
                raise DataError(
                    f"`{words.option}` makes {len(one.prompt)} tokens of row {row}; expected 1 to {self.longest}. Pass "
                    "a larger --data.max_prompt_length, or shorter words."
                )
        return [None if one is None else one.prompt for one in tokens]

    def _row(self, problem: Problem, hint: str, words: OtherWords) -> Row:
        text = filled(words.text, prompt=str(problem.prompt), hint=hint)
        text = text if words.hint in (None, 1) else filled(self.template, prompt=text)
        asked = Problem(text, problem.system).asked("{prompt}", self.chat)
        return Row(asked, (), {**self.chat_template_kwargs, **problem.options})


def filled(text: str, **values: str) -> str:
    """A text with values in the place of their names in braces; braces in the values stay."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda found: values[found[1]], text)


def beginning(solution: str | None, share: float) -> str:
    """The first words of a solution, a share of those before its answer, rounded down."""
    words = (solution or "").partition(MARK)[0].partition("\\boxed")[0].split()
    return " ".join(words[: int(share * len(words) + 1e-9)])


def retold(problems: Any, words: Sequence[OtherWords]) -> Any:
    """The problems with the table ``problems/asked``, (P, 1 + words) int64: the text of each problem in its own words,
    then in the others; its own stand where it has no hint.

    Raises:
        DataError: the data do not say how to put their problems into other words.
    """
    telling = getattr(problems, "telling", None)
    if telling is None:
        raise DataError(
            f"`{words[0].option}` puts prompts into other words, and {problems.meta.get('name', 'the data')} does not "
            "keep their texts; expected problems that offpolicy has read. Leave the option out."
        )
    own, count = problems.tables["problems"][:, 0], len(problems.start)
    columns, new = [own], list[np.ndarray]()
    for told in telling.prompts(problems.tables["problems/row"], words):
        column = own.copy()
        for i, prompt in enumerate(told):
            if prompt is not None:
                column[i] = count + len(new)
                new.append(prompt)
        columns.append(column)
    return with_prompts(problems, new, np.stack(columns, axis=1))


def with_prompts(problems: Any, new: Sequence[np.ndarray], asked: np.ndarray) -> Any:
    """The problems with texts more, and the table of the texts they are asked with; the source of data is unchanged."""
    size = np.asarray([len(one) for one in new], np.int64)
    old = {name: to_numpy(column) for name, column in problems.steps.items()}
    unknown = np.full(int(size.sum()), np.nan)
    steps: dict[str, Any] = {
        name: np.append(column, unknown.astype(column.dtype)) for name, column in old.items() if name != "token"
    }
    steps["token"] = np.concatenate([old["token"], *new]).astype(old["token"].dtype)
    more = type(problems)(
        steps,
        start=np.append(problems.start, len(old["token"]) + np.cumsum(size) - size),
        length=np.append(problems.length, size),
        tables={**problems.tables, "problems/asked": asked},
        meta=problems.meta,
    )
    more.reopen, more.telling = problems.reopen, problems.telling
    return more
