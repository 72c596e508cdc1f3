"""What goal-conditioned methods share: acting towards goals, temperature, questions, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from toy import fit, method

from offpolicy.data.replay import Replay
from offpolicy.errors import UsageError


@pytest.fixture(scope="module")
def ota(replay: Replay) -> Any:
    return method("OTA-clipped", normalize_obs=True).prepare(replay)


def test_answers_are_of_the_kind_and_shape_of_the_observations(ota: Any) -> None:
    obs, goal = np.random.default_rng(0).normal(size=(2, 4, 3))
    actions = ota.act_goal(obs, goal)
    assert actions.dtype == np.float32 and actions.shape == (4, 1)
    np.testing.assert_allclose(ota.act_goal(obs[1], goal[1]), actions[1], rtol=1e-5)  # one row gives one row
    np.testing.assert_allclose(ota.act_goal(obs, goal[0])[0], actions[0], rtol=1e-5)  # one goal for all
    assert ota.act_goal(obs[0], goal).shape == (4, 1)
    values = ota.value_of(torch.from_numpy(obs), goal)
    assert values.keys() == {"low", "high"} and values["low"].shape == (4,) and isinstance(values["low"], torch.Tensor)
    assert ota.value_of(obs[0], goal[0])["high"].shape == ()
    assert ota.subgoal(obs, goal).shape == ota.represent(obs, goal).shape == (4, ota.hparams.rep_dim)
    assert ota.training


def test_actions_are_in_environment_units(ota: Any) -> None:
    """The bounds of the data are ±2."""
    obs, goal = torch.randn(2, 4, 3)
    with torch.no_grad():
        inner = ota.goal_policy(ota.normalizer.obs(obs), ota.normalizer.obs(goal), lambda mean: mean)
    torch.testing.assert_close(ota.act_goal(obs, goal), 2 * inner.clamp(-1, 1))


def test_temperature_adds_noise_to_both_levels(ota: Any) -> None:
    obs, goal = torch.randn(2, 4, 3)
    calm = ota.act_goal(obs, goal)
    one, two = (
        ota.act_goal(obs, goal, temperature=0.1, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0)
    )
    assert torch.equal(one, two) and not torch.equal(one, calm)
    g = torch.Generator().manual_seed(0)
    noise = [0.1 * torch.randn(4, width, generator=g) for width in (ota.hparams.rep_dim, 1)]
    means = iter(noise)
    with torch.no_grad():
        inner = ota.goal_policy(ota.normalizer.obs(obs), ota.normalizer.obs(goal), lambda mean: mean + next(means))
    torch.testing.assert_close(one, 2 * inner.clamp(-1, 1))


def test_an_agent_plays_towards_its_goals(ota: Any) -> None:
    agent, (obs, goal) = type(ota).agent(ota), np.random.default_rng(0).normal(size=(2, 4, 3))
    agent.reset(4)
    agent.set_goals(goal)
    np.testing.assert_array_equal(agent.act(obs), ota.act_goal(obs, goal))
    agent.reset(4)
    with pytest.raises(UsageError, match="was given none"):
        agent.act(obs)


def test_what_cannot_be_asked(ota: Any, replay: Replay) -> None:
    obs = np.zeros((4, 3))
    with pytest.raises(UsageError, match="Call `act_goal"):
        ota.act(obs)
    with pytest.raises(UsageError, match=r"`goal` has shape \(4, 2\)"):
        ota.act_goal(obs, obs[:, :2])
    with pytest.raises(UsageError, match="4 observations and 3 goals"):
        ota.act_goal(obs, obs[:3])
    with pytest.raises(UsageError, match="temperature"):
        ota.act_goal(obs, obs, temperature=-1.0)
    without = method("GCBC")
    del without.agent  # of the tests, see toy.py
    with pytest.raises(UsageError, match="GCBC acts towards goals and was given none"):
        fit(without, replay, 2)  # Pendulum has no goals; told before training
    flat = method("GCBC").prepare(replay)
    assert flat.value_of(obs, obs) == {}
    for question in (flat.subgoal, flat.represent):
        with pytest.raises(UsageError, match="no high level"):
            question(obs, obs)


def test_all_options_reach_the_checkpoint() -> None:
    """OTA passes most of its options on to HIQL."""
    hparams = method("OTA-clipped", abstraction_factor=3, subgoal_steps=7).hparams
    assert hparams["abstraction_factor"] == 3 and hparams["subgoal_steps"] == 7 and "options" not in hparams


def line() -> Replay:
    """On a line a step of a moves by a/10; each episode walks 20 steps to the left or to the right."""
    rng = np.random.default_rng(0)
    length, episodes = 20, 60
    action = rng.choice([-1.0, 1.0], episodes).repeat(length)[:, None].astype(np.float32)
    start = np.arange(episodes) * length
    obs = np.concatenate([rng.uniform(-5, 5) + np.cumsum(action[s : s + length]) for s in start])[:, None] / 10
    obs = obs.astype(np.float32) - action / 10  # the state before the action
    tail = obs[start + length - 1] + action[start + length - 1] / 10
    steps = {"obs": obs, "action": action, "terminated": np.zeros(len(obs), bool)}
    return Replay(steps, start=start, length=np.full(episodes, length), tail={"obs": tail})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GCBC", {"hidden_dims": (32,), "lr": 1e-2}),
        ("OTA-clipped", {"hidden_dims": (32, 32), "lr": 3e-3, "tau": 0.05, "discount": 0.95, "actor_p_random": 0.0}),
    ],
)
def test_the_way_to_a_goal_is_learnt(name: str, options: dict[str, Any]) -> None:
    module = method(name, batch_size=128, max_grad_norm=None, **options).prepare(line())
    module.run_block(0, 200)
    here = np.linspace(-0.5, 0.5, 11)[:, None]
    assert (module.act_goal(here, here + 0.8) > 0.2).all() and (module.act_goal(here, here - 0.8) < -0.2).all()
    way = np.linspace(-0.3, 0.6, 10)[:, None]
    for value in module.value_of(way, way[-1]).values():  # grows on the way; over options it is not learnt at the goal
        assert (np.diff(value)[:6] > 0).mean() > 0.8
