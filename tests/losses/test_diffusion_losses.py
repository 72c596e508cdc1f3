"""Known answers of EDM's preconditioning and loss."""

from __future__ import annotations

import math

import pytest
import torch

from offpolicy.losses.diffusion import denoise, denoising_loss, loss_weight, noise_level, preconditioning


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


SIGMA = t(0.002, 0.3, 1.0, 7.0, 80.0)


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_identities(sigma_data: float) -> None:
    """With s = σ_d: c_skip = s²·c_in², c_out = σ·s·c_in, c_skip + (σ·c_in)² = 1, and c_out²·w = 1."""
    c = preconditioning(SIGMA, sigma_data)
    torch.testing.assert_close(c.skip, (sigma_data * c.inner) ** 2)
    torch.testing.assert_close(c.out, sigma_data * SIGMA * c.inner)
    torch.testing.assert_close(c.skip + (SIGMA * c.inner) ** 2, torch.ones_like(SIGMA))
    torch.testing.assert_close(c.out**2 * loss_weight(SIGMA, sigma_data), torch.ones_like(SIGMA))


def test_known_values() -> None:
    """At σ = 1: ½, 1/√2, 1/√2, 0, w = 2. At σ = 80: c_skip = 1/6401, c_noise = ln 80 / 4."""
    c = preconditioning(t(1.0, 80.0))
    torch.testing.assert_close(c.skip, t(0.5, 1.56225590e-4), rtol=1e-8, atol=0)
    torch.testing.assert_close(c.out[0], t(0.70710678)[0], rtol=1e-8, atol=0)
    torch.testing.assert_close(c.inner[0], t(0.70710678)[0], rtol=1e-8, atol=0)
    torch.testing.assert_close(c.noise, t(0.0, 1.09550666), rtol=1e-8, atol=1e-12)
    assert loss_weight(t(1.0)).item() == 2.0


def test_noise_levels_are_log_normal() -> None:
    """exp(-1.2 + 1.2·ε): e^-1.2 at 0, 1 at ε = 1."""
    torch.testing.assert_close(noise_level(t(0.0, 1.0)), t(math.exp(-1.2), 1.0))


def test_a_network_that_says_nothing_leaves_the_scaled_data() -> None:
    """F ≡ 0 gives c_skip·x and the loss w·mean (c_skip·x - x₀)²; here σ = 1 and 2, so c_skip = 1/2 and 1/5."""
    clean = torch.tensor([[[1.0, 2.0]], [[-1.0, 3.0]]], dtype=torch.float64)  # (B = 2, T = 1, C = 2)
    x, sigma = clean + 1.0, t(1.0, 2.0)
    denoised = denoise(lambda y, noise: torch.zeros_like(y), x, sigma)
    torch.testing.assert_close(denoised, torch.stack([x[0] / 2, x[1] / 5]))
    first = 2.0 * (0.0**2 + 0.5**2) / 2  # x/2 = (1, 1.5)
    second = 1.25 * (1.0**2 + 2.2**2) / 2  # x/5 = (0, 0.8)
    torch.testing.assert_close(denoising_loss(denoised, clean, sigma), t(first, second))


def test_the_network_sees_scaled_data_and_the_noise() -> None:
    seen = {}

    def network(y: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        seen.update(y=y, noise=noise)
        return y

    x = torch.arange(6, dtype=torch.float64).reshape(1, 3, 2)
    found = denoise(network, x, t(3.0).squeeze())  # one level for all
    torch.testing.assert_close(seen["y"], x / math.sqrt(10))
    assert seen["noise"].item() == pytest.approx(math.log(3) / 4)
    torch.testing.assert_close(found, x / 10 + 3 / math.sqrt(10) * x / math.sqrt(10))


def test_the_best_denoiser_of_normal_data_has_the_least_loss() -> None:
    """For x₀ ~ N(0, 1) the posterior mean is x / (1 + σ²) = c_skip·x: the network's best answer is 0."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 4096, 1, 4, generator=generator, dtype=torch.float64)
    sigma = torch.full((4096,), 0.8, dtype=torch.float64)
    x = clean + 0.8 * noise

    def loss(factor: float) -> float:
        return denoising_loss(denoise(lambda y, _: factor * y, x, sigma), clean, sigma).mean().item()

    assert loss(0.0) < min(loss(0.1), loss(-0.1))
    assert loss(0.0) == pytest.approx(1.0, abs=0.03)  # w·Var(x₀|x) = (σ² + 1)/σ²·σ²/(1 + σ²)


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, x, weight = torch.randn(3, 2, 3, 2, generator=generator, dtype=torch.float64)
    weight = weight.requires_grad_()
    sigma = t(0.5, 3.0)
    assert torch.autograd.gradcheck(
        lambda w: denoising_loss(denoise(lambda y, noise: y * w + noise[:, None, None], x, sigma), clean, sigma), weight
    )
