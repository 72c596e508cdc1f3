import importlib.util
import random
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from scripts import environment

from offpolicy.compute.generators import isolated_rng
from offpolicy.environments.wrappers import NoEnvironment
from offpolicy.errors import UsageError
from offpolicy.evaluation import rollout
from offpolicy.evaluation.rollout import Evaluator, make_evaluator

PENDULUM = {"env_id": "Pendulum-v1"}
PENDULUM_SIZES = SimpleNamespace(obs_dim=3, action_dim=1)


class Corridor(gymnasium.Env):
    """A point on a line; the reward is the action; the episode ends after a number of steps drawn at the reset."""

    def __init__(self, dict_obs=False, report=None, high=1.0):
        part = spaces.Box(-10, 10, (2,), np.float64)
        goal = spaces.Box(-10, 10, (1,), np.float64)
        self.dict_obs, self.report = dict_obs, report
        nested = spaces.Dict({"velocity": goal})
        self.observation_space = spaces.Dict({"here": part, "goal": goal, "more": nested}) if dict_obs else part
        self.action_space = spaces.Box(-high, high, (1,), np.float32)
        self.actions, self.seeds, self.options = [], [], []

    def _obs(self):
        here = np.array([self.x, self.t])
        return (
            {"here": here, "goal": np.array([7.0]), "more": {"velocity": np.array([-1.0])}} if self.dict_obs else here
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.options.append(options)
        self.t, self.end, self.x = 0, int(self.np_random.integers(2, 12)), float(self.np_random.random())
        return self._obs(), {}

    def step(self, action):
        assert self.t < self.end, "stepped after its end"
        assert action.dtype == np.float32
        self.actions.append(float(action[0]))
        self.t += 1
        self.x += float(action[0])
        info = {} if self.report is None else {self.report: self.t == 2 and self.end % 2 == 0}
        return self._obs(), float(action[0]), self.t >= self.end, False, info


class Endless(Corridor):
    def step(self, action):
        self.end = self.t + 5
        return super().step(action)


class Numbers(Corridor):
    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Discrete(3)


for name, kind in (("Corridor", Corridor), ("Endless", Endless), ("Numbers", Numbers)):
    if f"{name}-v0" not in gymnasium.registry:
        gymnasium.register(f"{name}-v0", entry_point=kind)


def corridor(sizes=(2, 1), *, episodes=7, seed=3, num_envs=None, **meta):
    return Evaluator(
        {"env_id": "Corridor-v0", **meta},
        SimpleNamespace(obs_dim=sizes[0], action_dim=sizes[1]),
        episodes=episodes,
        seed=seed,
        num_envs=num_envs,
    )


def swing(obs):
    return obs @ np.array([[-1.0], [3.0], [0.5]])


def by_hand(episodes, seed):
    """The obvious loop over one Pendulum."""
    env = gymnasium.make("Pendulum-v1")
    returns = []
    for k in range(episodes):
        obs, _ = env.reset(seed=seed + k)
        total, over = 0.0, False
        while not over:
            action = np.clip(swing(obs.astype(np.float32)[None])[0].astype(np.float32), -2, 2)
            obs, reward, terminated, truncated, _ = env.step(action)
            total, over = total + reward, terminated or truncated
        returns.append(total)
    return np.array(returns)


def test_equals_the_obvious_loop_for_any_number_of_environments():
    expected = by_hand(5, seed=40)
    for num_envs in (1, 2, 5, None):
        result = Evaluator(PENDULUM, PENDULUM_SIZES, episodes=5, seed=40, num_envs=num_envs).run(swing)
        np.testing.assert_array_equal(result.returns, expected)
        np.testing.assert_array_equal(result.lengths, 200)
        assert result.success is None


def test_episode_k_has_seed_k_and_ended_episodes_are_left_alone():
    one = corridor(num_envs=1)
    result = one.run(lambda obs: np.full((len(obs), 1), 0.5))
    assert one.envs[0].unwrapped.seeds == [3, 4, 5, 6, 7, 8, 9]
    assert len(set(result.lengths.tolist())) > 1  # they end at different times
    np.testing.assert_allclose(result.returns, 0.5 * result.lengths)
    for num_envs in (2, 3, 7, 50):
        several = corridor(num_envs=num_envs)
        assert len(several.envs) == min(num_envs, 7)
        again = several.run(lambda obs: np.full((len(obs), 1), 0.5))
        np.testing.assert_array_equal(again.lengths, result.lengths)
        np.testing.assert_array_equal(again.returns, result.returns)


def test_environments_are_kept_and_a_second_run_is_the_same():
    evaluator = Evaluator(PENDULUM, PENDULUM_SIZES, episodes=3)
    envs = list(evaluator.envs)
    first = evaluator.run(swing)
    second = evaluator.run(swing)
    np.testing.assert_array_equal(first.returns, second.returns)
    assert evaluator.envs == envs
    evaluator.close()
    assert evaluator.envs == []


def test_ten_pendulum_episodes_are_fast():
    evaluator = Evaluator(PENDULUM, PENDULUM_SIZES)
    times = []
    for _ in range(3):
        start = time.process_time()
        evaluator.run(swing)
        times.append(time.process_time() - start)
    assert min(times) < 0.4


def test_actions_are_clipped_to_the_space():
    evaluator = corridor(episodes=1, env_kwargs={"high": 0.25})
    evaluator.run(lambda obs: np.full((len(obs), 1), 3.0))
    assert set(evaluator.envs[0].unwrapped.actions) == {0.25}


def test_actions_may_be_tensors():
    expected = Evaluator(PENDULUM, PENDULUM_SIZES, episodes=2).run(swing).returns
    weight = torch.tensor([[-1.0], [3.0], [0.5]], requires_grad=True)

    def act(obs):
        action = torch.from_numpy(obs) @ weight
        assert not action.requires_grad
        return action

    result = Evaluator(PENDULUM, PENDULUM_SIZES, episodes=2).run(act)
    np.testing.assert_allclose(result.returns, expected, rtol=1e-4)


def test_parts_of_a_dict_observation_come_in_the_order_of_the_data():
    seen = []
    evaluator = corridor((4, 1), episodes=1, env_kwargs={"dict_obs": True}, obs_keys=["goal", "here", "more/velocity"])

    def act(obs):
        seen.append(obs)
        return np.zeros((len(obs), 1))

    evaluator.run(act)
    assert seen[0].dtype == np.float32
    np.testing.assert_array_equal(seen[1][0, [0, 2, 3]], [7.0, 1.0, -1.0])
    assert seen[0][0, 2] == 0.0  # what the policy kept does not change afterwards


def test_reset_options_for_all_or_round_and_round():
    same = corridor(episodes=3, num_envs=1, reset_options={"goal_cell": [6, 6]})
    same.run(lambda obs: np.zeros((len(obs), 1)))
    assert same.envs[0].unwrapped.options == [{"goal_cell": [6, 6]}] * 3
    tasks = corridor(episodes=3, num_envs=1, reset_options=[{"task_id": 1}, {"task_id": 2}])
    tasks.run(lambda obs: np.zeros((len(obs), 1)))
    assert [o["task_id"] for o in tasks.envs[0].unwrapped.options] == [1, 2, 1]


@pytest.mark.parametrize("report", ["success", "is_success"])
def test_success_is_reported_at_any_step(report):
    result = corridor(env_kwargs={"report": report}).run(lambda obs: np.zeros((len(obs), 1)))
    np.testing.assert_array_equal(result.success, result.lengths % 2 == 0)
    assert result.success.any() and not result.success.all()


class Counter:
    """Acts on what it remembers: the step number of each row."""

    def __init__(self):
        self.resets, self.rewards, self.finished = [], [], []

    def reset(self, num_envs):
        self.resets.append(num_envs)
        self.t = np.zeros(num_envs)

    def act(self, obs):
        return 0.01 * self.t[:, None]

    def observe(self, reward, finished):
        self.t += 1
        self.rewards.append(reward.copy())
        self.finished.append(finished.copy())


def test_a_policy_with_memory():
    agent = Counter()
    result = corridor(num_envs=4).run(agent)
    assert agent.resets == [4, 3]
    expected = [sum(np.float32(0.01 * t) for t in range(n)) for n in result.lengths]
    np.testing.assert_allclose(result.returns, expected, rtol=1e-6)
    waves = sum(r.sum() for r in agent.rewards)
    np.testing.assert_allclose(waves, result.returns.sum())
    assert agent.finished[-1].all() and not agent.finished[0].any()


def test_global_generators_are_put_back_and_the_evaluation_does_not_depend_on_them():
    def noisy(obs):
        return np.array([[random.random() + np.random.rand() + torch.rand(()).item() - 1.5] for _ in obs])

    evaluator = Evaluator(PENDULUM, PENDULUM_SIZES, episodes=2)
    results = []
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
        results.append(evaluator.run(noisy).returns)
        assert random.getstate() == before[0]
        np.testing.assert_array_equal(np.random.get_state()[1], before[1])
        assert torch.equal(torch.get_rng_state(), before[2])
    np.testing.assert_array_equal(*results)


def test_generators_are_put_back_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), isolated_rng(0):
        torch.rand(3)
        1 / 0  # noqa: B018
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_the_generator_of_the_accelerator_is_put_back():
    torch.rand(3, device="cuda")
    state = torch.cuda.get_rng_state()
    with isolated_rng(0):
        torch.rand(3, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_a_policy_that_diverged_scores_nan_and_stops():
    whole = corridor().run(lambda obs: np.full((len(obs), 1), 0.5))
    result = corridor().run(lambda obs: np.where(obs[:, 1:] >= 8, np.nan, 0.5))  # obs[:, 1] is the step number
    diverged = whole.lengths > 8
    assert diverged.any() and not diverged.all()
    np.testing.assert_array_equal(np.isnan(result.returns), diverged)
    np.testing.assert_array_equal(result.lengths, np.minimum(whole.lengths, 8))
    np.testing.assert_array_equal(result.returns[~diverged], whole.returns[~diverged])


def test_wrong_action_shape():
    with pytest.raises(UsageError, match=r"shape \(7,\) for 7 observations; expected \(7, 1\)"):
        corridor().run(lambda obs: np.zeros(len(obs)))


def test_an_episode_without_end(monkeypatch):
    monkeypatch.setattr(rollout, "MAX_STEPS", 50)
    meta = {"env_id": "Endless-v0"}
    sizes = SimpleNamespace(obs_dim=2, action_dim=1)
    with pytest.raises(UsageError, match=r"50 steps without an end.*max_episode_steps"):
        Evaluator(meta, sizes, episodes=1).run(lambda obs: np.zeros((1, 1)))
    limited = Evaluator({**meta, "max_episode_steps": 20}, sizes, episodes=2).run(lambda obs: np.zeros((2, 1)))
    np.testing.assert_array_equal(limited.lengths, 20)


@pytest.mark.parametrize(
    ("meta", "sizes", "message"),
    [
        (PENDULUM, (4, 1), "observations of width 3, the data have 4.*obs_keys"),
        (PENDULUM, (3, 2), "actions of width 1, the data have 2"),
        ({"env_id": "CartPole-v1"}, (4, 2), r"action space Discrete\(2\); expected a Box of 2 numbers"),
        ({"env_id": "Numbers-v0"}, (1, 1), r"observation space Discrete\(3\); expected numbers in a Box"),
        (
            {"env_id": "Corridor-v0", "env_kwargs": {"dict_obs": True}},
            (4, 1),
            r"'goal', 'here', 'more'.*Set `obs_keys`",
        ),
        (
            {"env_id": "Corridor-v0", "env_kwargs": {"dict_obs": True}, "obs_keys": ["x"]},
            (1, 1),
            "no observation part 'x'",
        ),
        ({"env_id": "Corridor-v0", "env_kwargs": {"hihg": 1}}, (2, 1), r"refuses `env_kwargs` \{'hihg': 1\}"),
    ],
)
def test_an_environment_that_does_not_match_the_data(meta, sizes, message):
    with pytest.raises(UsageError, match=message) as caught:
        make_evaluator(meta, SimpleNamespace(obs_dim=sizes[0], action_dim=sizes[1]))
    assert not isinstance(caught.value, NoEnvironment)


@pytest.mark.parametrize("wrong", [{"episodes": -1}, {"num_envs": 0}])
def test_impossible_numbers(wrong):
    with pytest.raises(UsageError, match="expected at least 1"):
        Evaluator(PENDULUM, PENDULUM_SIZES, **wrong)


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ({}, "name no environment"),
        ({"env_id": None}, "name no environment"),
        ({"env_id": "Nothing-v3"}, "Nothing-v3 cannot be made here .*doesn't exist"),
        ({"env_id": "nopackage:Nothing-v3"}, "No module named 'nopackage'"),
    ],
)
def test_no_environment_is_a_sentence(meta, reason):
    evaluator, why = make_evaluator(meta, PENDULUM_SIZES)
    assert evaluator is None
    assert re.search(reason, why)
    assert why.endswith("not measured.")


