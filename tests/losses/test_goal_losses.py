"""Losses of goal-conditioned learning: known answers, gradients, seeds; and values of a chain that they converge to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from offpolicy.losses.goal import awr_loss, ddpg_bc_loss, implicit_value_loss


def f64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_implicit_value_known_answer() -> None:
    """γ = 0.5, τ = 0.9, two members, two rows.

    Row 1: r = -1, m = 1, v̄' = (-2, -4), v̄ = (-2, -3): A = -1 - 0.5·4 + 2.5 = -0.5 < 0, weight 0.1; targets -2, -3 by
    member; v = (0, 0): 0.1·4 and 0.1·9. Row 2: r = m = 0: A = 0 + 1 ≥ 0, weight 0.9, target 0; v = (1, -2): 0.9·1 and
    0.9·4. Means 0.65 and 2.25, sum 2.9.
    """
    v = f64([0.0, 1.0], [0.0, -2.0]).requires_grad_()
    target_v, target_next_v = f64([-2.0, -1.0], [-3.0, -1.0]), f64([-2.0, 9.0], [-4.0, 9.0])
    reward, mask = f64(-1.0, 0.0), f64(1.0, 0.0)
    loss = implicit_value_loss(v, target_v, target_next_v, reward, mask, discount=0.5, expectile=0.9)
    assert loss.item() == pytest.approx(2.9, rel=1e-12)
    loss.backward()  # ω·2·(v - target)/2
    torch.testing.assert_close(v.grad, f64([0.2, 0.9], [0.3, -1.8]))
    weighed = implicit_value_loss(
        v, target_v, target_next_v, reward, mask, discount=0.5, expectile=0.9, weight=f64(1.0, 0.0)
    )
    assert weighed.item() == pytest.approx((0.4 + 0.9) / 2, rel=1e-12)


def test_an_advantage_of_zero_counts_as_positive() -> None:
    zero = f64([0.0], [0.0])
    loss = implicit_value_loss(zero + 1, zero, zero, f64(0.0), f64(1.0), discount=0.9, expectile=0.9)
    assert loss.item() == pytest.approx(1.8)


def test_implicit_value_gives_no_gradient_to_targets() -> None:
    parts = [torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    loss = implicit_value_loss(*parts, -torch.ones(5), torch.ones(5), discount=0.9, expectile=0.7)  # type: ignore[misc]
    grads = torch.autograd.grad(loss, parts, allow_unused=True)
    assert grads[0] is not None and grads[1] is None and grads[2] is None


def test_losses_keep_seeds_apart() -> None:
    g = torch.Generator().manual_seed(0)
    v, target_v, target_next_v = (torch.randn(3, 2, 5, generator=g) for _ in range(3))
    reward, mask = -torch.rand(3, 5, generator=g), torch.ones(3, 5)
    joint = implicit_value_loss(v, target_v, target_next_v, reward, mask, discount=0.9, expectile=0.7)
    log_prob, advantage = torch.randn(3, 5, generator=g), torch.randn(3, 5, generator=g)
    for s in range(3):
        alone = implicit_value_loss(
            v[s], target_v[s], target_next_v[s], reward[s], mask[s], discount=0.9, expectile=0.7
        )
        torch.testing.assert_close(joint[s], alone)
        torch.testing.assert_close(awr_loss(log_prob, advantage, 3.0)[s], awr_loss(log_prob[s], advantage[s], 3.0))
        scale = torch.tensor([1.0, 2.0, 3.0])
        torch.testing.assert_close(
            ddpg_bc_loss(advantage, log_prob, scale, 0.3)[s], ddpg_bc_loss(advantage[s], log_prob[s], scale[s], 0.3)
        )


def test_awr_known_answer() -> None:
    """α = 2: weights e and, at A = 3 (e⁶ = 403), 100; -(e·(-1) + 100·(-2))/2. A takes no gradient."""
    log_prob, advantage = f64(-1.0, -2.0).requires_grad_(), f64(0.5, 3.0).requires_grad_()
    loss = awr_loss(log_prob, advantage, 2.0)
    assert loss.item() == pytest.approx((math.e + 200) / 2, rel=1e-12)
    loss.backward()
    torch.testing.assert_close(log_prob.grad, f64(-math.e / 2, -50.0))
    assert advantage.grad is None
    assert awr_loss(log_prob, advantage, 0.0).item() == pytest.approx(1.5)  # plain cloning


def test_ddpg_bc_known_answer() -> None:
    """q = (-2, -6), scale 4: 4/4 - 0.3·(-1.5)."""
    q, log_prob = f64(-2.0, -6.0), f64(-1.0, -2.0)
    loss = ddpg_bc_loss(q, log_prob, f64(4.0)[0], 0.3)
    assert loss.item() == pytest.approx(4.0 / (4.0 + 1e-6) + 0.45, rel=1e-12)


def chain(option_steps: int | None, expectile: float, length: int = 101, discount: float = 0.99) -> Tensor:
    """The value by distance d = 0 … length - 1 to the goal that plain sweeps of the loss converge to, on a chain.

    One table entry per d. Without options d leads to d - 1, and d = 0, the goal itself, counts as reached; with options
    d leads to max(d - n, 0), and ways that end at 0 do.
    """
    d = torch.arange(length)
    later = (d - (option_steps or 1)).clamp(min=0)
    missed = (later > 0).double() if option_steps else (d > 0).double()
    v = torch.zeros(2, length, dtype=torch.float64)
    for _ in range(length):  # a full step to the target of each member, as every weight is positive
        table = v.clone().requires_grad_()
        loss = implicit_value_loss(table, v, v[:, later], -missed, missed, discount=discount, expectile=expectile)
        (gradient,) = torch.autograd.grad(loss * length / 2, table)
        above = discount * missed * v[0, later] - missed >= v[0]
        v = v - gradient / torch.where(above, expectile, 1.0 - expectile)
    return v[0]


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.99])
def test_values_of_a_chain(expectile: float) -> None:
    """-(1 - γ^d)/(1 - γ), and with options of n steps -(1 - γ^K)/(1 - γ), K = ⌈d/n⌉ - 1."""
    low, five, twenty = (chain(n, expectile) for n in (None, 5, 20))
    expected = {1: -1.0, 5: -4.9010, 20: -18.2093, 100: -63.3968}
    assert {d: round(low[d].item(), 4) for d in expected} == expected
    options = {1: 0.0, 5: 0.0, 6: -1.0, 20: -2.9701, 21: -3.9404, 100: -17.3831}
    assert {d: round(five[d].item(), 4) for d in options} == options
    assert [round(twenty[d].item(), 4) for d in (21, 100)] == [-1.0, -3.9404]
    torch.testing.assert_close(chain(1, expectile)[1:], low[:-1])  # n = 1 is the low value one step nearer
