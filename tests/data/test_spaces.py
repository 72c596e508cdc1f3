"""Spaces: bounds on one side or none, integer actions in a Box, and data that no vector method can train on."""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium
import made_data
import numpy as np
import pytest
import torch
from gymnasium import spaces
from toy import toy_replay

import offpolicy as op
from offpolicy.data.normalize import action_bounds
from offpolicy.data.replay import Replay
from offpolicy.data.sources import from_arrays
from offpolicy.data.spaces import check_suits, known_bounds
from offpolicy.errors import DataError, UsageError
from offpolicy.registry import find_method
from offpolicy.training.offline import OfflineModule

N = 40
CONTROL = (
    "BC",
    "TD3BC",
    "IQL",
    "PRDC",
    "A2PR",
    "ODICE",
    "CQL",
    "AWAC",
    "ReBRAC",
    "SAC",
    "TD3",
    "EDAC",
    "SACN",
    "RAVL",
    "MBPO",
    "DecisionTransformer",
)
OTHERS = ("WorldModel", "FQE", "TrajectoryDiffusion", "HIQL", "OTA", "GCIVL", "GCIQL", "GCBC")


walks = partial(made_data.walks, N, episode_end=np.arange(N) % 10 == 9)


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_large_bounds_are_none_and_wrong_ones_are_refused() -> None:
    big = float(np.finfo(np.float64).max)
    low, high = known_bounds([-np.inf, -big, 0.0, -3.4028235e38], [1.0, big, np.inf, 3.4028235e38])
    assert low.tolist() == [-np.inf, -np.inf, 0.0, -np.inf] and high.tolist() == [1.0, np.inf, np.inf, np.inf]
    for wrong in ((1.0, -1.0), (np.nan, 1.0), ("a", 1.0), ([0.0, 0.0, 0.0], 1.0)):
        with pytest.raises(UsageError, match="the action bounds are"):
            from_arrays(walks(), action_low=wrong[0], action_high=wrong[1])


@pytest.mark.parametrize("infinite", [np.inf, float(np.finfo(np.float32).max), 1e300])
def test_a_finite_bound_counts_where_the_other_is_infinite(infinite: float) -> None:
    data = walks(action=np.abs(walks()["action"]))
    replay = from_arrays(data, action_low=0.0, action_high=[infinite, 2.0])
    low, high = action_bounds(replay)
    assert low.tolist() == [0.0, 0.0] and high.tolist() == [float(data["action"][:, 0].max()), 2.0]
    assert any("where a side has no bound, the data's is taken" in n for n in replay.meta["notes"])
    data["action"][7, 0] = -0.5
    with pytest.raises(DataError, match=r"`action` has values outside \[0, inf\] in 1 row \(first: row 7"):
        from_arrays(data, action_low=0.0, action_high=infinite)


def test_scales_come_from_the_rows_that_train() -> None:
    """Row 3 is faulty and dropped with its episode; row 15 is in an episode that is not chosen; 9 is never drawn."""
    data = walks()
    data["action"][3], data["action"][15], data["action"][19] = np.nan, 50.0, -70.0
    replay = from_arrays(data, on_bad="drop_episode", action_low=-np.inf, action_high=np.inf)
    chosen = replay.filter([1, 2])
    low, high = action_bounds(chosen)
    np.testing.assert_array_equal(low, data["action"][20:].min(0))
    np.testing.assert_array_equal(high, data["action"][20:].max(0))
    low, high = action_bounds(chosen, chosen.usable_rows())
    drawn = np.setdiff1d(np.arange(20, 40), [29, 39])
    np.testing.assert_array_equal(high, data["action"][drawn].max(0))


def test_the_best_episodes_alone_scale_the_actions_of_cloning() -> None:
    data = walks()
    data["reward"][:] = np.repeat([0.0, 1.0, 2.0, 3.0], 10)
    data["action"][5] = 9.0
    method = op.BC(top=0.5, hidden_dims=(8,), batch_size=8).prepare(from_arrays(data))
    assert (method.normalizer.environment_action(torch.ones(2)) < 1.0).all()


def test_integer_columns_are_numbers_where_the_space_is_known() -> None:
    whole = np.random.default_rng(0).integers(-2, 3, (N, 1))
    for replay in (
        from_arrays(walks(action=whole), env_id="Pendulum-v1"),
        from_arrays(walks(action=whole), action_low=-2, action_high=2),
    ):
        assert replay.steps["action"].dtype == np.float32 and "action_n" not in replay.meta
        assert replay.meta["action_low"] == [-2.0]


# -- environments ------------------------------------------------------------------------------------------------------


class Env(gymnasium.Env):
    observation_space = spaces.Box(-1, 1, (3,), np.float32)

    def __init__(self, action_space: Any) -> None:
        self.action_space = action_space


