"""Calls of rewards: which values a function takes by which names, and how long it may take.

A function is bound to its values before training, so that a wrong signature is known at once. While rewards are
computed in the main thread, a watchdog interrupts one that takes too long.
"""

from __future__ import annotations

import inspect
import math
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from offpolicy.errors import UsageError

ANSWERED = ("completion", "response", "solution_str")  # names of what the policy wrote, beside `answer`
RIGHT = ("reference", "ground_truth", "solution")  # names of the right answer, unless a column is called so
SECONDS = 10.0  # for one answer
OWN_COLUMNS = ("ground_truth", "solution")
FACTS = ("ended", "length")
BATCH = ("prompts", "completions")
PLACES = (("prompt",), ("answer", *ANSWERED), (*RIGHT, "answer"))  # names that fit the three positions
OF_VERL = ("data_source",)  # the first parameter there, a column and no prompt
GROUPS = "groups"  # numbers that answers to one prompt share, for functions of a batch that compare them
RESERVED = ("prompt", "answer", *ANSWERED, *RIGHT, *FACTS, *BATCH, "lengths", "references", "answers", GROUPS)

# -- binding -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """What may be said about n answers: texts, right answers, facts by name and columns of the data by name."""

    prompts: Sequence[str]
    answers: Sequence[str]
    references: Sequence[Any]
    facts: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.answers)


@dataclass(frozen=True)
class Call:
    """A function with the values it takes.

    Attributes:
        function: what is called.
        form: "positions" (prompt, answer, reference), "names" (one answer by keywords), or "batch" (all of them).
        names: keywords it gets.
        columns: the names among them that are columns of the data.
    """

    function: Callable[..., Any]
    form: str
    names: tuple[str, ...]
    columns: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """The values without which the function cannot be called."""
        parameters = inspect.signature(self.function).parameters if self.names else {}
        return tuple(n for n in self.names if n in parameters and parameters[n].default is inspect.Parameter.empty)

    @property
    def is_batch(self) -> bool:
        return self.form == "batch"

    def one(self, rows: Rows, i: int) -> Any:
        """What the function says of answer ``i``."""
        if self.form == "positions":
            given = rows.prompts[i], rows.answers[i], rows.references[i]
            return self.function(*given, **{name: rows.facts[name][i] for name in self.names})
        return self.function(**{name: values[i] for name, values in self._values(rows).items()})

    def all(self, rows: Rows) -> Any:
        """What a function of a batch says of all answers."""
        return self.function(**{name: list(values) for name, values in self._values(rows).items()})

    def _values(self, rows: Rows) -> dict[str, Sequence[Any]]:
        known: dict[str, Sequence[Any]] = {"prompt": rows.prompts, "prompts": rows.prompts, **rows.facts}
        known |= dict.fromkeys(("completions", *ANSWERED), rows.answers)
        known |= dict.fromkeys((*RIGHT, "references", "answers"), rows.references)
        known["answer"] = rows.references if self.is_batch or _names_answer(self.names) else rows.answers
        if "length" in known:
            known["lengths"] = known["length"]
        known |= {name: rows.columns[name] for name in self.columns}
        return {name: known[name] for name in self.names if name in known}


def _names_answer(names: Collection[str]) -> bool:
    return any(name in names for name in ANSWERED)


