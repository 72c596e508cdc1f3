"""Statistics of many runs: one number for a method over tasks and seeds, and how sure it is.

Scores are a matrix (n, m) of n runs (seeds) by m tasks, normalised so that 1 is the reference. Aggregates and their
stratified bootstrap are those of Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical
Precipice" (arXiv:2108.13264). With few seeds take Student's interval for each task and the bootstrap over a suite: a
percentile bootstrap of three seeds that claims 95 % covers 75 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

from offpolicy.errors import UsageError, check_range
from offpolicy.evaluation.scores import interval

Scores = np.ndarray
Statistic = Callable[..., Any]  # of matrices (…, n, m), each → (…)
BLOCK = 1 << 22  # numbers that are drawn at a time


def checked_scores(scores: Any, name: str = "scores") -> Scores:
    """Scores as a float64 matrix (n, m); a vector is the runs of one task.

    Raises:
        UsageError: no run, no task, or a score that is not finite.
    """
    found = np.asarray(scores, np.float64)
    found = found[:, None] if found.ndim == 1 else found
    if found.ndim != 2 or 0 in found.shape:
        raise UsageError(f"`{name}` has shape {found.shape}; expected (runs, tasks), at least one of each.")
    if not np.isfinite(found).all():
        run, task = np.argwhere(~np.isfinite(found))[0]
        raise UsageError(
            f"`{name}` has {found[run, task]} for run {run} of task {task}; expected finite scores. Leave that run out "
            "of all tasks, or finish it."
        )
    return found


# -- one number of a matrix, over its last two axes --------------------------------------------------------------------


def mean_score(scores: Scores) -> Any:
    """Mean over tasks of the mean over runs: (…, n, m) → (…)."""
    return np.mean(scores, (-2, -1))


def median_score(scores: Scores) -> Any:
    """Median over tasks of the mean over runs: (…, n, m) → (…)."""
    return np.median(np.mean(scores, -2), -1)


def interquartile_mean(scores: Scores) -> Any:
    """IQM: the mean of the middle half of all n·m scores together, of which ⌊n·m/4⌋ are dropped at each end.

    (…, n, m) → (…).
    """
    ordered = np.sort(np.reshape(scores, (*np.shape(scores)[:-2], -1)), -1)
    dropped = ordered.shape[-1] // 4
    return np.mean(ordered[..., dropped : ordered.shape[-1] - dropped], -1)


def optimality_gap(scores: Scores, gamma: float = 1.0) -> Any:
    """How far scores stay below gamma: γ - mean of min(x, γ), lower is better: (…, n, m) → (…)."""
    return gamma - np.mean(np.minimum(scores, gamma), (-2, -1))


def performance_profile(scores: Scores, thresholds: Sequence[float] | np.ndarray, *, of_tasks: bool = False) -> Any:
    """The share of scores that lie above each threshold, strictly: (…, n, m) → (…, thresholds).

    Args:
        scores: of runs by tasks.
        thresholds: τ, in the unit of the scores.
        of_tasks: compare the mean over runs of each task instead of every score.
    """
    if of_tasks:
        scores = np.mean(scores, -2, keepdims=True)
    above = np.asarray(scores)[..., None] > np.asarray(thresholds, np.float64)
    return np.mean(above, (-3, -2))


def improvement_per_task(x: Scores, y: Scores) -> Any:
    """P(X > Y) of every task, ties as one half: (…, n, m) and (…, k, m) → (…, m)."""
    difference = np.asarray(x)[..., :, None, :] - np.asarray(y)[..., None, :, :]
    return np.mean((np.sign(difference) + 1.0) / 2.0, (-3, -2))


def probability_of_improvement(x: Scores, y: Scores) -> Any:
    """How likely a run of X beats a run of Y on a task, mean over tasks: (…, n, m) and (…, k, m) → (…)."""
    return np.mean(improvement_per_task(x, y), -1)


AGGREGATES: dict[str, Statistic] = {
    "mean": mean_score,
    "median": median_score,
    "IQM": interquartile_mean,
    "optimality gap": optimality_gap,
}

# -- how sure ----------------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A lower and an upper end, in the unit of what is estimated."""

    low: Any
    high: Any


