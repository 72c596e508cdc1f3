"""IQL against its formulas and against an obvious loop, in both orders of its steps.

Losses are evaluated from outside as `test_td3bc.py` shows.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from plain import assert_same, assert_seeds_equal, made_batch, plain_mlp, ready
from torch import Tensor
from torch.distributions import Normal

from lightning_modules.bc import BC
from lightning_modules.iql import IQL
from offpolicy.errors import UsageError

SMALL: dict[str, Any] = {"hidden_dims": (8, 8)}


def small(**options: Any) -> Any:
    return ready(IQL(**(SMALL | options)))


def by_hand(**options: Any) -> Any:
    """V = 0 everywhere, Q̄ = (1, 2) everywhere, π = 0 with standard deviation 1."""
    method = small(**options)
    with torch.no_grad():
        for p in method.parameters():
            p.zero_()
        method.target_critic.net.layers[-1].bias.copy_(torch.tensor([[[1.0]], [[2.0]]]))
    return method


@pytest.mark.parametrize(("bias", "expected"), [(0.0, 0.7), (3.0, 0.3 * 4.0)])
def test_value_loss_known_answer(bias: float, expected: float) -> None:
    """min Q̄ = 1. V = 0: u = 1, 0.7·1; V = 3: u = −2, 0.3·4."""
    method = by_hand(expectile=0.7)
    method.value.net.layers[-1].bias.data.fill_(bias)
    batch = made_batch(method)
    loss, metrics = method.value_loss(batch)
    assert loss.item() == method.value_loss(batch, method.advantage(batch))[0].item()
    assert loss.item() == pytest.approx(expected, rel=1e-12) and metrics["v_mean"].item() == pytest.approx(bias)
    assert method.advantage(batch)[0].unique().tolist() == [1.0 - bias]


def test_critic_loss_known_answer() -> None:
    """Q = 0, r = 1, V(s') = 10, γ = 0.9: y = 10, and 1 where terminated; ½·2·(100 + 1)/2 = 50.5."""
    method = by_hand(discount=0.9)
    batch = made_batch(method, size=2)._replace(reward=torch.ones(2).double(), terminated=torch.tensor([False, True]))
    loss, metrics = method.critic_loss(batch, torch.full((2,), 10.0).double())
    assert loss.item() == pytest.approx(50.5, rel=1e-12) and metrics["q_mean"].item() == 0.0


def test_gaussian_actor_loss_known_answer() -> None:
    """π = N(0, 1) in 2 dimensions, a = (1, 2): −log π = ½·5 + log 2π; weight exp(3·0.5) on it."""
    method = by_hand(beta=3.0)
    batch = made_batch(method, size=1)._replace(action=torch.tensor([[1.0, 2.0]]).double())
    loss, metrics = method.actor_loss(batch, torch.tensor([0.5]).double())
    assert loss.item() == pytest.approx(math.exp(1.5) * (2.5 + math.log(2 * math.pi)), rel=1e-12)
    assert metrics["weight_mean"].item() == pytest.approx(math.exp(1.5))


def test_deterministic_actor_loss_known_answer() -> None:
    """π = 0, a = (1, 2): the squared error is summed, 5; the weight is capped at 100."""
    method = by_hand(beta=3.0, deterministic=True)
    batch = made_batch(method, size=1)._replace(action=torch.tensor([[1.0, 2.0]]).double())
    assert method.actor_loss(batch, torch.tensor([math.log(100) / 3 + 1e-9]).double())[0].item() == pytest.approx(500.0)


def test_beta_zero_is_plain_cloning() -> None:
    """All weights 1: the deterministic loss is A times that of BC, which is a mean over dimensions."""
    method, bc = small(beta=0.0, deterministic=True), ready(BC(hidden_dims=(8, 8)))
    bc.actor.load_state_dict(method.actor.state_dict())
    batch = made_batch(method)
    advantage = torch.randn(16).double() * 100
    assert method.actor_loss(batch, advantage)[0].item() == pytest.approx(
        2.0 * bc.actor_loss(batch)[0].item(), rel=1e-12
    )


def test_expectile_one_half_is_half_the_squared_error() -> None:
    method = small(expectile=0.5)
    batch = made_batch(method)
    u = method.advantage(batch)[0].detach()
    assert method.value_loss(batch)[0].item() == pytest.approx(0.5 * u.square().mean().item(), rel=1e-12)


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_by_finite_differences(deterministic: bool) -> None:
    method = small(hidden_dims=(4,), deterministic=deterministic)
    batch, advantage = made_batch(method, size=6), torch.randn(6).double()
    losses = {
        "value": lambda: method.value_loss(batch)[0],
        "critic": lambda: method.critic_loss(batch, advantage)[0],
        "actor": lambda: method.actor_loss(batch, advantage)[0],
    }
    for network, loss in losses.items():
        parameters = list(getattr(method, network).parameters())
        for p, g in zip(parameters, torch.autograd.grad(loss(), parameters), strict=True):
            for i in range(0, p.numel(), 3):
                value = p.data.view(-1)[i].item()
                around = []
                for h in (1e-6, -1e-6):
                    p.data.view(-1)[i] = value + h
                    around.append(loss().item())
                p.data.view(-1)[i] = value
                assert g.reshape(-1)[i].item() == pytest.approx((around[0] - around[1]) / 2e-6, rel=1e-5, abs=1e-7)


class Reference:
    """The algorithm in the order of CORL or of the authors' code: `backward`, `torch.optim.Adam`, two critics apart."""

    def __init__(self, method: IQL, horizon: int) -> None:
        self.h, self.horizon = method.hparams, horizon
        self.pi, self.v = plain_mlp(method.actor.net), plain_mlp(method.value.net)
        self.q = [plain_mlp(method.critic.net, i) for i in range(2)]
        self.target_q = copy.deepcopy(self.q)
        actor = [*self.pi.parameters()]
        if not self.h.deterministic:
            self.log_std = torch.zeros(2, dtype=torch.float64, requires_grad=True)
            actor.append(self.log_std)
        self.adam = {
            "v": torch.optim.Adam(self.v.parameters(), lr=self.h.value_lr),
            "q": torch.optim.Adam([p for q in self.q for p in q.parameters()], lr=self.h.critic_lr),
            "pi": torch.optim.Adam(actor, lr=self.h.actor_lr),
        }
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.adam["pi"], horizon)

    def advantage(self, batch: Any) -> Tensor:
        sa = torch.cat([batch.obs, batch.action], 1)
        with torch.no_grad():
            target = torch.min(*[q(sa)[:, 0] for q in self.target_q])
        return target - self.v(batch.obs)[:, 0]

    def descend(self, name: str, loss: Tensor) -> float:
        self.adam[name].zero_grad()
        loss.backward()
        self.adam[name].step()
        return loss.item()

    def value(self, batch: Any) -> Tensor:
        u = self.advantage(batch)
        above = (u > 0).double()
        tau = self.h.expectile
        self.losses["value_loss"] = self.descend("v", ((above * tau + (1 - above) * (1 - tau)) * u**2).mean())
        return u.detach()

    def critic(self, batch: Any, next_v: Tensor) -> None:
        y = batch.reward + self.h.discount * (1 - batch.terminated.double()) * next_v
        sa = torch.cat([batch.obs, batch.action], 1)
        loss = sum(((q(sa)[:, 0] - y) ** 2).mean() for q in self.q) / 2
        self.losses["critic_loss"] = self.descend("q", loss)  # type: ignore[arg-type]
        for target, net in zip(self.target_q, self.q, strict=True):
            for old, new in zip(target.parameters(), net.parameters(), strict=True):
                old.data.copy_(self.h.tau * new.data + (1 - self.h.tau) * old.data)

    def actor(self, batch: Any, u: Tensor) -> None:
        weight = torch.exp(self.h.beta * u).clamp(max=100.0)
        mean = torch.tanh(self.pi(batch.obs))
        if self.h.deterministic:
            error = ((mean - batch.action) ** 2).sum(1)
        else:
            error = -Normal(mean, self.log_std.exp()).log_prob(batch.action).sum(1)
        self.losses["actor_loss"] = self.descend("pi", (weight * error).mean())
        self.schedule.step()

    def next_v(self, batch: Any) -> Tensor:
        with torch.no_grad():
            return self.v(batch.next_obs)[:, 0]

    def update(self, batch: Any) -> dict[str, float]:
        self.losses: dict[str, float] = {}
        if self.h.update_order == "corl":
            next_v = self.next_v(batch)
            u = self.value(batch)
            self.critic(batch, next_v)
            self.actor(batch, u)
        else:
            self.value(batch)
            self.actor(batch, self.advantage(batch).detach())
            self.critic(batch, self.next_v(batch))
        return self.losses


