"""Losses of goal-conditioned learning: pure functions of tensors.

Axes are counted from the right: batch −1, ensemble −2; anything in front is seeds. Every loss reduces the batch (and
sums the ensemble) and keeps the seeds.
"""

from __future__ import annotations

from torch import Tensor

from offpolicy.losses.td import expectile_weight, exponential_weight


def implicit_value_loss(
    v: Tensor,
    target_v: Tensor,
    target_next_v: Tensor,
    reward: Tensor,
    mask: Tensor,
    *,
    discount: float,
    expectile: float,
    weight: Tensor | None = None,
) -> Tensor:
    """Action-free expectile regression of state values (IVL; HIQL, arXiv:2307.11949, section 4; authors' code).

    The sign that the expectile looks at is that of r + γ·m·min v̄(s') - mean v̄(s), the same for all members; each
    member is then pulled to its own target r + γ·m·v̄ⱼ(s'). No gradient passes through the targets.

    Args:
        v: vⱼ(s, g), (…, E, B).
        target_v: v̄ⱼ(s, g) by target weights, (…, E, B).
        target_next_v: v̄ⱼ(s', g) by target weights, (…, E, B).
        reward: r, (…, B).
        mask: m, 0 where s' must not be bootstrapped from, else 1, (…, B).
        discount: γ per transition s → s', in [0, 1).
        expectile: τ in (0, 1).
        weight: of each row of the batch, ≥ 0, (…, B); None for 1.

    Returns:
        Σ over members of the mean over the batch, (…,).
    """
    target_v, target_next_v = target_v.detach(), target_next_v.detach()
    advantage = reward + discount * mask * target_next_v.amin(-2) - target_v.mean(-2)
    omega = expectile_weight(advantage, expectile)
    if weight is not None:
        omega = omega * weight
    target = reward.unsqueeze(-2) + (discount * mask).unsqueeze(-2) * target_next_v
    return (omega.unsqueeze(-2) * (target - v).square()).mean(-1).sum(-1)


def awr_loss(log_prob: Tensor, advantage: Tensor, alpha: float) -> Tensor:
    """Advantage-weighted regression, -mean min(exp(α·A), 100)·log π (arXiv:1910.00177; clip of HIQL's code).

    Args:
        log_prob: log π of what is cloned, nats, (…, B).
        advantage: A, (…, B); no gradient passes through it.
        alpha: α, inverse temperature, ≥ 0; 0 is plain cloning.

    Returns:
        (…,).
    """
    return -(exponential_weight(advantage, alpha) * log_prob).mean(-1)


def ddpg_bc_loss(q: Tensor, log_prob: Tensor, q_scale: Tensor, alpha: float) -> Tensor:
    """Deterministic policy gradient with cloning, -mean Q / (q_scale + 1e-6) - α·mean log π (arXiv:2406.09329; code).

    Args:
        q: Q(s, π(s)), (…, B), with a gradient for the policy.
        log_prob: log π of the data's actions, nats, (…, B).
        q_scale: mean of |Q| over the global batch, without gradient, (…,).
        alpha: α, weight of cloning, ≥ 0.

    Returns:
        (…,).
    """
    return -q.mean(-1) / (q_scale + 1e-6) - alpha * log_prob.mean(-1)
