"""Affine maps of observations, actions and rewards."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offpolicy.data.normalize import Normalizer, action_bounds, mean_std, parse_reward_transform
from offpolicy.data.replay import Replay
from offpolicy.errors import UsageError


def small(**meta: object) -> Replay:
    """Two episodes with returns 3 and −1."""
    steps = {
        "obs": np.array([[0.0, 5.0], [2.0, 5.0], [4.0, 5.0], [6.0, 5.0]], dtype=np.float32),
        "action": np.array([[-1.0], [0.0], [3.0], [1.0]], dtype=np.float32),
        "reward": np.array([1.0, 2.0, -1.0, 0.0], dtype=np.float32),
        "terminated": np.array([False, True, False, False]),
    }
    return Replay(steps, start=np.array([0, 2]), length=np.array([2, 2]), meta=meta)


def fitted(
    replay: Replay, reward_transform: str = "r", rows: np.ndarray | None = None, **options: object
) -> Normalizer:
    normalizer = Normalizer((2,), 1).double()
    settings = {"normalize_obs": True, "eps": 1e-3} | options
    normalizer.fit(replay, rows, reward_transform=reward_transform, **settings)
    return normalizer


def test_observations_known_answer() -> None:
    """Column 0 has mean 3 and variance (9 + 1 + 1 + 9)/4 = 5; column 1 is constant and stays as it is."""
    normalizer = fitted(small())
    scale = 1.0 / (5.0**0.5 + 1e-3)
    expected = torch.tensor([[-3.0 * scale, 5.0], [3.0 * scale, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(normalizer.obs(torch.tensor([[0.0, 5.0], [6.0, 5.0]]).double()), expected)


def test_observations_of_the_drawn_rows_only() -> None:
    """Rows 0 and 1: mean 1, deviation 1."""
    normalizer = fitted(small(), rows=np.array([0, 1]), eps=0.0)
    assert normalizer.obs_center.tolist() == [1.0, 0.0] and normalizer.obs_scale.tolist() == [1.0, 1.0]


def test_observations_left_alone() -> None:
    normalizer = fitted(small(), normalize_obs=False)
    assert normalizer.obs(torch.tensor([7.0, 8.0]).double()).tolist() == [7.0, 8.0]


def test_actions_by_the_environments_bounds() -> None:
    """[−2, 4] → [−1, 1]: centre 1, half-width 3."""
    normalizer = fitted(small(action_low=[-2.0], action_high=[4.0]))
    action = torch.tensor([[-2.0], [1.0], [4.0]]).double()
    assert normalizer.action(action).flatten().tolist() == [-1.0, 0.0, 1.0]
    torch.testing.assert_close(normalizer.environment_action(normalizer.action(action)), action)


@pytest.mark.parametrize("meta", [{}, {"action_low": [-np.inf], "action_high": [np.inf]}])
def test_actions_by_the_data_when_bounds_are_unknown(meta: dict) -> None:
    assert [b.tolist() for b in action_bounds(small(**meta))] == [[-1.0], [3.0]]


def test_a_constant_action_column_is_only_shifted() -> None:
    normalizer = fitted(small(action_low=[2.0], action_high=[2.0]))
    action = torch.tensor([[2.0]]).double()
    assert normalizer.action(action).item() == 0.0 and normalizer.environment_action(action * 0).item() == 2.0


@pytest.mark.parametrize(
    ("text", "affine"),
    [
        ("r", (1.0, 0.0)),
        ("r-1", (1.0, -1.0)),
        ("10r-5", (10.0, -5.0)),
        ("10*r - 5", (10.0, -5.0)),
        ("0.1r", (0.1, 0.0)),
        ("1e-3r+.5", (1e-3, 0.5)),
        ("-r", (-1.0, 0.0)),
        ("return_range", None),
    ],
)
def test_reward_transforms(text: str, affine: tuple[float, float] | None) -> None:
    assert parse_reward_transform(text) == affine


@pytest.mark.parametrize("text", ["", "1", "0r", "r*2", "rr", "r-", "log(r)", "r-1r", "e3r"])
def test_impossible_reward_transforms(text: str) -> None:
    with pytest.raises(UsageError, match="expected 'r' \\(unchanged\\), an affine form"):
        parse_reward_transform(text)


def test_rewards_known_answers() -> None:
    """10·2 − 5 = 15; by the range of returns 3 − (−1) = 4: 2·1000/4 = 500."""
    assert fitted(small(), "10r-5").reward(torch.tensor(2.0).double()).item() == pytest.approx(15.0)
    assert fitted(small(), "return_range").reward(torch.tensor(2.0).double()).item() == pytest.approx(500.0)


def test_return_range_of_equal_returns() -> None:
    with pytest.raises(UsageError, match="expected returns that differ"):
        fitted(small().filter([0]), "return_range")


def test_mean_and_std_in_chunks_equal_numpy() -> None:
    rng = np.random.default_rng(0)
    column = (1e4 + rng.normal(size=(1000, 3))).astype(np.float32)  # one pass in float32 would lose the deviation
    rows = np.sort(rng.choice(1000, 300, replace=False))
    for chosen in (None, rows):
        mean, std = mean_std(column, chosen, chunk=64)
        exact = column.astype(np.float64) if chosen is None else column[chosen].astype(np.float64)
        np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-12)
        np.testing.assert_allclose(std, exact.std(0), rtol=1e-9)
    np.testing.assert_array_equal(mean_std(torch.from_numpy(column), rows)[0], mean_std(column, rows)[0])