def bootstrap_interval(
    statistic: Statistic,
    *matrices: Any,
    replicates: int = 20_000,
    level: float = 0.95,
    random: np.random.Generator | np.random.RandomState | int = 0,
) -> Interval:
    """Percentile interval of a statistic by the stratified bootstrap: runs are drawn again for every task by itself.

    Args:
        statistic: of one matrix, or of as many as are given, over their last two axes.
        matrices: scores (n, m); several methods may have different numbers of runs.
        replicates: how many times runs are drawn, ≥ 1.
        level: of the interval, in (0, 1).
        random: a generator, or its seed. A ``RandomState`` draws ``choice(n, (n, m))`` for each replicate, and
            of several matrices in their order, as rliable does.

    Raises:
        UsageError: fewer than two runs, which are always drawn alike, or scores that are not finite.
    """
    check_range("replicates", replicates, 1)
    check_range("level", level, 0.0, 1.0, lower_open=True, upper_open=True)
    found = [checked_scores(matrix) for matrix in matrices]
    if any(len(matrix) < 2 for matrix in found):
        raise UsageError("a bootstrap of one run has no width; expected at least two runs. Train more seeds.")
    if isinstance(random, int):
        random = np.random.default_rng(random)
    at_once = max(1, BLOCK // sum(matrix.size for matrix in found))
    values = []
    for start in range(0, replicates, at_once):
        count = min(at_once, replicates - start)
        values.append(statistic(*_drawn(found, count, random)))
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(np.concatenate(values), (tail, 1.0 - tail), axis=0)
    return Interval(low, high)


def bootstrap_band(
    statistic: Statistic,
    curves: Any,
    *,
    replicates: int = 2_000,
    level: float = 0.95,
    random: np.random.Generator | int = 0,
) -> Interval:
    """The interval of a statistic at every time of a curve; one drawing of runs serves all times.

    Args:
        statistic: of matrices (…, n, m), over their last two axes.
        curves: scores of n runs by m tasks by T times, (n, m, T).
        replicates, level, random: as of :func:`bootstrap_interval`.

    Returns:
        Ends of shape (T,), each that of :func:`bootstrap_interval` for the scores of its time.

    Raises:
        UsageError: as :func:`bootstrap_interval`.
    """
    x = np.asarray(curves, np.float64)
    if x.ndim != 3 or len(x) < 2 or not np.isfinite(x).all():
        raise UsageError(
            f"`curves` has shape {x.shape}; expected finite scores (runs, tasks, times) of at least two runs."
        )
    random = np.random.default_rng(random) if isinstance(random, int) else random
    rows = random.integers(len(x), size=(replicates, *x.shape[:2]))
    tail = (1.0 - level) / 2.0
    ends = [
        np.quantile(statistic(np.take_along_axis(x[None, :, :, t], rows, -2)), (tail, 1.0 - tail), axis=0)
        for t in range(x.shape[-1])
    ]
    return Interval(*np.array(ends).reshape(-1, 2).T)


def _drawn(matrices: list[Scores], count: int, random: np.random.Generator | np.random.RandomState) -> list[Scores]:
    """Each matrix with its runs drawn again, ``count`` times: (count, n, m)."""
    if isinstance(random, np.random.RandomState):  # replicate by replicate, to draw what others draw
        rows = [[random.choice(len(x), x.shape) for x in matrices] for _ in range(count)]
        chosen = [np.stack(some) for some in zip(*rows, strict=True)]
    else:
        chosen = [random.integers(len(x), size=(count, *x.shape)) for x in matrices]
    return [np.take_along_axis(x[None], some, -2) for x, some in zip(matrices, chosen, strict=True)]


def student_interval(values: Any, level: float = 0.95) -> Interval:
    """Student's interval of a mean: x̄ ± t·s/√n, s with n - 1.

    Raises:
        UsageError: fewer than two values.
    """
    x = np.asarray(values, np.float64)
    if x.size < 2:
        raise UsageError(f"an interval needs at least two values; found {x.size}. Train more seeds.")
    half = interval(x, level)
    return Interval(float(x.mean() - half), float(x.mean() + half))


class Difference(NamedTuple):
    """Welch's comparison of two means.

    Attributes:
        mean: of the first less the mean of the second.
        low, high: ends of its interval.
        t: Welch's statistic.
        df: degrees of freedom.
        p: two-sided, of no difference.
    """

    mean: float
    low: float
    high: float
    t: float
    df: float
    p: float


def welch_difference(x: Any, y: Any, level: float = 0.95) -> Difference:
    """The difference of two means by Welch's test: two methods share neither weights nor updates, so no pairs of seeds.

    Where all values of both equal their means, the difference is exact: p is 1 for a difference of 0, else 0.

    Raises:
        UsageError: fewer than two values of one.
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if min(a.size, b.size) < 2:
        raise UsageError(f"a comparison needs two values of each; found {a.size} and {b.size}. Train more seeds.")
    mean = float(a.mean() - b.mean())
    v, w = a.var(ddof=1) / a.size, b.var(ddof=1) / b.size
    if v + w == 0.0:
        return Difference(
            mean, mean, mean, math.copysign(math.inf, mean) if mean else 0.0, math.inf, float(mean == 0.0)
        )
    df = float((v + w) ** 2 / (v**2 / (a.size - 1) + w**2 / (b.size - 1)))
    error = float(np.sqrt(v + w))
    half = float(stdtrit(df, 0.5 + level / 2.0)) * error
    return Difference(mean, mean - half, mean + half, mean / error, df, float(2.0 * stdtr(df, -abs(mean / error))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for several comparisons: adjusted p-values, in the order given."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    found = np.empty_like(adjusted)
    found[order] = adjusted
    return found.tolist()


# -- scores against the number of evaluations --------------------------------------------------------------------------


def expected_online_performance(scores: Any, *, replacement: bool = False) -> np.ndarray:
    """The best score to expect when k of N policies are tried in the environment, k = 1 … N.

    Kurenkov and Kolesnikov, "Showing Your Offline Reinforcement Learning Work" (arXiv:2110.04156).

    Args:
        scores: (N,), one per policy.
        replacement: draw policies with replacement, as ReBRAC's code does; otherwise k distinct ones.
    """
    v = np.sort(checked_scores(scores)[:, 0])
    n = v.size
    i, k = np.arange(1, n + 1)[None], np.arange(1, n + 1)[:, None]
    if replacement:
        return (v * ((i / n) ** k - ((i - 1) / n) ** k)).sum(-1)
    share = np.zeros((n, n))  # C(i - 1, k - 1) / C(n, k), by its recursion in i from i = n down
    share[:, -1] = np.arange(1, n + 1) / n
    for j in range(n - 1, 0, -1):
        share[:, j - 1] = share[:, j] * np.maximum(j - k[:, 0] + 1, 0) / j
    return share @ v
