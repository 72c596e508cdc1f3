"""IQL — Kostrikov, Nair & Levine 2021, Offline Reinforcement Learning with Implicit Q-Learning (arXiv:2110.06169).

Value: an upper expectile of min Q̄(s, a) over the actions of the data.  Critics: squared error to r + γ·V(s').
Actor: advantage-weighted regression, weight min(exp(β·(min Q̄ - V)), 100).

Two orders of the steps are in use, and ``update_order`` names them:
"corl" (CORL's code, the default): V, Q, actor; target and weight both use V as it was before its own step.
"original" (the authors' JAX code): V, actor, Q; target and weight both use V after its step.
Differs from both: the learning rate of the actor decays over ``lr_decay_steps``, stored with the run.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from offpolicy.data.views import Transitions
from offpolicy.errors import UsageError, check_range, check_widths
from offpolicy.losses.td import expectile_loss, exponential_weight, squared_td, td_target
from offpolicy.nn.critics import EnsembleCritic, ValueNetwork
from offpolicy.nn.policies import DeterministicPolicy, GaussianPolicy
from offpolicy.training.offline import Metrics, OfflineModule, Rate, Sizes


class IQL(OfflineModule):
    """Implicit Q-learning.

    Args:
        expectile: τ of the value regression, in (0, 1); 0.7 for locomotion, 0.9 for AntMaze.
        beta: inverse temperature of the actor's weights, ≥ 0; 0 is plain cloning.
        weight_max: cap on the actor's weights, > 0.
        discount: γ per environment step, in [0, 1).
        tau: Polyak rate of the target critics, in [0, 1].
        deterministic: regress actions by squared error instead of a Gaussian likelihood.
        actor_dropout: probability of zeroing a hidden unit of the actor in training, in [0, 1).
        update_order: "corl" or "original", see the top of this file.
        num_critics: critics in the ensemble, ≥ 1.
        hidden_dims: widths of the hidden layers of all networks.
        actor_lr: learning rate of the actor at the start.
        critic_lr: learning rate of the critics.
        value_lr: learning rate of the state value.
        lr_decay_steps: updates over which the actor's rate falls to 0 along a cosine; None takes ``max_steps`` of the
            run that started, 0 keeps the rate constant.
        batch_size: transitions per update over all processes.
        normalize_obs: standardise observations.
        reward_transform: "r", an affine form such as "r-1", or "return_range".
        max_grad_norm: limit on each network's gradient norm, > 0; None for no limit.
    """

    compiled = ("advantage", "value_loss", "critic_loss", "actor_loss")

    def __init__(
        self,
        *,
        expectile: float = 0.7,
        beta: float = 3.0,
        weight_max: float = 100.0,
        discount: float = 0.99,
        tau: float = 0.005,
        deterministic: bool = False,
        actor_dropout: float = 0.0,
        update_order: Literal["corl", "original"] = "corl",
        num_critics: int = 2,
        hidden_dims: tuple[int, ...] = (256, 256),
        actor_lr: float = 3e-4,
        critic_lr: float = 3e-4,
        value_lr: float = 3e-4,
        lr_decay_steps: int | None = None,
        batch_size: int = 256,
        normalize_obs: bool = True,
        reward_transform: str = "r",
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__()
        check_range("expectile", expectile, 0.0, 1.0, lower_open=True, upper_open=True)
        check_range("beta", beta, 0.0)
        check_range("weight_max", weight_max, 0.0, lower_open=True, infinite=True)
        check_range("discount", discount, 0.0, 1.0, upper_open=True)
        check_range("tau", tau, 0.0, 1.0)
        check_range("actor_dropout", actor_dropout, 0.0, 1.0, upper_open=True)
        check_range("actor_lr", actor_lr, 0.0)
        check_range("num_critics", num_critics, 1)
        if lr_decay_steps is not None:
            check_range("lr_decay_steps", lr_decay_steps, 0)
        if update_order not in ("corl", "original"):
            raise UsageError(f"`update_order` is {update_order!r}; expected 'corl' or 'original'.")
        check_widths("hidden_dims", hidden_dims)
        self.save_hyperparameters()

    def build(self, sizes: Sizes) -> None:
        h = self.hparams
        policy: Any = DeterministicPolicy if h.deterministic else GaussianPolicy
        self.actor = policy(sizes.obs_dim, sizes.action_dim, h.hidden_dims, dropout=h.actor_dropout)
        self.critic = EnsembleCritic(sizes.obs_dim, sizes.action_dim, h.num_critics, h.hidden_dims)
        self.target_critic = self.target_of(self.critic)
        self.value = ValueNetwork(sizes.obs_dim, h.hidden_dims)

    def learning_rates(self) -> dict[str, Rate]:
        h = self.hparams
        return {"value": h.value_lr, "critic": h.critic_lr, "actor": self.decayed_actor_lr}

    def decayed_actor_lr(self, step: int) -> float:
        """Cosine from ``actor_lr`` at the first update to 0 after ``decay_steps``."""
        if not self.decay_steps:
            return self.hparams.actor_lr
        progress = min((step - 1) / self.decay_steps, 1.0)
        return 0.5 * (1.0 + math.cos(math.pi * progress)) * self.hparams.actor_lr

    def advantage(self, batch: Transitions) -> tuple[Tensor, Tensor]:
        """min Q̄(s, a) - V(s), (…, B), with a gradient for V; and V(s) detached."""
        with torch.no_grad():
            target_q = self.target_critic(batch.obs, batch.action).amin(-2)
        v = self.value(batch.obs)
        return target_q - v, v.detach()

    def value_loss(self, batch: Transitions, advantage: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Metrics]:
        """``advantage`` is what :meth:`advantage` gave, if it is at hand."""
        adv, v = self.advantage(batch) if advantage is None else advantage
        loss = expectile_loss(adv, self.hparams.expectile).mean(-1)
        return loss, {"value_loss": loss.detach(), "v_mean": v.mean(-1)}

    def next_value(self, batch: Transitions) -> Tensor:
        with torch.no_grad():
            return self.value(batch.next_obs)

    def critic_loss(self, batch: Transitions, next_v: Tensor) -> tuple[Tensor, Metrics]:
        """``next_v (…, B)`` is V(s') before or after the value step, by ``update_order``."""
        target_q = td_target(batch.reward, batch.terminated, next_v, self.hparams.discount)
        q = self.critic(batch.obs, batch.action)
        loss = 0.5 * squared_td(q, target_q)
        return loss, {"critic_loss": loss.detach(), "q_mean": q.detach().mean((-2, -1))}

    def actor_loss(self, batch: Transitions, adv: Tensor) -> tuple[Tensor, Metrics]:
        """``adv (…, B)`` is the advantage before or after the value step, by ``update_order``."""
        weight = exponential_weight(adv, self.hparams.beta, self.hparams.weight_max)
        if self.hparams.deterministic:
            error = (self.actor(batch.obs) - batch.action).square().sum(-1)
        else:
            error = -self.actor.log_prob(batch.obs, batch.action)
        loss = (weight * error).mean(-1)
        return loss, {"actor_loss": loss.detach(), "weight_mean": weight.mean(-1)}

    def update(self, batch: Transitions, step: int) -> Metrics:
        return self.update_corl(batch) if self.hparams.update_order == "corl" else self.update_original(batch)

    def update_corl(self, batch: Transitions) -> Metrics:
        next_v = self.next_value(batch)
        advantage = self.advantage(batch)
        loss, metrics = self.value_loss(batch, advantage)
        self.step("value", loss)
        loss, critic_metrics = self.critic_loss(batch, next_v)
        self.step("critic", loss)
        self.track("critic", self.hparams.tau)
        loss, actor_metrics = self.actor_loss(batch, advantage[0].detach())
        self.step("actor", loss)
        return metrics | critic_metrics | actor_metrics

    def update_original(self, batch: Transitions) -> Metrics:
        loss, metrics = self.value_loss(batch)
        self.step("value", loss)
        with torch.no_grad():
            adv, _ = self.advantage(batch)
        loss, actor_metrics = self.actor_loss(batch, adv)
        self.step("actor", loss)
        loss, critic_metrics = self.critic_loss(batch, self.next_value(batch))
        self.step("critic", loss)
        self.track("critic", self.hparams.tau)
        return metrics | actor_metrics | critic_metrics

    def policy(self, obs: Tensor) -> Tensor:
        return self.actor(obs)

    def sample_action(self, obs: Tensor, noise: Tensor) -> Tensor:
        return super().sample_action(obs, noise) if self.hparams.deterministic else self.actor.sample(obs, noise)

    def log_density(self, obs: Tensor, action: Tensor) -> Tensor:
        if self.hparams.deterministic:
            return super().log_density(obs, action)
        return self.actor.log_prob(obs, action)
