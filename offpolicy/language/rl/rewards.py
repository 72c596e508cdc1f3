"""Rewards of answers: a weighted sum of verifiers, other rewards and functions of the user.

The rewards of this library are in :mod:`offpolicy.language.rl.verifiers`; how a function of the user is called is
in :mod:`offpolicy.language.rl.reward_calls`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from offpolicy.errors import UsageError, check_range, nearest
from offpolicy.given import LARGEST
from offpolicy.language.rl import mathematics
from offpolicy.language.rl.group_rewards import GROUP_REWARDS
from offpolicy.language.rl.reward_calls import FACTS, GROUPS, RESERVED, SECONDS, Call, Rows, TooLong, Watchdog, bind
from offpolicy.language.rl.verifiers import REWARDS as OF_ONE
from offpolicy.language.rl.verifiers import VERIFIERS, Reference, Verifier
from offpolicy.registry import Spec, import_callable, make, named_spec

REWARDS: dict[str, Callable[..., Any]] = {**OF_ONE, **GROUP_REWARDS}
SOLVED = 1.0  # what a verifier gives to a right answer
ENOUGH = 8  # different problems after which a reward that never gave a number is given up
MISTAKES = (TypeError, NameError, AttributeError, ImportError, SyntaxError, NotImplementedError)  # not of one answer


class Scored(NamedTuple):
    """Rewards of n answers.

    Attributes:
        scores: (n,) float64, the weighted sum of the parts.
        parts: name → (n,) float64, each reward without its weight.
        problems: how many of the n × parts scores could not be had and count as 0.
        failed: (n,) bool, answers of which one of these scores is.
    """

    scores: np.ndarray
    parts: dict[str, np.ndarray]
    problems: int
    failed: np.ndarray


class Tally(NamedTuple):
    """How one reward has worked so far.

    Attributes:
        worked: answers that it gave a number for.
        failed: answers that it gave no number for.
        mistakes: the failures in which the function raised what looks like a mistake in its code.
        problems: hashes of the different problems it was asked about, up to a few.
        first: what was wrong first, or None.
    """

    worked: int = 0
    failed: int = 0
    mistakes: int = 0
    problems: frozenset[int] = frozenset()
    first: str | None = None

    def __add__(self, other: Tally) -> Tally:  # type: ignore[override]
        return Tally(
            self.worked + other.worked,
            self.failed + other.failed,
            self.mistakes + other.mistakes,
            self.problems | other.problems,
            self.first or other.first,
        )

    @property
    def is_hopeless(self) -> bool:
        """Whether it never gave a number, and will not."""
        mistaken = self.mistakes == self.failed
        return not self.worked and self.failed > 0 and (mistaken or len(self.problems) >= ENOUGH)


@dataclass
class _Part:
    """A reward: what the user called it, its weight, how it is called and how it fared."""

    path: str
    weight: float
    call: Call
    tally: Tally = field(default_factory=Tally)


class Rewards:
    """A weighted sum of rewards. What fails for an answer scores 0 there and is counted.

    Args:
        parts: one reward or several, each a name (final_number, exact, last_number, math, format, length), an import
            path ``package.module.function`` of your own, or ``{"name": …, "weight": 1.0, **parameters}``. See
            :func:`offpolicy.language.rl.reward_calls.bind` for how a function is called.
        columns: of the data, that functions may ask for by name.
        seconds: longest time for one answer, ≥ 0; then it is interrupted and has failed
            (:class:`offpolicy.language.rl.reward_calls.Watchdog`). 0 is no limit.

    Attributes:
        problems: how many scores could not be had so far: an exception, an exit, a time-out, None, or a number that is
            not finite.
        first_problem: what was wrong with the first of these scores, or None.

    Raises:
        UsageError: a name or a parameter is not known, or a function cannot be called.
    """

    known: ClassVar[Mapping[str, Callable[..., Any]]] = REWARDS  # by name
    what: ClassVar[str] = "reward"  # in messages
    option: ClassVar[str] = "--model.rewards"
    judged: ClassVar[str] = "answers"
    otherwise: ClassVar[str] = "It scores 0"  # what becomes of a failure

    def __init__(
        self, parts: Spec | Sequence[Spec] = "final_number", *, columns: Collection[str] = (), seconds: float = SECONDS
    ) -> None:
        check_range("reward_seconds", seconds, 0)
        listed = [parts] if isinstance(parts, str) or not isinstance(parts, Sequence) else list(parts)
        if not listed:
            raise UsageError("`reward` names none; expected one or several, such as final_number.")
        self._parts: dict[str, _Part] = {}
        for spec in listed:
            given = named_spec(self.what, spec)
            weight = given.pop("weight", 1.0)
            check_range("weight", weight)
            at_call = {*FACTS, *({*RESERVED, *columns} - given.keys())}
            function = make(self.what, given, self.known, at_call=at_call)
            path = str(given["name"])
            name = path.replace(":", ".").rpartition(".")[2]
            if name in self._parts:
                raise UsageError(f"`reward` has '{name}' twice; expected different rewards. Add up their weights.")
            self._parts[name] = _Part(path, float(weight), bind(function, path, columns, self.what))
        self.seconds = seconds
        self.problems = 0
        self.first_problem: str | None = None

    def __str__(self) -> str:
        return " + ".join(n if p.weight == 1.0 else f"{p.weight:g}·{n}" for n, p in self._parts.items())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parts."""
        return tuple(self._parts)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights of the parts."""
        return tuple(part.weight for part in self._parts.values())

    @property
    def verifiers(self) -> tuple[str, ...]:
        """The parts that compare with a right answer."""
        return tuple(name for name, part in self._parts.items() if part.path in VERIFIERS)

    @property
    def comparing(self) -> tuple[str, ...]:
        """The parts that compare the answers of a group."""
        return tuple(name for name, part in self._parts.items() if GROUPS in part.call.needs)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the data that functions ask for."""
        return tuple(dict.fromkeys(name for part in self._parts.values() for name in part.call.columns))

    @property
    def tallies(self) -> dict[str, Tally]:
        """How each part fared so far."""
        return {name: part.tally for name, part in self._parts.items()}

    def __call__(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        references: Sequence[Reference],
        *,
        ended: Sequence[bool] | None = None,
        lengths: Sequence[int] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        groups: Sequence[int] | None = None,
    ) -> Scored:
        """Score n answers.

        Args:
            prompts: n texts.
            answers: n texts, without special tokens.
            references: n right answers, None where there is none, a list where each of several is right.
            ended: whether each answer stopped by itself; None for all.
            lengths: tokens of each answer; needed by the reward ``length``.
            columns: columns of the data that functions ask for, n values each.
            groups: numbers that answers drawn together share; None for answers to the same prompt.
        """
        n, before = len(answers), self.problems
        if lengths is None and any("length" in p.call.needs for p in self._parts.values()):
            raise UsageError("a reward looks at `length`, and no `lengths` were given; expected tokens per answer.")
        facts: dict[str, Sequence[Any]] = {} if lengths is None else {"length": lengths}
        facts["ended"] = [True] * n if ended is None else ended
        facts[GROUPS] = _numbered(prompts) if groups is None else groups
        rows = Rows(prompts, answers, references, facts, columns or {})
        if "math" in self.verifiers:
            mathematics.prepare()
        with Watchdog(self.seconds) as watchdog:
            scored = {name: self._scores(name, part, rows, watchdog) for name, part in self._parts.items()}
        total, failed = np.zeros(n), np.zeros(n, bool)
        for name, part in self._parts.items():
            total += part.weight * scored[name][0]
            failed |= scored[name][1]
        return Scored(total, {name: found for name, (found, _) in scored.items()}, self.problems - before, failed)

    def solved(self, scored: Scored) -> np.ndarray:
        """Which answers are right, (n,) bool: by the first verifier of the parts, else by a whole reward of ≥ 1."""
        return next((scored.parts[name] for name in self.verifiers), scored.scores) >= SOLVED

    def check(self, tallies: Sequence[Mapping[str, Tally]], *, ended: bool = False) -> None:
        """Stop where rewards cannot be had.

        Args:
            tallies: of every process.
            ended: whether the run is over, so that a single failure of all is enough.

        Raises:
            UsageError: a reward never gave a number; or, at the end, none of them ever did.
        """
        whole = {name: sum((one[name] for one in tallies), Tally()) for name in self._parts}
        failed = [name for name, tally in whole.items() if tally.failed and not tally.worked]
        given_up = failed if ended and len(failed) == len(whole) else [n for n in failed if whole[n].is_hopeless]
        for name in given_up[:1]:
            expected = "a list with a number for each" if self._parts[name].call.is_batch else "a number for each"
            expected = "right answers that it can read" if name in self.verifiers else expected
            raise UsageError(
                f"the {self.what} {self._parts[name].path} failed for every one of {whole[name].failed:,} "
                f"{self.judged}: {whole[name].first}; expected {expected}. Correct it, or choose another with "
                f"{self.option}."
            )

    def _scores(self, name: str, part: _Part, rows: Rows, watchdog: Watchdog) -> tuple[np.ndarray, np.ndarray]:
        """A part's number for each answer, and where there is none, (n,) both."""
        found, failed = np.zeros(len(rows)), np.zeros(len(rows), bool)
        values: Any = [None] * len(rows)
        if part.call.is_batch and len(rows):
            values, failure = _guarded(lambda: _listed(part.call.all(rows), len(rows)), watchdog, len(rows))
            if failure is not None:
                values = [failure] * len(rows)
        for i in range(len(rows)):
            if part.call.is_batch:
                value, failure = values[i], values[i] if isinstance(values[i], _Failure) else None
            else:
                value, failure = _guarded(lambda: part.call.one(rows, i), watchdog)  # noqa: B023 - called at once
            if failure is None:
                found[i], failure = _number_of(value, rows.references[i])
            failed[i] = failure is not None
            self._note(name, part, rows, i, failure)
        return found, failed

    def _note(self, name: str, part: _Part, rows: Rows, i: int, failure: _Failure | None) -> None:
        seen = part.tally.problems
        if len(seen) < ENOUGH:
            seen |= {hash((rows.prompts[i], str(rows.references[i])))}
        if failure is None:
            part.tally += Tally(1, problems=seen)
            return
        part.tally += Tally(0, 1, int(failure.mistake), seen, failure.words)
        self.problems += 1
        if self.first_problem is None:
            self.first_problem = f"{self.what} '{name}': {failure.words}; answer {rows.answers[i][:80]!r}"
            warnings.warn(f"{self.first_problem}. {self.otherwise}; further failures are only counted.", stacklevel=2)


