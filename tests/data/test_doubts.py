"""Doubts about sound data: next observations, time limits, precision, discrete actions as floats, jumps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from offpolicy.data.doubts import SAMPLE, breaks, precision_doubt, sample_rows
from offpolicy.data.sources import from_arrays, open_source


def walks(n: int = 400, episode: int = 50, **changes: Any) -> dict[str, Any]:
    """Random walks cut by a time limit; `next_obs` is right everywhere."""
    rng = np.random.default_rng(0)
    obs = np.cumsum(rng.normal(size=(n + 1, 3)), axis=0).astype(np.float32)
    end = np.arange(n) % episode == episode - 1
    following = obs[1:].copy()
    following[end] += 0.5
    data = {
        "obs": obs[:-1],
        "action": rng.uniform(-1, 1, (n, 1)).astype(np.float32),
        "reward": rng.normal(size=n).astype(np.float32),
        "terminated": np.zeros(n, bool),
        "episode_end": end,
        "next_obs": following,
        **changes,
    }
    return {name: column for name, column in data.items() if column is not None}


def warnings(data: dict[str, Any], **options: Any) -> list[str]:
    return from_arrays(data, **options).meta["warnings"]


@pytest.mark.parametrize("n", [400, 4 * SAMPLE])
def test_next_observations(n: int) -> None:
    assert warnings(walks(n)) == []
    good = walks(n)
    of_next_episode = np.roll(good["obs"], -1, axis=0)
    assert "first observation of the next episode" in warnings({**good, "next_obs": of_next_episode})[0]
    assert "equals the row's own observation in 100%" in warnings({**good, "next_obs": good["obs"]})[0]
    shifted = np.roll(good["obs"], -2, axis=0)
    assert "is not the next row's observation" in warnings({**good, "next_obs": shifted})[0]


def test_breaks_against_the_obvious_loop() -> None:
    rng = np.random.default_rng(0)
    obs, following = rng.integers(0, 2, (300, 2)).astype(np.float32), rng.integers(0, 2, (300, 2)).astype(np.float32)
    expected = [t < 299 and tuple(following[t]) != tuple(obs[t + 1]) for t in range(300)]
    assert breaks(obs, following).tolist() == expected
    obs[5] = following[4] = np.nan
    assert not breaks(obs, following)[4]


@pytest.mark.parametrize("options", [{}, {"max_episode_steps": 50}])
def test_terminals_at_the_time_limit_everywhere(options: dict[str, Any]) -> None:
    data = walks(next_obs=None, episode_end=None, terminated=walks()["episode_end"])
    assert any("the terminals may hold time limits" in w for w in warnings(data, **options))
    data["terminated"][20] = True  # an early end that is real, the others at the limit
    assert any("the terminals may hold time limits" in w for w in warnings(data, **options))
    cut = data["terminated"].copy()
    cut[149] = False  # one at the limit that is not terminated: the data know the difference
    assert not any(
        "time limits" in w for w in warnings({**data, "terminated": cut, "timeouts": ~cut & walks()["episode_end"]})
    )


def test_one_step_episodes_that_terminate_are_no_time_limit() -> None:
    assert warnings(walks(episode=1, terminated=np.ones(400, bool), next_obs=None)) == []


# -- precision ---------------------------------------------------------------------------------------------------------


def column(kind: str, n: int = 400) -> np.ndarray:
    t = np.arange(n)
    rng = np.random.default_rng(0)
    return {
        "times": 1.7e9 + 0.01 * t,
        "numbers of episodes": 10.0**9 + t // 50,
        "GPS": 52.5 + 1e-6 * np.cumsum(rng.normal(size=n)),
        "large integers": 2**40 + t,
        "noise": rng.normal(size=n),
        "near one": 1 + 1e-2 * rng.normal(size=n),
        "constant": np.full(n, 0.1),
        "flags": t % 2.0,
    }[kind]


@pytest.mark.parametrize("n", [400, 100_000])
@pytest.mark.parametrize("kind", ["times", "numbers of episodes", "GPS", "large integers"])
def test_values_lost_in_float32_are_warned_of(kind: str, n: int) -> None:
    sample = np.stack([column("noise", n), column(kind, n)], axis=1)[sample_rows(n)]
    text = precision_doubt("obs", sample)
    assert text is not None and "`obs` column 1 loses values" in text and "`obs[:, 1] -= obs[:, 1][0]`" in text


@pytest.mark.parametrize("kind", ["noise", "near one", "constant", "flags"])
def test_ordinary_columns_are_not(kind: str) -> None:
    assert precision_doubt("obs", column(kind)[:, None]) is None
    assert precision_doubt("obs", column(kind, 100_000)[sample_rows(100_000)][:, None]) is None


def test_precision_in_files(tmp_path: Path) -> None:
    data = walks(next_obs=None)
    data["obs"] = data["obs"].astype(np.float64)
    data["obs"][:, 2] = column("times")
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for key, value in data.items():
            file[key] = value
    np.savez(tmp_path / "a.npz", **data)
    for name in ("a.hdf5", "a.npz"):
        assert any("`obs` column 2 loses values" in w for w in open_source(tmp_path / name).meta["warnings"])


# -- others ------------------------------------------------------------------------------------------------------------


def test_whole_numbers_from_zero_may_be_discrete_actions() -> None:
    numbers = np.random.default_rng(0).integers(0, 4, (400, 1)).astype(np.float32)
    assert any("if they are discrete actions" in w for w in warnings(walks(action=numbers)))
    assert warnings(walks(action=numbers), action_low=0.0, action_high=3.0) == []
    assert warnings(walks(action=numbers - 1)) == []


def test_jumps_of_large_and_small_numbers() -> None:
    """Squares of float32 overflow from 2e19 on and vanish below 1e-23."""
    for scale in (1e25, 1e-25):
        data = walks(next_obs=None, episode_end=None)
        data["obs"] = (np.arange(400.0)[:, None] * np.ones(3) * scale).astype(np.float32)
        data["obs"][200:] += np.float32(1000 * scale)
        assert any("jumps of more than 50 times" in w and "row 199" in w for w in warnings(data))
