"""Verifiers, which compare an answer with one that is known to be right, and other rewards of this library.

A verifier is called as ``verifier(prompt, answer, reference)`` with texts, ``reference`` None where the data have
none, or a list where several answers are right, and returns a number, or None where it cannot judge. What stands before
``</think>`` is not part of the answer; of an answer that was cut off the last word does not count, as the rest of it
may be missing, nor does a marked answer whose line or box has not ended.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import wraps
from typing import Any

from offpolicy.data.texts.answers import alternatives
from offpolicy.data.texts.numbers import MARK, Mark, last_mark, last_number_in, number_of, plain_number
from offpolicy.errors import UsageError, check_range
from offpolicy.language.rl import mathematics

Reference = str | Sequence[str] | None  # the right answer, several of which each is right, or none
Verifier = Callable[[str, str, Reference], float | None]


# -- reading answers ---------------------------------------------------------------------------------------------------


def final_part(answer: str, prompt: str = "", *, ended: bool = True) -> str:
    """What counts of an answer: the part after its thinking, without a last word that may have been cut.

    Thinking begins in the answer, or with the last word of the prompt, as chat templates have it.
    """
    if "</think>" in answer:
        answer = answer.rpartition("</think>")[2]
    elif "<think>" in answer or prompt.rstrip().endswith("<think>"):
        return ""
    return answer if ended else re.sub(r"\S+$", "", answer)


def read_final_number(text: str) -> Decimal | None:
    """The number after the last ``####`` of a text: ``#### 1,234.50`` is 1234.5. None when there is none."""
    mark = last_mark(text) if MARK in text else None
    return None if mark is None else _number(mark)


def read_answer_number(text: str, *, ended: bool = True) -> Decimal | None:
    """The number alone after the last ``####`` or in the last ``\\boxed{}``, whichever comes later."""
    mark = last_mark(text, ended=ended)
    return None if mark is None else _number(mark)


def _number(mark: Mark) -> Decimal | None:
    return number_of(mark.content) if mark.whole else None


def _expected(reference: str) -> Decimal | None:
    """The number a reference gives: marked, or alone."""
    mark = last_mark(reference)
    return number_of(reference) if mark is None else _number(mark)


def _any_of(verifier: Callable[..., float | None]) -> Callable[..., float | None]:
    """A verifier that is content with any of several right answers."""

    @wraps(verifier)
    def judged(prompt: str, answer: str, reference: Reference, **options: Any) -> float | None:
        found = [verifier(prompt, answer, one, **options) for one in alternatives(reference)]
        return max((score for score in found if score is not None), default=None)

    return judged


# -- verifiers and other rewards ---------------------------------------------------------------------------------------


@_any_of
def exact(prompt: str, answer: str, reference: str, *, ended: bool = True) -> float | None:
    """1 where a whole answer is the reference: the same text, or the same number and nothing else."""
    found, expected = final_part(answer, prompt).strip(), reference.strip()
    number = plain_number(expected)
    return float(ended and (found == expected or (number is not None and plain_number(found) == number)))


@_any_of
def last_number(prompt: str, answer: str, reference: str, *, ended: bool = True) -> float | None:
    """1 where the last number of the answer equals the reference's, whatever stands beside it."""
    expected = _expected(reference)
    return None if expected is None else float(last_number_in(final_part(answer, prompt, ended=ended)) == expected)


@_any_of
def final_number(prompt: str, answer: str, reference: str, *, ended: bool = True) -> float | None:
    """1 where the number after the last ``####``, or in the last ``\\boxed{}``, is that of the reference, else 0.

    GSM8K's rule (arXiv:2110.14168). The number must stand alone (:mod:`offpolicy.data.texts.numbers`), and its line
    must have ended. None when the reference is no such number.
    """
    expected = _expected(reference)
    return None if expected is None else float(read_answer_number(final_part(answer, prompt), ended=ended) == expected)


@_any_of
def math(prompt: str, answer: str, reference: str, *, ended: bool = True, timeout: float = 5.0) -> float | None:
    """1 where the answer equals the reference as a mathematical expression, by ``math-verify`` (extra ``verify``).

    What ``####`` or ``\\boxed{}`` marks is the answer, else all of it. Without the extra, numbers are compared: the one
    that is marked, which must stand alone, else the last.

    Args:
        prompt: looked at for whether it opens the thinking.
        answer: of the policy.
        reference: the right answer, as text or LaTeX; None for none.
        ended: false for an answer that was cut off.
        timeout: seconds for reading an expression, and for comparing.

    Raises:
        TimeoutError: that took longer.
    """
    expected, mark = _expected(reference), last_mark(final_part(answer, prompt), ended=ended)
    if mark is not None and not mark.whole:
        return 0.0
    text = final_part(answer, prompt, ended=ended) if mark is None else mark.content
    if expected is not None and number_of(text) == expected:  # saves milliseconds
        return 1.0
    if mark is not None and mathematics.is_reference(text, reference):
        return 1.0
    shown = mathematics.readable(text, marked=mark is not None, reference=reference)
    if importlib.util.find_spec("math_verify") is not None:
        found = 0.0 if shown is None else mathematics.equal(shown, reference, timeout)
        if found is not None:
            return found
    if expected is None:
        return None
    if mark is not None or shown is None:
        return 0.0
    alone = mathematics.expression(text)  # of 4! the last number is not the answer
    return float((last_number_in(text) if alone is None else number_of(alone)) == expected)


@dataclass(frozen=True)
class Format:
    """1 where an answer looks as it should, else 0.

    Args:
        pattern: regular expression that the whole answer must match; None asks for exactly one final marker, ``####``
            or ``\\boxed{``.
    """

    pattern: str | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise UsageError(f"`pattern` is '{self.pattern}': {error}; expected a regular expression.") from None

    def __call__(self, prompt: str, answer: str, reference: str | None) -> float:
        if self.pattern is not None:
            return float(re.fullmatch(self.pattern, answer, re.DOTALL) is not None)
        text = final_part(answer, prompt)
        return float(text.count("####") + text.count("\\boxed{") == 1)


@dataclass(frozen=True)
class Length:
    """0 for answers up to ``limit − room`` tokens, from there down to −1 at ``limit`` (arXiv:2503.14476, Eq. 13).

    Args:
        limit: tokens, ≥ 1.
        room: tokens before the limit in which the penalty grows, in [1, limit].
    """

    limit: int
    room: int = 1

    def __post_init__(self) -> None:
        check_range("limit", self.limit, 1)
        check_range("room", self.room, 1, self.limit)

    def __call__(self, prompt: str, answer: str, reference: str | None, *, length: int) -> float:
        return -min(1.0, max(0, length - (self.limit - self.room)) / self.room)


VERIFIERS: dict[str, Verifier] = {
    "final_number": final_number,
    "exact": exact,
    "last_number": last_number,
    "math": math,
}
REWARDS: dict[str, Callable[..., Any]] = {**VERIFIERS, "format": Format, "length": Length}


def choose_verifier(references: list[str | None]) -> Verifier | None:
    """The verifier that fits the references of a data set: ``final_number`` when all have one, else None."""
    return final_number if references and all(read_final_number(r or "") is not None for r in references) else None
