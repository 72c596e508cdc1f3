"""Measures of a ranking and evaluation budgets against known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from offpolicy.errors import UsageError
from offpolicy.evaluation.aggregates import expected_online_performance
from offpolicy.evaluation.ranking import (
    bandit_budget,
    best_by_estimate,
    chosen_policies,
    regret_at_k,
    sharpe_ratio_at_k,
    spearman,
    spearman_interval,
)

TRUE, ESTIMATE, BEHAVIOUR = [10, 40, 35, 60, 55, 20, 80, 5], [30, 42, 42, 50, 70, 10, 65, 60], 30.0


def test_spearman_has_middle_ranks_for_ties() -> None:
    assert spearman(TRUE, ESTIMATE) == pytest.approx(0.5149792926, abs=1e-10)
    assert spearman(TRUE, TRUE) == pytest.approx(1.0) and spearman(TRUE, np.negative(TRUE)) == pytest.approx(-1.0)
    assert math.isnan(spearman(TRUE, [1.0] * 8))
    low, high = spearman_interval(TRUE, ESTIMATE)
    assert -1 <= low < 0.515 < high <= 1
    assert math.isnan(spearman_interval(TRUE[:3], ESTIMATE[:3]).low)


@pytest.mark.parametrize(
    ("k", "best", "worst", "std", "regret", "sharpe"),
    [
        (1, 55, 55, 0, 25, math.nan),
        (2, 80, 55, 12.5, 0, 4.0),
        (3, 80, 5, 31.1804782231, 0, 1.6035674515),
        (4, 80, 5, 27.6134025430, 0, 1.8107149209),
        (6, 80, 5, 23.3482095435, 0, 2.1414918307),
        (8, 80, 5, 24.3589690874, 0, 2.0526320232),
    ],
)
def test_chosen_policies(k: int, best: float, worst: float, std: float, regret: float, sharpe: float) -> None:
    found = chosen_policies(TRUE, ESTIMATE, k, BEHAVIOUR)
    assert (found.best, found.worst, found.regret) == (best, worst, regret)
    assert found.std == pytest.approx(std, abs=1e-10)
    assert found.sharpe == pytest.approx(sharpe, abs=1e-10, nan_ok=True)
    assert found.normalised_regret == regret_at_k(TRUE, ESTIMATE, k, normalised=True) == pytest.approx(regret / 75)
    assert sharpe_ratio_at_k(TRUE, ESTIMATE, k, BEHAVIOUR) == pytest.approx(sharpe, abs=1e-10, nan_ok=True)


def test_ties_keep_the_order_given_and_bad_input_is_told() -> None:
    assert best_by_estimate(ESTIMATE).tolist() == [4, 6, 7, 3, 1, 2, 0, 5]
    assert chosen_policies([1, 1], [2, 3], 1).normalised_regret == 0.0
    assert sharpe_ratio_at_k(TRUE, ESTIMATE, 2, 90.0) == 0.0
    with pytest.raises(UsageError, match="8 true values and 2 estimates"):
        spearman(TRUE, [1, 2])
    with pytest.raises(UsageError, match="`k` is 9 of 8"):
        best_by_estimate(ESTIMATE, 9)


SCORES = [
    [10, 20, 30, 40],
    [35, 35, 35, 35],
    [60, 0, 50, 60],
    [41, 39, 43, 41],
    [5, 5, 90, 60],
    [28, 32, 26, 30],
]


def test_the_bandit_follows_the_published_code() -> None:
    """unifloral's own evaluation.py over 20,000 trials; ours over 20,000, within a few standard errors.

    At first theirs counts a policy that was not pulled as one of mean 0, which an episode of score 0 ties with.
    """
    pulls = [2, 3, 4, 5, 6, 8, 10, 20, 50]
    for subsample, known in (
        (None, [37.52, 39.37, 40.39, 40.92, 41.09, 41.16, 41.29, 41.25, 41.22]),
        (3, [37.51, 39.39, 39.13, 39.07, 39.09, 39.05, 39.04, 38.99, 38.96]),
    ):
        found = bandit_budget(SCORES, max_pulls=50, subsample=subsample, trials=20_000, replicates=50)
        np.testing.assert_allclose(found.mean[np.array(pulls) - 1], known, atol=0.15)
        assert found.mean[0] == pytest.approx(np.mean(SCORES), abs=0.15)  # of one draw, the mean of means
        assert (found.low <= found.mean).all() and (found.mean <= found.high).all()


def test_constant_policies_give_the_closed_form_also_below_zero() -> None:
    constant = np.array([-3.0, 10, 25, 40, 70])
    for values in (constant, constant - 100):
        found = bandit_budget(values[:, None].repeat(2, 1), max_pulls=6, subsample=None, trials=20_000, replicates=20)
        np.testing.assert_allclose(found.mean[:5], expected_online_performance(values), atol=0.8)
        assert found.mean[4] == found.mean[5] == values.max()


@pytest.mark.parametrize("options", [{"max_pulls": 0}, {"trials": 0}, {"alpha": -1.0}])
def test_impossible_budgets(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        bandit_budget(SCORES, **options)  # type: ignore[arg-type]
