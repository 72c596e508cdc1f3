"""Trajectory diffusion: training, averaged weights, evaluation, generation, and the laws of policies that guide it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform
from toy import fit, method, toy_replay

import offpolicy as op
from lightning_modules.trajectory_diffusion import TrajectoryDiffusion
from offpolicy.data.replay import Replay
from offpolicy.diffusion.sampler import GuidanceOptions, SamplerOptions, to_replay
from offpolicy.errors import UsageError
from offpolicy.files import Table
from offpolicy.losses.diffusion import denoise, loss_weight
from offpolicy.recipes import named_recipe, recipe

FEW = SamplerOptions(steps=5)


@pytest.fixture(scope="module")
def model() -> TrajectoryDiffusion:
    """A small one that has learnt nothing, in float64."""
    made = method("TrajectoryDiffusion").double()
    assert isinstance(made, TrajectoryDiffusion)
    made.prepare(toy_replay())
    return made.double().eval()


# -- training ----------------------------------------------------------------------------------------------------------


def test_the_rate_rises_from_a_tenth_and_falls_along_a_cosine() -> None:
    """100 updates, 10 of them to warm up: 0.1, then 0.1 + 0.9·½, 1 at update 11, ½ midway through the other 90, 0."""
    rate = TrajectoryDiffusion(lr=1.0, lr_decay_steps=100).decayed_lr
    found = [rate(step) for step in (1, 6, 11, 56, 101, 500)]
    assert found == pytest.approx([0.1, 0.55, 1.0, 0.5, 0.0, 0.0])
    assert TrajectoryDiffusion(lr=1.0, lr_decay_steps=0).decayed_lr(10**6) == 1.0


def test_the_horizon_of_the_rate_is_that_of_the_run_that_started(replay: Replay, tmp_path: Path) -> None:
    fit(method("TrajectoryDiffusion"), replay, 10, tmp_path)
    longer = method("TrajectoryDiffusion")
    fit(longer, replay, 20, tmp_path, ckpt_path=tmp_path / "checkpoints" / "step=00000010.ckpt")
    assert longer.decay_steps == 10 and method("TrajectoryDiffusion", lr_decay_steps=7).decay_steps == 7


def test_averaged_weights_move_every_few_updates(replay: Replay) -> None:
    """0.9·before + 0.1·θ after updates 3 and 6, and not in between."""
    module = method("TrajectoryDiffusion", ema_every=3, ema_decay=0.9, lr_decay_steps=0)
    module.prepare(replay)
    average = [p.clone() for p in module.denoiser.parameters()]
    for t in range(7):
        module.run_block(t, 1)
        if t + 1 in (3, 6):
            average = [0.9 * a + 0.1 * p.detach() for a, p in zip(average, module.denoiser.parameters())]
        for a, p in zip(average, module.target_denoiser.parameters()):
            torch.testing.assert_close(p, a)


def test_the_loss_is_that_of_the_formula(model: TrajectoryDiffusion) -> None:
    """Mean w(σ)·(D(x₀ + σε; σ) - x₀)², σ = exp(-1.2 + 1.2·ε'), step by step."""
    batch = model.draw(0, 1)[0]
    loss, metrics = model.denoiser_loss(batch)
    errors = []
    for k in range(len(batch.x)):
        sigma = torch.exp(-1.2 + 1.2 * batch.noise.sigma[k : k + 1])
        x = batch.x[k : k + 1] + sigma * batch.noise.data[k : k + 1]
        errors.append((loss_weight(sigma) * (denoise(model.denoiser, x, sigma) - batch.x[k]).square()).mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean())
    assert torch.equal(metrics["loss"], loss.detach())


def test_held_out_episodes_are_not_trained_on(replay: Replay) -> None:
    module = method("TrajectoryDiffusion", held_out=0.2)
    train, rest = module.split(replay)
    assert rest is not None and rest.num_episodes == 6 and train.num_episodes == 24
    assert not set(train.start) & set(rest.start)
    module.prepare(replay)
    assert set(module.bound_rows.tolist()) <= set(train.rows.tolist())
    batch = module.held_out_batch(replay)
    assert batch is not None and set(batch.row.tolist()) <= set(rest.rows.tolist())
    assert batch.noise.data.shape == batch.x.shape


def test_the_evaluation_loss_is_that_of_the_averaged_weights(replay: Replay, tmp_path: Path) -> None:
    module = method("TrajectoryDiffusion", ema_decay=1.0)  # they never move
    module.run.eval_every = 20
    fit(module, replay, 40, tmp_path)
    rows = Table(tmp_path / "evals.csv").rows()
    assert [row["step"] for row in rows] == [20, 40] and rows[0]["eval/loss"] == rows[1]["eval/loss"]
    batch = module.held_out_batch(replay)
    assert rows[0]["eval/loss"] == pytest.approx(module.losses(module.target_denoiser, batch).mean().item())


@pytest.mark.parametrize(("options", "episodes"), [({"held_out": 0.0}, 1), ({}, 0)])
def test_runs_without_evaluation(options: dict[str, Any], episodes: int, replay: Replay) -> None:
    module = method("TrajectoryDiffusion", **options)
    module.run.eval_episodes = episodes
    fit(module, replay, 10)
    assert not module.eval_row


def test_few_episodes_give_no_evaluation_and_a_note() -> None:
    module = method("TrajectoryDiffusion")
    fit(module, toy_replay([10] * 5), 5)
    assert not module.eval_row
    assert module.describe().notes == ["too few episodes to hold one out: no evaluation loss"]


def test_clipped_actions_are_noted() -> None:
    replay = toy_replay()
    replay.steps["action"][:] = 2.0
    module = method("TrajectoryDiffusion")
    fit(module, replay, 5)
    assert "100 % of the actions lie beyond ±0.999" in module.describe().notes[0]


@pytest.mark.slow
def test_it_learns_what_follows() -> None:
    """s' = s + a / 2 in noise-free walks: generated steps obey it far better than chance."""
    rng = np.random.default_rng(0)
    action = rng.uniform(-0.9, 0.9, (64, 9, 1)).astype(np.float32)
    obs = np.concatenate([np.zeros((64, 1, 1), np.float32), np.cumsum(action, 1)[:, :-1] / 2], 1)
    steps = {"obs": obs.reshape(-1, 1), "action": action.reshape(-1, 1)}
    steps |= {"reward": np.zeros(576, np.float32), "terminated": np.zeros(576, bool)}
    meta = {"name": "walks", "action_low": [-1.0], "action_high": [1.0]}
    replay = Replay(steps, start=np.arange(64) * 9, length=np.full(64, 9), meta=meta)
    module = TrajectoryDiffusion(horizon=4, num_features=64, num_blocks=1, lr=1e-2, ema_every=1, ema_decay=0.97)
    module.seed, module.run.eval_episodes = 0, 0
    fit(module, replay, 200)
    made = module.generate(200, sampler=SamplerOptions(steps=16))
    error = made["obs"][:, 1:] - made["obs"][:, :-1] - made["action"][:, :-1] / 2
    others = made["obs"][:, 1:] - made["obs"][:, :-1] - made["action"].flip(0)[:, :-1] / 2
    assert error.square().mean() < 0.2 * others.square().mean()
    assert (made["reward"] == 0).all() and not made["terminated"].any()


# -- generating --------------------------------------------------------------------------------------------------------


def test_a_trajectory_depends_on_its_number_alone(model: TrajectoryDiffusion) -> None:
    whole = model.generate(7, sampler=FEW)
    assert {k: tuple(v.shape) for k, v in whole.items()} == {
        "obs": (7, 6, 3),
        "action": (7, 6, 1),
        "reward": (7, 6),
        "terminated": (7, 6),
    }
    assert (whole["action"].abs() <= 1).all() and whole["terminated"].dtype == torch.bool
    seen: list[int] = []
    parts = model.generate(7, sampler=FEW, batch_size=3, progress=seen.append)
    later = model.generate(4, first=3, sampler=FEW)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(later[name], value[3:], rtol=1e-9, atol=1e-9)
    assert seen == [3, 3, 1]
    again = model.generate(6, first=1, sampler=FEW, batch_size=3)  # equal batches: bit for bit
    assert all(torch.equal(model.generate(3, first=4, sampler=FEW)[k], again[k][3:]) for k in again)
    other = model.generate(7, seed=1, sampler=FEW)
    assert not torch.equal(other["obs"], whole["obs"])


def test_longer_than_in_training_and_too_short(model: TrajectoryDiffusion) -> None:
    assert model.generate(2, horizon=13, sampler=FEW)["obs"].shape == (2, 13, 3)
    with pytest.raises(UsageError, match=r"`horizon` is 1; expected .* Change `--horizon`"):
        model.generate(2, horizon=1, sampler=FEW)
    with pytest.raises(UsageError, match="`count` is 0"):
        model.generate(0)
    with pytest.raises(UsageError, match="`horizon` is 3"):
        TrajectoryDiffusion(horizon=3)


def test_a_policy_of_strength_zero_changes_no_bit(model: TrajectoryDiffusion) -> None:
    policy = op.TD3BC(hidden_dims=(8, 8)).prepare(toy_replay())
    plain = model.generate(3, sampler=FEW)
    for guidance in (GuidanceOptions(), GuidanceOptions(coefficient=1.0, delay=5)):
        guided = model.generate(3, sampler=FEW, policy=policy, guidance=guidance)
        assert all(torch.equal(guided[name], value) for name, value in plain.items())


@pytest.mark.parametrize("kind", ["TD3BC", "IQL"])
def test_guidance_raises_the_likelihood_of_actions(kind: str, model: TrajectoryDiffusion) -> None:
    policy = getattr(op, kind)(hidden_dims=(8, 8)).prepare(toy_replay(), seed=1)
    found = []
    for coefficient in (0.0, 0.5, 1.0, 2.0):
        guidance = GuidanceOptions(coefficient=coefficient)
        made = model.generate(64, sampler=SamplerOptions(steps=8), policy=policy, guidance=guidance)
        found.append(policy.log_prob(made["obs"], made["action"]).mean().item())
    assert (np.diff(found) > 0).all(), found


def test_a_policy_of_other_sizes_is_refused(model: TrajectoryDiffusion) -> None:
    policy = op.TD3BC(hidden_dims=(8, 8)).prepare(toy_replay(obs_dim=4))
    with pytest.raises(UsageError, match=r"of \(4, 1\) numbers, the diffusion model of \(3, 1\)"):
        model.generate(2, policy=policy, guidance=GuidanceOptions(coefficient=1.0))


def test_guidance_needs_one_policy(model: TrajectoryDiffusion) -> None:
    with pytest.raises(UsageError, match=r"`guidance.coefficient` is 1.0 and there is no policy; expected one"):
        model.generate(2, guidance=GuidanceOptions(coefficient=1.0))
    several = method("TD3BC")
    several.seeds = (0, 1)
    several.prepare(toy_replay())
    with pytest.raises(UsageError, match="holds the seeds 0, 1, each a policy of its own; expected one"):
        model.generate(2, policy=several, guidance=GuidanceOptions(coefficient=1.0))


def test_bfloat16_and_compiled_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = method("TrajectoryDiffusion", num_features=64, num_blocks=1).prepare(toy_replay())
    plain = module.generate(3, sampler=FEW)
    half = module.generate(3, sampler=FEW, bf16=True)
    assert not torch.equal(half["obs"], plain["obs"]) and half["obs"].dtype == torch.float32
    torch.testing.assert_close(half["obs"], plain["obs"], rtol=0.1, atol=0.5)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled = module.generate(3, sampler=FEW, compile=True)
    torch.testing.assert_close(compiled["obs"], plain["obs"], rtol=1e-4, atol=1e-4)


def test_generated_data_train_a_policy(tmp_path: Path, replay: Replay) -> None:
    fit(method("TrajectoryDiffusion"), replay, 10, tmp_path)
    loaded: Any = op.load(tmp_path)
    synthetic = to_replay(loaded.generate(40, sampler=FEW), loaded.data_meta)
    assert synthetic.meta["env_id"] == "Pendulum-v1" and np.abs(synthetic.steps["action"]).max() <= 2.0
    learner = fit(method("TD3BC"), synthetic, 5)
    assert "eval/return_mean" in learner.eval_row


def test_data_without_bounds_take_those_of_the_data(replay: Replay) -> None:
    bare = Replay(replay.steps, start=replay.start, length=replay.length, tail=replay.tail, meta={"name": "bare"})
    module = fit(method("TrajectoryDiffusion"), bare, 5)
    assert module.data_meta["action_low"] == pytest.approx([replay.steps["action"].min()], rel=1e-5)
    to_replay(module.generate(2, sampler=FEW), module.data_meta)  # type: ignore[operator]


def test_it_is_no_policy(model: TrajectoryDiffusion) -> None:
    for ask in (
        lambda: model.act(np.zeros(3)),
        model.agent,
        lambda: model.log_prob(torch.zeros(1, 3), torch.zeros(1, 1)),
    ):
        with pytest.raises(UsageError, match="TrajectoryDiffusion generates data and is no policy"):
            ask()
    with pytest.raises(UsageError, match="one seed per process"):
        method("TrajectoryDiffusion").seeds = (0, 1)


# -- laws of policies --------------------------------------------------------------------------------------------------


def asked(name: str, **options: Any) -> tuple[Any, Tensor, Tensor]:
    policy = method(name, **options).prepare(toy_replay(), seed=2).double()
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    return policy, obs, (torch.rand(4, 5, 1, generator=generator, dtype=torch.float64) * 1.8 - 0.9).requires_grad_()


@pytest.mark.parametrize(("name", "options"), [("TD3BC", {}), ("BC", {}), ("IQL", {"deterministic": True})])
def test_a_deterministic_policy_counts_as_a_normal_of_unit_variance(name: str, options: dict[str, Any]) -> None:
    policy, obs, action = asked(name, **options)
    mean = policy.policy(policy.normalizer.obs(obs))
    found = policy.log_prob(obs, action)
    torch.testing.assert_close(found, Normal(mean, 1.0).log_prob(action).sum(-1))
    (gradient,) = torch.autograd.grad(found.sum(), action)
    torch.testing.assert_close(gradient, (mean - action).detach())


@pytest.mark.parametrize("name", ["IQL", "AWAC", "ODICE"])
def test_a_normal_policy_has_its_own_law(name: str) -> None:
    policy, obs, action = asked(name)
    policy.actor.log_std.data.fill_(-0.7)
    mean = policy.actor.mean(policy.normalizer.obs(obs))
    expected = Normal(mean, torch.tensor(-0.7, dtype=torch.float64).exp()).log_prob(action).sum(-1)
    torch.testing.assert_close(policy.log_prob(obs, action), expected)


@pytest.mark.parametrize("name", ["CQL", "EDAC"])
def test_a_squashed_policy_has_its_own_law(name: str) -> None:
    policy, obs, action = asked(name)
    mean, log_std = policy.actor.heads(policy.normalizer.obs(obs))
    law = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    torch.testing.assert_close(policy.log_prob(obs, action), law.log_prob(action).sum(-1), rtol=1e-4, atol=1e-4)


def test_dropout_plays_no_part_in_a_law() -> None:
    policy, obs, action = asked("IQL-dropout")
    policy.train()
    assert torch.equal(policy.log_prob(obs, action), policy.log_prob(obs, action)) and policy.training


@pytest.mark.parametrize(
    ("name", "reason"), [("DecisionTransformer", "history of an episode"), ("GCBC", "towards a goal")]
)
def test_policies_without_a_law(name: str, reason: str) -> None:
    policy, obs, action = asked(name)
    with pytest.raises(UsageError, match=f"{reason}.*Choose another method"):
        policy.log_prob(obs, action)


# -- recipes -----------------------------------------------------------------------------------------------------------


def test_recipes() -> None:
    for task in ("pendulum-stitch-v0", "pointmaze-medium-hidden-goal-v0"):
        found = recipe("TrajectoryDiffusion", task)
        assert found is not None and found.settings["model.num_features"] == 64
    assert recipe("TrajectoryDiffusion", "hopper-medium-v2") is None
    assert named_recipe("TrajectoryDiffusion", "published").settings["model.num_features"] == 1024


@pytest.mark.parametrize(
    "options",
    [{"p_std": 0.0}, {"held_out": 1.0}, {"ema_decay": 1.5}, {"ema_every": 0}, {"num_blocks": 0}, {"stride": 0}],
)
def test_impossible_settings(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"`{next(iter(options))}` is"):
        TrajectoryDiffusion(**options)
