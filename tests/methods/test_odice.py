"""O-DICE against its formulas, and whole updates against an obvious implementation."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from plain import assert_same, assert_seeds_equal, made_batch, plain_mlp, ready
from torch import Tensor, nn

from lightning_modules.odice import ODICE
from offpolicy.data.replay import Replay
from offpolicy.errors import UsageError
from offpolicy.recipes import named_recipe, recipe

SMALL: dict[str, Any] = {"value_hidden_dims": (8, 8), "actor_hidden_dims": (12, 12)}


def small(**options: Any) -> ODICE:
    return ready(ODICE(**(SMALL | options)))  # type: ignore[return-value]


class Reference:
    """The update written down step by step, with `backward` and `torch.optim.Adam`."""

    def __init__(self, method: ODICE) -> None:
        self.h = method.hparams
        self.v = nn.ModuleList([plain_mlp(method.value, i) for i in range(self.h.num_values)])
        self.target = copy.deepcopy(self.v)
        self.mean = plain_mlp(method.actor.net)
        self.log_std = nn.Parameter(method.actor.log_std.detach()[0].clone())
        self.value_adam = torch.optim.Adam(self.v.parameters(), lr=self.h.value_lr)
        self.actor_adam = torch.optim.Adam(
            [*self.mean.parameters(), self.log_std], lr=self.h.actor_lr, weight_decay=self.h.weight_decay
        )

    def all(self, networks: Any, s: Tensor) -> Tensor:
        return torch.stack([network(s)[:, 0] for network in networks])

    def f_star(self, y: Tensor) -> Tensor:
        if self.h.divergence == "reverse_kl":
            return torch.exp(y - 1)
        w = torch.clamp(y / 2 + 1, min=0)
        return y * w - (w - 1) ** 2

    def gradient(self, loss: Tensor) -> Tensor:
        self.value_adam.zero_grad()
        loss.backward(retain_graph=True)
        return torch.cat([p.grad.flatten() for p in self.v.parameters()])

    def update(self, batch: Any, step: int) -> dict[str, Tensor]:
        h, s, s2 = self.h, batch.obs, batch.next_obs
        go_on = h.discount * (1.0 - batch.terminated.double())
        with torch.no_grad():
            target_v, target_next_v = self.all(self.target, s).amin(0), self.all(self.target, s2).amin(0)
        v, next_v = self.all(self.v, s), self.all(self.v, s2)
        y = batch.reward + go_on * (next_v if h.gradient == "true" else target_next_v) - v
        linear, forward = (1 - h.lambda_) * v.mean(), h.lambda_ * self.f_star(y).mean()
        if h.gradient == "orthogonal":
            y_back = batch.reward + go_on * next_v - target_v
            g_f = self.gradient(forward)
            g_b = self.gradient(h.eta * h.lambda_ * self.f_star(y_back).mean())
            c = (g_f @ g_b) / torch.clamp(g_f @ g_f, min=1e-10)
            total = self.gradient(linear) + g_f + g_b - c * g_f
        else:
            total = self.gradient(linear + forward)
        start = 0
        for p in self.v.parameters():
            p.grad = total[start : start + p.numel()].view_as(p).clone()
            start += p.numel()
        self.value_adam.step()
        for old, new in zip(self.target.parameters(), self.v.parameters(), strict=True):
            old.data.copy_(0.005 * new.data + 0.995 * old.data)

        mean = self.mean(s)
        mean = torch.tanh(mean) if h.tanh_mean else mean
        law = torch.distributions.Independent(torch.distributions.Normal(mean, self.log_std.clamp(-5, 2).exp()), 1)
        y = y.detach()
        if h.divergence == "reverse_kl":
            weight = torch.exp(y - 1)
        else:
            weight = torch.clamp(y / 2 + 1, min=0) if h.exact_weights else torch.relu(y)
        loss = (torch.clamp(weight, max=100) * -law.log_prob(batch.action)).mean()
        self.actor_adam.zero_grad()
        loss.backward()
        self.actor_adam.step()
        return {"value_loss": linear + forward, "actor_loss": loss}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lambda_": 0.4, "eta": 0.3, "layer_norm": False, "tanh_mean": True, "weight_decay": 1e-2},
        {"divergence": "reverse_kl", "num_values": 1},
        {"gradient": "semi", "exact_weights": True},
        {"gradient": "true"},
    ],
    ids=["default", "imitation-like", "kl-single", "semi-exact", "true"],
)
def test_updates_equal_the_obvious_implementation(options: dict[str, Any]) -> None:
    method = small(**options)
    reference = Reference(method)
    for step in range(1, 7):
        batch = made_batch(method, seed=step)
        expected = reference.update(batch, step)
        metrics = method.update(batch, step)
        for name, value in expected.items():
            torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-9, atol=1e-12)
    assert_same(method.value, list(reference.v))
    assert_same(method.target_value, list(reference.target))
    assert_same(method.actor.net, [reference.mean])
    torch.testing.assert_close(method.actor.log_std.detach()[0], reference.log_std.detach())


@pytest.mark.parametrize("num_values", [1, 2])
def test_seeds_in_one_module_equal_single_ones(num_values: int) -> None:
    """Each seed has its own projection."""
    assert_seeds_equal(ODICE, (3, 8), num_values=num_values, **SMALL)


def flat_gradient(method: ODICE, term: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(term, method.params("value"), retain_graph=True)])


@pytest.mark.parametrize("eta", [0.2, 1.0, 30.0])
def test_what_is_added_is_orthogonal_to_the_forward_gradient(eta: float) -> None:
    method = small(eta=eta)
    batch = made_batch(method)
    terms = method.value_terms(batch)
    forward, linear = flat_gradient(method, terms.forward), flat_gradient(method, terms.linear)
    backward = flat_gradient(method, terms.backward)
    total = torch.cat([g.flatten() for g in method.value_gradient(method.value_terms(batch))[0]])
    added = total - linear - forward
    assert abs(forward @ added) < 1e-12 * forward.norm() * backward.norm()
    assert added.norm() > 0.01 * backward.norm()


def test_eta_zero_is_the_semi_gradient() -> None:
    """Same value, target and policy after several steps; η scales what is added linearly."""
    methods = [small(eta=0.0), small(gradient="semi")]
    for step in range(1, 4):
        for method in methods:
            method.update(made_batch(method, seed=step), step)
    for a, b in zip(methods[0].parameters(), methods[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    added = []
    for eta in (0.0, 1.0, 3.0):
        method = small(eta=eta)
        grads, _ = method.value_gradient(method.value_terms(made_batch(method)))
        added.append(torch.cat([g.flatten() for g in grads]))
    torch.testing.assert_close(added[2] - added[0], 3.0 * (added[1] - added[0]))


def test_parallel_gradients_add_nothing() -> None:
    """A backward term that is 2.5 times the forward one is projected away, whatever η."""
    method = small()
    batch = made_batch(method)
    terms = method.value_terms(batch)
    expected = flat_gradient(method, terms.linear + terms.forward)
    grads, c = method.value_gradient(terms._replace(backward=2.5 * method.value_terms(batch).forward))
    torch.testing.assert_close(c, torch.tensor(2.5).double())
    torch.testing.assert_close(torch.cat([g.flatten() for g in grads]), expected, rtol=1e-9, atol=1e-12)


def test_terminal_rows_have_no_backward_gradient() -> None:
    method = small()
    batch = made_batch(method, terminated=2.0)
    assert batch.terminated.all()
    terms = method.value_terms(batch)
    assert (flat_gradient(method, terms.backward) == 0).all()


def test_flat_conjugate_has_no_forward_gradient() -> None:
    """Residuals below -2 everywhere: g_F = 0 exactly and c = 0, so the rest of the gradient passes unchanged."""
    method = small()
    batch = made_batch(method)
    batch = batch._replace(reward=batch.reward - 100.0, terminated=torch.ones_like(batch.terminated))
    terms = method.value_terms(batch)
    assert (flat_gradient(method, terms.forward) == 0).all()
    other = made_batch(method, seed=1)
    terms = terms._replace(backward=method.value_terms(other).backward)
    expected = flat_gradient(method, terms.linear) + flat_gradient(method, terms.backward)
    grads, c = method.value_gradient(terms)
    assert c == 0
    torch.testing.assert_close(torch.cat([g.flatten() for g in grads]), expected)


def test_policy_weights() -> None:
    """Residuals ≤ 0 give zero loss and gradient; 300 counts as 100; heads are averaged, not summed."""
    method = small(weight_decay=0.0)
    batch = made_batch(method)
    loss, metrics = method.actor_loss(batch, -torch.ones(2, 16).double())
    assert loss == 0 and metrics["weight_mean"] == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, list(method.actor.parameters())))
    residual = torch.tensor([[300.0], [4.0]]).double().expand(2, 16)
    loss, _ = method.actor_loss(batch, residual)
    expected = -(100.0 + 4.0) / 2 * method.actor.log_prob(batch.obs, batch.action).mean()
    torch.testing.assert_close(loss, expected)


def test_two_processes_take_the_projection_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a batch each: with c from the averaged gradients, the mean of both gradients is that of the whole batch."""
    method = small()
    batch = made_batch(method)
    whole, c = method.value_gradient(method.value_terms(batch))
    halves = [type(batch)(*(x[i::2] if isinstance(x, Tensor) else x for x in batch)) for i in range(2)]
    local: list[list[Tensor]] = []
    monkeypatch.setattr(method, "reduce_gradients", lambda grads: local.append(grads) or grads)
    for half in halves:
        method.value_gradient(method.value_terms(half))
    mean = [(a + b) / 2 for a, b in zip(*local, strict=True)]
    monkeypatch.setattr(method, "reduce_gradients", lambda grads: mean)
    results = [method.value_gradient(method.value_terms(half)) for half in halves]
    for _, c_half in results:
        torch.testing.assert_close(c_half, c)
    for expected, first, second in zip(whole, results[0][0], results[1][0], strict=True):
        torch.testing.assert_close((first + second) / 2, expected, rtol=1e-9, atol=1e-12)


