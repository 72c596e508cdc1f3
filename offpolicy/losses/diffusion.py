"""Denoising with preconditioned networks — Karras et al. 2022 (EDM, arXiv:2206.00364, Table 1), data of deviation σ_d.

A network F sees scaled data and a number for the noise level σ; the denoiser
D(x; σ) = c_skip·x + c_out·F(c_in·x; c_noise) estimates the clean data, and
(D(x; σ) - x) / σ² is the score of the noisy ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor], Tensor]


class Scales(NamedTuple):
    """The factors c_skip, c_out and c_in, and c_noise, which the network is told, each of the shape of σ."""

    skip: Tensor
    out: Tensor
    inner: Tensor
    noise: Tensor


def preconditioning(sigma: Tensor, sigma_data: float = 1.0) -> Scales:
    """c_skip = σ_d² / (σ² + σ_d²), c_out = σ·σ_d / √(σ² + σ_d²), c_in = 1 / √(σ² + σ_d²), c_noise = ¼ ln σ.

    Args:
        sigma: noise levels > 0, any shape.
        sigma_data: σ_d > 0.
    """
    inner = (sigma.square() + sigma_data**2).rsqrt()
    return Scales(inner.square() * sigma_data**2, sigma * sigma_data * inner, inner, 0.25 * sigma.log())


def loss_weight(sigma: Tensor, sigma_data: float = 1.0) -> Tensor:
    """(σ² + σ_d²) / (σ·σ_d)², which gives every noise level the same weight on the output of the network."""
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()


def noise_level(normal: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Noise levels of training: exp(mean + std·ε) of standard normal numbers ε."""
    return torch.exp(mean + std * normal)


def denoise(network: Network, x: Tensor, sigma: Tensor, sigma_data: float = 1.0) -> Tensor:
    """D(x; σ), of the shape of x.

    Args:
        network: F(c_in·x, c_noise).
        x: noisy data (…, B, T, C).
        sigma: noise level of each sequence (…, B), or one for all, ().
        sigma_data: σ_d > 0.
    """
    skip, out, inner, noise = preconditioning(sigma, sigma_data)
    skip, out, inner = (c[..., None, None] for c in (skip, out, inner))
    return torch.addcmul(skip * x, out, network(inner * x, noise).to(x.dtype))


def denoising_loss(denoised: Tensor, clean: Tensor, sigma: Tensor, sigma_data: float = 1.0) -> Tensor:
    """Weighted squared error of denoised data, per sequence: mean over steps and channels (Eq. 8).

    Args:
        denoised: D(x; σ), (…, B, T, C).
        clean: x₀, of the same shape.
        sigma: σ of each sequence, (…, B).
        sigma_data: σ_d > 0.

    Returns:
        (…, B), not reduced, so that the caller can average over the batch.
    """
    return loss_weight(sigma, sigma_data) * (denoised - clean).square().mean((-2, -1))