def bind(function: Callable[..., Any], name: str, columns: Collection[str] = (), what: str = "reward") -> Call:
    """Decide how a reward is called.

    A function that names ``prompts`` and ``completions``, or ``completions`` and right answers or a column of the data,
    gets lists and returns a list. A function whose parameters are all known names gets the values of one answer by
    keyword; ``answer`` is what the policy wrote, or the right answer beside ``completion``. Any other function gets
    prompt, answer and reference by position, ``ended`` and ``length`` by keyword. ``groups`` are numbers that answers
    drawn together share, unless a column of the data is called so.

    Args:
        function: the reward, with its own parameters filled in.
        name: what the user called it, for errors.
        columns: of the data, that it may ask for by name.
        what: "reward" or "judge", for errors.

    Raises:
        UsageError: it can be called in none of these ways.
    """
    if not callable(function):
        raise UsageError(f"`{what}` is '{name}', which gives a {type(function).__name__}; expected a function.")
    call = getattr(function, "func", function)
    if inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(getattr(call, "__call__", None)):  # noqa: B004
        raise UsageError(f"`{what}` is '{name}', an async function; {_expected(name, what)}")
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some builtins do not say
        return Call(function, "positions", ())
    filled = getattr(function, "keywords", {})
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    by_name = [n for n, p in parameters.items() if p.kind in kinds and n not in filled]
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needs = {n for n, p in parameters.items() if p.default is p.empty and p.kind not in free}
    anything = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    asked = tuple(n for n in by_name if n in RESERVED or n in columns)
    if needs <= {*asked}:
        if "completions" in asked and {*asked} - {"completions", "lengths", *FACTS}:
            taken = tuple(
                n for n in asked if n in columns and (n not in RESERVED or n in (*OWN_COLUMNS, "answer", GROUPS))
            )
            return Call(function, "batch", _with(asked, (*BATCH, "reference", "answer", *FACTS), anything), taken)
        if not {*BATCH} & {*asked} and ({*asked} & {"answer", *ANSWERED} or (anything and not by_name)):
            beside = ("answer",) if {*asked} & {*ANSWERED} else ()
            taken = tuple(n for n in asked if n in columns and (n not in RESERVED or n in (*OWN_COLUMNS, *beside)))
            others = ("prompt", "reference", *FACTS, *(() if "answer" in asked else ("completion",)))
            return Call(function, "names", _with(asked, others, anything), taken)
    facts = tuple(n for n in FACTS if n in by_name)
    try:
        misplaced = any(n in RESERVED and n not in at for n, at in zip(parameters, PLACES))
        if misplaced or {*BATCH, *OF_VERL} & ({*by_name} & needs):
            raise TypeError("it would get something else than it says")
        inspect.signature(function).bind("", "", None, **dict.fromkeys(facts))
    except TypeError:
        shown = str(inspect.signature(function)).partition(" ->")[0]
        raise UsageError(
            f"`{what}` is '{name}', which is defined as {name.rpartition('.')[2]}{shown}; {_expected(name, what)}"
        ) from None
    return Call(function, "positions", facts)


def _with(asked: tuple[str, ...], others: Sequence[str], anything: bool) -> tuple[str, ...]:
    return (*asked, *(n for n in others if n not in asked)) if anything else asked


def _expected(name: str, what: str) -> str:
    short = name.replace(":", ".").rpartition(".")[2]
    if what == "judge":
        return (
            f"expected `def {short}(prompt, answer, other)`, which returns the probability that `answer` is preferred, "
            f"or `def {short}(prompts, completions, references)`, which returns a list of them."
        )
    return (
        f"expected `def {short}(prompt, answer, reference)`, which returns the number for one answer, or "
        f"`def {short}(prompts, completions, **kwargs)`, which returns a list of them. Further values are given by "
        "name: ended, length, and columns of the data."
    )


# -- time --------------------------------------------------------------------------------------------------------------


class TooLong(BaseException):
    """A reward took longer than it may; no Exception, so that a reward does not take it for its own failure."""


class Watchdog:
    """Interrupts calls that take too long, by the signal SIGALRM.

    Works in the main thread on systems with that signal; elsewhere nothing is interrupted. Calls into other languages
    that neither return nor heed signals, and code that catches every exception, go on.

    Args:
        seconds: for one call; 0 for no limit.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._deadline = math.inf
        self._done: threading.Event | None = None
        self._former: Any = None

    def __enter__(self) -> Watchdog:
        main = threading.main_thread()
        if self.seconds and threading.current_thread() is main and hasattr(signal, "pthread_kill"):
            self._former, self._done = signal.signal(signal.SIGALRM, self._ring), threading.Event()
            self._thread = threading.Thread(target=self._watch, args=(self._done, main.ident), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self._done is not None:
            self._done.set()
            self._thread.join()
            self._done = None
            signal.signal(signal.SIGALRM, signal.SIG_DFL if self._former is None else self._former)

    def start(self, calls: int = 1) -> None:
        """The clock of a call runs from now; one for several answers may take as long as these together."""
        self._deadline = time.monotonic() + self.seconds * calls if self._done is not None else math.inf

    def stop(self) -> None:
        self._deadline = math.inf

    def _watch(self, done: threading.Event, thread: int) -> None:
        while not done.wait(min(max(self._deadline - time.monotonic(), 0.02), 0.25)):
            late = time.monotonic() >= self._deadline
            if late and callable(signal.getsignal(signal.SIGALRM)):  # else the signal would end the process
                signal.pthread_kill(thread, signal.SIGALRM)
                done.wait(0.5)  # it rings again where that was caught

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() >= self._deadline:
            raise TooLong
        if callable(self._former):
            self._former(number, frame)
