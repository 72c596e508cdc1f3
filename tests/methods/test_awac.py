"""AWAC against its formulas, and whole updates against an obvious implementation."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from plain import assert_same, assert_seeds_equal, made_batch, plain_mlp, ready
from torch import nn
from torch.distributions import Normal

from lightning_modules.awac import AWAC
from offpolicy.errors import UsageError

SMALL: dict[str, Any] = {"hidden_dims": (8, 8, 8)}


def small(**options: Any) -> AWAC:
    return ready(AWAC(**(SMALL | options)))  # type: ignore[return-value]


class Reference:
    """The update written down step by step, with `backward` and `torch.optim.Adam`."""

    def __init__(self, method: AWAC) -> None:
        self.h = method.hparams
        self.mean = plain_mlp(method.actor.net)
        self.log_std = nn.Parameter(method.actor.log_std.detach()[0].clone())
        self.q1, self.q2 = plain_mlp(method.critic.net, 0), plain_mlp(method.critic.net, 1)
        self.target1, self.target2 = copy.deepcopy(self.q1), copy.deepcopy(self.q2)
        self.actor_adam = torch.optim.Adam([*self.mean.parameters(), self.log_std], lr=self.h.actor_lr)
        self.adam1 = torch.optim.Adam(self.q1.parameters(), lr=self.h.critic_lr)
        self.adam2 = torch.optim.Adam(self.q2.parameters(), lr=self.h.critic_lr)

    def law(self, s: torch.Tensor) -> Normal:
        return Normal(self.mean(s), self.log_std.clamp(-20, 2).exp())

    def sample(self, s: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        law = self.law(s)
        return (law.loc + law.scale * noise).clamp(-1, 1)

    def update(self, batch: Any) -> tuple[float, float]:
        h, s, a, s2 = self.h, batch.obs, batch.action, batch.next_obs
        with torch.no_grad():
            pair = torch.cat([s2, self.sample(s2, batch.noise.target)], 1)
            next_q = torch.min(self.target1(pair), self.target2(pair))[:, 0]
            y = batch.reward + h.discount * (1 - batch.terminated.double()) * next_q
        sa = torch.cat([s, a], 1)
        loss = ((self.q1(sa)[:, 0] - y) ** 2).mean() + ((self.q2(sa)[:, 0] - y) ** 2).mean()
        self.adam1.zero_grad()
        self.adam2.zero_grad()
        loss.backward()
        self.adam1.step()
        self.adam2.step()
        with torch.no_grad():
            pair = torch.cat([s, self.sample(s, batch.noise.policy)], 1)
            v = torch.min(self.q1(pair), self.q2(pair))[:, 0]
            q = torch.min(self.q1(sa), self.q2(sa))[:, 0]
            weight = torch.exp((q - v) / h.lambda_).clamp(max=100)
        actor_loss = -(weight * self.law(s).log_prob(a).sum(1)).mean()
        self.actor_adam.zero_grad()
        actor_loss.backward()
        self.actor_adam.step()
        for target, network in ((self.target1, self.q1), (self.target2, self.q2)):
            for old, new in zip(target.parameters(), network.parameters(), strict=True):
                old.data.copy_(0.995 * old.data + 0.005 * new.data)
        return loss.item(), actor_loss.item()


@pytest.mark.parametrize("lambda_", [1 / 3, 0.01])
def test_updates_equal_an_obvious_implementation(lambda_: float) -> None:
    method = small(lambda_=lambda_)
    plain = Reference(method)
    for step in range(1, 6):
        batch = made_batch(method, seed=step)
        metrics = method.update(batch, step)
        losses = plain.update(batch)
        assert (metrics["critic_loss"].item(), metrics["actor_loss"].item()) == pytest.approx(losses, rel=1e-9)
    assert_same(method.actor.net, [plain.mean])
    assert_same(method.critic.net, [plain.q1, plain.q2])
    assert_same(method.target_critic.net, [plain.target1, plain.target2])
    torch.testing.assert_close(method.actor.log_std[0], plain.log_std)


def test_known_answer() -> None:
    """Mean 0 and log σ = 0: -log π(a) = ½a² + ½ log 2π per axis.

    With Q = 0 everywhere all weights are 1, so the loss for actions (0.6, 0.8) and (0, 0) is
    ½·(½·(0.36 + 0.64) + 0) + log 2π = 0.25 + log 2π.
    """
    method = small()
    for p in [*method.actor.parameters(), *method.critic.parameters()]:
        p.data.zero_()
    batch = made_batch(method, size=2)._replace(action=torch.tensor([[0.6, 0.8], [0.0, 0.0]], dtype=torch.float64))
    loss, metrics = method.actor_loss(batch)
    assert loss.item() == pytest.approx(0.25 + math.log(2 * math.pi), rel=1e-12)
    assert metrics["weight_mean"].item() == 1.0


def test_infinite_lambda_is_maximum_likelihood() -> None:
    method, batch = small(lambda_=1e12), made_batch(small())
    loss, _ = method.actor_loss(batch)
    ours = torch.autograd.grad(loss, list(method.actor.parameters()))
    plain = torch.autograd.grad(-method.actor.log_prob(batch.obs, batch.action).mean(), list(method.actor.parameters()))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_weights_are_capped() -> None:
    """Q = 1000·(sum of actions): every row whose action beats the sample by more than (ln 100)·λ / 1000 weighs 100."""
    method = small(hidden_dims=(), lambda_=1.0)
    method.critic.net.layers[0].weight.data.copy_(torch.tensor([0.0, 0, 0, 1000, 1000])[:, None])
    method.critic.net.layers[0].bias.data.zero_()
    batch = made_batch(method, size=64)
    with torch.no_grad():
        sampled = method.actor.sample(batch.obs, batch.noise.policy).clamp(-1, 1)
    adv = 1000 * (batch.action - sampled).sum(-1)
    assert ((adv > math.log(100)) | (adv < -50)).all()
    _, metrics = method.actor_loss(batch)
    assert metrics["weight_mean"].item() == pytest.approx(100 * (adv > 0).double().mean().item(), rel=1e-9)


def test_seeds_are_one_more_axis() -> None:
    assert_seeds_equal(AWAC, (3, 4), **SMALL)


def test_samples_and_actions_stay_in_range() -> None:
    method = small()
    for p in method.actor.net.parameters():
        p.data.fill_(3.0)
    assert method.actor(made_batch(method).obs).abs().max() > 1
    assert method.policy(made_batch(method).obs).abs().max() == 1


@pytest.mark.parametrize("bad", [{"lambda_": 0.0}, {"weight_max": 0.0}, {"discount": 1.0}, {"tau": -0.1}])
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        AWAC(**bad)
