"""TD3 — Fujimoto, van Hoof & Meger 2018, Addressing Function Approximation Error in Actor-Critic Methods
(arXiv:1802.09477).

Critic: Σᵢ mean (Qᵢ(s, a) - y)², y = r + γ·minᵢ Q̄ᵢ(s', clip(π̄(s') + clip(σ·ε, ±c), ±1)).
Actor and targets, every second update: -mean Q₁(s, π(s)).
Settings are those of the authors' code; the paper's runs had rates of 1e-3, layers of 400 and 300, and batches of 100.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offpolicy.data.views import Transitions
from offpolicy.errors import check_range, check_widths
from offpolicy.losses.td import smoothed_action, squared_td, td_target
from offpolicy.nn.critics import EnsembleCritic
from offpolicy.nn.policies import DeterministicPolicy
from offpolicy.training.offline import Draw, Metrics, OfflineModule, Rate, Sizes


class TD3(OfflineModule):
    """Twin critics, delayed actor, smoothed target actions.

    Args:
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
    """

    compiled = ("critic_loss", "actor_loss")

    def __init__(
        self,
        *,
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
        normalize_obs: bool = False,
        reward_transform: str = "r",
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__()
        check_range("discount", discount, 0.0, 1.0, upper_open=True)
        check_range("tau", tau, 0.0, 1.0)
        check_range("policy_noise", policy_noise, 0.0)
        check_range("noise_clip", noise_clip, 0.0, infinite=True)
        check_range("policy_freq", policy_freq, 1)
        check_range("num_critics", num_critics, 1)
        check_widths("hidden_dims", hidden_dims)
        self.save_hyperparameters()

    def build(self, sizes: Sizes) -> None:
        h = self.hparams
        self.actor = DeterministicPolicy(sizes.obs_dim, sizes.action_dim, h.hidden_dims)
        self.critic = EnsembleCritic(sizes.obs_dim, sizes.action_dim, h.num_critics, h.hidden_dims)
        self.target_actor, self.target_critic = self.target_of(self.actor), self.target_of(self.critic)

    def learning_rates(self) -> dict[str, Rate]:
        return {"critic": self.hparams.critic_lr, "actor": self.hparams.actor_lr}

    def draws(self) -> dict[str, Draw]:
        return {"target": Draw((self.sizes.action_dim,))}

    def critic_loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        h = self.hparams
        with torch.no_grad():
            next_action = self.target_actor(batch.next_obs)
            next_action = smoothed_action(next_action, batch.noise.target, h.policy_noise, h.noise_clip)
            next_q = self.target_critic(batch.next_obs, next_action).amin(-2)
            target_q = td_target(batch.reward, batch.terminated, next_q, h.discount)
        q = self.critic(batch.obs, batch.action)
        loss = squared_td(q, target_q)
        return loss, {"critic_loss": loss.detach(), "q_mean": q.detach().mean((-2, -1))}

    def actor_loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        loss = -self.critic.member(batch.obs, self.actor(batch.obs)).mean(-1)
        return loss, {"actor_loss": loss.detach()}

    def phase(self, step: int) -> bool:
        """Whether actor and targets move."""
        return step % self.hparams.policy_freq == 0

    def update(self, batch: Transitions, step: int) -> Metrics:
        loss, metrics = self.critic_loss(batch)
        self.step("critic", loss)
        if step % self.hparams.policy_freq == 0:
            loss, actor_metrics = self.actor_loss(batch)
            self.step("actor", loss)
            self.track("critic", self.hparams.tau)
            self.track("actor", self.hparams.tau)
            metrics |= actor_metrics
        return metrics

    def policy(self, obs: Tensor) -> Tensor:
        return self.actor(obs)
