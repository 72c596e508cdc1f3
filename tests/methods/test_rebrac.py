"""ReBRAC against its formulas, and whole updates against an obvious implementation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plain import assert_same, assert_seeds_equal, made_batch, plain_mlp, ready

from lightning_modules.rebrac import ReBRAC
from offpolicy.data.sizes import Sizes
from offpolicy.errors import UsageError

SMALL: dict[str, Any] = {"hidden_dims": (8, 8, 8), "batch_size": 16}


def small(**options: Any) -> ReBRAC:
    return ready(ReBRAC(**(SMALL | options)))  # type: ignore[return-value]


class Reference:
    """The update written down step by step, with `backward` and `torch.optim.Adam`; ``i`` counts from 0."""

    def __init__(self, method: ReBRAC) -> None:
        self.h = method.hparams
        self.pi = plain_mlp(method.actor.net)
        self.q = torch.nn.ModuleList([plain_mlp(method.critic.net, i) for i in range(2)])
        self.pi_target, self.q_target = copy.deepcopy(self.pi), copy.deepcopy(self.q)
        self.pi_adam = torch.optim.Adam(self.pi.parameters(), lr=self.h.actor_lr)
        self.q_adam = torch.optim.Adam(self.q.parameters(), lr=self.h.critic_lr)

    def update(self, batch: Any, i: int) -> dict[str, float]:
        h, s, a, s2 = self.h, batch.obs, batch.action, batch.next_obs
        with torch.no_grad():
            noise = torch.clamp(h.policy_noise * batch.noise.target, -h.noise_clip, h.noise_clip)
            a2 = torch.clamp(torch.tanh(self.pi_target(s2)) + noise, -1, 1)
            penalty = ((a2 - batch.next_action) ** 2).sum(1)
            pair = torch.cat([s2, a2], 1)
            next_q = torch.min(self.q_target[0](pair), self.q_target[1](pair))[:, 0] - h.critic_beta * penalty
            y = batch.reward + h.discount * (1 - batch.terminated.double()) * next_q
        loss = sum(((q(torch.cat([s, a], 1))[:, 0] - y) ** 2).mean() for q in self.q)
        self.q_adam.zero_grad()
        loss.backward()
        self.q_adam.step()
        result = {"critic_loss": loss.item()}
        if i % h.policy_freq == 0:
            before = copy.deepcopy(self.pi)
            p = torch.tanh(self.pi(s))
            pair = torch.cat([s, p], 1)
            q = torch.min(self.q[0](pair), self.q[1](pair))[:, 0]
            scale = 1 / q.abs().mean().detach() if h.normalize_q else 1.0
            loss = (h.actor_beta * ((p - a) ** 2).sum(1) - scale * q).mean()
            self.pi_adam.zero_grad()
            loss.backward()
            self.pi_adam.step()
            for target, source in ((self.pi_target, before), (self.q_target, self.q)):
                for old, new in zip(target.parameters(), source.parameters(), strict=True):
                    old.data.copy_((1 - h.tau) * old.data + h.tau * new.data)
            result["actor_loss"] = loss.item()
        return result


@pytest.mark.parametrize(
    "options",
    [
        {"actor_beta": 0.1, "critic_beta": 0.5},
        {"actor_beta": 0.0, "critic_beta": 0.0, "layer_norm": False},  # TD3 with a normalised minimum of Q
        {"normalize_q": False, "policy_freq": 3, "tau": 0.3},
    ],
)
def test_updates_equal_an_obvious_implementation(options: dict[str, Any]) -> None:
    method = small(**options)
    plain = Reference(method)
    for step in range(1, 8):
        batch = made_batch(method, seed=step)
        metrics = {k: v.item() for k, v in method.update(batch, step).items()}
        expected = plain.update(batch, step - 1)
        assert {k: metrics[k] for k in expected} == pytest.approx(expected, rel=1e-9)
        assert ("actor_loss" in metrics) == ("actor_loss" in expected)
    assert_same(method.actor.net, [plain.pi])
    assert_same(method.critic.net, plain.q)
    assert_same(method.target_actor.net, [plain.pi_target])
    assert_same(method.target_critic.net, plain.q_target)


def test_first_update_steps_the_actor_and_leaves_its_target() -> None:
    """The target moves towards the actor before its step, with which it started equal: no change at the first update,
    and a change by τ·(first step) at the third. The second update leaves actor and targets bit-identical."""
    method = small(tau=0.5)
    start = [p.clone() for p in method.actor.parameters()]
    method.update(made_batch(method, seed=1), 1)
    first = [p.clone() for p in method.actor.parameters()]
    assert not torch.equal(first[0], start[0])
    assert all(map(torch.equal, method.target_actor.parameters(), start))
    targets = [p.clone() for p in (*method.target_actor.parameters(), *method.target_critic.parameters())]
    method.update(made_batch(method, seed=2), 2)
    assert all(map(torch.equal, method.actor.parameters(), first))
    assert all(map(torch.equal, (*method.target_actor.parameters(), *method.target_critic.parameters()), targets))
    method.update(made_batch(method, seed=3), 3)
    for target, old, new in zip(method.target_actor.parameters(), start, first, strict=True):
        torch.testing.assert_close(target, (old + new) / 2)


def test_penalty_of_the_target() -> None:
    """Q̄ = 0, π̄ = 0, no noise, γ = 0.99, β₂ = 0.5, â' = (0.6, 0.8): y = 1 - 0.99·0.5·(0.36 + 0.64) = 0.505.

    With Q = 0 the loss of both critics is 2·0.505²; on a terminated row y = 1, so 2·1².
    """
    method = small(critic_beta=0.5, policy_noise=0.0)
    for p in method.parameters():
        p.data.zero_()
    batch = made_batch(method, size=1)._replace(
        next_action=torch.tensor([[0.6, 0.8]], dtype=torch.float64),
        reward=torch.ones(1, dtype=torch.float64),
        terminated=torch.tensor([False]),
    )
    assert method.critic_loss(batch)[0].item() == pytest.approx(2 * 0.505**2, rel=1e-12)
    ended = batch._replace(terminated=torch.tensor([True]))
    assert method.critic_loss(ended)[0].item() == pytest.approx(2.0, rel=1e-12)


def test_penalties_are_sums_over_the_action() -> None:
    """Twice as many equal action axes double both penalties."""
    found = []
    for action_dim in (2, 4):
        method = ready(ReBRAC(**SMALL, critic_beta=1.0, actor_beta=1.0, policy_noise=0.0), action_dim=action_dim)
        for p in method.parameters():
            p.data.zero_()
        method.critic.net.layers[-1].bias.data.fill_(1.0)  # Q = 1, so that λ is finite
        batch = made_batch(method, size=4, terminated=0.0)
        same = torch.full_like(batch.action, 0.5)
        batch = batch._replace(action=same, next_action=same, reward=torch.zeros_like(batch.reward))
        _, metrics = method.actor_loss(batch)
        method.critic.net.layers[-1].bias.data.zero_()
        found.append((metrics["bc_loss"].item(), method.critic_loss(batch)[0].item() ** 0.5))
    assert found[1] == pytest.approx((2 * found[0][0], 2 * found[0][1]), rel=1e-12)
    assert found[0][0] == pytest.approx(2 * 0.25)


def test_actor_gradient_by_hand() -> None:
    """λ is a constant for the gradient, so with Q = c·(a₁ + a₂) and c > 0, π > 0 the loss is β₁·‖p - a‖² - (p₁ + p₂)/m,
    m = mean(p₁ + p₂); the gradient in p of a row of B is (2·β₁·(p - a) - 1/m) / B."""
    method = small(hidden_dims=(), layer_norm=False, actor_beta=0.3)
    for network in (method.actor, method.critic):
        for p in network.parameters():
            p.data.zero_()
    method.critic.net.layers[0].weight.data[:, 3:] = 2.0
    method.actor.net.layers[0].bias.data.fill_(0.5)
    batch = made_batch(method, size=4)
    loss, _ = method.actor_loss(batch)
    gradient = torch.autograd.grad(loss, method.actor.net.layers[0].bias)[0][0]
    p = torch.tanh(torch.tensor(0.5, dtype=torch.float64))
    expected = ((2 * 0.3 * (p - batch.action) - 1 / (2 * p)) * (1 - p**2)).mean(0)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_start_of_the_networks() -> None:
    method: Any = ReBRAC().initialize(Sizes(17, 6), 0)
    for network, fan_in, last in ((method.actor, 17, 1e-3), (method.critic, 23, 3e-3)):
        layers = network.net.layers
        assert len(layers) == 4 and all((layer.bias == 0.1).all() for layer in layers[:-1])
        for layer, fan in zip(layers[:-1], (fan_in, 256, 256), strict=True):
            assert 0.99 * fan**-0.5 < layer.weight.abs().max() <= fan**-0.5
        assert 0.9 * last < layers[-1].weight.abs().max() <= last and layers[-1].bias.abs().max() <= last
    assert not len(method.actor.net.norms) and method.critic.net.layer_norm == "after"
    assert [norm.eps for norm in method.critic.net.norms] == [1e-6] * 3


def test_seeds_are_one_more_axis() -> None:
    assert_seeds_equal(ReBRAC, (3, 4), **SMALL)


@pytest.mark.parametrize(
    "bad", [{"actor_beta": -1.0}, {"critic_beta": -1.0}, {"discount": 1.0}, {"policy_freq": 0}, {"noise_clip": -0.5}]
)
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        ReBRAC(**bad)
