"""The ensemble world model: loss and clamp against numbers by hand, a linear system recovered, elites, roll-outs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain import made_batch, plain_mlp, ready
from torch import Tensor
from toy import differences, fit, toy_replay, weights

from lightning_modules.bc import BC
from lightning_modules.world_model import GaussianEnsemble, WorldModel
from offpolicy.api import load
from offpolicy.data.replay import Replay
from offpolicy.data.views import Noise, Transitions
from offpolicy.errors import DataError, UsageError

SMALL: dict[str, Any] = {"members": 3, "elites": 2, "hidden_dims": (8, 8), "batch_size": 16}


def small(**options: Any) -> Any:
    return WorldModel(**(SMALL | options))


def linear_replay(noise: float = 0.0) -> Replay:
    """s' = s + 0.1·a − 0.05·s (+ noise), r = s₀ + a₀, actions in [-1, 1]."""
    rng = np.random.default_rng(0)
    episodes, steps = 40, 10
    obs = np.empty((episodes, steps + 1, 2))
    action = rng.uniform(-1, 1, (episodes, steps, 2))
    obs[:, 0] = rng.normal(size=(episodes, 2))
    for t in range(steps):
        drawn = noise * rng.normal(size=(episodes, 2))
        obs[:, t + 1] = 0.95 * obs[:, t] + 0.1 * action[:, t] + drawn
    reward = obs[:, :-1, 0] + action[:, :, 0]
    columns = {"obs": obs[:, :-1].reshape(-1, 2), "action": action.reshape(-1, 2), "reward": reward.reshape(-1)}
    start = np.arange(episodes) * steps
    return Replay(
        {**{k: v.astype(np.float32) for k, v in columns.items()}, "terminated": np.zeros(episodes * steps, bool)},
        start=start,
        length=np.full(episodes, steps),
        tail={"obs": obs[:, -1].astype(np.float32)},
        meta={"action_low": [-1.0, -1.0], "action_high": [1.0, 1.0]},
    )


def test_soft_clamp_known_answers() -> None:
    """Bounds ½ and −10. A raw 0.5: ½ − log 2, and the lower bound adds log(1 + e^{−(10.5 − log 2)}) to it. Far out: the
    bound itself, up to e^{−10.5} of the other clamp."""
    ensemble = GaussianEnsemble(1, 1, 1, ()).double()
    weight, bias = ensemble.net.layers[0].parameters()
    weight.data.zero_()
    x = torch.zeros(1, 1, dtype=torch.float64)
    below = 0.5 - math.log(2.0)
    for raw, expected in (
        (0.5, -10.0 + math.log1p(math.exp(below + 10.0))),
        (100.0, -10.0 + math.log1p(math.exp(10.5))),
        (-100.0, -10.0),
    ):
        bias.data.copy_(torch.tensor([[[7.0, raw]]]))
        mean, log_var = ensemble(x)
        assert mean.item() == 7.0 and log_var.item() == pytest.approx(expected, rel=1e-12)


def test_loss_known_answer() -> None:
    """μ = 0 and v = 0 in all members, y = (1, 2, 2): mean square 3, plus 0 for v; twice, for two members.

    The bounds are ±20, which leave v = 0 to 4e-9: spread 40 per column, 3 columns and 2 members, 0.01·240.
    """
    method = ready(small(members=2), obs_dim=2, action_dim=1)
    with torch.no_grad():
        for p in method.model.net.parameters():
            p.zero_()
        method.model.max_log_var.fill_(20.0)
        method.model.min_log_var.fill_(-20.0)
    one = torch.ones(4, 1).double()
    batch = Transitions(
        torch.zeros(4, 2).double(), one, 2 * one[:, 0], torch.tensor([[1.0, 2.0]] * 4).double(), one > 1
    )
    loss, metrics = method.model_loss(batch)
    assert loss.item() == pytest.approx(2 * 3.0 + 0.01 * 240, rel=1e-7)
    assert metrics["error"].item() == pytest.approx(3.0, rel=1e-12)
    method.target_center.copy_(torch.tensor([1.0, 2.0, 2.0]))
    assert method.model_loss(batch)[1]["error"].item() == 0.0