def test_mixed_precision_leaves_the_value_in_float32() -> None:
    method = small().float()
    batch = made_batch(method)
    batch = type(batch)(*(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in batch))
    plain = method.value_terms(batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = method.value_terms(batch)
    assert mixed.residual.dtype == torch.float32
    assert torch.equal(plain.residual, mixed.residual)


def expert_replay(episodes: int = 4, steps: int = 30) -> Replay:
    """Made data: in every episode the action is a fixed function of the observation, with another sign in each."""
    g = np.random.default_rng(0)
    obs = g.normal(size=(episodes * steps, 3)).astype(np.float32) * 2 + 5
    sign = np.repeat(np.where(np.arange(episodes) % 2 == 1, 1.0, -1.0), steps)[:, None]
    action = (sign * np.tanh(obs[:, :2] - 5)).astype(np.float32)
    return Replay(
        {"obs": obs, "action": action, "reward": g.normal(size=len(obs)).astype(np.float32)}
        | {"terminated": np.zeros(len(obs), bool)},
        start=np.arange(episodes) * steps,
        length=np.full(episodes, steps),
        meta={"action_low": [-1.0, -1.0], "action_high": [1.0, 1.0]},
    )


def test_imitation_trains_on_one_episode_without_rewards() -> None:
    """The last row has no known successor and is left out; statistics are those of the episode's other rows."""
    replay = expert_replay()
    method = ODICE(expert_episode=1, normalize_obs=True, tanh_mean=True, layer_norm=False, batch_size=64, **SMALL)
    method.prepare(replay)
    assert method.hparams.reward_transform == "r"
    assert method.bound_rows.tolist() == list(range(30, 59))
    batch = method.draw(0, 1)[0]
    assert (batch.reward == 0).all()
    rows = replay.steps["obs"][30:59]
    torch.testing.assert_close(method.normalizer.obs_center, torch.from_numpy(rows.mean(0)))
    torch.testing.assert_close(method.normalizer.obs_scale, torch.from_numpy(1 / (rows.std(0) + 1e-3)))
    assert (np.asarray(replay.steps["reward"]) != 0).all()  # the user's data are as they were


@pytest.mark.slow
def test_imitation_copies_the_expert() -> None:
    """Episodes 1 and 2 act with opposite signs; the policy follows the chosen one."""
    replay = expert_replay()
    torch.manual_seed(0)
    method = ODICE(
        expert_episode=1,
        lambda_=0.4,
        normalize_obs=True,
        tanh_mean=True,
        layer_norm=False,
        value_hidden_dims=(32, 32),
        actor_hidden_dims=(32, 32),
        value_lr=1e-3,
        actor_lr=3e-3,
        batch_size=64,
    )
    method.prepare(replay)
    method.run_block(0, 400)
    action = method.act(replay.steps["obs"][30:59])
    assert np.square(action - replay.steps["action"][30:59]).mean() < 0.02


def test_an_episode_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="0 to 3"):
        ODICE(expert_episode=4, **SMALL).prepare(expert_replay())


