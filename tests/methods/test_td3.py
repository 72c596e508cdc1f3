"""TD3 against its formulas and against an obvious loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plain import assert_same, assert_seeds_equal, made_batch, plain_mlp, ready
from torch import Tensor, nn

from lightning_modules.td3 import TD3
from lightning_modules.td3bc import TD3BC
from offpolicy.errors import UsageError

SMALL: dict[str, Any] = {"hidden_dims": (8, 8)}


def small(**options: Any) -> Any:
    return ready(TD3(**(SMALL | options)))


class Reference:
    """The paper's algorithm 1: two critics apart, `backward`, `torch.optim.Adam`."""

    def __init__(self, method: Any) -> None:
        self.pi = plain_mlp(method.actor.net)
        self.q = nn.ModuleList([plain_mlp(method.critic.net, i) for i in range(2)])
        self.target_pi, self.target_q = copy.deepcopy(self.pi), copy.deepcopy(self.q)
        self.pi_adam = torch.optim.Adam(self.pi.parameters(), lr=3e-4)
        self.q_adam = torch.optim.Adam(self.q.parameters(), lr=3e-4)

    def value(self, network: nn.Module, s: Tensor, a: Tensor) -> Tensor:
        return network(torch.cat([s, a], 1))[:, 0]

    def update(self, batch: Any, step: int) -> None:
        with torch.no_grad():
            noise = (0.2 * batch.noise.target).clamp(-0.5, 0.5)
            a2 = (torch.tanh(self.target_pi(batch.next_obs)) + noise).clamp(-1, 1)
            next_q = torch.min(*(self.value(q, batch.next_obs, a2) for q in self.target_q))
            y = batch.reward + 0.99 * (1 - batch.terminated.double()) * next_q
        loss = sum(((self.value(q, batch.obs, batch.action) - y) ** 2).mean() for q in self.q)
        self.q_adam.zero_grad()
        loss.backward()
        self.q_adam.step()
        if step % 2:
            return
        actor_loss = -self.value(self.q[0], batch.obs, torch.tanh(self.pi(batch.obs))).mean()
        self.pi_adam.zero_grad()
        actor_loss.backward()
        self.pi_adam.step()
        for ours, target in ((self.q, self.target_q), (self.pi, self.target_pi)):
            for new, old in zip(ours.parameters(), target.parameters(), strict=True):
                old.data.copy_(0.995 * old.data + 0.005 * new.data)


def test_updates_equal_an_obvious_implementation() -> None:
    method = small()
    plain = Reference(method)
    for step in range(1, 7):
        batch = made_batch(method, seed=step)
        method.update(batch, step)
        plain.update(batch, step)
    assert_same(method.actor.net, [plain.pi])
    assert_same(method.critic.net, plain.q)
    assert_same(method.target_actor.net, [plain.target_pi])
    assert_same(method.target_critic.net, plain.target_q)


def test_the_actors_gradient_is_that_of_td3bc_without_cloning() -> None:
    """Up to the factor λ of the loss."""
    ours, theirs = small(), ready(TD3BC(**SMALL))
    theirs.load_state_dict(ours.state_dict())
    batch = made_batch(ours)
    action = theirs.actor(batch.obs)
    lambda_ = 2.5 / theirs.critic.member(batch.obs, action).abs().mean().item()
    loss, metrics = theirs.actor_loss(batch)
    bc = ((action - batch.action) ** 2).mean()
    torch.testing.assert_close(loss, metrics["bc_loss"] + lambda_ * ours.actor_loss(batch)[0])
    parameters = list(theirs.actor.parameters())
    cloned = torch.autograd.grad(loss, parameters)
    cloning = torch.autograd.grad(bc, parameters)
    free = torch.autograd.grad(ours.actor_loss(batch)[0], list(ours.actor.parameters()))
    for all_, part, own in zip(cloned, cloning, free, strict=True):
        torch.testing.assert_close(all_ - part, lambda_ * own, rtol=1e-8, atol=1e-12)


def test_odd_steps_leave_actor_and_targets_alone() -> None:
    method = small()
    before = copy.deepcopy(method.state_dict())
    assert "actor_loss" not in method.update(made_batch(method), 1)
    changed = {k.split(".")[0] for k, v in method.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"critic"}


def test_seeds_are_one_more_axis() -> None:
    assert_seeds_equal(TD3, (3, 4), **SMALL)


@pytest.mark.parametrize("bad", [{"policy_freq": 0}, {"policy_noise": -0.1}, {"num_critics": 0}, {"discount": 1.0}])
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        TD3(**bad)
