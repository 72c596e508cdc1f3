"""Losses of value learning and of policies regularised by values: pure functions of tensors.

Axes are counted from the right: batch −1, ensemble −2; anything in front is seeds. Every loss reduces the batch (and
sums the ensemble) and keeps the seeds.
"""

from __future__ import annotations

from torch import Tensor


def td_target(reward: Tensor, terminated: Tensor, next_value: Tensor, discount: float | Tensor) -> Tensor:
    """One-step target r + γ·(1 − terminated)·v(s').

    Args:
        reward: (…, B).
        terminated: (…, B) bool; true removes the bootstrap. The end of an episode by a time limit is not terminated.
        next_value: (…, B), value of the next state.
        discount: γ per environment step, or per row (…, B).

    Returns:
        Target, (…, B). Do not differentiate through it.
    """
    return reward + discount * next_value.masked_fill(terminated, 0.0)


def smoothed_action(action: Tensor, noise: Tensor, scale: float, clip: float) -> Tensor:
    """The target action of TD3 with clipped noise, clip(a + clip(σ·ε, ±c), ±1) (arXiv:1802.09477).

    Args:
        action: a, of the target policy, in [-1, 1], any shape.
        noise: ε, standard normal, of the same shape.
        scale: σ ≥ 0, standard deviation of the noise.
        clip: c ≥ 0, bound on it.
    """
    return (action + (scale * noise).clamp(-clip, clip)).clamp(-1.0, 1.0)


def squared_td(q: Tensor, target: Tensor) -> Tensor:
    """Σ over critics of the mean squared TD error.

    Args:
        q: (…, E, B) predictions of E critics.
        target: (…, B), common to all critics.

    Returns:
        (…,): one number per seed.
    """
    return (q - target.unsqueeze(-2)).square().mean(-1).sum(-1)


def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    """Asymmetric squared loss |τ − 1[u < 0]|·u² (IQL, arXiv:2110.06169, section 4.1), not reduced.

    Args:
        difference: u = target − prediction, any shape.
        expectile: τ in (0, 1); 0.5 is half the squared error.
    """
    return expectile_weight(difference, expectile) * difference.square()


def expectile_weight(difference: Tensor, expectile: float) -> Tensor:
    """|τ − 1[u < 0]| of differences u, any shape: τ for u ≥ 0, 1 − τ below."""
    return (expectile - (difference < 0).to(difference.dtype)).abs()


def exponential_weight(advantage: Tensor, beta: float, maximum: float = 100.0) -> Tensor:
    """min(exp(β·A), maximum), the weight of advantage-weighted regression; detached, any shape.

    Args:
        advantage: A, any shape.
        beta: inverse temperature, ≥ 0; 0 weighs all actions alike.
        maximum: cap on the weight, > 0.
    """
    return (beta * advantage.detach()).exp().clamp(max=maximum)


def mean_squared_action(action: Tensor, target: Tensor) -> Tensor:
    """Mean over batch and action dimensions of (π − a)²: (…, B, A) twice → (…,)."""
    return (action - target).square().mean((-2, -1))
