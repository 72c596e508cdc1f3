"""HIQL and OTA against an obvious loop, where their gradients stop, and acting through sub-goals.

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

from lightning_modules.hiql import HIQL
from lightning_modules.ota import OTA
from offpolicy.errors import UsageError

SMALL: dict[str, Any] = {"hidden_dims": (8, 6), "rep_dim": 4}


def small(cls: Any = HIQL, **options: Any) -> Any:
    return ready(cls(**(SMALL | options)))


class Reference:
    """Both methods with one network per member, `backward` on the sum and `torch.optim.Adam`, from the formulas."""

    def __init__(self, method: HIQL) -> None:
        self.h = method.hparams
        self.phi = plain_mlp(method.phi.net)
        self.low, self.high = plain_mlp(method.low_actor.net), plain_mlp(method.high_actor.net)
        heads = ["value", "high_value"] if isinstance(method, OTA) else ["value"]
        self.v = {name: [plain_mlp(getattr(method, name).net, j) for j in range(2)] for name in heads}
        self.target = copy.deepcopy(self.v)
        networks = [self.phi, self.low, self.high, *(net for nets in self.v.values() for net in nets)]
        self.adam = torch.optim.Adam([p for net in networks for p in net.parameters()], lr=self.h.lr)

    def rep(self, s: Tensor, g: Tensor) -> Tensor:
        z = self.phi(torch.cat([s, g], 1))
        return z / z.norm(dim=1, keepdim=True) * math.sqrt(self.h.rep_dim)

    def all(self, nets: list[Any], s: Tensor, g: Tensor) -> list[Tensor]:
        return [net(torch.cat([s, self.rep(s, g)], 1))[:, 0] for net in nets]

    def mean(self, nets: list[Any], s: Tensor, g: Tensor) -> Tensor:
        with torch.no_grad():
            return sum(self.all(nets, s, g)) / 2  # type: ignore[return-value]

    def value_loss(self, name: str, s: Tensor, next_s: Tensor, g: Tensor, r: Tensor, m: Tensor) -> Tensor:
        with torch.no_grad():
            now, then = self.all(self.target[name], s, g), self.all(self.target[name], next_s, g)
            advantage = r + self.h.discount * m * torch.minimum(*then) - (now[0] + now[1]) / 2
            above = (advantage >= 0).double()
            weight = above * self.h.expectile + (1 - above) * (1 - self.h.expectile)
        loss = torch.zeros((), dtype=torch.float64)
        for v, next_v in zip(self.all(self.v[name], s, g), then, strict=True):
            loss = loss + (weight * (r + self.h.discount * m * next_v - v) ** 2).mean()
        return loss

    def clone(self, mean: Tensor, x: Tensor, advantage: Tensor, alpha: float) -> Tensor:
        weight = torch.exp(alpha * advantage).clamp(max=100.0)
        return -(weight * Normal(mean, 1.0).log_prob(x).sum(1)).mean()

    def update(self, b: Any) -> dict[str, float]:
        first, last = "value", list(self.v)[-1]
        losses = {"value_loss": self.value_loss(first, b.obs, b.next_obs, b.value_goal, b.value_reward, b.value_mask)}
        if last != first:
            losses["high_value_loss"] = self.value_loss(
                last, b.obs, b.high_value_option_obs, b.high_value_goal, b.high_value_reward, b.high_value_mask
            )
        z = self.rep(b.obs, b.low_goal)
        z = z if self.h.low_actor_rep_grad else z.detach()
        advantage = self.mean(self.v[first], b.next_obs, b.low_goal) - self.mean(self.v[first], b.obs, b.low_goal)
        losses["low_actor_loss"] = self.clone(self.low(torch.cat([b.obs, z], 1)), b.action, advantage, self.h.low_alpha)
        advantage = self.mean(self.v[last], b.high_target, b.high_goal) - self.mean(self.v[last], b.obs, b.high_goal)
        target = self.rep(b.obs, b.high_target).detach()
        losses["high_actor_loss"] = self.clone(
            self.high(torch.cat([b.obs, b.high_goal], 1)), target, advantage, self.h.high_alpha
        )
        self.adam.zero_grad()
        sum(losses.values()).backward()  # type: ignore[union-attr]
        for name, nets in self.v.items():  # towards the weights from before the step
            for target_net, net in zip(self.target[name], nets, strict=True):
                for old, new in zip(target_net.parameters(), net.parameters(), strict=True):
                    old.data.copy_(self.h.tau * new.data + (1 - self.h.tau) * old.data)
        self.adam.step()
        return {name: loss.item() for name, loss in losses.items()}


@pytest.mark.parametrize("cls", [HIQL, OTA])
@pytest.mark.parametrize("rep_grad", [False, True])
def test_updates_equal_the_obvious_loop(cls: Any, rep_grad: bool) -> None:
    method = small(cls, low_actor_rep_grad=rep_grad, lr=1e-2, tau=0.05, low_alpha=2.0)
    reference = Reference(method)
    for step in range(1, 9):
        batch = made_batch(method, seed=step)
        metrics = method.update(batch, step)
        for name, value in reference.update(batch).items():
            assert metrics[name].item() == pytest.approx(value, rel=1e-9)
    assert_same(method.phi.net, [reference.phi])
    assert_same(method.low_actor.net, [reference.low])
    assert_same(method.high_actor.net, [reference.high])
    for name, nets in reference.v.items():
        assert_same(getattr(method, name).net, nets)
        assert_same(getattr(method, f"target_{name}").net, reference.target[name])


def test_the_value_loss_over_options_is_hiqls_on_the_same_tensors() -> None:
    """Bit for bit: the same heads and (s', g, r, m) for (s_Ω, g, r, m)."""
    method = small(OTA)
    method.high_value, method.target_high_value = method.value, method.target_value
    batch = made_batch(method)
    batch = batch._replace(
        high_value_option_obs=batch.next_obs,
        high_value_goal=batch.value_goal,
        high_value_reward=batch.value_reward,
        high_value_mask=batch.value_mask,
    )
    parts = [*method.value.parameters(), *method.phi.parameters()]
    low, high = (torch.autograd.grad(loss(batch)[0], parts) for loss in (method.value_loss, method.high_value_loss))
    assert torch.equal(method.value_loss(batch)[0], method.high_value_loss(batch)[0])
    assert all(torch.equal(a, b) for a, b in zip(low, high, strict=True))


def test_short_options_can_be_left_out() -> None:
    """Weight 0 for the second row: half of the loss of the first row alone."""
    method, plain = small(OTA, drop_short_options=True), small(OTA)
    batch = made_batch(method, size=2)._replace(high_value_full=torch.tensor([1.0, 0.0]).double())
    first = type(batch)(**{k: v[:1] for k, v in batch._asdict().items() if isinstance(v, Tensor)})
    expected = plain.high_value_loss(first)[0] / 2
    assert method.high_value_loss(batch)[0].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("cls", [HIQL, OTA])
def test_where_gradients_stop(cls: Any) -> None:
    """Values and φ learn from value losses alone, and φ from the low policy where that is asked for."""

    def reached(method: Any, loss: str) -> set[str]:
        parts = {name: p for name, p in method.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(getattr(method, loss)(made_batch(method))[0], parts.values(), allow_unused=True)
        return {name.split(".")[0] for name, grad in zip(parts, grads, strict=True) if grad is not None}

    method = small(cls)
    assert reached(method, "value_loss") == {"phi", "value"}
    assert reached(method, "low_actor_loss") == {"low_actor"}
    assert reached(method, "high_actor_loss") == {"high_actor"}
    assert reached(small(cls, low_actor_rep_grad=True), "low_actor_loss") == {"low_actor", "phi"}
    if cls is OTA:
        assert reached(method, "high_value_loss") == {"phi", "high_value"}


@pytest.mark.parametrize("loss", ["value_loss", "high_value_loss", "low_actor_loss", "high_actor_loss"])
def test_gradients_by_finite_differences(loss: str) -> None:
    """The representation of the targets is held: the batch has no bootstrap and the advantages weigh nothing."""
    method = small(OTA, hidden_dims=(4,), rep_dim=2, low_alpha=0.0, high_alpha=0.0)
    batch = made_batch(method, size=6)
    batch = batch._replace(value_mask=0 * batch.value_mask, high_value_mask=0 * batch.high_value_mask)
    own = {"value_loss": "value", "high_value_loss": "high_value"}.get(loss, loss.removesuffix("_loss"))
    parameters = list(getattr(method, own).parameters())
    for p, g in zip(parameters, torch.autograd.grad(getattr(method, loss)(batch)[0], parameters), strict=True):
        for i in range(0, p.numel(), 3):
            value, around = p.data.view(-1)[i].item(), []
            for h in (1e-6, -1e-6):
                p.data.view(-1)[i] = value + h
                around.append(getattr(method, loss)(batch)[0].item())
            p.data.view(-1)[i] = value
            assert g.reshape(-1)[i].item() == pytest.approx((around[0] - around[1]) / 2e-6, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("options", [{}, {"low_actor_rep_grad": True, "max_grad_norm": 0.1}])
def test_seeds_side_by_side_equal_seeds_alone(options: dict[str, Any]) -> None:
    assert_seeds_equal(OTA, (0, 5, 9), **SMALL, **options)


def test_acting_goes_through_the_subgoal() -> None:
    method = small()
    obs, goal = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    z = plain_mlp(method.high_actor.net)(torch.cat([obs, goal], 1))
    z = z / z.norm(dim=1, keepdim=True) * 2
    torch.testing.assert_close(method.subgoal(obs, goal), z)
    expected = plain_mlp(method.low_actor.net)(torch.cat([obs, z], 1)).clamp(-1, 1)
    torch.testing.assert_close(method.act_goal(obs, goal), expected)
    for p in method.high_actor.net.layers[-1].parameters():  # the length of what the high level says does not matter
        p.data.mul_(7.0)
    torch.testing.assert_close(method.act_goal(obs, goal), expected)


def test_values_are_means_over_the_heads() -> None:
    method = small(OTA)
    obs, goal = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    found = method.value_of(obs, goal)
    reference = Reference(method)
    torch.testing.assert_close(found["low"], reference.mean(reference.v["value"], obs, goal))
    torch.testing.assert_close(found["high"], reference.mean(reference.v["high_value"], obs, goal))
    torch.testing.assert_close(small().value_of(obs, goal)["value"], found["low"])
    torch.testing.assert_close(method.represent(obs, goal), reference.rep(obs, goal))


@pytest.mark.parametrize(
    "options",
    [
        {"low_alpha": -1.0},
        {"high_alpha": -1.0},
        {"subgoal_steps": 0},
        {"expectile": 1.0},
        {"discount": 1.0},
        {"tau": -0.1},
        {"rep_dim": 0},
        {"actor_p_random": 1.5},
        {"abstraction_factor": 0},
    ],
)
def test_impossible_settings(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        OTA(**options)


def test_probabilities_of_goals_must_sum_to_one() -> None:
    with pytest.raises(UsageError, match="with the sum 1"):
        HIQL(value_p_random=0.5)
