"""How well estimates rank policies, against their true values; and what a few evaluations in the environment buy.

Measures of a ranking are those of Fu et al., "Benchmarks for Deep Off-Policy Evaluation" (arXiv:2103.16596), and of
Kiyohara et al., "Towards Assessing and Benchmarking Risk-Return Tradeoff of Off-Policy Evaluation" (arXiv:2311.18207).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

from offpolicy.errors import UsageError, check_range
from offpolicy.evaluation.aggregates import Interval, checked_scores


def _pair(true: Any, estimate: Any) -> tuple[np.ndarray, np.ndarray]:
    a, b = checked_scores(true, "true")[:, 0], checked_scores(estimate, "estimate")[:, 0]
    if len(a) != len(b):
        raise UsageError(f"there are {len(a)} true values and {len(b)} estimates; expected one of each per policy.")
    return a, b


def spearman(true: Any, estimate: Any) -> float:
    """Spearman's rank correlation with middle ranks for ties, in [-1, 1]; NaN where all of one are equal.

    Args:
        true: values of K policies, (K,).
        estimate: of the same policies, (K,).
    """
    a, b = _pair(true, estimate)
    return float(_correlations(a[None], b[None])[0])


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each row, (R, K) and (R, K) → (R,)."""
    x, y = (rankdata(values, axis=1) - (values.shape[1] + 1) / 2.0 for values in (a, b))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))


def spearman_interval(
    true: Any, estimate: Any, level: float = 0.95, replicates: int = 2_000, random: int = 0
) -> Interval:
    """Percentile interval of Spearman's correlation by a bootstrap over policies; NaN below four of them."""
    a, b = _pair(true, estimate)
    if len(a) < 4:
        return Interval(float("nan"), float("nan"))
    generator = np.random.default_rng(random)
    drawn = generator.integers(len(a), size=(replicates, len(a)))
    found = _correlations(a[drawn], b[drawn])
    found = found[~np.isnan(found)]
    if not len(found):
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(found, ((1.0 - level) / 2.0, (1.0 + level) / 2.0))
    return Interval(float(low), float(high))


def best_by_estimate(estimate: Any, k: int | None = None) -> np.ndarray:
    """The places of the k policies with the largest estimates, best first, ties in the order given, int64 (k,)."""
    values = checked_scores(estimate, "estimate")[:, 0]
    k = len(values) if k is None else k
    if not 1 <= k <= len(values):
        raise UsageError(f"`k` is {k} of {len(values)} policies; expected 1 … {len(values)}.")
    return np.argsort(-values, kind="stable")[:k]


class ChosenPolicies(NamedTuple):
    """The true values of the k policies with the largest estimates.

    Attributes:
        k: how many.
        best, worst, mean, std: of their true values, the deviation with 1/k.
        regret: best of all policies less the best of the chosen ones.
        normalised_regret: the same over the span of all policies, in [0, 1]; 0 where all are equal.
        sharpe: SharpeRatio@k, the gain of the best over the behaviour, at least 0, over the deviation; NaN for k = 1,
            without a value of the behaviour, and where all chosen are equal.
    """

    k: int
    best: float
    worst: float
    mean: float
    std: float
    regret: float
    normalised_regret: float
    sharpe: float


def chosen_policies(true: Any, estimate: Any, k: int, behaviour: float | None = None) -> ChosenPolicies:
    """What choosing k policies by their estimates gives.

    Args:
        true: values of K policies, (K,), by playing.
        estimate: of the same policies, (K,).
        k: in 1 … K.
        behaviour: value of the policy that collected the data, in the same unit.
    """
    a, b = _pair(true, estimate)
    chosen = a[best_by_estimate(b, k)]
    regret, span = float(a.max() - chosen.max()), float(a.max() - a.min())
    std = float(chosen.std())
    sharpe = float("nan")
    if behaviour is not None and k > 1 and std > 0:
        sharpe = max(float(chosen.max()) - behaviour, 0.0) / std
    return ChosenPolicies(
        k,
        float(chosen.max()),
        float(chosen.min()),
        float(chosen.mean()),
        std,
        regret,
        regret / span if span > 0 else 0.0,
        sharpe,
    )


