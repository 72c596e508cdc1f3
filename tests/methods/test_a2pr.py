"""A2PR against its formulas, and whole updates against an obvious implementation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plain import assert_same, assert_seeds_equal, made_batch, plain_linear, plain_mlp, ready
from torch import Tensor, nn

from lightning_modules.a2pr import A2PR
from lightning_modules.td3bc import TD3BC
from offpolicy.errors import UsageError
from offpolicy.recipes import recipe

SMALL: dict[str, Any] = {"actor_hidden_dims": (8, 8, 8), "critic_hidden_dims": (8,) * 4, "vae_hidden_dims": (10, 10)}


def small(**options: Any) -> A2PR:
    return ready(A2PR(**(SMALL | options)))  # type: ignore[return-value]


class Reference:
    """The update written down step by step, with `backward` and `torch.optim.Adam`."""

    def __init__(self, method: A2PR) -> None:
        self.h = method.hparams
        self.pi = plain_mlp(method.actor.net)
        self.q = nn.ModuleList([plain_mlp(method.critic.net, i) for i in range(2)])
        self.v = plain_mlp(method.value.net)
        trunk = plain_mlp(method.vae.encoder)
        head = method.vae.encoder.layers[-1]
        z = method.vae.latent_dim
        self.trunk = trunk[:-1]
        self.mean = plain_linear(head.weight.detach()[:, :z], head.bias.detach()[:, :z])
        self.log_std = plain_linear(head.weight.detach()[:, z:], head.bias.detach()[:, z:])
        self.decoder = plain_mlp(method.vae.decoder)
        self.target_pi, self.target_q = copy.deepcopy(self.pi), copy.deepcopy(self.q)
        self.vae_parts = nn.ModuleList([self.trunk, self.mean, self.log_std, self.decoder])
        self.adam = {
            name: torch.optim.Adam(part.parameters(), lr=lr)
            for name, part, lr in (
                ("pi", self.pi, 3e-4),
                ("q", self.q, 3e-4),
                ("v", self.v, 3e-4),
                ("vae", self.vae_parts, 1e-3),
            )
        }

    def both(self, critics: Any, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(c(torch.cat([s, a], 1)) for c in critics)  # type: ignore[return-value]

    def encode(self, s: Tensor, a: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.trunk(torch.cat([s, a], 1))
        mean, std = self.mean(hidden), self.log_std(hidden).clamp(-4, 15).exp()
        return mean + std * noise, mean, std

    def decode(self, s: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.decoder(torch.cat([s, z], 1)))

    def descend(self, name: str, loss: Tensor) -> None:
        for optimiser in self.adam.values():
            optimiser.zero_grad()
        loss.backward()
        self.adam[name].step()

    def update(self, batch: Any, step: int) -> dict[str, Tensor]:
        s, a, s2 = batch.obs, batch.action, batch.next_obs
        r, alive = batch.reward[:, None], 1.0 - batch.terminated.double()[:, None]
        with torch.no_grad():
            noise = (0.2 * batch.noise.target).clamp(-0.5, 0.5)
            a2 = (torch.tanh(self.target_pi(s2)) + noise).clamp(-1, 1)
            y = r + alive * self.h.discount * torch.min(*self.both(self.target_q, s2, a2))
        q1, q2 = self.both(self.q, s, a)
        q_loss = ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()
        self.descend("q", q_loss)

        with torch.no_grad():
            y2 = r + alive * self.h.discount * torch.min(*self.both(self.q, s2, a2))
        v = self.v(s)
        v_loss = ((v - torch.min(y, y2)) ** 2).mean()
        self.descend("v", v_loss)
        v = v.detach()

        z, mean, std = self.encode(s, a, batch.noise.vae)
        with torch.no_grad():
            data_q = self.both(self.q, s, a)[0]
            gate = (data_q > v).double()
        kl = -0.5 * (1 + (std**2).log() - mean**2 - std**2).mean()
        vae_loss = self.h.vae_weight * (gate * (self.decode(s, z) - a) ** 2).mean() + 0.5 * kl
        self.descend("vae", vae_loss)
        losses = {"critic_loss": q_loss, "value_loss": v_loss, "vae_loss": vae_loss}
        if step % 2 == 0:
            p = torch.tanh(self.pi(s))
            q = self.both(self.q, s, p)[0]
            rl = -self.h.alpha / q.abs().mean().detach() * q.mean()
            if self.h.vae_action == "policy":
                candidate = self.decode(s, self.encode(s, p, batch.noise.actor)[0])
            else:
                candidate = self.decode(s, batch.noise.actor.clamp(-0.5, 0.5))
            with torch.no_grad():
                vae_q = self.both(self.q, s, candidate)[0]
                chosen = (vae_q - v >= data_q - v).double()
                switch = self.h.bc_weight * ((vae_q >= v) | (data_q > v)).double()
            target = chosen * candidate + (1 - chosen) * a
            if self.h.detach_target:
                target = target.detach()
            loss = rl + (switch * (p - target) ** 2).mean()
            self.shares = torch.stack([gate.mean(), chosen.mean(), (switch > 0).double().mean()])
            self.descend("pi", loss)
            losses["actor_loss"] = loss
            for target_net, net in ((self.target_q, self.q), (self.target_pi, self.pi)):
                for old, new in zip(target_net.parameters(), net.parameters(), strict=True):
                    old.data.copy_(0.005 * new.data + 0.995 * old.data)
        return losses


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 40.0, "vae_weight": 1.5, "bc_weight": 0.8, "discount": 0.995},
        {"vae_action": "prior"},
        {"detach_target": True},
    ],
    ids=["policy", "prior", "detached"],
)
def test_updates_equal_the_obvious_implementation(options: dict[str, Any]) -> None:
    method = small(**options)
    with torch.no_grad():  # values that vary around 0, so that both sides of every decision occur
        for net in (method.critic.net, method.value.net):
            for layer in net.layers:
                layer.weight.mul_(3.0)
                layer.bias.zero_()
    method.target_critic.load_state_dict(method.critic.state_dict())
    reference = Reference(method)
    for step in range(1, 7):
        batch = made_batch(method, seed=step)
        expected = reference.update(batch, step)
        metrics = method.update(batch, step)
        for name, value in expected.items():
            torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-10, atol=1e-12)
    assert ((reference.shares > 0) & (reference.shares < 1)).all()
    assert_same(method.actor.net, [reference.pi])
    assert_same(method.target_actor.net, [reference.target_pi])
    assert_same(method.critic.net, list(reference.q))
    assert_same(method.target_critic.net, list(reference.target_q))
    assert_same(method.value.net, [reference.v])
    assert_same(method.vae.decoder, [reference.decoder])
    head = method.vae.encoder.layers[-1].weight.detach()
    torch.testing.assert_close(head, torch.cat([reference.mean.weight.T, reference.log_std.weight.T], 1).detach())


def test_seeds_in_one_module_equal_single_ones() -> None:
    assert_seeds_equal(A2PR, (3, 8), **SMALL)


def fixed_q(method: A2PR, monkeypatch: pytest.MonkeyPatch, q: Any) -> None:
    """Let Q₁(s, a) be a function of the action alone."""
    monkeypatch.setattr(method.critic, "member", lambda obs, action, index=0: q(action))


@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0], ids=["vae better", "data better", "tie"])
def test_target_is_the_better_of_the_two_actions(monkeypatch: pytest.MonkeyPatch, sign: float) -> None:
    """Q₁ = ±|a - a_data|² ranks the VAE's action above or below the data's; with 0 both are equal and it is the VAE's.

    α = 0 leaves the imitation term alone: w₂ = 1 and an open switch give mean (p - ã)².
    """
    method = small(alpha=0.0)
    batch = made_batch(method)
    data = batch.action
    fixed_q(method, monkeypatch, lambda a: sign * (a - data).square().sum(-1) + 0.0 * a.sum(-1) + 1.0)
    v = torch.full((16,), -100.0, dtype=torch.float64)
    loss, metrics = method.actor_loss(batch, v, method.data_q(batch))
    p = method.actor(batch.obs)
    vae_action = method.vae(batch.obs, p, batch.noise.actor)[0]
    expected = (p - (data if sign < 0 else vae_action)).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert metrics["vae_chosen"] == (0.0 if sign < 0 else 1.0)


def test_switch_is_a_logical_or() -> None:
    """v above both Qs: loss and gradient exactly 0. v below both: weight w₂, not 2·w₂."""
    method = small(alpha=0.0, bc_weight=3.0)
    batch = made_batch(method)
    data_q = method.data_q(batch)
    closed, _ = method.actor_loss(batch, torch.full_like(data_q, 1e6), data_q)
    assert closed == 0
    assert all((g == 0).all() for g in torch.autograd.grad(closed, list(method.actor.parameters())))
    open_, metrics = method.actor_loss(batch, torch.full_like(data_q, -1e6), data_q)
    p = method.actor(batch.obs)
    vae_action = method.vae(batch.obs, p, batch.noise.actor)[0]
    chosen = method.critic.member(batch.obs, vae_action) >= data_q
    target = torch.where(chosen[:, None], vae_action, batch.action)
    torch.testing.assert_close(open_, 3.0 * (p - target).square().mean(), rtol=1e-12, atol=0)
    assert metrics["bc_loss"] == open_


def test_without_imitation_the_gradient_is_that_of_normalised_q() -> None:
    method = small(bc_weight=0.0)
    batch = made_batch(method)
    params = list(method.actor.parameters())
    loss, _ = method.actor_loss(batch, torch.zeros(16).double(), method.data_q(batch))
    q = method.critic.member(batch.obs, method.actor(batch.obs))
    plain = -2.5 / q.abs().mean().detach() * q.mean()
    for ours, theirs in zip(torch.autograd.grad(loss, params), torch.autograd.grad(plain, params), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_with_the_data_action_everywhere_it_is_td3bc() -> None:
    """v = -∞ opens the switch, a data_q above every Q₁ selects the data's action; w₂ = 1."""
    method = small()
    other = ready(TD3BC(hidden_dims=(8, 8, 8)))
    other.actor.load_state_dict(method.actor.state_dict())
    other.critic = method.critic
    batch = made_batch(method)
    high = torch.full((16,), 1e6, dtype=torch.float64)
    loss, _ = method.actor_loss(batch, -high, high)
    expected, _ = other.actor_loss(batch)  # type: ignore[attr-defined]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_vae_gate() -> None:
    """Rows with Q₁ ≤ v do not count, however wrong; with all gates closed only ½·KL is left; the mean keeps them."""
    method = small(vae_weight=2.0)
    batch = made_batch(method, size=4)
    q = torch.tensor([1.0, 0.0, -1.0, 5.0], dtype=torch.float64)
    v = torch.zeros(4, dtype=torch.float64)  # open, closed (strict), closed, open
    loss, metrics = method.vae_loss(batch, v, q)
    action = method.vae(batch.obs, batch.action, batch.noise.vae)[0]
    error = (action - batch.action).square()
    torch.testing.assert_close(loss, 2.0 * error[[0, 3]].sum() / 8 + 0.5 * metrics["vae_kl"], rtol=1e-12, atol=0)
    assert metrics["advantage_positive"] == 0.5
    closed, metrics = method.vae_loss(batch, v + 10.0, q)
    assert closed == 0.5 * metrics["vae_kl"]
    raised = small(advantage_threshold=2.0)
    assert raised.vae_loss(batch, v, q)[1]["advantage_positive"] == 0.25


