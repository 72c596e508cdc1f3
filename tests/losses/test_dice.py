"""Known answers of the conjugates, the policy weights and the projection."""

from __future__ import annotations

import pytest
import torch

from offpolicy.losses.dice import conjugate, exact_ratio, policy_weight, projection


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_chi2_conjugate_known_answers() -> None:
    """y + y²/4 from y = -2 on: 0, 2 + 1 = 3, -2 + 1 = -1, 1 + 1/4; below it w = 0 gives -(0 - 1)² = -1."""
    y = t(0.0, 2.0, -2.0, -10.0, 1.0)
    torch.testing.assert_close(conjugate(y, "pearson_chi2"), t(0.0, 3.0, -1.0, -1.0, 1.25))


def test_reverse_kl_conjugate_known_answers() -> None:
    """exp(y - 1): 1 at y = 1 and e at y = 2."""
    torch.testing.assert_close(conjugate(t(1.0, 2.0), "reverse_kl"), t(1.0, 2.718281828459045))


@pytest.mark.parametrize("divergence", ["pearson_chi2", "reverse_kl"])
def test_conjugate_is_the_maximum_over_ratios(divergence: str) -> None:
    """f*(y) ≥ w·y - f(w) for every w ≥ 0 on a grid, nearly reached on it, and reached exactly at w*(y)."""
    y = torch.linspace(-5, 3, 33, dtype=torch.float64)
    w = torch.linspace(0, 10, 100_001, dtype=torch.float64)[:, None]

    def f(w: torch.Tensor) -> torch.Tensor:
        return (w - 1).square() if divergence == "pearson_chi2" else torch.xlogy(w, w)

    value, best = conjugate(y, divergence), (w * y - f(w)).amax(0)
    assert (value >= best - 1e-12).all()
    torch.testing.assert_close(value, best, rtol=0, atol=1e-6)
    ratio = exact_ratio(y, divergence)
    torch.testing.assert_close(ratio * y - f(ratio), value)


@pytest.mark.parametrize("divergence", ["pearson_chi2", "reverse_kl"])
def test_derivative_of_the_conjugate_is_the_ratio(divergence: str) -> None:
    y = t(-10.0, -2.5, -1.0, 0.0, 0.3, 4.0).requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(conjugate(y, divergence).sum(), y)[0], exact_ratio(y.detach(), divergence)
    )
    assert torch.autograd.gradcheck(lambda x: conjugate(x, divergence), t(-3.0, -1.0, 0.5).requires_grad_())


def test_policy_weights() -> None:
    """χ²: max(y, 0) up to 100, so 300 gives 100; exact: y/2 + 1 from -2 on; reverse KL: exp(y - 1)."""
    y = t(-3.0, 0.0, 1.5, 300.0).requires_grad_()
    weight = policy_weight(y, "pearson_chi2")
    assert not weight.requires_grad
    torch.testing.assert_close(weight, t(0.0, 0.0, 1.5, 100.0))
    torch.testing.assert_close(policy_weight(y, "pearson_chi2", exact=True), t(0.0, 1.0, 1.75, 100.0))
    torch.testing.assert_close(policy_weight(t(1.0, 900.0), "reverse_kl", maximum=5.0), t(1.0, 5.0))


def test_projection_known_answers() -> None:
    """(1, 2)·(3, -1) = 1 over 1 + 4 = 5, and (0, 0) against anything is 0 over the floor."""
    forward, backward = t(1.0, 2.0), t(3.0, -1.0)
    torch.testing.assert_close(projection(forward, backward), torch.tensor(0.2, dtype=torch.float64))
    both = projection(torch.stack([forward, 0 * forward]), torch.stack([backward, backward]))
    torch.testing.assert_close(both, t(0.2, 0.0))


def test_projection_leaves_nothing_along_the_forward_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    forward, backward = (torch.randn(3, 500, generator=g, dtype=torch.float64) for _ in range(2))
    rest = backward - projection(forward, backward)[:, None] * forward
    torch.testing.assert_close((rest * forward).sum(-1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(projection(forward, -2.5 * forward), torch.full((3,), -2.5, dtype=torch.float64))