def regret_at_k(true: Any, estimate: Any, k: int, *, normalised: bool = False) -> float:
    """The best true value of all policies less that of the k best by estimate; ``normalised`` by the span of all."""
    found = chosen_policies(true, estimate, k)
    return found.normalised_regret if normalised else found.regret


def sharpe_ratio_at_k(true: Any, estimate: Any, k: int, behaviour: float) -> float:
    """SharpeRatio@k (arXiv:2311.18207, Eq. 6), with the gain over the behaviour cut at 0; k ≥ 2."""
    return chosen_policies(true, estimate, k, behaviour).sharpe


# -- evaluations in the environment ------------------------------------------------------------------------------------


class BudgetCurve(NamedTuple):
    """What the policy chosen after so many evaluations is worth.

    Attributes:
        pulls: number of evaluations, 1 … N.
        mean: true value of the chosen policy, mean over trials, (N,).
        low, high: interval of that mean over trials, (N,). It narrows with the trials and says nothing of how training
            runs differ.
    """

    pulls: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def bandit_budget(
    scores: Any,
    *,
    max_pulls: int = 200,
    subsample: int | None = 8,
    trials: int = 1_000,
    alpha: float = 2.0,
    replicates: int = 1_000,
    random: np.random.Generator | int = 17,
) -> BudgetCurve:
    """unifloral's protocol (Jackson et al. 2025, arXiv:2504.11453): UCB over policies, one episode a pull.

    In each trial some policies are drawn, and UCB with the bonus sqrt(α·ln(total)/n) chooses whose episode is played
    next. After every pull the policy with the highest mean so far counts with its true value, the mean over all its
    episodes. Differs from the authors' code where means are 0 or negative: a policy without an episode is never the
    chosen one.

    Args:
        scores: of episodes, (policies, episodes), normalised to 100.
        max_pulls: evaluations in a trial, ≥ 1.
        subsample: policies drawn for each trial; None for all, in another order each time.
        trials: how many, ≥ 1.
        alpha: α, ≥ 0.
        replicates: of the bootstrap over trials.
        random: a generator or its seed.
    """
    found = checked_scores(scores)
    for name, value, least in (("max_pulls", max_pulls, 1), ("trials", trials, 1), ("alpha", alpha, 0.0)):
        check_range(name, value, least)
    generator = np.random.default_rng(random) if isinstance(random, int) else random
    size = min(subsample or len(found), len(found))
    check_range("subsample", size, 1)
    arms = np.argsort(generator.random((trials, len(found))), 1)[:, :size]
    true = found.mean(1)
    total, count, trial = np.zeros((trials, size)), np.zeros((trials, size)), np.arange(trials)
    chosen = np.empty((max_pulls, trials))
    for pull in range(max_pulls):
        mean = np.where(count > 0, total / np.maximum(count, 1.0), 0.0)
        bonus = np.sqrt(alpha * np.log(pull + 1.0) / np.maximum(count, 1.0))
        ucb = np.where(count > 0, mean + bonus, np.inf)
        tied = ucb == ucb.max(1, keepdims=True)
        arm = np.where(tied, generator.random((trials, size)), -1.0).argmax(1)
        episode = generator.integers(found.shape[1], size=trials)
        total[trial, arm] += found[arms[trial, arm], episode]
        count[trial, arm] += 1.0
        best = np.where(count > 0, total / np.maximum(count, 1.0), -np.inf).argmax(1)
        chosen[pull] = true[arms[trial, best]]
    drawn = generator.integers(trials, size=(replicates, trials))
    weight = np.stack([np.bincount(row, minlength=trials) for row in drawn]) / trials
    low, high = np.quantile(chosen @ weight.T, (0.025, 0.975), axis=1)
    return BudgetCurve(np.arange(1, max_pulls + 1), chosen.mean(1), low, high)
