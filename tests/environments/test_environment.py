"""Environments of users: what they raise or return amiss is one sentence that names them, or is taken."""

from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from offpolicy.data.sources import from_arrays
from offpolicy.environments.checks import EnvironmentFailed
from offpolicy.environments.make import make_environment
from offpolicy.errors import UsageError
from offpolicy.evaluation import rollout
from offpolicy.evaluation.rollout import Evaluator

OBS = np.zeros(3, np.float32)
SIZES = SimpleNamespace(obs_dim=3, action_dim=1)


class Steady(gymnasium.Env):
    """Ten steps of reward 1; subclasses answer in another form."""

    observation_space = spaces.Box(-9, 9, (3,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    first, later = (OBS, {}), (OBS, 1.0, False, False, {})

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return self.first

    def step(self, action):
        self.t += 1
        return (*self.later[:3], self.later[3] if self.t < 10 else True, *self.later[4:])


def answers(obs=OBS, reward=1.0, terminated=False, truncated=False, info=None):
    return obs, reward, terminated, truncated, {} if info is None else info


def play(kind, **meta):
    gymnasium.register("Own-v0", entry_point=kind)
    try:
        return Evaluator({"env_id": "Own-v0", **meta}, SIZES, episodes=2).run(lambda obs: np.zeros((len(obs), 1)))
    finally:
        del gymnasium.registry["Own-v0"]


def steady(**changes):
    return type("Own", (Steady,), changes)


@pytest.mark.parametrize(
    "later",
    [
        answers(reward=np.ones(1)),
        answers(reward=np.ones((1, 1), np.float32)),
        answers(reward=np.float16(1)),
        answers(reward=torch.ones(1)),
        answers(reward=True),
        answers(reward=1),
        answers(terminated=np.zeros(1, bool), truncated=np.bool_(False)),
        answers(obs=[0, 0, 0]),
        answers(obs=np.zeros((1, 3))),
        answers(obs=np.zeros(3, np.int64)),
        answers(obs=torch.zeros(3)),
        (OBS, 1.0, False, False, None),
    ],
)
def test_numbers_in_other_clothes_are_taken(later):
    np.testing.assert_array_equal(play(steady(later=later)).returns, 10.0)


@pytest.mark.parametrize(
    ("reported", "success"),
    [(np.array([True]), True), (np.array(0.0), False), (torch.tensor(True), True), (1, True), (None, None)],
)
def test_successes_of_one_element_are_taken(reported, success):
    found = play(steady(later=answers(info={"success": reported}))).success
    assert (None if found is None else bool(found.all())) == success


class Old(Steady):
    def step(self, action):
        return (*super().step(action)[:3], {})


class Raises(Steady):
    def step(self, action):
        if self.t == 3:
            raise RuntimeError("simulator exploded.\nat length")
        return super().step(action)


class Exits(Steady):
    def reset(self, *, seed=None, options=None):
        raise SystemExit("licence not found")


class WithoutOptions(Steady):
    def reset(self, *, seed=None):
        return super().reset()


class WithoutSeed(Steady):
    def reset(self):
        return super().reset()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Old, "step 1 of episode 1.*expected step.action. to return .observation, reward, terminated"),
        (Raises, r"failed in step 4 of episode 1 \(seed 10000\): RuntimeError: simulator exploded \(test_environment"),
        (Exits, "the reset of episode 1.*licence not found"),
        (WithoutOptions, "options.*expected reset.seed=…, options=…."),
        (WithoutSeed, "expected reset.seed=…, options=…."),
        (steady(first=OBS), r"returned one value \(ndarray\) in the reset.*expected reset"),
        (steady(first=(OBS, OBS)), "returned 2 values .*in the reset"),
        (steady(first=(OBS, {}, {})), "returned 3 values"),
        (steady(first=(None, {})), "NoneType.*expected numbers"),
        (steady(later=answers(reward=np.ones(2))), r"`reward` of shape \(2,\).*expected one number"),
        (steady(later=answers(reward=None)), "`reward`: None"),
        (steady(later=answers(reward="1")), "`reward`: 1 .str."),
        (steady(later=answers(reward=1j)), "`reward`.*complex"),
        (steady(later=answers(reward=np.nan)), "reward nan.*finite"),
        (steady(later=answers(reward=np.array([-np.inf]))), "reward -inf.*finite"),
        (steady(later=answers(reward=1e39)), r"reward 1e\+39 .*finite number of float32"),
        (steady(later=answers(reward=10**400)), "reward 1000.*finite number of float32"),
        (steady(later=answers(terminated=np.nan)), "`terminated` of nan .*true or false"),
        (steady(later=answers(truncated=0.5)), "`truncated` of 0.5 .*true or false"),
        (steady(later=answers(obs=np.ma.masked_array(OBS, [0, 1, 0]))), "nan at place 1 .*finite numbers"),
        (steady(later=answers(terminated=np.zeros(3, bool))), r"`terminated` of shape \(3,\)"),
        (steady(later=answers(info={"success": np.array([True, False])})), r"`success` of shape \(2,\)"),
        (steady(later=answers(info={"is_success": "yes"})), "`success`: yes"),
        (steady(later=answers(info={"success": np.nan})), "success nan"),
        (steady(later=(OBS, 1.0, False, False, "info")), "returned 5 values .*str"),
        (steady(later=answers(obs=np.zeros(1))), "observation of 1 numbers in step 1.*expected 3"),
        (steady(later=answers(obs=np.zeros((2, 3)))), "observation of 6 numbers"),
        (steady(later=answers(obs=np.array([0.0, np.nan, 0.0]))), "observation with nan at place 1.*finite"),
        (steady(first=(np.array([0.0, 0.0, np.inf]), {})), "observation with inf at place 2 in the reset"),
        (steady(later=answers(obs={"a": 1})), "another kind .dict"),
        (steady(later=answers(obs=np.array(["a", "b", "c"]))), "another kind"),
        (steady(later=answers(obs=[[1, 2], [3]])), "failed in step 1"),
    ],
)
def test_what_cannot_be_taken_is_one_sentence(kind, message):
    with pytest.raises(EnvironmentFailed, match=message) as caught:
        play(kind)
    text = str(caught.value)
    assert text.startswith("Own-v0 ") and "\n" not in text and "--run.eval_episodes=0" in text and len(text) < 500