class _Failure(NamedTuple):
    words: str
    mistake: bool = False


def _guarded(do: Callable[[], Any], watchdog: Watchdog, calls: int = 1) -> tuple[Any, _Failure | None]:
    """What a call returns, or why it does not; only an interruption by the user gets through."""
    try:
        watchdog.start(calls)
        try:
            return do(), None
        finally:
            watchdog.stop()
    except KeyboardInterrupt:
        raise
    except TooLong:
        return None, _Failure(f"it took longer than {watchdog.seconds:g} s (--model.reward_seconds)")
    except SystemExit as error:
        return None, _Failure(f"it called sys.exit({'' if error.code is None else repr(error.code)})")
    except BaseException as error:  # graders raise anything
        return None, _Failure(f"{type(error).__name__}: {str(error)[:300]}", isinstance(error, MISTAKES))


def _listed(values: Any, n: int) -> list[Any]:
    """The numbers that a function of a batch returned."""
    if not hasattr(values, "__len__") or isinstance(values, str | Mapping) or len(values) != n:
        shown = f"{len(values)} values" if hasattr(values, "__len__") else repr(values)[:80]
        raise TypeError(f"it returned {shown} for {n} answers")
    return list(values)


def _numbered(prompts: Sequence[str]) -> list[int]:
    """A number for each prompt, the same for equal ones."""
    known: dict[str, int] = {}
    return [known.setdefault(prompt, len(known)) for prompt in prompts]