def test_updates_equal_the_obvious_loop() -> None:
    """Two members apart, `torch.optim.AdamW` for all parameters together."""
    method = ready(small(members=2, weight_decay=0.1))
    nets = [plain_mlp(method.model.net, i) for i in range(2)]
    bounds = [p.detach().clone().requires_grad_() for p in (method.model.max_log_var, method.model.min_log_var)]
    adam = torch.optim.AdamW([*(p for net in nets for p in net.parameters()), *bounds], lr=1e-3, weight_decay=0.1)
    for step in range(1, 5):
        batch = made_batch(method, seed=step)
        y = torch.cat([batch.next_obs - batch.obs, batch.reward[:, None]], 1)
        loss: Any = 0.01 * (bounds[0] - bounds[1]).sum()
        for i, net in enumerate(nets):
            mean, v = net(torch.cat([batch.obs, batch.action], 1)).chunk(2, 1)
            v = bounds[0][i] - torch.nn.functional.softplus(bounds[0][i] - v)
            v = bounds[1][i] + torch.nn.functional.softplus(v - bounds[1][i])
            loss = loss + ((mean - y) ** 2 / v.exp() + v).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        torch.testing.assert_close(method.update(batch, step)["loss"], loss.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(method.model.max_log_var, bounds[0], rtol=1e-9, atol=0)


def test_targets_are_standardised() -> None:
    replay = linear_replay()
    method = small(held_out=0.0).prepare(replay)
    batch = Transitions(**method.view.fields(replay, replay.rows, method.normalizer), noise=Noise())
    y = method.target(batch)
    torch.testing.assert_close(y.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(3), rtol=1e-4, atol=0)


def test_elites_have_the_smallest_held_out_error() -> None:
    """Member k predicts k + 1 or −k everywhere, so their order of errors is known; whole episodes are held out."""
    method = small(members=4, elites=2).prepare(linear_replay())
    assert linear_replay().num_episodes == 40 and method.select(linear_replay()).num_episodes == 32
    with torch.no_grad():
        for p in method.model.net.parameters():
            p.zero_()
        for member, value in enumerate((9.0, 0.1, 5.0, -0.2)):
            method.model.net.layers[-1].bias[member, 0, :3] = value
    error = method.held_out()["loss"]
    assert method.elite.tolist() == [1, 3]
    # held-out y has about mean 0 and variance 1: errors 1 + 0.1² and 1 + 0.2², up to what 80 rows differ
    assert error == pytest.approx(1.0, abs=0.3)
    assert small(held_out=0.0).prepare(linear_replay()).held_out() == {}


def test_a_linear_system_is_recovered_and_rolled_out() -> None:
    method = small(hidden_dims=(), lr=2e-2, weight_decay=0.0, batch_size=64)
    method.seed, method.run.eval_every = 0, 0
    fit(method, linear_replay(), 400)
    start = torch.tensor([[1.0, -1.0], [0.5, 0.0]])
    action = torch.tensor([0.5, -0.5])
    found = method.rollout(start, lambda obs: action.expand(len(obs), 2), 6)
    assert {k: tuple(v.shape) for k, v in found.items()} == {
        "obs": (2, 6, 2), "action": (2, 6, 2), "reward": (2, 6), "terminated": (2, 6),
    }  # fmt: skip
    obs = start
    for t in range(6):
        torch.testing.assert_close(found["obs"][:, t], obs, rtol=0, atol=0.02)
        torch.testing.assert_close(found["reward"][:, t], obs[:, 0] + 0.5, rtol=0, atol=0.05)
        obs = 0.95 * obs + 0.1 * action
    assert not found["terminated"].any()


def rolled(method: Any, start: Tensor, **options: Any) -> dict[str, Tensor]:
    return method.rollout(start, lambda obs: obs[:, :1].tanh(), 5, **options)


def test_a_trajectory_depends_on_its_number_alone() -> None:
    method = ready(small(), obs_dim=3, action_dim=1)
    start = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()
    whole = rolled(method, start, seed=3)
    parts = [rolled(method, part, seed=3, first=first) for first, part in ((0, start[:2]), (2, start[2:]))]
    for name, value in whole.items():
        torch.testing.assert_close(value, torch.cat([part[name] for part in parts]), rtol=1e-12, atol=1e-12)
    assert not torch.equal(rolled(method, start, seed=4)["obs"][:, 1], whole["obs"][:, 1])


def test_only_elites_are_drawn_and_noise_has_their_variance() -> None:
    """Members 0 and 2 add 1 and 3 in every step, member 1 is no elite and would add 100; variance e^{−10}."""
    method = ready(small(), obs_dim=1, action_dim=1)
    with torch.no_grad():
        for p in method.model.net.parameters():
            p.zero_()
        for member, value in enumerate((1.0, 100.0, 3.0)):
            method.model.net.layers[-1].bias[member, 0] = torch.tensor([value, value, -50.0, -50.0])
    method.elite.copy_(torch.tensor([0, 2]))
    found = rolled(method, torch.zeros(2000, 1).double())
    change = found["obs"][:, 1:].diff(dim=1).flatten()
    near = torch.where(change < 2.0, 1.0, 3.0)
    assert (change - near).std().item() == pytest.approx(math.exp(-5.0), rel=0.05)
    assert near.mean().item() == pytest.approx(2.0, abs=0.05)


def test_policy_and_termination() -> None:
    """A method acts by its deterministic action; the function of ends is told this step and the next observation."""
    replay = linear_replay()
    method, policy = small().prepare(replay), BC(hidden_dims=(8,)).prepare(replay)
    start = torch.from_numpy(replay.steps["obs"][:4])
    found = method.rollout(start, policy, 3, termination=lambda obs, action, next_obs: next_obs[:, 0] > obs[:, 0])
    torch.testing.assert_close(found["action"][:, 0], policy.act(start))
    torch.testing.assert_close(found["terminated"][:, 0], found["obs"][:, 1, 0] > found["obs"][:, 0, 0])


def test_a_run_resumes_and_its_elites_are_kept(tmp_path: Path) -> None:
    def run(steps: int, folder: Path, **options: Any) -> Any:
        method = small()
        method.seed, method.run.eval_every, method.run.log_every = 0, 15, 15
        return fit(method, toy_replay(), steps, folder, **options)

    whole = run(30, tmp_path / "whole")
    run(15, tmp_path / "parts")
    resumed = run(30, tmp_path / "parts", ckpt_path=tmp_path / "parts" / "checkpoints" / "step=00000015.ckpt")
    assert not differences(weights(whole), weights(resumed))
    assert whole.eval_row["eval/loss"] == resumed.eval_row["eval/loss"] > 0
    assert not differences(weights(load(tmp_path / "whole")), weights(whole))


def test_what_it_refuses() -> None:
    with pytest.raises(UsageError, match="`elites` is 8; expected a value in"):
        WorldModel(elites=8)
    with pytest.raises(UsageError, match="a world model does not act; expected a policy"):
        small().prepare(linear_replay()).act(np.zeros(2))
    with pytest.raises(UsageError, match="one seed per process"):
        small().seeds = (0, 1)
    with pytest.raises(DataError, match="leaves one side empty"):
        small().prepare(toy_replay([10]))


def test_ends_whose_successor_is_unknown_teach_nothing() -> None:
    """Ten-step episodes that terminate, with nothing stored after them: their last rows are never drawn."""
    replay = linear_replay()
    replay.steps["terminated"][replay.end] = True
    told = small(held_out=0.0).prepare(replay)
    bare = small(held_out=0.0).prepare(Replay(replay.steps, start=replay.start, length=replay.length, meta=replay.meta))
    assert told.bound_rows.tolist() == list(range(400)) and bare.bound_rows.tolist() == [
        row for row in range(400) if row % 10 < 9
    ]