def test_the_limit_wrapper_over_four_values():
    """gymnasium's own wrapper unpacks before we see them."""
    with pytest.raises(EnvironmentFailed, match=r"expected step\(action\) to return"):
        play(Old, max_episode_steps=5)


def test_a_part_that_is_missing():
    space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Box(-1, 1, (1,))})
    parts = {"a": np.zeros(2), "b": np.zeros(1)}
    whole = steady(observation_space=space, first=(parts, {}), later=answers(obs=parts))
    np.testing.assert_array_equal(play(whole, obs_keys=["b", "a"]).returns, 10.0)
    broken = steady(observation_space=space, first=(parts, {}), later=answers(obs={"a": np.zeros(2)}))
    with pytest.raises(EnvironmentFailed, match="without 'b'"):
        play(broken, obs_keys=["b", "a"])


def test_an_endless_episode_is_named(monkeypatch):
    monkeypatch.setattr(rollout, "MAX_STEPS", 20)
    endless = steady(step=lambda self, action: answers())
    with pytest.raises(UsageError, match=r"Own-v0 ran for 20 steps without an end.*--data\.max_episode_steps"):
        play(endless)


def test_an_error_in_closing_is_a_warning(caplog):
    def close(self):
        raise OSError("the window is gone")

    kind = steady(close=close)
    gymnasium.register("Own-v0", entry_point=kind)
    try:
        evaluator = Evaluator({"env_id": "Own-v0"}, SIZES, episodes=1)
    finally:
        del gymnasium.registry["Own-v0"]
    evaluator.close()
    assert evaluator.envs == [] and "the window is gone" in caplog.text


@pytest.mark.parametrize(
    ("space", "name"),
    [
        (spaces.MultiDiscrete([3, 2]), "MultiDiscrete"),
        (spaces.MultiBinary(2), "MultiBinary"),
        (spaces.Dict({"a": spaces.Box(-1, 1, (1,))}), "Dict"),
        (spaces.Tuple([spaces.Discrete(2)]), "Tuple"),
        (spaces.Text(3), "Text"),
        (None, "None"),
    ],
)
def test_actions_of_other_spaces_are_refused_at_load(space, name):
    rng = np.random.default_rng(0)
    columns = {"obs": rng.normal(size=(9, 3)), "action": rng.uniform(-1, 1, (9, 1)), "reward": np.zeros(9)}
    gymnasium.register("Own-v0", entry_point=steady(action_space=space))
    try:
        with pytest.raises(UsageError, match=f"Own-v0.*{name}"):
            from_arrays(columns, terminated=np.zeros(9, bool), env_id="Own-v0")
    finally:
        del gymnasium.registry["Own-v0"]


@pytest.mark.parametrize("env", [Steady(), Steady, gymnasium.spec("Pendulum-v1")])
def test_an_object_is_no_id(env):
    with pytest.raises(UsageError, match=r"`env_id` is an object.*gymnasium\.register"):
        make_environment({"env_id": env})