def test_scale_of_q_does_not_matter() -> None:
    """The last layer of Q₁ times 7 leaves -λ·mean Q₁ alone."""
    method = small(bc_weight=0.0)
    batch, zero = made_batch(method), torch.zeros(16).double()
    before, _ = method.actor_loss(batch, zero, zero)
    with torch.no_grad():
        method.critic.net.layers[-1].weight[0] *= 7.0
        method.critic.net.layers[-1].bias[0] *= 7.0
    after, _ = method.actor_loss(batch, zero, zero)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=0)


def test_gradient_of_the_target_reaches_the_policy_unless_detached() -> None:
    """With Q constant the VAE's action is the target; without detaching the gradient has a second path through it."""
    gradients = []
    for detach in (False, True):
        method = small(alpha=0.0, detach_target=detach)
        batch = made_batch(method)
        low = torch.full((16,), -1e6, dtype=torch.float64)
        loss, _ = method.actor_loss(batch, low, low)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(method.actor.parameters()))]))
        p = method.actor(batch.obs)
        target = method.vae(batch.obs, p, batch.noise.actor)[0]
        direct = (p - (target.detach() if detach else target)).square().mean()
        plain = torch.cat([g.flatten() for g in torch.autograd.grad(direct, list(method.actor.parameters()))])
        torch.testing.assert_close(gradients[-1], plain)
    assert not torch.allclose(gradients[0], gradients[1])


