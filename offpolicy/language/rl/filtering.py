"""Online filters: which of the answers drawn for an iteration it learns from (option ``filter``).

``signal`` looks at whole groups as they are drawn, and asks further problems in place of those it drops. The others
look at all answers of the iteration once they have their advantages, and leave some out of every mean of the steps; the
advantages stay those of the whole groups. A function of one's own ``(answers, advantage) → kept`` is one of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offpolicy.data.replay import Replay
from offpolicy.data.texts.rollouts import OWN, select_answers
from offpolicy.errors import UsageError, check_range, nearest
from offpolicy.losses.advantages import group_statistics
from offpolicy.losses.answers import Answers
from offpolicy.registry import Spec, make, named_spec


@dataclass(frozen=True)
class Signal:
    """Drops groups whose own answers all have the same reward, and asks the next problems in their place.

    DAPO's dynamic sampling (arXiv:2503.14476, section 3.2). After so many rounds the authors' code gives up; here the
    groups that were dropped first fill the iteration up, so that its steps keep their size.

    Args:
        redraws: rounds of asking again in an iteration, ≥ 1; 10 in the authors' code.
        reward: name of the reward that is looked at; None for the weighted sum.
    """

    redraws: int = 10
    reward: str | None = None

    def __post_init__(self) -> None:
        check_range("redraws", self.redraws, 1)


@dataclass(frozen=True)
class Ended:
    """Leaves out answers that were cut at the longest length (arXiv:2503.14476, overlong filtering)."""

    def __call__(self, answers: Answers, advantage: Tensor) -> Tensor:
        return answers.ended | ~answers.own


@dataclass(frozen=True)
class Spread:
    """Keeps the groups whose rewards differ most, by their deviation; the first of equal ones.

    Args:
        keep: share of the groups, rounded down to one at least, in (0, 1]; 0.75 in SPEAR's scripts.
    """

    keep: float = 0.75

    def __post_init__(self) -> None:
        check_range("keep", self.keep, 0.0, 1.0, lower_open=True)

    def __call__(self, answers: Answers, advantage: Tensor) -> Tensor:
        names, first, index = np.unique(answers.group.numpy(), return_index=True, return_inverse=True)
        spread = group_statistics(answers.reward, answers.group, answers.own).std[torch.from_numpy(first)]
        order = torch.argsort(spread, descending=True, stable=True)[: max(1, math.floor(self.keep * len(names)))]
        return torch.isin(torch.from_numpy(index), order)


@dataclass(frozen=True)
class Variance:
    """Keeps the own answers whose advantages vary most: the subset of N with the largest variance (arXiv:2509.22115).

    Such a subset is always some of the lowest and some of the highest. The share goes linearly from ``keep`` to
    ``final``. That the shares are of all answers of an iteration is our reading; the paper's values are not known here.

    Args:
        keep: share of the own answers, rounded down to two at least, in (0, 1].
        final: share at the end, in (0, 1]; None for ``keep``.
        over: iterations from one to the other, ≥ 1.
    """

    keep: float = 0.5
    final: float | None = None
    over: int = 100

    def __post_init__(self) -> None:
        check_range("keep", self.keep, 0.0, 1.0, lower_open=True)
        check_range("final", self.keep if self.final is None else self.final, 0.0, 1.0, lower_open=True)
        check_range("over", self.over, 1)

    def __call__(self, answers: Answers, advantage: Tensor) -> Tensor:
        part = min(1.0, (answers.iteration - 1) / self.over)
        share = self.keep + part * ((self.keep if self.final is None else self.final) - self.keep)
        mine = answers.own.nonzero()[:, 0]
        chosen = most_varied(advantage[mine], max(2, math.floor(share * len(mine) + 1e-9)))
        return ~answers.own | torch.zeros_like(answers.own).index_fill(0, mine[chosen], True)


def most_varied(values: Tensor, count: int) -> Tensor:
    """Rows of the ``count`` values (all, where there are fewer) of (n,) that have the largest variance."""
    order = torch.argsort(values.double(), stable=True)
    ranked, n = values.double()[order], len(values)
    count = min(count, n)
    total, square = (torch.cat([ranked.new_zeros(1), one.cumsum(0)]) for one in (ranked, ranked.square()))
    low = torch.arange(count + 1, device=values.device)  # of the lowest, the rest are of the highest

    def of_both(sums: Tensor) -> Tensor:
        return sums[low] + sums[n] - sums[n - count + low]

    spread = of_both(square) - of_both(total).square() / max(1, count)
    cut = int(spread.argmax())
    return torch.cat([order[:cut], order[n - count + cut :]])


FILTERS: dict[str, Any] = {"signal": Signal, "ended": Ended, "spread": Spread, "variance": Variance}


class Filters:
    """The filters of a run.

    Args:
        spec: the option: None, a filter or several.
        rewards: names of the rewards.

    Attributes:
        signal: what draws again; None for nothing.
        masks: what leaves answers out, by name.

    Raises:
        UsageError: a filter is not known, stands twice, or looks at a reward that there is not.
    """

    def __init__(self, spec: Spec | Sequence[Spec] | None, rewards: Sequence[str]) -> None:
        listed: list[Any] = [] if spec is None else list(spec) if isinstance(spec, list | tuple) else [spec]
        names = [str(named_spec("filter", one).get("name")) for one in listed]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise UsageError(f"`filter` has '{twice[0]}' twice; expected different filters.")
        made = {name: make("filter", one, FILTERS) for name, one in zip(names, listed)}
        self.signal: Signal | None = next((one for one in made.values() if isinstance(one, Signal)), None)
        self.masks = {name: one for name, one in made.items() if not isinstance(one, Signal)}
        wanted = None if self.signal is None else self.signal.reward
        if wanted is not None and wanted not in rewards:
            raise UsageError(
                f"`filter` looks at the reward '{wanted}'; expected one of {', '.join(rewards)}."
                f"{nearest(wanted, rewards)}"
            )

    @property
    def redraws(self) -> int:
        """Rounds in which problems may be asked in place of groups without signal."""
        return 0 if self.signal is None else self.signal.redraws

    def _has_signal(self, group: np.ndarray, reward: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the groups, ascending, and whether the rewards of each differ."""
        names, index = np.unique(group, return_inverse=True)
        lowest, highest = np.full(len(names), np.inf), np.full(len(names), -np.inf)
        np.minimum.at(lowest, index, reward)
        np.maximum.at(highest, index, reward)
        return names, highest > lowest

    def with_signal(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """How many groups of judged rows have a signal."""
        mine = [row for row in rows if row["source"] == OWN]
        name = self.signal.reward if self.signal else None
        reward = [row["reward"] if name is None else row["parts"][name] for row in mine]
        return int(self._has_signal(np.asarray([row["slot"] for row in mine]), np.asarray(reward))[1].sum())

    def chosen(self, store: Replay, wanted: int) -> tuple[Replay, dict[str, float]]:
        """The first groups with a signal, and where they are too few those without that were drawn first.

        Args:
            store: of all that was drawn.
            wanted: groups.

        Returns:
            Their store, and facts for the metrics.
        """
        own = store.episodes["source"] == OWN
        name = self.signal.reward if self.signal else None
        reward = store.episodes["reward" if name is None else f"reward/{name}"]
        names, useful = self._has_signal(store.episodes["group"][own], reward[own])
        order = np.concatenate([names[useful], names[~useful]])[:wanted]
        left = select_answers(store, np.isin(store.episodes["group"], order))
        assert left is not None
        return left, {
            "filter/without_signal": float((~useful).sum()),
            "filter/drawn_again": float(len(names) - wanted),
            "filter/filled_up": float(max(0, wanted - int(useful.sum()))),
        }

    def kept(self, answers: Answers, advantage: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Which answers count in the means of the steps, (B,) bool, and how many each filter left out."""
        kept, facts = torch.ones_like(answers.own), {}
        for name, mask in self.masks.items():
            one = mask(answers, advantage)
            facts[f"filter/{name.rpartition('.')[2]}"] = float((~one).sum())
            kept &= one
        return kept, facts

    def facts(self) -> list[tuple[str, str]]:
        """The line of the first screen."""
        words = [f"leaves out answers by {name}" for name in self.masks]
        if self.signal is not None:
            words.insert(
                0,
                "groups whose answers are worth the same are dropped and other problems asked, in "
                f"{self.signal.redraws} rounds at most; what is asked counts as seen",
            )
        return [("filter", "; ".join(words))] if words else []
