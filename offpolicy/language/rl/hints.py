"""Hints beside problems that the policy fails: the beginning of the solution, or a column of the data (``hints``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from offpolicy.compute import processes
from offpolicy.data.texts.retelling import OtherWords
from offpolicy.data.texts.rollouts import OWN
from offpolicy.errors import UsageError, check_range, check_whole_number
from offpolicy.language.rl.engine import FurtherAnswers, Request, Stop
from offpolicy.language.rl.rows import answer_row

BEHIND_HINT = 1 << 24  # times the tier: added to the number of a group for a single answer behind a hint


@dataclass
class Hints:
    """What is known of the failures at each problem, and the words in which hints are shown.

    Args:
        tiers: of hints, the least first: shares of the words of the solution, ascending, each in (0, 1), of which the
            answer behind "####" or in \\boxed is never shown; or names of columns of the data that hold hints.
        patience: iterations in a row in which no answer to a problem was right, ≥ 1.
        text: what the problem is put into before the template of the data, with {prompt} and {hint}.
    """

    tiers: Sequence[float | str] = (0.25, 0.5, 0.75)
    patience: int = 1
    text: str = "{prompt}\nHint: {hint}"

    what: ClassVar[str] = ""  # for the first screen

    def __post_init__(self) -> None:
        check_whole_number("patience", self.patience, 1)
        if isinstance(self.tiers, str) or not isinstance(self.tiers, Sequence):
            raise UsageError(
                f"`tiers` is {self.tiers!r}; expected a list of shares, as [0.25, 0.5, 0.75], or of columns, as [idea]."
            )
        shares = [tier for tier in self.tiers if not isinstance(tier, str)]
        for tier in shares:
            check_range("tiers", tier, 0.0, 1.0, lower_open=True, upper_open=True)
        if not self.tiers or len(set(self.tiers)) < len(self.tiers) or shares != sorted(shares):
            raise UsageError(
                f"`tiers` is {list(self.tiers)}; expected ascending shares, as [0.25, 0.5, 0.75], or columns."
            )
        if not isinstance(self.text, str) or "{prompt}" not in self.text or "{hint}" not in self.text:
            raise UsageError(f"`text` is '{self.text}'; expected {{prompt}} and {{hint}} in it. Add them.")

    def words(self) -> list[OtherWords]:
        return [OtherWords(self.text, tier, "hints") for tier in self.tiers]

    def begin(self, problems: int) -> None:
        """Start with so many problems, of which nothing is known."""
        self.failures = np.zeros(problems, np.int64)

    def tier_of(self, problem: np.ndarray) -> np.ndarray:
        """The tier that groups of these problems are asked with, (G,); 0 for no hint."""
        return np.zeros_like(problem)

    def learn(self, problem: np.ndarray, right: np.ndarray) -> None:
        """Take own answers of an iteration: their problems (B,), and whether each is right, (B,) bool."""
        asked, solved = self._asked(problem), self._asked(problem[right])
        self.failures = np.where(asked, np.where(solved, 0, self.failures + 1), self.failures)

    def _asked(self, problem: np.ndarray) -> np.ndarray:
        return np.bincount(problem, minlength=len(self.failures)) > 0

    def state_dict(self) -> dict[str, Any]:
        return {"failures": torch.from_numpy(self.failures)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.failures = np.array(state["failures"], np.int64)


@dataclass
class Tiers(Hints):
    """Asks whole groups behind a hint.

    After ``patience`` iterations of failures the next group of a problem is asked with one tier more, up to the last;
    an iteration with a right answer takes a tier back. All answers of a group are drawn behind the same words, and
    their log-probabilities are those behind these words.
    """

    what: ClassVar[str] = "to whole groups"

    def begin(self, problems: int) -> None:
        super().begin(problems)
        self.tier = np.zeros(problems, np.int64)

    def tier_of(self, problem: np.ndarray) -> np.ndarray:
        return self.tier[problem]

    def learn(self, problem: np.ndarray, right: np.ndarray) -> None:
        super().learn(problem, right)
        more = self.failures >= self.patience
        self.tier = np.clip(self.tier + more - self._asked(problem[right]), 0, len(self.tiers))
        self.failures[more] = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "tier": torch.from_numpy(self.tier)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.tier = np.array(state["tier"], np.int64)


@dataclass
class Scaffold(Hints):
    """Puts a right answer that was drawn behind a hint in the place of a failed one (Scaf-GRPO, arXiv:2510.19807).

    A group is drawn without a hint. Where none of its answers is right, and the problem has failed ``patience``
    iterations with this one, an answer is drawn behind each tier in turn until one is right, which takes the place of
    the last failed answer of the group. Its log-probabilities are those behind the hint; its reward counts in the
    group. What is known of a problem is of the answers without a hint alone.
    """

    patience: int = 2
    what: ClassVar[str] = "to one answer of a failed group, until it is right"

    def wanted(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
        """Number and problem of the groups of judged rows that want help, in ascending order."""
        groups = {row["slot"]: row["problem"] for row in rows if row["source"] == OWN}
        helped = {row["slot"] for row in rows if row["source"] == OWN and row["right"]}
        waits = self.failures + 1 >= self.patience
        return sorted((slot, problem) for slot, problem in groups.items() if slot not in helped and waits[problem])


def with_help(rows: Sequence[dict[str, Any]], hinted: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Judged rows in which right hinted answers stand in the place of the last answer of their groups."""
    found, last = list(rows), {row["slot"]: i for i, row in enumerate(rows) if row["source"] == OWN}
    for row in hinted:
        if row["right"]:
            found[last[row["slot"]]] = row
    return found


def helped(
    answering: FurtherAnswers, rows: list[dict[str, Any]], hinted: list[dict[str, Any]], k: int, seed: int, stop: Stop
) -> list[dict[str, Any]]:
    """Judged rows, in failed groups with an answer behind a hint; all that are drawn so are added to ``hinted``."""
    for tier in range(1, answering.asking.scaffolds + 1):
        wanted = answering.asking.wanted_help(rows, tier)
        if not wanted:
            continue
        mine = wanted[processes.rank() :: processes.world_size()]
        requests = [Request(answering.prompt(problem, tier), slot + tier * BEHIND_HINT, 1) for slot, problem in mine]
        drawn = zip(mine, answering.generated(requests, k, seed, stop))
        made = [answer_row(slot, problem, OWN, some[0], k, asked=tier) for (slot, problem), some in drawn]
        judged = answering.judged(made)
        rows = with_help(rows, judged)
        hinted += judged
    return rows


def check_hinted_rewards(hints: Hints | None, comparing: Sequence[str]) -> None:
    """Raise :class:`UsageError` where rewards compare the answers of a group and single answers are hinted."""
    if isinstance(hints, Scaffold) and comparing:
        raise UsageError(
            f"`hints` is 'scaffold', which judges an answer by itself, and the reward {comparing[0]} compares the "
            "answers of a group; expected a reward of single answers, or other hints. Pass --model.hints tiers."
        )


HINTS = {"tiers": Tiers, "scaffold": Scaffold}
