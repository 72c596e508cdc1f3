"""GCIVL, GCIQL (both actor losses) and GCBC against an obvious loop, and where their gradients stop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plain import assert_same, assert_seeds_equal, made_batch, plain_mlp, ready
from torch import Tensor, nn
from torch.distributions import Normal

from lightning_modules.gcbc import GCBC
from lightning_modules.gciql import GCIQL
from lightning_modules.gcivl import GCIVL
from offpolicy.errors import UsageError

CASES: list[tuple[Any, dict[str, Any]]] = [
    (GCBC, {}),
    (GCIVL, {"tau": 0.05, "alpha": 2.0}),
    (GCIQL, {"tau": 0.05}),
    (GCIQL, {"tau": 0.05, "actor_loss_kind": "awr", "alpha": 2.0}),
]


def small(cls: Any, **options: Any) -> Any:
    return ready(cls(**({"hidden_dims": (8, 6)} | options)))


class Reference:
    """One network per member, `backward` on the sum and `torch.optim.Adam`, from the formulas."""

    def __init__(self, method: Any) -> None:
        self.h, self.kind = method.hparams, type(method)
        self.nets: dict[str, list[nn.Module]] = {"actor": [plain_mlp(method.actor.net)]}
        for name in ("value", "critic"):
            if hasattr(method, name):
                net = getattr(method, name).net
                self.nets[name] = [plain_mlp(net, j) for j in range(net.layers[0].weight.shape[0])]
        self.target = {name: copy.deepcopy(self.nets[name]) for name in method.targets}
        self.adam = torch.optim.Adam([p for ns in self.nets.values() for n in ns for p in n.parameters()], lr=self.h.lr)

    @staticmethod
    def of(nets: list[nn.Module], *parts: Tensor) -> Tensor:
        return torch.stack([net(torch.cat(parts, 1))[:, 0] for net in nets])

    def expectile(self, advantage: Tensor) -> Tensor:
        above = (advantage >= 0).double()
        return above * self.h.expectile + (1 - above) * (1 - self.h.expectile)

    def losses(self, b: Any) -> dict[str, Tensor]:
        h, nets = self.h, self.nets
        mean = nets["actor"][0](torch.cat([b.obs, b.actor_goal], 1))
        log_prob = Normal(mean, 1.0).log_prob(b.action).sum(1)
        if self.kind is GCBC:
            return {"actor_loss": -log_prob.mean()}
        found = {}
        if self.kind is GCIVL:
            with torch.no_grad():
                now = self.of(self.target["value"], b.obs, b.value_goal)
                then = self.of(self.target["value"], b.next_obs, b.value_goal)
                weight = self.expectile(b.value_reward + h.discount * b.value_mask * then.min(0)[0] - now.mean(0))
                target = b.value_reward + h.discount * b.value_mask * then
                advantage = self.of(nets["value"], b.next_obs, b.actor_goal) - self.of(
                    nets["value"], b.obs, b.actor_goal
                )
            v = self.of(nets["value"], b.obs, b.value_goal)
            found["value_loss"] = sum((weight * (target[j] - v[j]) ** 2).mean() for j in range(2))
        else:
            with torch.no_grad():
                q = self.of(self.target["critic"], b.obs, b.value_goal, b.action).min(0)[0]
                next_v = self.of(nets["value"], b.next_obs, b.value_goal)[0]
                y = b.value_reward + h.discount * b.value_mask * next_v
                advantage = self.of(nets["critic"], b.obs, b.actor_goal, b.action).min(0)[0][None]
                advantage = advantage - self.of(nets["value"], b.obs, b.actor_goal)
            v = self.of(nets["value"], b.obs, b.value_goal)[0]
            found["value_loss"] = (self.expectile(q - v) * (q - v) ** 2).mean()
            found["critic_loss"] = sum(
                ((q - y) ** 2).mean() for q in self.of(nets["critic"], b.obs, b.value_goal, b.action)
            )
            if h.actor_loss_kind == "ddpgbc":
                frozen = copy.deepcopy(nets["critic"])
                q = self.of(frozen, b.obs, b.actor_goal, mean.clamp(-1, 1)).min(0)[0]
                found["actor_loss"] = -q.mean() / (q.abs().mean().detach() + 1e-6) - h.alpha * log_prob.mean()
                return found
        weight = torch.exp(h.alpha * advantage.mean(0)).clamp(max=100.0)
        found["actor_loss"] = -(weight * log_prob).mean()
        return found

    def update(self, batch: Any) -> dict[str, float]:
        losses = self.losses(batch)
        self.adam.zero_grad()
        sum(losses.values()).backward()  # type: ignore[union-attr]
        for name, targets in self.target.items():  # towards the weights from before the step
            for target, net in zip(targets, self.nets[name], strict=True):
                for old, new in zip(target.parameters(), net.parameters(), strict=True):
                    old.data.copy_(self.h.tau * new.data + (1 - self.h.tau) * old.data)
        self.adam.step()
        return {name: loss.item() for name, loss in losses.items()}


@pytest.mark.parametrize(("cls", "options"), CASES)
def test_updates_equal_the_obvious_loop(cls: Any, options: dict[str, Any]) -> None:
    method = small(cls, lr=1e-2, **options)
    reference = Reference(method)
    for step in range(1, 9):
        batch = made_batch(method, seed=step)
        metrics = method.update(batch, step)
        for name, value in reference.update(batch).items():
            assert metrics[name].item() == pytest.approx(value, rel=1e-9)
    for name, nets in reference.nets.items():
        assert_same(getattr(method, name).net, nets)
    for name, nets in reference.target.items():
        assert_same(getattr(method, f"target_{name}").net, nets)


@pytest.mark.parametrize(("cls", "options"), CASES)
def test_every_loss_moves_its_network_alone(cls: Any, options: dict[str, Any]) -> None:
    method = small(cls, **options)
    parts = {name: p for name, p in method.named_parameters() if p.requires_grad}
    for loss in method.losses:
        grads = torch.autograd.grad(getattr(method, loss)(made_batch(method))[0], parts.values(), allow_unused=True)
        reached = {name.split(".")[0] for name, grad in zip(parts, grads, strict=True) if grad is not None}
        assert reached == {loss.removesuffix("_loss")}


def test_the_policy_climbs_the_critic() -> None:
    """Without cloning the actor's gradient is that of -min Q / mean|min Q| in the action, by finite differences."""
    method = small(GCIQL, alpha=0.0)
    batch = made_batch(method, size=4)
    bias = method.actor.net.layers[-1].bias
    (gradient,) = torch.autograd.grad(method.actor_loss(batch)[0], bias)
    scale = method.frozen_q(batch.obs, batch.actor_goal, method.actor(batch.obs, batch.actor_goal)).abs().mean().item()
    for i in range(bias.numel()):
        around = []
        for h in (1e-6, -1e-6):
            shift = torch.zeros(bias.numel()).double()
            shift[i] = h
            action = method.actor(batch.obs, batch.actor_goal) + shift
            around.append(-method.frozen_q(batch.obs, batch.actor_goal, action).mean().item() / (scale + 1e-6))
        assert gradient[0, i].item() == pytest.approx((around[0] - around[1]) / 2e-6, rel=1e-5)


@pytest.mark.parametrize(("cls", "options"), CASES)
def test_seeds_side_by_side_equal_seeds_alone(cls: Any, options: dict[str, Any]) -> None:
    assert_seeds_equal(cls, (0, 5, 9), hidden_dims=(8, 6), **options)


@pytest.mark.parametrize(("cls", "options"), CASES)
def test_acting_is_the_clipped_mean(cls: Any, options: dict[str, Any]) -> None:
    method = small(cls, **options)
    method.actor.net.layers[-1].bias.data[0, 0] = 3.0
    obs, goal = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    found = method.act_goal(obs, goal)
    torch.testing.assert_close(found, plain_mlp(method.actor.net)(torch.cat([obs, goal], 1)).clamp(-1, 1))
    assert (found[:, 0] == 1.0).all()


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (GCIVL, {"alpha": -1.0}),
        (GCIVL, {"expectile": 0.0}),
        (GCIQL, {"tau": 2.0}),
        (GCIQL, {"actor_loss_kind": "bc"}),
        (GCBC, {"discount": 1.0}),
    ],
)
def test_impossible_settings(cls: Any, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        cls(**options)
