"""Value losses: known answers, gradients, and axes counted from the right."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offpolicy.losses.td import (
    expectile_loss,
    exponential_weight,
    mean_squared_action,
    smoothed_action,
    squared_td,
    td_target,
)

NUMBERS = st.floats(-10, 10)


def f64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_td_target_known_answer() -> None:
    """1 + 0.9·10 = 10 and, terminated, 2; with γ per row 1 + 0.5·10 = 6."""
    reward, value, terminated = f64(1.0, 2.0), f64(10.0, 20.0), torch.tensor([False, True])
    torch.testing.assert_close(td_target(reward, terminated, value, 0.9), f64(10.0, 2.0))
    torch.testing.assert_close(td_target(reward, terminated, value, f64(0.5, 0.5)), f64(6.0, 2.0))


def test_td_target_ignores_a_diverged_value_where_terminated() -> None:
    """0·∞ would be NaN."""
    target = td_target(f64(1.0), torch.tensor([True]), f64(math.inf), 0.9)
    assert target.tolist() == [1.0]


def test_squared_td_known_answer() -> None:
    """Critic 1 errs by (1, −1), critic 2 by (3, 0): 1 + 9/2 = 5.5."""
    q, target = f64([2.0, 1.0], [4.0, 2.0]), f64(1.0, 2.0)
    torch.testing.assert_close(squared_td(q, target), f64(5.5)[0])


def test_expectile_known_answer() -> None:
    """τ = 0.7: 0.7·2² = 2.8 above, 0.3·2² = 1.2 below, 0 at 0."""
    torch.testing.assert_close(expectile_loss(f64(2.0, -2.0, 0.0), 0.7), f64(2.8, 1.2, 0.0))


@given(NUMBERS)
def test_expectile_one_half_is_half_the_squared_error(u: float) -> None:
    torch.testing.assert_close(expectile_loss(f64(u), 0.5), f64(0.5 * u * u))


@pytest.mark.parametrize("expectile", [0.1, 0.5, 0.7, 0.9])
def test_expectile_of_two_points(expectile: float) -> None:
    """For the points 0 and 1 the τ-expectile is τ: τ·(1 − v) = (1 − τ)·v. There the gradient is 0."""
    v = torch.tensor(expectile, dtype=torch.float64, requires_grad=True)
    expectile_loss(f64(0.0, 1.0) - v, expectile).mean().backward()
    assert v.grad is not None and abs(v.grad.item()) < 1e-12


def test_exponential_weight_known_answer() -> None:
    """exp(3·0.5) = 4.4817; from β·A = ln 100 on it stays 100; −∞ gives 0."""
    advantage = f64(0.5, math.log(100) / 3, 1e9, -math.inf)
    torch.testing.assert_close(exponential_weight(advantage, 3.0), f64(math.exp(1.5), 100.0, 100.0, 0.0))
    assert exponential_weight(f64(5.0, -5.0), 0.0).tolist() == [1.0, 1.0]
    assert exponential_weight(f64(5.0), 1.0, maximum=7.0).tolist() == [7.0]
    assert not exponential_weight(f64(0.5).requires_grad_(), 3.0).requires_grad


def test_mean_squared_action_known_answer() -> None:
    """Errors (1, 0) and (2, 1): (1 + 0 + 4 + 1)/4 = 1.5, a mean over the action dimensions too."""
    action, target = f64([1.0, 0.0], [2.0, 1.0]), f64([0.0, 0.0], [0.0, 0.0])
    torch.testing.assert_close(mean_squared_action(action, target), f64(1.5)[0])


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: squared_td(x, torch.linspace(-1, 1, 5).double()),
        lambda x: expectile_loss(x, 0.8).mean(),
        lambda x: mean_squared_action(x, torch.zeros(2, 5).double()),
        lambda x: td_target(torch.ones(5).double(), torch.arange(5) > 2, x[0], 0.9).square().sum(),
    ],
)
def test_gradients_by_finite_differences(loss: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(loss, (x,))


@given(st.integers(0, 100))
def test_batch_order_never_matters(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q, target = torch.randn(2, 6, generator=g).double(), torch.randn(6, generator=g).double()
    order = torch.randperm(6, generator=g)
    torch.testing.assert_close(squared_td(q[:, order], target[order]), squared_td(q, target))


def test_axes_in_front_are_seeds() -> None:
    """Every loss of two seeds is the two losses side by side."""
    g = torch.Generator().manual_seed(0)
    q, target = (torch.randn(shape, generator=g).double() for shape in ((2, 3, 5), (2, 5)))
    action, other = (torch.randn(2, 5, 4, generator=g).double() for _ in range(2))
    for i in range(2):
        assert torch.equal(squared_td(q, target)[i], squared_td(q[i], target[i]))
        assert torch.equal(mean_squared_action(action, other)[i], mean_squared_action(action[i], other[i]))
    assert squared_td(q, target).shape == mean_squared_action(action, other).shape == (2,)


def test_smoothed_action_known_answer() -> None:
    """σ 0.2, c 0.5: ε = 1 adds 0.2; ε = 5 adds the clip 0.5; ε = −9 takes 0.5 from −0.8, which ends at the bound."""
    action, noise = f64(0.1, 0.1, -0.8), f64(1.0, 5.0, -9.0)
    torch.testing.assert_close(smoothed_action(action, noise, 0.2, 0.5), f64(0.3, 0.6, -1.0))
    torch.testing.assert_close(smoothed_action(action, noise, 0.2, 0.0), action)