def test_no_episodes_means_no_evaluation():
    evaluator, why = make_evaluator(PENDULUM, PENDULUM_SIZES, episodes=0)
    assert evaluator is None and "off" in why


def test_an_evaluator_has_no_reason_against_it():
    evaluator, why = make_evaluator(PENDULUM, PENDULUM_SIZES, episodes=2)
    assert isinstance(evaluator, Evaluator) and why == ""


@pytest.mark.parametrize(
    ("env_id", "module", "extra"),
    [
        ("Hopper-v4", "mujoco", "mujoco"),
        ("PointMaze_MediumDense-v3", "gymnasium_robotics", "robotics"),
        ("AdroitHandPen-v1", "gymnasium_robotics", "robotics"),
        ("cube-single-v0", "ogbench", "ogbench"),
    ],
)
def test_a_missing_package_names_its_extra(monkeypatch, env_id, module, extra):
    find_spec, make = importlib.util.find_spec, gymnasium.make

    def without(env_id, **kwargs):
        if module == "mujoco":
            raise gymnasium.error.DependencyNotInstalled("MuJoCo is not installed, run `pip install gymnasium[mujoco]`")
        return make(env_id, **kwargs)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
    monkeypatch.setattr(gymnasium, "make", without)
    monkeypatch.delitem(gymnasium.registry, env_id, raising=False)
    evaluator, why = make_evaluator({"env_id": env_id}, PENDULUM_SIZES)
    assert evaluator is None
    assert f"{env_id} needs {module}" in why
    assert f"pip install 'offpolicy[{extra}]'" in why


def test_old_versions_make_no_noise(recwarn):
    pytest.importorskip("mujoco")
    evaluator, _ = make_evaluator(
        {"env_id": "Hopper-v4", "env_kwargs": {"render_mode": "human"}, "max_episode_steps": 5},
        SimpleNamespace(obs_dim=11, action_dim=3),
        episodes=2,
    )
    result = evaluator.run(lambda obs: np.zeros((len(obs), 3)))
    assert result.lengths.tolist() == [5, 5]
    assert evaluator.envs[0].render_mode is None
    assert not [w for w in recwarn if "out of date" in str(w.message)]


@pytest.mark.slow
def test_importing_the_module_stays_light():
    """Nor do the modules that look for checkpoints before anything else is imported."""
    modules = "evaluation.rollout", "evaluation.scores", "checkpoint", "files"
    heavy = "{'gymnasium', 'lightning', 'matplotlib'}"
    code = "".join(f"import offpolicy.{m}; " for m in modules) + f"import sys; print({heavy} & sys.modules.keys())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert out.stdout.strip() == "set()", out.stderr
