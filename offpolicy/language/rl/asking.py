"""Which problems an iteration asks, and in which words (options ``curriculum``, ``templates`` and ``hints``).

Both are functions of the seed, the iteration, the number of a group, and, with ``curriculum`` or ``hints``, of what
earlier answers have taught; this is learned once per iteration from the answers of all processes, and saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from offpolicy.data import sampling
from offpolicy.data.texts.replaying import Recent
from offpolicy.data.texts.retelling import OtherWords, retold
from offpolicy.data.texts.rollouts import OWN
from offpolicy.errors import DataError, UsageError, check_range
from offpolicy.registry import make


@dataclass(frozen=True)
class Asked:
    """Problems that the policy is asked for an iteration, one per group.

    Args:
        iteration: that the answers are for.
        version: the iteration whose weights answer.
        seen: place of the first problem in the endless stream of problems.
        groups: problems, ≥ 1.
        first: number of the first group in its iteration.
    """

    iteration: int
    version: int
    seen: int
    groups: int
    first: int = 0


@runtime_checkable
class Curriculum(Protocol):
    """What orders the problems of an iteration; every process has one, and all of them must say the same."""

    def begin(self, problems: int) -> None:
        """Start with so many problems, of which nothing is known."""

    def order(self, seed: int, iteration: int) -> np.ndarray:
        """The problems, those to be asked first in front, (n ≥ 1,) int64; after the last comes the first again.

        It is asked several times in an iteration, and must say the same each time.
        """

    def learn(self, problem: np.ndarray, right: np.ndarray) -> None:
        """Take own answers of an iteration, group by group: problems (B,), and whether each is right, (B,) bool."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class Vade:
    """Asks the problems whose success rate, drawn from what is known of it, is nearest to ½ (VADE).

    Every problem has Beta(α, β) of its success rate p, at first Beta(1, 1). An iteration draws p of each and takes the
    largest p(1 − p), the variance of a reward of 0 or 1. Then α and β of every problem go back to 1 by ``slow``, those
    of problems that were asked by ``fast``, and the right and wrong answers are added: as the policy changes, what is
    old counts less. The two factors are our reading of the paper's decay at two scales; it was not checked.

    Args:
        slow: what is left of α − 1 and β − 1 after an iteration, in [0, 1].
        fast: the same, for problems that were asked, in [0, 1].
    """

    slow: float = 0.99
    fast: float = 0.8

    def __post_init__(self) -> None:
        check_range("slow", self.slow, 0.0, 1.0)
        check_range("fast", self.fast, 0.0, 1.0)

    def begin(self, problems: int) -> None:
        self.counts = np.ones((2, problems))  # α and β

    def order(self, seed: int, iteration: int) -> np.ndarray:
        key = sampling.keys(seed, "vade", torch.tensor([iteration], device="cpu"))
        drawn = np.random.Generator(np.random.Philox(key=int(key) & (2**64 - 1))).beta(*self.counts)
        return np.argsort(-drawn * (1 - drawn), kind="stable")

    def learn(self, problem: np.ndarray, right: np.ndarray) -> None:
        size = self.counts.shape[1]
        new = np.stack([np.bincount(problem[right], minlength=size), np.bincount(problem[~right], minlength=size)])
        self.counts = 1 + np.where(new.sum(0) > 0, self.fast, self.slow) * (self.counts - 1) + new

    def state_dict(self) -> dict[str, Any]:
        return {"counts": torch.from_numpy(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counts = np.asarray(state["counts"], np.float64)


@dataclass
class Hints:
    """Asks a problem with the beginning of its solution once the policy has failed it several times.

    After ``patience`` iterations in a row in which no answer to a problem was right, its next group is asked with one
    tier more, up to the last; an iteration with a right answer takes a tier back. The whole group is asked in the same
    words, and its log-probabilities are those behind these words.

    Args:
        tiers: shares of the words of the solution, ascending, each in (0, 1); the answer behind "####" or in \\boxed is
            never shown.
        patience: iterations of failures, ≥ 1.
        text: what the problem is put into before the template of the data, with {prompt} and {hint}.
    """

    tiers: Sequence[float] = (0.25, 0.5, 0.75)
    patience: int = 1
    text: str = "{prompt}\nHint: {hint}"

    def __post_init__(self) -> None:
        check_range("patience", self.patience, 1)
        for tier in self.tiers:
            check_range("tiers", tier, 0.0, 1.0, lower_open=True, upper_open=True)
        if not self.tiers or list(self.tiers) != sorted(set(self.tiers)):
            raise UsageError(f"`tiers` is {list(self.tiers)}; expected ascending shares, as [0.25, 0.5, 0.75].")
        if "{prompt}" not in self.text or "{hint}" not in self.text:
            raise UsageError(f"`text` is '{self.text}'; expected {{prompt}} and {{hint}} in it. Add them.")

    def words(self) -> list[OtherWords]:
        return [OtherWords(self.text, tier, "hints") for tier in self.tiers]

    def begin(self, problems: int) -> None:
        self.tier, self.failures = np.zeros(problems, np.int64), np.zeros(problems, np.int64)

    def learn(self, problem: np.ndarray, right: np.ndarray) -> None:
        asked = np.bincount(problem, minlength=len(self.tier)) > 0
        solved = np.bincount(problem[right], minlength=len(self.tier)) > 0
        self.failures = np.where(asked, np.where(solved, 0, self.failures + 1), self.failures)
        more = self.failures >= self.patience
        self.tier = np.clip(self.tier + more - solved, 0, len(self.tiers))
        self.failures[more] = 0

    def state_dict(self) -> dict[str, Any]:
        return {"tier": torch.from_numpy(self.tier), "failures": torch.from_numpy(self.failures)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tier, self.failures = (np.asarray(state[name], np.int64) for name in ("tier", "failures"))


CURRICULA = {"vade": Vade}
HINTS = {"tiers": Hints}


class AskedProblems:
    """Which problems an iteration asks, and in which words.

    Args:
        problems: of the run.
        options: of the method: ``curriculum``, ``templates`` and ``hints``.

    Attributes:
        problems: with the texts of all words.
        curriculum: what orders the problems; None for the stream.
        hints: after failures; None for none.
    """

    def __init__(self, problems: Any, options: Any) -> None:
        count = len(problems.tables["problems"])
        self.templates = list(getattr(options, "templates", None) or ())
        curriculum, hints = getattr(options, "curriculum", None), getattr(options, "hints", None)
        self.curriculum: Curriculum | None = None if curriculum is None else make("curriculum", curriculum, CURRICULA)
        self.hints: Hints | None = None if hints is None else make("hints", hints, HINTS)
        if self.curriculum is not None and not isinstance(self.curriculum, Curriculum):
            raise UsageError(
                f"`curriculum` is {curriculum!r}; expected a class with begin, order, learn, state_dict and "
                "load_state_dict, as offpolicy.language.rl.asking.Curriculum has them."
            )
        if self.hints is not None and not isinstance(self.hints, Hints):
            raise UsageError(
                f"`hints` is {hints!r}; expected 'tiers', or a class that extends offpolicy.language.rl.asking.Hints."
            )
        for one in self._learners().values():
            one.begin(count)
        words = self.hints.words() if self.hints else [OtherWords(text, 0.0, "templates") for text in self.templates]
        self.problems = retold(problems, words) if words else problems
        if self.hints:
            asked = self.problems.tables["problems/asked"]
            self.without = int((asked[:, 1:] == asked[:, :1]).any(1).sum())
            if self.without == count:
                raise DataError(
                    f"`hints` shows the beginning of solutions, and {problems.meta.get('name', 'the data')} has none "
                    "that are long enough; expected a column `solution` with words before the answer. Name it with "
                    "--data.columns, or leave the option out."
                )

    def _learners(self) -> dict[str, Any]:
        known = {"curriculum": self.curriculum, "hints": self.hints}
        return {name: one for name, one in known.items() if one is not None}

    def of(self, asked: Asked, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The problems of groups, and in which words each is asked, (G,) both; 0 for those of the data."""
        slot = asked.first + np.arange(asked.groups)
        if self.curriculum is None:
            problem = problems_in_turn(len(self.problems.tables["problems"]), asked.groups, asked.seen, seed)
        else:
            problem = self._by_curriculum(asked, seed, slot)
        return problem, self._words(seed, asked.iteration, slot, problem)

    def _by_curriculum(self, asked: Asked, seed: int, slot: np.ndarray) -> np.ndarray:
        assert self.curriculum is not None
        order, n = np.asarray(self.curriculum.order(seed, asked.iteration)), len(self.problems.tables["problems"])
        if order.ndim != 1 or not len(order) or order.dtype.kind not in "iu" or order.min() < 0 or order.max() >= n:
            raise UsageError(
                f"`curriculum` orders the problems as {order.dtype} {order.shape}, {order.ravel()[:5].tolist()} …; "
                f"expected one row of whole numbers from 0 to {n - 1}. Correct its `order`."
            )
        return order[slot % len(order)]

    def _words(self, seed: int, iteration: int, slot: np.ndarray, problem: np.ndarray) -> np.ndarray:
        if self.templates:
            key = sampling.keys(seed, "templates", torch.tensor([iteration], device="cpu"))[0]
            return 1 + (sampling.bits(key, torch.from_numpy(slot)) % len(self.templates)).numpy()
        return np.zeros_like(problem) if self.hints is None else self.hints.tier[problem]

    def learn(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the judged answers of an iteration, of all processes, group by group."""
        own = [row for row in rows if row["source"] == OWN]
        problem = np.asarray([row["problem"] for row in own], np.int64)
        right = np.asarray([row["right"] for row in own], bool)
        for one in self._learners().values():
            one.learn(problem, right)

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The share of answers that were drawn behind a hint."""
        if self.hints is None:
            return {}
        problem, words = (np.asarray([row[name] for row in rows]) for name in ("problem", "asked"))
        asked = self.problems.tables["problems/asked"]
        return {"answers/hinted": float((asked[problem, words] != asked[problem, 0]).mean())}

    def facts(self) -> list[tuple[str, str]]:
        """Lines of the first screen."""
        lines = []
        if self.curriculum is not None:
            name = type(self.curriculum).__doc__ or type(self.curriculum).__name__
            lines.append(("curriculum", name.strip().partition("\n")[0]))
        if self.templates:
            lines.append(("templates", f"{len(self.templates)}, one per group; evaluations have that of the data"))
        if self.hints is not None:
            tiers = ", ".join(f"{100 * tier:g} %" for tier in self.hints.tiers)
            text = f"{tiers} of the solution after {self.hints.patience} iteration(s) of failures; none in evaluations"
            if self.without:
                text += f"; {self.without:,} problems lack words for a tier and stay as they are there"
            lines.append(("hints", text))
        return lines

    def state_dict(self) -> dict[str, Any]:
        """What was learned, and the words, by whose number answers are stored."""
        words = [list(one) for one in self.hints.words()] if self.hints else self.templates
        return {"words": words, **{name: one.state_dict() for name, one in self._learners().items()}}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint.

        Raises:
            UsageError: it was written with other words, or another curriculum.
        """
        mine, state = self.state_dict(), state or {"words": []}
        if mine["words"] != state["words"] or mine.keys() != state.keys():
            raise UsageError(
                "the checkpoint was written with other `templates`, `hints` or `curriculum`, by which its answers are "
                "kept; expected the same. Go on with those of the run, or start a new one."
            )
        for name, one in self._learners().items():
            one.load_state_dict(state[name])


def problems_in_turn(n: int, count: int, seen: int, seed: int) -> np.ndarray:
    """The next of n problems in an endless stream in which every one comes once per pass, (count,)."""
    passes = range(seen // n, (seen + count - 1) // n + 1)
    stream = np.concatenate([sampling.permutation(seed, p, n).numpy() for p in passes])
    return stream[seen - n * passes[0] :][:count]


def check_asking(options: Any, rule: Recent) -> None:
    """Raise :class:`UsageError` where problems cannot be chosen or put into other words."""
    templates = options.templates
    if templates is not None and (isinstance(templates, str) or not templates):
        raise UsageError(f"`templates` is {templates!r}; expected a list of texts with {{prompt}} in each.")
    for text in templates or ():
        if "{prompt}" not in str(text):
            raise UsageError(f"`templates` has '{text}'; expected a text with {{prompt}} in it. Add it.")
    words = [name for name in ("templates", "hints") if options[name] is not None]
    if len(words) == 2:
        raise UsageError("`templates` and `hints` are both given, and a group has one prompt; expected one of them.")
    for name in words:
        if options.demonstrations:
            raise UsageError(
                f"`{name}` changes the prompt, and `demonstrations` are answers to the prompt of the data; expected "
                "one of them. Pass --model.demonstrations 0, or leave it out."
            )
        if not rule.draws:
            raise UsageError(
                f"`{name}` asks a problem in several words, and `replay` '{getattr(rule, 'name', type(rule).__name__)}'"
                " puts stored answers into other groups of the problem; expected one of them."
            )
    for name in ("hints", "curriculum"):
        if options[name] is not None and options.lag:
            raise UsageError(
                f"`{name}` follows from the answers of the iteration before, and `lag` is {options.lag}, which asks "
                "before they are there; expected 0. Pass --model.lag 0."
            )