SPACES: dict[str, Any] = {
    "MultiDiscrete": spaces.MultiDiscrete([3, 2]),
    "MultiBinary": spaces.MultiBinary(2),
    "Dict": spaces.Dict(a=spaces.Box(-1, 1, (2,))),
    "Tuple": spaces.Tuple([spaces.Discrete(2), spaces.Box(-1, 1, (1,))]),
    "Text": spaces.Text(3),
}


@pytest.mark.parametrize("kind", SPACES)
def test_other_spaces_of_actions_are_refused_in_a_sentence(kind: str) -> None:
    name = f"Odd{kind}-v0"
    gymnasium.register(name, lambda: Env(SPACES[kind]))
    try:
        with pytest.raises(UsageError, match=f"{name} has {kind} actions; expected a Box"):
            from_arrays(walks(), env_id=name)
    finally:
        del gymnasium.registry[name]


def test_an_environment_instead_of_its_id() -> None:
    with gymnasium.make("Pendulum-v1") as env, pytest.raises(UsageError, match="Pass 'Pendulum-v1'"):
        from_arrays(walks(), env_id=env)
    with pytest.raises(UsageError, match="Register it with gymnasium"):
        from_arrays(walks(), env_id=Env(spaces.Discrete(2)))


def test_bounds_of_an_environment_on_one_side() -> None:
    high = np.array([np.inf, 1.0], dtype=np.float32)
    gymnasium.register("HalfOpen-v0", lambda: Env(spaces.Box(np.zeros(2, np.float32), high)))
    try:
        replay = from_arrays(walks(action=np.abs(walks()["action"])), env_id="HalfOpen-v0")
    finally:
        del gymnasium.registry["HalfOpen-v0"]
    assert replay.meta["action_low"] == [0.0, 0.0] and replay.meta["action_high"] == [np.inf, 1.0]
    assert action_bounds(replay)[0].tolist() == [0.0, 0.0]


# -- what methods take -------------------------------------------------------------------------------------------------


def discrete(kind: str) -> Replay:
    rng = np.random.default_rng(0)
    columns = {
        "one number": rng.integers(0, 4, N),
        "several": rng.integers(0, 3, (N, 2)),
        "flags": rng.random((N, 2)) < 0.5,
    }
    return from_arrays(walks(action=columns[kind]))


@pytest.mark.parametrize("name", CONTROL + OTHERS)
def test_discrete_actions_images_and_stacked_frames_are_refused(name: str) -> None:
    method = find_method(name)()
    for kind in ("one number", "several", "flags"):
        with pytest.raises(DataError, match=f"discrete actions.* which {name} would take for real numbers"):
            method.prepare(discrete(kind))
    rng = np.random.default_rng(0)
    images = from_arrays(walks(obs=rng.integers(0, 255, (N, 8, 8, 3)).astype(np.uint8)))
    with pytest.raises(DataError, match=r"shape \(8, 8, 3\) a step \(images\)"):
        method.prepare(images)
    with pytest.raises(DataError, match=r"shape \(4, 3\) a step \(stacked or structured\)"):
        method.prepare(from_arrays(walks(obs=rng.normal(size=(N, 4, 3)))))


def test_a_fit_is_refused_before_it_writes_anything(tmp_path: Any) -> None:
    with pytest.raises(DataError, match="discrete actions"):
        op.fit(op.TD3BC(), discrete("one number"), max_steps=2, root=tmp_path, verbose=False)
    assert not list(tmp_path.iterdir())


class Own(op.TD3BC):
    """A user's own method."""


class Chooser(OfflineModule):
    takes_discrete_actions = True
    takes_images = True


def test_own_methods_are_asked_unless_they_declare_otherwise() -> None:
    with pytest.raises(DataError, match="which Own would take for real numbers"):
        Own().prepare(discrete("one number"))
    Chooser().check_data(discrete("one number"))
    Chooser().check_data(from_arrays(walks(obs=np.zeros((N, 4, 3)), action=discrete("several").steps["action"])))


def test_replays_made_by_hand_are_checked_too() -> None:
    replay = toy_replay()
    for name, column, text in (
        ("action", np.zeros((300, 1), np.int64), "discrete actions"),
        ("action", np.zeros(300, np.float32), r"actions of shape \(300,\)"),
        ("obs", np.zeros((300, 3), np.int64), "observations of type int64"),
        ("obs", np.zeros((300, 0), np.float32), "no number in them"),
        ("action", torch.zeros(300, 1, dtype=torch.int64), "discrete actions"),
    ):
        odd = Replay({**replay.steps, name: column}, start=replay.start, length=replay.length, meta={"name": "odd"})
        with pytest.raises(DataError, match=text):
            check_suits(odd, "TD3BC")


def test_one_step_episodes_show_no_dynamics() -> None:
    bandit = from_arrays(walks(terminated=np.ones(N, bool), episode_end=None))
    assert bandit.num_episodes == N
    with pytest.raises(DataError, match="shows no step's successor"):
        op.WorldModel().prepare(bandit)
    op.TD3BC(hidden_dims=(8,), batch_size=8).prepare(bandit)
