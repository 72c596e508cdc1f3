"""Estimates of policies from episodes: importance weights by hand, values of the right policy, support and doubts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import toy_replay

import offpolicy as op
from offpolicy.data.replay import Replay
from offpolicy.errors import DataError, UsageError
from offpolicy.evaluation.behaviour import fit_behaviour
from offpolicy.evaluation.estimators import LoggedEpisodes, weight_health, weighted_importance_sampling
from offpolicy.evaluation.support import Support
from offpolicy.evaluation.verdicts import Scored, doubt_of_weights, verdict
from offpolicy.nn.policies import normal_log_prob
from offpolicy.training.estimating import estimate_policies
from offpolicy.training.fitted_values import Fitting, fitted_values
from offpolicy.training.held_episodes import Held

SMALL = Fitting(updates=20, discount=0.9, critics=2, hidden_dims=(8,), tau=0.5)
STD = 0.4


class Normal(op.OfflineModule):
    """a ~ N(w·(1, 1, 1)·s, 0.4²) in actions of [-1, 1]."""

    def __init__(self, weight: float = 0.0) -> None:
        super().__init__()
        self.weight = weight

    def build(self, sizes: op.Sizes) -> None:
        self.register_parameter("p", torch.nn.Parameter(torch.tensor(self.weight)))

    def policy(self, obs: torch.Tensor) -> torch.Tensor:
        return self.p * obs.sum(-1, keepdim=True)

    def sample_action(self, obs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.policy(obs) + STD * noise

    def log_density(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return normal_log_prob(action, self.policy(obs), torch.full_like(action, STD).log())


class Mute(Normal):
    """It draws actions of a density that it does not give."""

    log_density = op.OfflineModule.log_density


class Still(op.OfflineModule):
    def build(self, sizes: op.Sizes) -> None:
        self.register_parameter("p", torch.nn.Parameter(torch.zeros(())))

    def policy(self, obs: torch.Tensor) -> torch.Tensor:
        return self.p * obs[:, :1]


def ready(method: Any) -> Any:
    """A policy of actions in [-2, 2]."""
    method.initialize(op.Sizes(3, 1), 0)
    method.normalizer.action_scale.fill_(0.5)
    return method


def logged_replay() -> Replay:
    """Episodes of unequal length by a ~ N(0, 0.8²) in [-2, 2], with its log-density in those units."""
    replay = toy_replay((3, 5, 4, 5) * 3)
    action = np.clip(0.8 * np.random.default_rng(0).normal(size=(replay.num_steps, 1)), -1.9, 1.9)
    logp = -0.5 * (action[:, 0] / 0.8) ** 2 - np.log(0.8 * np.sqrt(2 * np.pi))
    return replay.derive({**replay.steps, "action": action.astype(np.float32), "logp": logp}, replay.tail)


def test_importance_weights_are_ratios_of_densities_in_one_unit() -> None:
    """N(w·s, 0.4²) in [-1, 1] is N(2w·s, 0.8²) in [-2, 2]: the policy of weight 0 is that of the data."""
    replay = logged_replay()
    same, other = ready(Normal(0.0)), ready(Normal(0.05))
    found = estimate_policies(
        [same, other], replay, estimators=("wis", "is"), fitting=SMALL, behaviour="logp", intervals="episodes"
    )
    reward = np.zeros((12, 5))
    reward[np.arange(5) < replay.length[:, None]] = replay.steps["reward"]
    mean = (reward * 0.9 ** np.arange(5)).sum(1).mean()
    for name in ("wis", "is"):
        one = found.values[name][0]
        assert one.value == pytest.approx(mean, rel=1e-5) and one.effective == pytest.approx(12, rel=1e-5)
        assert one.low < one.value < one.high and found.doubts[name][0] == ""
    action, center = replay.steps["action"][:, 0].astype(np.float64), 2 * 0.05 * replay.steps["obs"].sum(1)
    ratio = np.zeros((12, 5))
    ratio[np.arange(5) < replay.length[:, None]] = -0.5 * (((action - center) / 0.8) ** 2 - (action / 0.8) ** 2)
    by_hand = LoggedEpisodes(reward, replay.length, log_ratio=ratio)
    assert found.values["wis"][1].value == pytest.approx(weighted_importance_sampling(by_hand, 0.9).value, rel=1e-4)
    assert found.values["wis"][1].effective == pytest.approx(weight_health(by_hand).effective, rel=1e-4)
    with pytest.raises(DataError, match="expected one of these with log-probabilities"):
        estimate_policies([same], replay, estimators=["wis"], behaviour="nothing")


def test_doubly_robust_takes_the_values_of_its_own_policy() -> None:
    replay, policies = logged_replay(), [ready(Normal(0.0)), ready(Normal(0.2)), ready(Still())]
    found = estimate_policies(policies, replay, estimators=("dr", "fqe"), fitting=SMALL, behaviour="logp")
    assert len(found.values["dr"]) == 2 and len(found.values["fqe"]) == 3
    assert len(found.without) == 1 and "Still is deterministic" in found.without[0]
    method, _ = fitted_values(policies[:2], replay, SMALL, "sample")
    held = Held(replay, 0.0, policies[0])
    tables = held.tables(method)
    logged = held.logged(policies[1], held.column("logp"), tables.of(1))
    expected = method.values(replay.steps["obs"], replay.steps["action"])[1].mean(0).numpy()
    np.testing.assert_allclose(logged.q[logged.inside], expected, rtol=1e-5)
    ended = replay.steps["terminated"][replay.end]
    assert (logged.v_after[ended] == 0).all() and (logged.v_after[~ended] != 0).all()


def test_intervals_of_fitted_q_come_from_refits() -> None:
    fitting = Fitting(updates=20, discount=0.9, critics=2, hidden_dims=(8,), holdout=0.2, refits=3)
    policy, replay = ready(Still()), toy_replay((4,) * 20)
    (one,) = estimate_policies([policy], replay, fitting=fitting, intervals="refits").values["fqe"]
    assert one.low < one.value < one.high
    (one,) = estimate_policies([policy], replay, fitting=fitting).values["fqe"]
    assert np.isnan(one.low)


def test_refusals() -> None:
    replay = logged_replay()
    for policy, options, words in (
        (Still(), {"estimators": ["wis"]}, "Still is deterministic, so its actions have no density"),
        (Mute(), {"estimators": ["wis"]}, "Mute draws actions but does not give their density"),
        (Normal(), {"estimators": ["wis"], "how": "mean"}, "weighs the actions that policies draw"),
        (Normal(), {"estimators": ["wiss"]}, "expected one of fqe"),
        (Normal(), {"estimators": []}, "is empty"),
        (Normal(), {"intervals": "all"}, "expected one of episodes"),
    ):
        with pytest.raises(UsageError, match=words):
            estimate_policies([ready(policy)], replay, fitting=SMALL, **options)


def test_the_behaviour_is_found_by_likelihood() -> None:
    """N(s/2, 0.2²) has -log 0.2 - ½ log 2π - ½ = 0.19 nats per step; actions at the bounds ask for a squashed law."""
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(3_000, 1)).astype(np.float32)
    action = np.clip(0.5 * obs + 0.2 * rng.normal(size=obs.shape), -1, 1).astype(np.float32) * 0.9
    found = fit_behaviour(obs[600:], action[600:], obs[:600], action[:600], updates=150)
    assert found.likelihood == pytest.approx(0.19 - np.log(0.9), abs=0.25) and found.likelihood > found.other
    assert found.log_prob(obs[:600], action[:600]).mean() == pytest.approx(found.likelihood, abs=1e-4)
    bounded = fit_behaviour(obs[600:], np.sign(action[600:]), obs[:600], np.sign(action[:600]), updates=50)
    assert bounded.kind == "mixture of 5 tanh-normals" and np.isfinite(bounded.likelihood)


def test_support_tells_actions_of_the_data_from_others() -> None:
    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(800, 2)), rng.uniform(-0.5, 0.5, (800, 1))
    support = Support(obs[200:], action[200:], obs[:200], action[:200])
    own = support.coverage(action[:200][support.asked])
    assert own.near == 1.0 and own.outside == pytest.approx(0.05, abs=0.01)
    far = support.coverage(np.ones((len(support.asked), 1)))
    assert far.near == 0.0 and far.outside > 0.9
    same = Support(obs, action, obs, action, np.repeat(np.arange(8), 100))  # nothing is held out
    assert same.coverage(action[same.asked]).outside == pytest.approx(0.05, abs=0.01)
    assert same.coverage(action[same.asked] + 1e-3).outside == pytest.approx(0.05, abs=0.02)
    assert np.isnan(Support(obs, action, obs, action, np.zeros(800)).coverage(action[same.asked]).outside)


def test_verdicts() -> None:
    def one(name: str, value: float, **facts: Any) -> Scored:
        return Scored(Path(name), 1, value, spread=0.1, **facts)

    weak = one("a", 1.0, effective=3.0, episodes=200)
    assert doubt_of_weights(weak) == "effective sample size 3 of 200 episodes"
    assert doubt_of_weights(weak._replace(effective=20.0)) == ""
    far = weak._replace(effective=20.0, outside=0.6)
    assert doubt_of_weights(far, robust=True) == "60% of its actions lie outside the data"
    nan, pair = np.nan, [one("a", 1.0), one("b", 1.1)]
    for found, doubts, numbers, words in (
        (pair[:1], [""], (nan, nan, nan, 1), "One policy has no order"),
        (pair, ["x", "x"], (nan, nan, nan, 2), "no estimate is free of doubt"),
        (pair, ["", ""], (0.9, 0.5, 1.0, 1), "nearly the same policy"),
        (pair, ["x", ""], (0.2, -0.4, 0.8, 2), "may be none.*1 of 2 estimates are in doubt"),
        (pair, ["", ""], (0.9, 0.5, 1.0, 2), "agrees with scores"),
        (pair, ["", ""], (-1.0, -1.0, -1.0, 2), r"run against it \(-1.00 to -1.00"),
        (pair, ["", ""], (1.0, nan, nan, 2), "fewer than four policies"),
        ([one("a", 1.0, true=2.0), pair[1]], ["", ""], (nan, nan, nan, 2), "one policy has a score"),
        ([one(name, 1.0, true=2.0) for name in "ab"], ["", ""], (nan, nan, nan, 2), "are all equal"),
        (pair, ["", ""], (nan, nan, nan, 2), "no policies have scores.*two best differ by less"),
    ):
        assert re.search(words, verdict(found, doubts, *numbers)), words