@pytest.mark.parametrize(
    "options",
    [
        {"lambda_": 0.0},
        {"lambda_": 1.0},
        {"eta": -1.0},
        {"divergence": "kl"},
        {"gradient": "none"},
        {"num_values": 0},
        {"weight_max": 0.0},
        {"expert_episode": -1},
        {"weight_decay": -1e-3},
    ],
)
def test_bad_hyperparameters_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        ODICE(**options)


@pytest.mark.parametrize(
    ("task", "num_values", "layer_norm", "reward_transform", "eval_episodes"),
    [
        ("hopper-medium-v2", 2, True, "return_range", 10),
        ("antmaze-umaze-v2", 2, False, "3r-3", 50),
        ("antmaze-medium-diverse-v2", 2, False, "3r-3", 50),
        ("antmaze-umaze-diverse-v2", 1, False, "3r-3", 50),
        ("antmaze-large-play-v2", 1, False, "3r-3", 50),
    ],
)
def test_recipes_have_the_authors_values(
    task: str, num_values: int, layer_norm: bool, reward_transform: str, eval_episodes: int
) -> None:
    found = recipe("ODICE", task)
    assert found is not None
    model = found.group("model")
    assert (model["num_values"], model["layer_norm"]) == (num_values, layer_norm)
    assert (model["reward_transform"], found.group("run")["eval_episodes"]) == (reward_transform, eval_episodes)


@pytest.mark.parametrize(("env", "weight_decay"), [("hopper", 1e-5), ("walker2d", 1e-3)])
def test_imitation_is_a_recipe_to_ask_for(env: str, weight_decay: float) -> None:
    found = named_recipe("ODICE", f"imitation-{env}")
    assert found.group("model")["weight_decay"] == weight_decay
    assert ODICE(**found.group("model")).hparams.lambda_ == 0.4
    assert recipe("ODICE", f"{env}-expert-v2").name == "odice/mujoco"  # type: ignore[union-attr]