@pytest.mark.parametrize(
    "options",
    [{"alpha": -1.0}, {"vae_weight": -1.0}, {"bc_weight": -0.1}, {"vae_action": "both"}, {"discount": 1.0}],
)
def test_bad_hyperparameters_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        A2PR(**options)


@pytest.mark.parametrize(
    ("task", "alpha", "vae_weight", "bc_weight", "discount"),
    [
        ("halfcheetah-medium-v2", 40.0, 1.0, 1.0, 0.99),
        ("halfcheetah-medium-replay-v2", 40.0, 1.5, 0.8, 0.995),
        ("halfcheetah-medium-expert-v2", 40.0, 1.0, 15.0, 0.99),
        ("hopper-random-v2", 2.5, 1.5, 1.5, 0.995),
        ("hopper-medium-v2", 2.5, 1.0, 0.4, 0.995),
        ("hopper-medium-replay-v2", 2.5, 1.5, 0.5, 0.99),
        ("hopper-medium-expert-v2", 2.5, 1.0, 4.0, 0.99),
        ("walker2d-medium-v2", 2.5, 1.5, 1.0, 0.99),
        ("walker2d-medium-replay-v2", 2.5, 1.5, 1.2, 0.995),
        ("walker2d-medium-expert-v2", 2.5, 1.0, 0.8, 0.99),
    ],
)
def test_recipes_have_the_authors_values(
    task: str, alpha: float, vae_weight: float, bc_weight: float, discount: float
) -> None:
    found = recipe("A2PR", task)
    assert found is not None and not any(origin.startswith("ours") for origin in found.origin)
    expected = {"alpha": alpha, "vae_weight": vae_weight, "bc_weight": bc_weight, "discount": discount}
    assert found.group("model") == expected


@pytest.mark.parametrize("task", ["halfcheetah-random-v2", "walker2d-random-v2", "antmaze-large-play-v2"])
def test_values_that_the_authors_did_not_publish_are_marked_ours(task: str) -> None:
    found = recipe("A2PR", task)
    assert found is not None
    ours = next(keys for origin, keys in found.origin.items() if origin.startswith("ours (a guess"))
    assert {"model.alpha", "model.vae_weight", "model.bc_weight"} <= set(ours)