def _number_of(value: Any, reference: Reference) -> tuple[float, _Failure | None]:
    if value is None:
        return 0.0, _Failure(f"it could not judge (the reference is {reference!r})")
    try:
        number = float(value)
    except Exception as error:
        return 0.0, _Failure(f"{type(error).__name__}: {error}", mistake=isinstance(error, TypeError))
    return (number, None) if abs(number) <= LARGEST else (0.0, _Failure(f"it returned {number}"))  # NaN is not


def resolve_verifier(name: str) -> Verifier:
    """A verifier by name, or a function of the user by import path ``package.module.function``.

    Raises:
        UsageError: there is none.
    """
    if name in VERIFIERS:
        return VERIFIERS[name]
    if "." not in name and ":" not in name:
        raise UsageError(
            f"no verifier is called '{name}'; expected one of {', '.join(VERIFIERS)}, or an import path "
            f"package.module.function.{nearest(name, VERIFIERS)}"
        )
    call = bind(import_callable(name, "verifier"), name)
    failures: list[str] = []

    def judged(prompt: str, answer: str, reference: Reference) -> float | None:
        rows = Rows([prompt], [answer], [reference], {"ended": [True]})
        with Watchdog(SECONDS) as watchdog:
            value, failure = _guarded(
                lambda: _listed(call.all(rows), 1)[0] if call.is_batch else call.one(rows, 0), watchdog
            )
        if failure is None and value is not None:
            number, failure = _number_of(value, reference)
        if failure is not None and not failures:
            failures.append(failure.words)
            warnings.warn(f"verifier '{name}': {failure.words}; answer {answer[:80]!r}. It has no score.", stacklevel=2)
        return None if failure is not None or value is None else number

    judged.__name__ = name.replace(":", ".").rpartition(".")[2]
    return judged