@pytest.mark.parametrize("order", ["corl", "original"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_updates_equal_the_obvious_loop(order: str, deterministic: bool) -> None:
    """Twelve updates, over which the actor's rate falls as torch's own cosine schedule has it."""
    method = small(update_order=order, deterministic=deterministic, actor_lr=1e-2, tau=0.05, lr_decay_steps=12)
    reference = Reference(method, horizon=12)
    for step in range(1, 13):
        batch = made_batch(method, seed=step)
        metrics = method.update(batch, step)
        for name, value in reference.update(batch).items():
            assert metrics[name].item() == pytest.approx(value, rel=1e-9)
    assert_same(method.actor.net, [reference.pi])
    assert_same(method.value.net, [reference.v])
    assert_same(method.critic.net, reference.q)
    assert_same(method.target_critic.net, reference.target_q)
    if not deterministic:
        torch.testing.assert_close(method.actor.log_std[0], reference.log_std, rtol=1e-9, atol=1e-12)


def test_the_two_orders_differ() -> None:
    results = []
    for order in ("corl", "original"):
        method = small(update_order=order, lr_decay_steps=0)
        for step in range(1, 4):
            method.updates = step
            method.update(made_batch(method, seed=step), step)
        results.append(method.state_dict())
    assert any(not torch.equal(results[0][k], results[1][k]) for k in results[0] if k.startswith("critic"))


def test_learning_rate_is_a_cosine_of_the_update() -> None:
    """3e-4 at the first update, half of it in the middle, 0 after the last and from then on."""
    method = IQL(lr_decay_steps=100)
    assert [method.decayed_actor_lr(t) for t in (1, 101, 1000)] == [3e-4, 0.0, 0.0]
    assert method.decayed_actor_lr(51) == pytest.approx(1.5e-4)
    assert method.decayed_actor_lr(26) == pytest.approx(3e-4 * (1 + math.cos(math.pi / 4)) / 2)
    assert IQL(lr_decay_steps=0).decayed_actor_lr(10**9) == 3e-4


@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"update_order": "original", "max_grad_norm": 0.1}])
def test_seeds_side_by_side_equal_seeds_alone(options: dict[str, Any]) -> None:
    assert_seeds_equal(IQL, (0, 5, 9), **SMALL, **options, lr_decay_steps=0)


def test_acting_is_the_tanh_of_the_mean() -> None:
    method = small(actor_dropout=0.5)
    obs = torch.randn(4, 3).double()
    expected = torch.tanh(plain_mlp(method.actor.net)(obs))
    torch.testing.assert_close(method.act(obs), expected)  # without dropout, and without noise
    assert method.training


@pytest.mark.parametrize(
    "options",
    [
        {"expectile": 0.0},
        {"expectile": 1.0},
        {"beta": -1.0},
        {"weight_max": 0.0},
        {"discount": 1.0},
        {"tau": -0.1},
        {"actor_dropout": 1.0},
        {"update_order": "jax"},
        {"num_critics": 0},
        {"lr_decay_steps": -1},
    ],
)
def test_impossible_settings(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        IQL(**options)
