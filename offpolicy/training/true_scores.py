"""What policies have collected in an environment, for comparison with estimates: evaluations of runs, single episodes,
and what a few of them buy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offpolicy.data.guard import read_json
from offpolicy.evaluation.ranking import bandit_budget
from offpolicy.evaluation.scores import has_score, normalized_score
from offpolicy.files import Table
from offpolicy.training.checkpoints import run_of
from offpolicy.training.headlines import headline


def true_score(path: Path, updates: int) -> float | None:
    """What the run's own evaluation of this update gave in an environment, None where there is none."""
    found = _own_evaluation(path, updates)
    return found and found[1]


def _own_evaluation(path: Path, updates: int) -> tuple[str, float] | None:
    """The number that judges it, with its column."""
    for row in Table(run_of(path) / "evals.csv").rows():
        judge = headline(row)
        if row.get("step") == updates and judge and isinstance(row[judge], (int, float)):
            return judge, float(row[judge])
    return None


def episode_scores(policy: Any, returns: Sequence[float]) -> list[float]:
    """The scores of episodes with these returns; the returns themselves where no score is known."""
    meta = policy.data_meta
    if returns and has_score(meta):
        return [
            float(one) for one in normalized_score(np.asarray(returns), meta["ref_min_score"], meta["ref_max_score"])
        ]
    return [float(one) for one in returns]


def kept_returns(path: Path, updates: int) -> list[float]:
    """The returns in the largest file that ``python -m offpolicy.evaluate`` has left of this update."""
    found: list[float] = []
    for file in sorted(run_of(path).glob(f"evaluation-step{updates:08d}-seed*-episodes*.json")):
        kept = read_json(file)
        returns = kept.get("returns", []) if kept.get("checkpoint") == path.name else []
        if len(returns) > len(found) and "temperature" not in file.name and isinstance(returns[0], (int, float)):
            found = returns
    return found


def unit_of(path: Path, policy: Any, episodes: Sequence[float]) -> str:
    """What the true number of a policy is: "score", "return", "success_rate", or empty where there is none."""
    if episodes:
        return "score" if has_score(policy.data_meta) else "return"
    found = _own_evaluation(path, policy.updates)
    return "" if found is None else found[0].removeprefix("eval/").removesuffix("_mean")


def behaviour_score(replay: Any, unit: str) -> float | None:
    """What the episodes of the data collected on average, in the unit of the scores; None where it has none."""
    mean = float(replay.returns().mean())
    if unit == "score" and has_score(replay.meta):
        return float(normalized_score(mean, replay.meta["ref_min_score"], replay.meta["ref_max_score"]))
    return mean if unit == "return" else None


def budget_curve(episodes: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """What a few evaluations in the environment buy, by unifloral's protocol; None below two policies with episodes.

    Args:
        episodes: scores of single episodes of each policy; the same number of each is taken.
    """
    known = [list(one) for one in episodes if one]
    if len(known) < 2:
        return None
    count = min(map(len, known))
    curve = bandit_budget(np.array([one[:count] for one in known]))
    return {name: getattr(curve, name).tolist() for name in curve._fields} | {"policies": len(known), "episodes": count}
