"""TD3+BC — Fujimoto & Gu 2021, A Minimalist Approach to Offline Reinforcement Learning (arXiv:2106.06860).

Critic: twin TD error with smoothed target actions (TD3, arXiv:1802.09477).
Actor, every second update: -λ·Q₁(s, π(s)) + (π(s) - a)², with λ = α / mean|Q₁(s, π(s))|.
Both terms are means, the second over batch and action dimensions, as in the authors' code.

With `final_alpha` the weight of cloning, 1/α, falls exponentially, as Beeson & Montana 2022 (arXiv:2211.11802) let it
fall while a trained policy goes on online; a larger constant `alpha` on a trained run is their offline refinement.
Unverified: the rate, and whether their critic stands still in the refinement; here it goes on learning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_modules.td3 import TD3
from offpolicy.data.views import Transitions
from offpolicy.errors import UsageError, check_range
from offpolicy.losses.td import mean_squared_action
from offpolicy.training.offline import Metrics, Sizes


class TD3BC(TD3):
    """TD3 with a behaviour-cloning term.

    Args:
        alpha: α; larger trusts Q more, 0 is plain cloning. Range ≥ 0, paper 2.5.
        discount: γ per environment step, in [0, 1).
        tau: Polyak rate of the targets, in [0, 1].
        policy_noise: standard deviation of the target action's noise, in units of the scaled action (±1), ≥ 0.
        noise_clip: bound on that noise, ≥ 0.
        policy_freq: critic updates per actor and target update, ≥ 1.
        num_critics: critics in the ensemble, ≥ 1; the target takes their minimum.
        hidden_dims: widths of the hidden layers of actor and critics.
        actor_lr: Adam's learning rate of the actor.
        critic_lr: Adam's learning rate of the critics.
        batch_size: transitions per update over all processes.
        normalize_obs: standardise observations: (s - mean) / (std + 1e-3).
        reward_transform: "r", an affine form such as "0.1r" or "r-1", or "return_range".
        max_grad_norm: limit on each network's gradient norm, > 0; None for no limit.
        final_alpha: α at the end, > 0, which it goes to from ``alpha`` > 0 by the same factor in every update; None for
            a constant one.
        alpha_steps: updates until then, counted from the first one that was asked for ``final_alpha``, ≥ 1; None for
            100,000.
    """

    def __init__(
        self,
        *,
        alpha: float = 2.5,
        discount: float = 0.99,
        tau: float = 0.005,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        policy_freq: int = 2,
        num_critics: int = 2,
        hidden_dims: tuple[int, ...] = (256, 256),
        actor_lr: float = 3e-4,
        critic_lr: float = 3e-4,
        batch_size: int = 256,
        normalize_obs: bool = True,
        reward_transform: str = "r",
        max_grad_norm: float | None = None,
        final_alpha: float | None = None,
        alpha_steps: int | None = None,
    ) -> None:
        check_range("alpha", alpha, 0.0)
        if final_alpha is not None:
            check_range("final_alpha", final_alpha, 0.0, lower_open=True)
            if alpha == 0.0:
                raise UsageError(
                    f"`final_alpha` is {final_alpha}, and `alpha` is 0.0, which no factor moves; expected `alpha` > 0. "
                    "Pass a larger --model.alpha, or leave final_alpha out."
                )
        if alpha_steps is not None:
            check_range("alpha_steps", alpha_steps, 1)
            if final_alpha is None:
                raise UsageError(
                    f"`alpha_steps` is {alpha_steps}, and `alpha` stays what it is without `final_alpha`; expected "
                    "both or none. Add --model.final_alpha, or leave alpha_steps out."
                )
        super().__init__(
            discount=discount,
            tau=tau,
            policy_noise=policy_noise,
            noise_clip=noise_clip,
            policy_freq=policy_freq,
            num_critics=num_critics,
            hidden_dims=hidden_dims,
            actor_lr=actor_lr,
            critic_lr=critic_lr,
            batch_size=batch_size,
            normalize_obs=normalize_obs,
            reward_transform=reward_transform,
            max_grad_norm=max_grad_norm,
        )

    def build(self, sizes: Sizes) -> None:
        super().build(sizes)
        if self.hparams.final_alpha is not None:
            self.register_buffer("alpha_updates", torch.zeros((), dtype=torch.int64))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.hparams.final_alpha is None:
            checkpoint["state_dict"].pop("alpha_updates", None)
        else:  # a run that had a constant α begins to change it
            checkpoint["state_dict"].setdefault("alpha_updates", torch.zeros((), dtype=torch.int64, device="cpu"))

    def alpha(self, like: Tensor) -> Tensor | float:
        """α of the update at hand; a tensor () of the type of ``like`` where it changes."""
        h = self.hparams
        if h.final_alpha is None:
            return h.alpha
        share = (self.alpha_updates.to(like.dtype) / (h.alpha_steps or 100_000)).clamp(max=1.0)
        return h.alpha * (h.final_alpha / h.alpha) ** share

    phase = TD3.phase  # a class with an `update` of its own says which phases it has

    def update(self, batch: Transitions, step: int) -> Metrics:
        metrics = super().update(batch, step)
        if self.hparams.final_alpha is not None:
            self.alpha_updates += 1
        return metrics

    def actor_loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        action = self.actor(batch.obs)
        q = self.critic.member(batch.obs, action)
        alpha = self.alpha(q)
        lambda_ = alpha / self.batch_mean(q.abs())
        bc_loss = mean_squared_action(action, batch.action)
        loss = bc_loss - lambda_ * q.mean(-1)
        metrics = {"actor_loss": loss.detach(), "bc_loss": bc_loss.detach()}
        return loss, metrics | ({"alpha": alpha.expand_as(loss)} if isinstance(alpha, Tensor) else {})
