"""Directions of several objectives, and answers chosen by them (directional preference alignment, arXiv:2402.18571)."""

from __future__ import annotations

import torch
from torch import Tensor

from offpolicy.errors import check_range


def direction(theta: Tensor) -> Tensor:
    """The unit vectors (cos θ, sin θ) of angles in radians, (…) → (…, 2): weights of the first and second objective."""
    return torch.stack([theta.cos(), theta.sin()], -1)


def cone(angle: Tensor, around: Tensor) -> Tensor:
    """Unit vectors at an angle from the first objective, (…, k): cos a·e₁ + sin a·u, u the direction of ``around``.

    Args:
        angle: a in radians, (…).
        around: any vectors over the other objectives, not 0, (…, k − 1).
    """
    unit = around / around.norm(dim=-1, keepdim=True)
    return torch.cat([angle.cos()[..., None], angle.sin()[..., None] * unit], -1)


def winner(scores: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
    """The answer with the largest vᵀr for each direction, the first of equal ones, int64 (P, D).

    Args:
        scores: r of N answers to each of P prompts in k objectives, (P, N, k).
        v: D directions for each prompt, (P, D, k); their lengths have no influence.
        present: which answers are there, (P, N) bool; None for all.
    """
    value = torch.einsum("pnk,pdk->pdn", scores, v)
    if present is not None:
        value = value.masked_fill(~present[:, None], -torch.inf)
    place = torch.arange(scores.shape[1], device=scores.device)
    best = value.amax(-1, keepdim=True)
    return torch.where(value == best, place, scores.shape[1]).amin(-1)


def percent(v: Tensor) -> Tensor:
    """The whole numbers round(100·v) that a prompt states, int64, of the shape of v."""
    check_range("the largest component", float(v.abs().max()) if v.numel() else 0.0, 0.0, 1.0 + 1e-6)
    return (100.0 * v).round().long()
