"""Pieces of distribution-correction (DICE) learning: conjugates of f-divergences, policy weights, the projection.

Conjugates are taken over non-negative ratios, f*(y) = max over w ≥ 0 of w·y − f(w), as in O-DICE (arXiv:2402.00348).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Divergence = Literal["pearson_chi2", "reverse_kl"]
DIVERGENCES = ("pearson_chi2", "reverse_kl")


def exact_ratio(residual: Tensor, divergence: Divergence) -> Tensor:
    """The maximiser w*(y) = max(0, (f')⁻¹(y)), which is also the derivative of f*; any shape.

    Args:
        residual: y, any shape.
        divergence: "pearson_chi2", f(w) = (w − 1)², gives max(y/2 + 1, 0); "reverse_kl", f(w) = w·log w, gives
            exp(y − 1), which overflows float32 from y ≈ 89.
    """
    if divergence == "reverse_kl":
        return (residual - 1.0).exp()
    return (0.5 * residual + 1.0).clamp(min=0.0)


def conjugate(residual: Tensor, divergence: Divergence) -> Tensor:
    """f*(y) = max over w ≥ 0 of w·y − f(w), not reduced; any shape.

    Args:
        residual: y, any shape.
        divergence: as in :func:`exact_ratio`. χ² gives y + y²/4 for y ≥ −2 and −1 below; reverse KL gives exp(y − 1).
    """
    ratio = exact_ratio(residual, divergence)
    if divergence == "reverse_kl":
        return ratio
    return ratio.square() - 1.0  # = y·w − (w − 1)² at w = max(y/2 + 1, 0), with derivative w exactly


def policy_weight(residual: Tensor, divergence: Divergence, *, exact: bool = False, maximum: float = 100.0) -> Tensor:
    """Weight of log π(a|s) in the extraction of the policy; detached, any shape.

    Args:
        residual: y, any shape.
        divergence: as in :func:`exact_ratio`.
        exact: use w*(y). Otherwise, as the authors' code does, χ² gives max(y, 0), which leaves out every transition
            with y ≤ 0; reverse KL has only the exact weight.
        maximum: cap on the weight, > 0.
    """
    y = residual.detach()
    weight = exact_ratio(y, divergence) if exact or divergence == "reverse_kl" else y.clamp(min=0.0)
    return weight.clamp(max=maximum)


def projection(forward: Tensor, backward: Tensor) -> Tensor:
    """c = (g_F·g_B) / max(g_F·g_F, 1e-10), so that g_B - c·g_F is orthogonal to g_F.

    With several processes both gradients must be means over the processes already.

    Args:
        forward: g_F over all parameters jointly, (…, P).
        backward: g_B, likewise.

    Returns:
        c, (…,): one number per seed.
    """
    return (forward * backward).sum(-1) / forward.square().sum(-1).clamp(min=1e-10)
