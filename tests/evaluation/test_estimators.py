"""Estimators against answers known from a Markov chain of two states, computed apart from this library."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from known_episodes import EPISODES, S2, A, R, S

from offpolicy.errors import UsageError
from offpolicy.evaluation.estimators import (
    ESTIMATORS,
    LoggedEpisodes,
    PolicyValue,
    counted_policy,
    direct_method,
    doubly_robust,
    importance_sampling,
    per_decision_importance_sampling,
    tabular_fitted_q,
    weight_health,
    weighted_doubly_robust,
    weighted_importance_sampling,
    weighted_per_decision_importance_sampling,
)

GAMMA = 0.9
TARGET, BEHAVIOUR = np.array([[0.2, 0.8], [0.4, 0.6]]), np.array([[0.5, 0.5], [0.7, 0.3]])
Q = np.array([[1.0, 1.2], [0.8, 2.0]])


def logged(behaviour: np.ndarray = BEHAVIOUR, padding: float = 0.0) -> LoggedEpisodes:
    n, longest = len(EPISODES), 4
    reward, ratio, q, v = (np.full((n, longest), padding) for _ in range(4))
    after = np.zeros(n)
    value = (TARGET * Q).sum(1)
    for i, episode in enumerate(EPISODES):
        for t, (s, a, r, s2) in enumerate(episode):
            reward[i, t], q[i, t], v[i, t] = r, Q[s, a], value[s]
            ratio[i, t] = np.log(TARGET[s, a]) - np.log(behaviour[s, a])
            after[i] = 0.0 if s2 == 2 else value[s2]
    return LoggedEpisodes(reward, np.array([len(e) for e in EPISODES]), ratio, q, v, after)


KNOWN = {  # with the true behaviour, and with the one counted in the same episodes
    importance_sampling: (0.560502563265, 0.957248352985),
    weighted_importance_sampling: (0.818891123117, 1.006918421451),
    per_decision_importance_sampling: (0.609357746939, 0.978228615680),
    weighted_per_decision_importance_sampling: (0.787968074728, 0.992613022706),
}


@pytest.mark.parametrize("estimator", KNOWN, ids=lambda f: f.__name__)
def test_importance_sampling(estimator: object) -> None:
    counted = counted_policy(S, A, 2, 2)
    np.testing.assert_allclose(counted, [[9 / 14, 5 / 14], [5 / 6, 1 / 6]])
    for behaviour, known in zip((BEHAVIOUR, counted), KNOWN[estimator], strict=True):  # type: ignore[index]
        for padding in (0.0, 7.0):  # what stands behind an episode counts for nothing
            found = estimator(logged(behaviour, padding), GAMMA)  # type: ignore[operator]
            assert found.value == pytest.approx(known, abs=1e-11)


def test_health_of_weights() -> None:
    health = weight_health(logged())
    assert health.effective == pytest.approx(4.056745844606, abs=1e-11)
    weights = [4 / 7, 0.0256, 0.228571428571, 2, 0.208979591837, 0.256, 0.585142857143, 1.6]
    assert health.largest == pytest.approx(2 / sum(weights), rel=1e-9) and not health.trusted
    assert weight_health(logged(counted_policy(S, A, 2, 2))).effective == pytest.approx(3.066144637106, abs=1e-11)
    np.testing.assert_allclose(np.exp(logged().log_weights()[:, -1]), weights, rtol=1e-10)


def test_doubly_robust() -> None:
    episodes = logged(padding=3.0)
    assert direct_method(episodes).value == pytest.approx(1.25, abs=1e-12)
    for estimator, cut, end in (
        (doubly_robust, 1.012314997551, 1.107574933159),
        (weighted_doubly_robust, 0.926582172161, 1.065756407518),
    ):
        assert estimator(episodes, GAMMA, bootstrap_end=False).value == pytest.approx(cut, abs=1e-11)
        assert estimator(episodes, GAMMA).value == pytest.approx(end, abs=1e-11)
    counted = logged(counted_policy(S, A, 2, 2))
    assert doubly_robust(counted, GAMMA, bootstrap_end=False).value == pytest.approx(0.886043863040, abs=1e-11)
    assert weighted_doubly_robust(counted, GAMMA, bootstrap_end=False).value == pytest.approx(0.875580582039, abs=1e-11)


def test_each_episode() -> None:
    per_decision = [-0.114285714286, 0.3072512, 0.158857142857, 4, 0.110285061224, 0.272, 0.140754285714, 0]
    robust = [0.948571428571, 1.47480576, 1.301485714286, 1.52, 1.431033991837, 1.207104, 0.975519085714, -0.76]
    np.testing.assert_allclose(per_decision_importance_sampling(logged(), GAMMA).per_episode, per_decision, atol=1e-11)
    np.testing.assert_allclose(doubly_robust(logged(), GAMMA, bootstrap_end=False).per_episode, robust, atol=1e-11)


def test_intervals_draw_episodes_and_form_ratios_anew() -> None:
    for found, low, high in (
        (per_decision_importance_sampling(logged(), GAMMA), 0.054893926531, 1.612030475918),
        (weighted_importance_sampling(logged(), GAMMA), 0.025037219101, 1.645062404353),
        (doubly_robust(logged(), GAMMA, bootstrap_end=False), 0.479222848163, 1.371066090449),
    ):
        exact = found.interval(random=np.random.RandomState(0))
        assert exact == pytest.approx((low, high), abs=1e-11)
        assert found.interval(replicates=20_000) == pytest.approx((low, high), abs=0.1)
    constant = PolicyValue(np.full((5, 1), 2.0), np.ones((5, 1)))
    assert constant.interval() == (2.0, 2.0)
    with pytest.raises(UsageError, match="one episode"):
        PolicyValue(np.ones((1, 1)), np.ones((1, 1))).interval()


def test_fitted_q_on_tables() -> None:
    for iterations, known in (
        (1, [0.5, 0, -0.2, 2]),
        (2, [0.692, 0.6048, 0.0376, 2]),
        (10, [1.304282537763, 0.721921101244, 0.342407417304, 2]),
        (None, [1.304488040849, 0.721983337812, 0.342515452835, 2]),
    ):
        found = tabular_fitted_q(S, A, R, np.minimum(S2, 1), S2 == 2, TARGET, GAMMA, iterations)
        np.testing.assert_allclose(found.ravel(), known, atol=1e-11)
    starts = [episode[0][0] for episode in EPISODES]
    assert (TARGET * found).sum(1)[starts].mean() == pytest.approx(0.963114754098, abs=1e-11)
    with pytest.raises(UsageError, match="discount"):
        tabular_fitted_q(S, A, R, S2, S2 == 2, TARGET, 1.0)


# -- what must hold for any data -------------------------------------------------------------------------------------


def test_the_same_policy_is_worth_its_mean_return() -> None:
    episodes = replace(logged(), log_ratio=np.zeros((8, 4)))
    mean = episodes.rewards(GAMMA).sum(1).mean()
    for name in ("is", "wis", "pdis", "pdwis"):
        assert ESTIMATORS[name](episodes, GAMMA).value == pytest.approx(mean, abs=1e-12)


def test_doubly_robust_without_values_is_per_decision() -> None:
    zero = replace(logged(), q=np.zeros((8, 4)), v=np.zeros((8, 4)), v_after=np.zeros(8))
    for robust, plain in (
        (doubly_robust, per_decision_importance_sampling),
        (weighted_doubly_robust, weighted_per_decision_importance_sampling),
    ):
        assert robust(zero, GAMMA).value == pytest.approx(plain(zero, GAMMA).value, abs=1e-12)


def simulated(n: int) -> LoggedEpisodes:
    """Episodes of four steps at most from the chain itself, and the true values of the policy as Q and V."""
    rng = np.random.default_rng(0)
    move = np.array([[[0.7, 0.3, 0], [0.1, 0.6, 0.3]], [[0.4, 0.5, 0.1], [0, 0.2, 0.8]]])
    pay = np.array([[0.5, 0.0], [-0.2, 2.0]])
    state, alive = (rng.random(n) > 0.8).astype(int), np.ones(n, bool)
    reward, ratio, length = np.zeros((n, 4)), np.zeros((n, 4)), np.zeros(n, int)
    for t in range(4):
        here = np.minimum(state, 1)
        action = (rng.random(n) > BEHAVIOUR[here, 0]).astype(int)
        reward[:, t] = np.where(alive, pay[here, action], 0.0)
        ratio[:, t] = np.log(TARGET[here, action] / BEHAVIOUR[here, action])
        length += alive
        state = np.where(alive, (rng.random(n)[:, None] > move[here, action].cumsum(1)).sum(1), 2)
        alive = state < 2
    return LoggedEpisodes(reward, length, ratio)


def test_estimates_approach_the_truth() -> None:
    episodes = simulated(40_000)
    for name in ("is", "wis", "pdis", "pdwis"):
        found = ESTIMATORS[name](episodes, GAMMA)
        assert found.value == pytest.approx(1.209859197568, abs=0.05), name
        low, high = found.interval(replicates=100)
        assert low < 1.209859197568 < high and high - low < 0.15


def test_weights_of_long_episodes_do_not_overflow() -> None:
    episodes = LoggedEpisodes(np.ones((3, 500)), np.full(3, 500), np.array([[5.0], [4.0], [-9.0]]) + np.zeros((3, 500)))
    for name in ("wis", "pdwis"):
        assert ESTIMATORS[name](episodes, 0.99).value == pytest.approx((1 - 0.99**500) / 0.01)
    assert weight_health(episodes).effective == pytest.approx(1.0) and weight_health(episodes).largest == 1.0
    never = replace(episodes, log_ratio=np.full((3, 500), -np.inf))
    assert weight_health(never).effective == 0.0 and ESTIMATORS["is"](never, 0.99).value == 0.0
    assert np.isnan(ESTIMATORS["wis"](never, 0.99).value) and np.isnan(ESTIMATORS["wis"](never, 0.99).interval().low)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LoggedEpisodes(np.ones(3), np.ones(3)), "expected \\(episodes, steps\\)"),
        (lambda: LoggedEpisodes(np.ones((3, 2)), np.array([1, 2, 3])), "expected 3 numbers of 1 … T"),
        (lambda: LoggedEpisodes(np.ones((3, 2)), np.array([1, 2, 2]), q=np.ones((3, 1))), "`q` has shape \\(3, 1\\)"),
        (lambda: importance_sampling(LoggedEpisodes(np.ones((2, 1)), np.ones(2, int)), 0.9), "no log-ratios"),
        (lambda: direct_method(LoggedEpisodes(np.ones((2, 1)), np.ones(2, int))), "no `q` and `v`"),
        (lambda: doubly_robust(replace(logged(), v_after=None), 0.9), "no `v_after`"),
    ],
)
def test_what_does_not_fit(make: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()  # type: ignore[operator]
