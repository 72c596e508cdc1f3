"""Offline policy evaluation: what a policy would collect, estimated from the episodes of another one.

The estimand is J(π) = E[Σ γ^t r_t] from the start states of the data. With w_t = Π_{k≤t} π(a_k|s_k)/π_b(a_k|s_k):

- importance sampling: mean of w_T·G; weighted: Σ w_T·G / Σ w_T (Precup et al. 2000).
- per decision: mean of Σ γ^t w_t r_t; weighted: Σ_t γ^t (Σ_i w_t r_t) / (Σ_i w_t).
- doubly robust (Jiang and Li 2016, arXiv:1511.03722): Σ_t γ^t [w_t (r_t - Q(s_t, a_t)) + w_{t-1} V(s_t)], w_{-1} = 1;
  weighted (Thomas and Brunskill 2016, arXiv:1604.00923): w_t / Σ_i w_t in place of w_t / n.

An episode that ended stays in a state without reward, and its weight keeps its last value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from offpolicy.errors import UsageError, check_range
from offpolicy.evaluation.aggregates import Interval

REPLICATES = 2_000
AT_ONCE = 1 << 22  # numbers that are drawn at a time


@dataclass(frozen=True)
class LoggedEpisodes:
    """n episodes side by side, padded to the longest, T.

    Attributes:
        reward: (n, T).
        length: steps of each, int64 (n,), ≥ 1; what stands behind counts for nothing.
        log_ratio: log π(a|s) - log π_b(a|s), nats, (n, T); None where only the direct method is asked for.
        q: Q(s, a) of the policy at the steps, (n, T), for doubly robust estimates.
        v: V(s) of the policy at the steps, (n, T).
        v_after: V of the state after the last step, (n,), 0 where the environment ended the episode.
    """

    reward: np.ndarray
    length: np.ndarray
    log_ratio: np.ndarray | None = None
    q: np.ndarray | None = None
    v: np.ndarray | None = None
    v_after: np.ndarray | None = None

    def __post_init__(self) -> None:
        shape = np.shape(self.reward)
        if len(shape) != 2 or 0 in shape:
            raise UsageError(f"`reward` has shape {shape}; expected (episodes, steps), at least one of each.")
        if np.shape(self.length) != shape[:1] or np.min(self.length) < 1 or np.max(self.length) > shape[1]:
            raise UsageError(f"`length` does not fit `reward` of shape {shape}; expected {shape[0]} numbers of 1 … T.")
        for name in ("log_ratio", "q", "v"):
            value = getattr(self, name)
            if value is not None and np.shape(value) != shape:
                raise UsageError(f"`{name}` has shape {np.shape(value)}; expected that of `reward`, {shape}.")

    @property
    def inside(self) -> np.ndarray:
        """Whether a step is one of its episode, bool (n, T)."""
        return np.arange(self.reward.shape[1]) < np.asarray(self.length)[:, None]

    def rewards(self, discount: float) -> np.ndarray:
        """γ^t r_t, 0 after the end, (n, T)."""
        return np.where(self.inside, self.reward, 0.0) * discount ** np.arange(self.reward.shape[1])

    def log_weights(self) -> np.ndarray:
        """log w_t, which keeps its value after the end, (n, T)."""
        if self.log_ratio is None:
            raise UsageError(
                "the episodes have no log-ratios, so there are no importance weights; expected `log_ratio` (n, T)."
            )
        return np.cumsum(np.where(self.inside, self.log_ratio, 0.0), 1)

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """Q(s, a) and V(s), 0 after the end, (n, T) each."""
        if self.q is None or self.v is None:
            raise UsageError("the episodes have no `q` and `v`; expected values of the policy at every step.")
        return np.where(self.inside, self.q, 0.0), np.where(self.inside, self.v, 0.0)


@dataclass(frozen=True)
class PolicyValue:
    """An estimate as a sum over k of ratios of sums over episodes: Σ_k Σ_i numerator / Σ_i denominator.

    Attributes:
        numerator, denominator: (n, K).
    """

    numerator: np.ndarray
    denominator: np.ndarray

    @property
    def value(self) -> float:
        """The estimate."""
        return float(self.of_counts(np.ones((1, len(self.numerator))))[0])

    @property
    def per_episode(self) -> np.ndarray:
        """What each episode gives by itself, (n,): the estimate of an ordinary (unweighted) estimator is their mean."""
        return (self.numerator / self.denominator).sum(1)

    def of_counts(self, counts: np.ndarray) -> np.ndarray:
        """The estimate where episode i is there counts (R, n) times: (R,)."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return (counts @ self.numerator / (counts @ self.denominator)).sum(1)

    def interval(
        self,
        level: float = 0.95,
        replicates: int = REPLICATES,
        random: np.random.Generator | np.random.RandomState | int = 0,
    ) -> Interval:
        """Percentile interval by a bootstrap over episodes, in which ratios are formed anew.

        Args:
            level: of the interval, in (0, 1).
            replicates: how many times n episodes are drawn, ≥ 1.
            random: a generator or its seed; each replicate draws ``choice(n, n)`` of a ``RandomState``.

        Raises:
            UsageError: fewer than two episodes.
        """
        check_range("replicates", replicates, 1)
        check_range("level", level, 0.0, 1.0, lower_open=True, upper_open=True)
        n = len(self.numerator)
        if n < 2:
            raise UsageError("a bootstrap of one episode has no width; expected at least two episodes.")
        random = np.random.default_rng(random) if isinstance(random, int) else random
        found, size = [], max(1, AT_ONCE // n)
        for start in range(0, replicates, size):
            count = min(size, replicates - start)
            if isinstance(random, np.random.RandomState):
                drawn = np.stack([random.choice(n, n) for _ in range(count)])
            else:
                drawn = random.integers(n, size=(count, n))
            flat = (drawn + n * np.arange(count)[:, None]).ravel()
            found.append(self.of_counts(np.bincount(flat, minlength=count * n).reshape(count, n)))
        tail = (1.0 - level) / 2.0
        values = np.concatenate(found)
        if np.isnan(values).all():
            return Interval(float("nan"), float("nan"))
        low, high = np.nanquantile(values, (tail, 1.0 - tail))
        return Interval(float(low), float(high))


def _mean(numerator: np.ndarray) -> PolicyValue:
    return PolicyValue(numerator, np.ones_like(numerator))


def _relative(log_weight: np.ndarray) -> np.ndarray:
    """Weights over their largest among the episodes: ratios stay the same, and nothing overflows."""
    largest = log_weight.max(0)
    return np.exp(log_weight - np.where(np.isfinite(largest), largest, 0.0))


def importance_sampling(episodes: LoggedEpisodes, discount: float) -> PolicyValue:
    """Ordinary importance sampling of whole episodes."""
    with np.errstate(over="ignore"):
        return _mean(np.exp(episodes.log_weights()[:, -1:]) * episodes.rewards(discount).sum(1, keepdims=True))


def weighted_importance_sampling(episodes: LoggedEpisodes, discount: float) -> PolicyValue:
    """The same, divided by the sum of the weights."""
    weight = _relative(episodes.log_weights()[:, -1:])
    return PolicyValue(weight * episodes.rewards(discount).sum(1, keepdims=True), weight)


def per_decision_importance_sampling(episodes: LoggedEpisodes, discount: float) -> PolicyValue:
    """Every reward weighed by the decisions before it."""
    with np.errstate(over="ignore"):
        return _mean((np.exp(episodes.log_weights()) * episodes.rewards(discount)).sum(1, keepdims=True))


def weighted_per_decision_importance_sampling(episodes: LoggedEpisodes, discount: float) -> PolicyValue:
    """The same, divided by the sum of the weights of all episodes at each step."""
    weight = _relative(episodes.log_weights())
    return PolicyValue(weight * episodes.rewards(discount), weight)


def direct_method(episodes: LoggedEpisodes) -> PolicyValue:
    """The mean value of the first states, without any weight."""
    return _mean(episodes.values()[1][:, :1])


def doubly_robust(episodes: LoggedEpisodes, discount: float, *, bootstrap_end: bool = True) -> PolicyValue:
    """Values corrected by weighed errors.

    Args:
        episodes: with ratios and values.
        discount: γ, in [0, 1].
        bootstrap_end: add γ^T w V(s_T) where an episode was cut, which estimates the return without a limit; without,
            that of the steps of the data.
    """
    numerator, _ = _robust_terms(episodes, discount, bootstrap_end, np.exp)
    return _mean(numerator.sum(1, keepdims=True))


def weighted_doubly_robust(episodes: LoggedEpisodes, discount: float, *, bootstrap_end: bool = True) -> PolicyValue:
    """The same with weights divided by their sum over episodes at each step; arguments as there."""
    return PolicyValue(*_robust_terms(episodes, discount, bootstrap_end, _relative))


def _robust_terms(
    episodes: LoggedEpisodes, discount: float, bootstrap_end: bool, weigh: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Terms and weights (n, 2T + 1): errors of Q by w_t, values V by w_{t-1}, and values after the last step by w_T."""
    q, v = episodes.values()
    steps = np.arange(q.shape[1])
    with np.errstate(over="ignore"):
        now = weigh(episodes.log_weights())
    before = np.concatenate([np.ones((len(q), 1)), now[:, :-1]], 1)
    error = episodes.rewards(discount) - discount**steps * q
    terms, weights = [now * error, before * discount**steps * v], [now, before]
    if bootstrap_end:
        if episodes.v_after is None:
            raise UsageError("the episodes have no `v_after`; expected the values after their last steps, (n,).")
        after = discount ** np.asarray(episodes.length) * episodes.v_after
        terms.append(now[:, -1:] * after[:, None])
        weights.append(now[:, -1:])
    return np.concatenate(terms, 1), np.concatenate(weights, 1)


ESTIMATORS: dict[str, Callable[..., PolicyValue]] = {
    "is": importance_sampling,
    "wis": weighted_importance_sampling,
    "pdis": per_decision_importance_sampling,
    "pdwis": weighted_per_decision_importance_sampling,
    "dr": doubly_robust,
    "wdr": weighted_doubly_robust,
}


class WeightHealth(NamedTuple):
    """How far importance weights can be trusted.

    Attributes:
        effective: (Σ w)² / Σ w² of the weights of whole episodes: how many equally weighed ones would tell as much.
        largest: share of the largest weight in their sum.
        episodes: how many there are.
    """

    effective: float
    largest: float
    episodes: int

    @property
    def trusted(self) -> bool:
        """Whether the effective number is at least 10 and 1 % of the episodes."""
        return self.effective >= max(10.0, 0.01 * self.episodes)


def weight_health(episodes: LoggedEpisodes) -> WeightHealth:
    """The effective number of episodes, and the share of the one with the largest weight."""
    weight = _relative(episodes.log_weights()[:, -1])
    total = weight.sum()
    if total == 0.0:  # the policy would have taken none of these episodes
        return WeightHealth(0.0, 1.0, len(weight))
    return WeightHealth(float(total**2 / (weight**2).sum()), float(weight.max() / total), len(weight))


# -- tables of few states and actions ----------------------------------------------------------------------------------


def counted_policy(state: Any, action: Any, states: int, actions: int) -> np.ndarray:
    """How often each action was taken in each state, as probabilities (states, actions); uniform where never seen."""
    counts = np.zeros((states, actions))
    np.add.at(counts, (np.asarray(state), np.asarray(action)), 1.0)
    total = counts.sum(1, keepdims=True)
    return np.where(total > 0, counts / np.maximum(total, 1.0), 1.0 / actions)


def tabular_fitted_q(
    state: Any,
    action: Any,
    reward: Any,
    next_state: Any,
    terminated: Any,
    policy: Any,
    discount: float,
    iterations: int | None = None,
) -> np.ndarray:
    """Fitted Q evaluation on tables (Le et al. 2019, arXiv:1903.08738): the reference that networks are tested against.

    Args:
        state, action, next_state: numbers, int (N,); pairs that never occur stay 0.
        reward: (N,).
        terminated: bool (N,); a row that was merely cut bootstraps.
        policy: π(a|s), (states, actions).
        discount: γ, in [0, 1).
        iterations: from 0; None for the fixed point.

    Returns:
        Q, (states, actions).
    """
    check_range("discount", discount, 0.0, 1.0, upper_open=True)
    pi = np.asarray(policy, np.float64)
    pair = np.asarray(state) * pi.shape[1] + np.asarray(action)
    count = np.bincount(pair, minlength=pi.size)
    seen = np.maximum(count, 1)
    mean_reward = np.bincount(pair, np.asarray(reward, np.float64), pi.size) / seen
    goes_on = np.where(np.asarray(terminated, bool), 0.0, 1.0)
    transition = np.zeros((pi.size, len(pi)))
    np.add.at(transition, (pair, np.asarray(next_state)), goes_on)
    step = discount * (transition / seen[:, None])[:, :, None] * pi  # (pairs, next states, next actions)
    step = step.reshape(pi.size, pi.size)
    if iterations is None:
        return np.linalg.solve(np.eye(pi.size) - step, mean_reward).reshape(pi.shape)
    q = np.zeros(pi.size)
    for _ in range(iterations):
        q = mean_reward + step @ q
    return q.reshape(pi.shape)
