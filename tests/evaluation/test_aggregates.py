"""Statistics of many runs, against known answers: rliable 1.2.0's, exact laws, and sorting by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offpolicy.errors import UsageError
from offpolicy.evaluation import aggregates as ag


def matrix(text: str) -> np.ndarray:
    return np.array([[float(v) for v in row.split()] for row in text.split("/")])


A = matrix(".42 .95 .10 / .50 .88 .31 / .37 1.02 .22 / .61 .91 .05 / .55 .79 .18")
B = matrix(".42 .80 .30 / .30 .91 .40 / .37 .99 .18 / .44 .70 .25")
C = matrix("1.2 -.1 / .4 0 / 1.0 .3")
D = matrix(".5 .5 1 0 / .5 1 1 .3 / .8 .5 1 .3")
MATRICES = {"A": A, "B": B, "C": C, "D": D}
TAUS = (0.0, 0.3, 0.5, 0.8, 1.0)
KNOWN = {  # mean, median, IQM, gap at 1, gap at 0.5
    "A": (0.524, 0.49, 0.5166666667, 0.4773333333, 0.1233333333),
    "B": (0.505, 0.3825, 0.4383333333, 0.495, 0.1116666667),
    "C": (0.4666666667, 0.4666666667, 0.425, 0.5666666667, 0.2333333333),
    "D": (0.6166666667, 0.6333333333, 0.6333333333, 0.3833333333, 0.075),
}
PROFILES = {
    "A": ((1, 11 / 15, 7 / 15, 4 / 15, 1 / 15), (1, 2 / 3, 1 / 3, 1 / 3, 0)),
    "B": ((1, 2 / 3, 1 / 3, 1 / 6, 0), (1, 2 / 3, 1 / 3, 1 / 3, 0)),
    "C": ((2 / 3, 1 / 2, 1 / 3, 1 / 3, 1 / 6), (1, 1 / 2, 1 / 2, 1 / 2, 0)),
    "D": ((11 / 12, 3 / 4, 5 / 12, 1 / 3, 0), (1, 3 / 4, 3 / 4, 1 / 4, 0)),
}
INTERVALS = {  # of mean, median, IQM, gap: RandomState(0), 2,000 replicates
    "A": ((0.47865, 0.56735), (0.416, 0.564), (0.4644444444, 0.5677777778), (0.4346666667, 0.522)),
    "B": (
        (0.4583333333, 0.5508541667),
        (0.334875, 0.43),
        (0.3983333333, 0.4866666667),
        (0.4491458333, 0.5416666667),
    ),
    "C": ((0.25, 0.6666666667), (0.25, 0.6666666667), (0.175, 0.7), (0.4, 0.75)),
    "D": ((0.525, 0.7083333333), (0.5, 0.8), (0.5, 0.8), (0.2916666667, 0.475)),
}


@pytest.mark.parametrize("name", list(MATRICES))
def test_points(name: str) -> None:
    x = MATRICES[name]
    found = [ag.mean_score(x), ag.median_score(x), ag.interquartile_mean(x), ag.optimality_gap(x)]
    assert [*found, ag.optimality_gap(x, 0.5)] == pytest.approx(KNOWN[name], abs=1e-9)


@pytest.mark.parametrize("name", list(MATRICES))
def test_profiles_count_what_lies_strictly_above(name: str) -> None:
    of_runs, of_tasks = PROFILES[name]
    assert ag.performance_profile(MATRICES[name], TAUS) == pytest.approx(of_runs, abs=1e-12)
    assert ag.performance_profile(MATRICES[name], TAUS, of_tasks=True) == pytest.approx(of_tasks, abs=1e-12)


@pytest.mark.parametrize("name", list(MATRICES))
def test_intervals_as_rliable_draws_them(name: str) -> None:
    for statistic, ends in zip(ag.AGGREGATES.values(), INTERVALS[name], strict=True):
        random = np.random.RandomState(0)
        found = ag.bootstrap_interval(statistic, MATRICES[name], replicates=2_000, random=random)
        assert found == pytest.approx(ends, abs=1e-9)


def test_improvement() -> None:
    assert ag.improvement_per_task(A, B) == pytest.approx((0.8, 0.625, 0.225), abs=1e-12)
    found = [ag.probability_of_improvement(*pair) for pair in ((A, B), (B, A), (A, A))]
    assert found == pytest.approx((0.55, 0.45, 0.5), abs=1e-12)
    random = np.random.RandomState(0)
    ends = ag.bootstrap_interval(ag.probability_of_improvement, A, B, replicates=2_000, random=random)
    assert ends == pytest.approx((0.35, 0.7333333333), abs=1e-9)


@pytest.mark.parametrize(
    ("statistic", "mean", "std"),
    [(ag.mean_score, 0.4666666667, 0.1097134314), (ag.interquartile_mean, 0.4351851852, 0.1404846598)],
)
def test_the_exact_law_of_the_bootstrap(statistic, mean: float, std: float) -> None:
    """All 729 drawings of C, once each, in place of a generator."""
    rows = list(product(range(3), repeat=3))
    exact = np.array([statistic(np.stack([C[list(a), 0], C[list(b), 1]], -1)) for a in rows for b in rows])
    assert (exact.mean(), exact.std()) == pytest.approx((mean, std), abs=1e-9)
    drawn = []

    def keep(x):
        drawn.append(statistic(x))
        return drawn[-1]

    ag.bootstrap_interval(keep, C, replicates=20_000)
    values = np.concatenate(drawn)
    assert set(np.round(values, 9)) <= set(np.round(exact, 9))  # each drawing is one of them, whatever the seed
    assert abs(values.mean() - mean) < 6 * std / np.sqrt(len(values))


def test_few_seeds() -> None:
    x, y = A[:, 0], B[:, 0]
    assert ag.student_interval(x) == pytest.approx((0.3699368055, 0.6100631945), abs=1e-9)
    assert ag.student_interval(y) == pytest.approx((0.2832343693, 0.4817656307), abs=1e-9)
    found = ag.welch_difference(x, y)
    assert (found.t, found.df, found.p) == pytest.approx((2.0161665237, 6.7931865101, 0.0848395256), abs=1e-9)
    assert (found.low, found.high) == pytest.approx((-0.0193617211, 0.2343617211), abs=1e-9)


def test_differences_without_spread() -> None:
    assert ag.welch_difference([1.0, 1.0], [1.0, 1.0]).p == 1.0
    apart = ag.welch_difference([2.0, 2.0], [1.0, 1.0])
    assert (apart.low, apart.high, apart.p) == (1.0, 1.0, 0.0)


def test_holm() -> None:
    """By hand: 0.01·4, then 0.02·3, 0.03·2 raised to what stands before it, 0.5."""
    assert ag.holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])


def test_expected_online_performance() -> None:
    v = [40, -3, 70, 10, 25]
    assert ag.expected_online_performance(v) == pytest.approx([28.4, 46.0, 56.5, 64.0, 70.0], abs=1e-12)
    again = ag.expected_online_performance(v, replacement=True)
    assert again[:2] == pytest.approx([28.4, 42.48], abs=1e-12)
    many = ag.expected_online_performance(np.arange(2_000.0))  # no factorials that overflow
    assert np.isfinite(many).all() and many[-1] == 1999.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_interquartile_mean_by_hand(values: list[float]) -> None:
    dropped = len(values) // 4
    kept = sorted(values)[dropped : len(values) - dropped]
    assert ag.interquartile_mean(np.array(values)[:, None]) == pytest.approx(sum(kept) / len(kept), abs=1e-12)


SMALL = st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=1, max_size=4).map(np.array)


@settings(max_examples=60, deadline=None)
@given(SMALL, SMALL)
def test_one_of_two_is_better(x: np.ndarray, y: np.ndarray) -> None:
    both = ag.probability_of_improvement(x, y) + ag.probability_of_improvement(y, x)
    assert both == pytest.approx(1.0, abs=1e-12)


def test_equal_runs_have_no_width_and_the_order_of_runs_is_nothing() -> None:
    assert ag.bootstrap_interval(ag.mean_score, np.full((3, 2), 0.25), replicates=50) == (0.25, 0.25)
    assert ag.interquartile_mean(A[::-1]) == pytest.approx(ag.interquartile_mean(A), abs=1e-15)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ag.checked_scores([[1.0, np.nan]]), "run 0 of task 1"),
        (lambda: ag.checked_scores(np.zeros((0, 3))), "at least one of each"),
        (lambda: ag.bootstrap_interval(ag.mean_score, [[1.0, 2.0]]), "at least two runs"),
        (lambda: ag.student_interval([1.0]), "at least two values"),
        (lambda: ag.welch_difference([1.0], [1.0, 2.0]), "two values of each"),
    ],
)
def test_bad_input(call, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        call()
