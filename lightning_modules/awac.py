"""AWAC — Nair, Gupta, Dalal & Levine 2020, Accelerating Online RL with Offline Datasets (arXiv:2006.09359).

Critic: Σᵢ mean (Qᵢ(s, a) - y)², y = r + γ·min Q̄(s', a'), a' ~ π(s').
Actor, with the critics after their step: -mean w·log π(a|s), w = min(exp(A / λ), 100),
        A = min Q(s, a) - min Q(s, ã), ã ~ π(s).
π is a normal whose mean is not squashed; its samples are clamped to ±1 and its log-density ignores the clamp.

| detail             | paper                | authors' code; CORL's if other         | here             |
|--------------------|----------------------|----------------------------------------|------------------|
| weight             | exp(A / λ) / Z       | softmax in the batch, times B; cap 100 | cap 100          |
| critics in A       | of the iteration     | before their step; after it            | after their step |
| V(s)               | mean over π          | one sample, K, or the mode; one sample | one sample       |
| decay of the actor | -                    | `policy_weight_decay`; 0               | 0                |
| training           | offline, then online | the same; offline                      | offline          |
"""

from __future__ import annotations

import torch
from torch import Tensor

from offpolicy.data.views import Transitions
from offpolicy.errors import check_range, check_widths
from offpolicy.losses.td import exponential_weight, squared_td, td_target
from offpolicy.nn.critics import EnsembleCritic
from offpolicy.nn.policies import GaussianPolicy, normal_log_prob
from offpolicy.training.offline import Draw, Metrics, OfflineModule, Rate, Sizes


class AWAC(OfflineModule):
    """Advantage-weighted actor-critic.

    Args:
        lambda_: λ, > 0; larger weighs all actions of the data alike (cloning). 1/3 for locomotion, 0.1 elsewhere.
        weight_max: cap on the actor's weights, > 0.
        discount: γ per environment step, in [0, 1).
        tau: Polyak rate of the target critics, in [0, 1].
        num_critics: critics in the ensemble, ≥ 1; their minimum is used everywhere.
        hidden_dims: widths of the hidden layers of actor and critics.
        actor_lr: Adam's learning rate of the actor.
        critic_lr: Adam's learning rate of the critics.
        batch_size: transitions per update over all processes.
        normalize_obs: standardise observations: (s - mean) / (std + 1e-3).
        reward_transform: "r", an affine form such as "0.1r" or "r-1", or "return_range".
        max_grad_norm: limit on each network's gradient norm, > 0; None for no limit.
    """

    compiled = ("critic_loss", "actor_loss")

    def __init__(
        self,
        *,
        lambda_: float = 1.0 / 3.0,
        weight_max: float = 100.0,
        discount: float = 0.99,
        tau: float = 0.005,
        num_critics: int = 2,
        hidden_dims: tuple[int, ...] = (256, 256, 256),
        actor_lr: float = 3e-4,
        critic_lr: float = 3e-4,
        batch_size: int = 256,
        normalize_obs: bool = True,
        reward_transform: str = "r",
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__()
        check_range("lambda_", lambda_, 0.0, lower_open=True)
        check_range("weight_max", weight_max, 0.0, lower_open=True, infinite=True)
        check_range("discount", discount, 0.0, 1.0, upper_open=True)
        check_range("tau", tau, 0.0, 1.0)
        check_range("num_critics", num_critics, 1)
        check_widths("hidden_dims", hidden_dims)
        self.save_hyperparameters()

    def build(self, sizes: Sizes) -> None:
        h = self.hparams
        self.actor = GaussianPolicy(sizes.obs_dim, sizes.action_dim, h.hidden_dims, tanh_mean=False)
        self.critic = EnsembleCritic(sizes.obs_dim, sizes.action_dim, h.num_critics, h.hidden_dims)
        self.target_critic = self.target_of(self.critic)

    def learning_rates(self) -> dict[str, Rate]:
        return {"critic": self.hparams.critic_lr, "actor": self.hparams.actor_lr}

    def draws(self) -> dict[str, Draw]:
        return {"target": Draw((self.sizes.action_dim,)), "policy": Draw((self.sizes.action_dim,))}

    def critic_loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            next_action = self.actor.sample(batch.next_obs, batch.noise.target).clamp(-1.0, 1.0)
            next_q = self.target_critic(batch.next_obs, next_action).amin(-2)
            target_q = td_target(batch.reward, batch.terminated, next_q, self.hparams.discount)
        q = self.critic(batch.obs, batch.action)
        loss = squared_td(q, target_q)
        return loss, {"critic_loss": loss.detach(), "q_mean": q.detach().mean((-2, -1))}

    def actor_loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        mean, log_std = self.actor.mean(batch.obs), self.actor.clamped_log_std()
        with torch.no_grad():
            sampled = torch.addcmul(mean, log_std.exp(), batch.noise.policy).clamp(-1.0, 1.0)
            both = torch.cat((batch.action, sampled), -2)  # one pass over the critics for Q(s, a) and Q(s, ã)
            q, v = self.critic(torch.cat((batch.obs, batch.obs), -2), both).amin(-2).chunk(2, -1)
        weight = exponential_weight(q - v, 1.0 / self.hparams.lambda_, self.hparams.weight_max)
        loss = -(weight * normal_log_prob(batch.action, mean, log_std)).mean(-1)
        return loss, {"actor_loss": loss.detach(), "weight_mean": weight.mean(-1)}

    def update(self, batch: Transitions, step: int) -> Metrics:
        loss, metrics = self.critic_loss(batch)
        self.step("critic", loss)
        loss, actor_metrics = self.actor_loss(batch)
        self.step("actor", loss)
        self.track("critic", self.hparams.tau)
        return metrics | actor_metrics

    def policy(self, obs: Tensor) -> Tensor:
        return self.actor(obs).clamp(-1.0, 1.0)

    def sample_action(self, obs: Tensor, noise: Tensor) -> Tensor:
        return self.actor.sample(obs, noise)

    def log_density(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.actor.log_prob(obs, action)
