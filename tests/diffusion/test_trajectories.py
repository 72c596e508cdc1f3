"""The trajectory view: which sub-trajectories are taken, and their channels and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from toy import toy_replay

from offpolicy.data.mixing import mixed
from offpolicy.data.normalize import Normalizer
from offpolicy.data.replay import Replay
from offpolicy.data.sampling import bits, keys
from offpolicy.diffusion.trajectories import ACTION_LIMIT, Channels, TrajectoryView
from offpolicy.errors import DataError, UsageError

CPU = torch.device("cpu")


def made(lengths: list[int], terminated: list[bool], **columns: Any) -> Replay:
    """Episodes whose observation counts the rows."""
    n, length = sum(lengths), np.array(lengths)
    end = np.zeros(n, dtype=bool)
    end[np.cumsum(length)[np.array(terminated)] - 1] = True
    steps = {
        "obs": np.arange(n, dtype=np.float32)[:, None],
        "action": np.linspace(-1, 1, n, dtype=np.float32)[:, None],
        "reward": np.ones(n, dtype=np.float32),
        "terminated": end,
    }
    meta = {"name": "made", "action_low": [-1.0], "action_high": [1.0]}
    return Replay(steps | columns, start=np.cumsum(length) - length, length=length, meta=meta)


def normalizer_of(replay: Replay) -> Normalizer:
    normalizer = Normalizer((replay.steps["obs"].shape[1],), replay.steps["action"].shape[1])
    normalizer.fit(replay, None, normalize_obs=False, reward_transform="r", eps=0.0)
    return normalizer


@pytest.mark.parametrize(("terminated", "starts"), [(True, [0, 8]), (False, [0])])
def test_an_episode_of_forty_steps(terminated: bool, starts: list[int]) -> None:
    """32 of 40 steps: starts 0 … 8. Start 8 ends with the episode: kept when that terminates, not when it is cut."""
    assert TrajectoryView(32, 8).places(made([40], [terminated])).tolist() == starts


def test_the_stride_runs_over_all_starts() -> None:
    """4 of 6, 3, 4, 5 and 7 steps: starts 0 1 2 | none | 9 | 13 14 | 18 19 20 21, numbered 0 … 9.

    Every third is 0, 9, 18 and 21; the episodes' first are 0, 9, 13 and 18. Of the last ones 2 and 21 terminate, 9 and
    14 are cut.
    """
    replay = made([6, 3, 4, 5, 7], [True, True, False, False, True])
    assert TrajectoryView(4, 3).places(replay).tolist() == [0, 2, 13, 18, 21]


@pytest.mark.parametrize("seed", range(5))
def test_sub_trajectories_stay_in_their_episode(seed: int) -> None:
    rng = np.random.default_rng(seed)
    replay = toy_replay(rng.integers(1, 20, 40).tolist(), seed=seed)
    view = TrajectoryView(5, 2)
    places = view.places(replay)
    assert (replay.episode_of[places] == replay.episode_of[places + 4]).all()
    assert (np.diff(places) > 0).all()
    last, terminated = replay.rows[places + 4], np.asarray(replay.steps["terminated"])
    assert (terminated[last] | ~np.isin(last, replay.end)).all()
    assert not terminated[replay.rows[places[:, None] + np.arange(4)]].any()
    coverage = view.coverage(replay)
    assert coverage.sum() == 5 * len(places) and coverage[places].min() >= 1


def test_a_step_without_a_successor_is_last_at_most() -> None:
    valid = np.ones(10, dtype=bool)
    valid[4] = False
    replay = made([10], [True], valid_td=valid)
    assert TrajectoryView(3, 1).places(replay).tolist() == [0, 1, 2, 5, 6, 7]


def test_other_indices_and_maps_give_the_same_numbers(tmp_path: Any) -> None:
    replay = toy_replay([9, 4, 12, 7])
    normalizer, view = normalizer_of(replay), TrajectoryView(4, 2)
    bound = view.bind(replay, normalizer, CPU)
    x = bound.gather(torch.arange(len(bound)))
    some = replay.filter([2, 0])
    found = view.bind(some, normalizer, CPU).gather(torch.tensor([0]))
    assert found.row is not None and found.row.tolist() == [13]  # first row of episode 2
    assert torch.equal(found.x, x.x[x.row == 13])
    mapped = view.bind(Replay.load(replay.save(tmp_path / "r")), normalizer, CPU)
    assert mapped.table is None and bound.table is not None
    torch.testing.assert_close(mapped.gather(torch.arange(len(bound))).x, x.x)


def test_a_mixture_keeps_its_share() -> None:
    real, drawn = toy_replay([9] * 4), toy_replay([5] * 9, seed=5)
    replay = mixed(real, drawn, 0.8)
    bound = TrajectoryView(4, 2).bind(replay, normalizer_of(real), CPU)
    words = bits(keys(0, "test", torch.zeros(1, dtype=torch.int64))[0], torch.arange(20_000))
    row = bound.gather(bound.pick(words)).row
    assert row is not None and (row >= 36).double().mean().item() == pytest.approx(0.8, abs=0.014)  # 5 deviations


def test_channels_known_answer() -> None:
    """Action 2 of bounds ±2 is 1, clipped to 0.999: arctanh = ½·ln(1.999 / 0.001) = 3.8002."""
    replay = toy_replay([6])
    replay.steps["action"][:] = np.array([[2.0], [0.0], [1.0], [-2.0], [-1.0], [0.5]], dtype=np.float32)
    bound = TrajectoryView(2, 1).bind(replay, normalizer_of(replay), CPU)
    x = bound.gather(torch.tensor([0])).x[0]
    assert x.shape == (2, 6)
    torch.testing.assert_close(x[:, :3], torch.from_numpy(replay.steps["obs"][:2]))
    torch.testing.assert_close(x[:, 3], torch.tensor([3.8002012, 0.0]))
    torch.testing.assert_close(x[:, 4], torch.from_numpy(replay.steps["reward"][:2]))


def fitted(replay: Replay, view: TrajectoryView) -> tuple[Channels, float]:
    channels = Channels(replay.steps["obs"].shape[1], replay.steps["action"].shape[1]).double()
    share = channels.fit(replay, replay.rows, view.coverage(replay), normalizer_of(replay).double())
    return channels, share


def test_statistics_are_those_of_all_sub_trajectories_and_steps() -> None:
    replay, view = toy_replay([9, 4, 12, 7]), TrajectoryView(4, 2)
    channels, share = fitted(replay, view)
    bound = view.bind(replay, normalizer_of(replay).double(), CPU)
    raw = bound.gather(torch.arange(len(bound))).x.flatten(0, 1)
    torch.testing.assert_close(channels.mean, raw.mean(0))
    torch.testing.assert_close(channels.spread, raw.std(0, correction=0))
    bound.channels = channels
    x = bound.gather(torch.arange(len(bound))).x.flatten(0, 1)
    torch.testing.assert_close(x.mean(0), torch.zeros(6).double(), rtol=0, atol=1e-12)
    varies = channels.spread > 0
    torch.testing.assert_close(x.std(0, correction=0)[varies], torch.ones(int(varies.sum())).double())
    assert share == 0.0


@pytest.mark.parametrize(("name", "value"), [("obs", np.nan), ("reward", -np.inf)])
def test_numbers_that_are_not_finite_are_named(name: str, value: float) -> None:
    replay = toy_replay([9, 4, 12, 7])
    replay.steps[name][15] = value
    with pytest.raises(DataError, match=rf"`{name}` has numbers that are not finite.*Remove the episodes"):
        fitted(replay, TrajectoryView(4, 2))


def test_there_and_back() -> None:
    replay = toy_replay([9, 4, 12, 7])
    channels, _ = fitted(replay, TrajectoryView(4, 2))
    obs, reward = torch.randn(5, 3, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    action = torch.rand(5, 3, 1, dtype=torch.float64) * 1.99 - 0.995
    terminated = torch.rand(5, 3) < 0.5
    found = channels.decode(channels.encode(obs, action, reward, terminated))
    torch.testing.assert_close(found["obs"], obs)
    torch.testing.assert_close(found["action"], action)
    torch.testing.assert_close(found["reward"], reward)
    assert torch.equal(found["terminated"], terminated)


def test_a_constant_column_comes_back_exactly_whatever_the_model_says() -> None:
    replay = toy_replay([9, 4, 12, 7])
    replay.steps["obs"][:, 1] = np.float32(0.1)
    replay.steps["terminated"][:] = False
    replay.steps["action"][::2] = 2.0
    channels, share = fitted(replay, TrajectoryView(4, 2))
    assert channels.std[1] == 1.0 and 0.3 < share < 0.7
    found = channels.float().decode(100 * torch.randn(7, 4, 6))
    assert (found["obs"][..., 1].numpy() == np.float32(0.1)).all() and not found["terminated"].any()
    assert (found["action"].abs() <= 1).all()


def test_actions_beyond_the_limit_stay_finite() -> None:
    one = torch.ones(1, 1)
    x = Channels.raw(one, one, one[0], one[0] > 0)
    assert torch.tanh(x[0, 1]).item() == pytest.approx(ACTION_LIMIT)


def test_no_episode_is_long_enough() -> None:
    with pytest.raises(DataError, match=r"no episode has a sub-trajectory of 32 steps \(the longest has 10 steps"):
        TrajectoryView(32).starts(toy_replay())
    with pytest.raises(DataError, match="cut it, its last step is left out"):  # a start there is, but it is cut
        TrajectoryView(10).starts(made([10], [False]))


def test_what_cannot_be_a_trajectory() -> None:
    replay = toy_replay()
    with pytest.raises(UsageError, match="`horizon` is 1"):
        TrajectoryView(1)
    del replay.steps["reward"]
    with pytest.raises(DataError, match=r"needs \['reward'\]"):
        TrajectoryView(4).places(replay)
    image = made([8], [True], obs=np.zeros((8, 2, 2), dtype=np.float32))
    with pytest.raises(DataError, match=r"observations of shape \(2, 2\)"):
        TrajectoryView(4).places(image)
