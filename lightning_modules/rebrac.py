"""ReBRAC — Tarasov et al. 2023, Revisiting the Minimalist Approach to Offline RL (arXiv:2305.09836).

TD3+BC with the cloning penalty in the target too, a weight for each, LayerNorm in the critics and deeper networks.

  Critic: Σᵢ mean (Qᵢ(s, a) - y)², y = r + γ·(min Q̄(s', a') - β₂·‖a' - â'‖²), a' the smoothed target action and â' the
          action of the data at s'.
  Actor, at the first update and every second one after it: mean [β₁·‖π(s) - a‖² - λ·min Q(s, π(s))],
          λ = 1 / mean|min Q(s, π(s))|; then the targets.
Squared norms are sums over action dimensions.

| detail              | paper          | authors' code                      | here                     |
|---------------------|----------------|------------------------------------|--------------------------|
| first actor step    | -              | first update (index 0)             | the same                 |
| actor's target      | Polyak         | from the actor before its step     | the same                 |
| critics' target     | Polyak         | from the critics after their step  | the same                 |
| λ                   | as TD3+BC      | from the minimum of Q; optional    | the same; `normalize_q`  |
| LayerNorm           | in the critics | after the activation, epsilon 1e-6 | the same                 |
| count for the delay | -              | anew every 1,000 updates           | runs on; equal for 2     |
| â' at a cut         | -              | rows at a time limit are left out  | the cut row's own action |
"""

from __future__ import annotations

import torch
from torch import Tensor

from offpolicy.data.views import Transitions, TransitionView
from offpolicy.errors import check_range, check_widths
from offpolicy.losses.td import smoothed_action, squared_td, td_target
from offpolicy.nn.critics import EnsembleCritic
from offpolicy.nn.policies import DeterministicPolicy
from offpolicy.nn.stacked import Init
from offpolicy.training.offline import Draw, Metrics, OfflineModule, Rate, Sizes

HIDDEN = Init("default", bias=0.1)  # this and the bounds of the last layers: authors' code, after EDAC's


class ReBRAC(OfflineModule):
    """TD3 with decoupled behaviour penalties of actor and critic.

    Args:
        actor_beta: β₁, weight of the cloning penalty of the actor, ≥ 0. Per task; see the recipes.
        critic_beta: β₂, weight of the penalty in the target, ≥ 0.
        normalize_q: divide Q in the actor's loss by its mean magnitude.
        layer_norm: normalise the critics' hidden layers.
        discount: γ per environment step, in [0, 1); 0.999 for AntMaze.
        tau: Polyak rate of the targets, in [0, 1].
        policy_noise: standard deviation of the target action's noise, in units of the scaled action (±1), ≥ 0.
        noise_clip: bound on that noise, ≥ 0.
        policy_freq: critic updates per actor and target update, ≥ 1.
        num_critics: critics in the ensemble, ≥ 1.
        hidden_dims: widths of the hidden layers of actor and critics.
        actor_lr: Adam's learning rate of the actor.
        critic_lr: Adam's learning rate of the critics.
        batch_size: transitions per update over all processes; 1024 for locomotion, 256 elsewhere.
        normalize_obs: standardise observations: (s - mean) / (std + 1e-3); off in the paper.
        reward_transform: "r", an affine form such as "0.1r" or "100r", or "return_range".
        max_grad_norm: limit on each network's gradient norm, > 0; None for no limit.
    """

    compiled = ("critic_loss", "actor_loss")
    view = TransitionView(next_action=True)

    def __init__(
        self,
        *,
        actor_beta: float = 0.01,
        critic_beta: float = 0.01,
        normalize_q: bool = True,
        layer_norm: bool = True,
        discount: float = 0.99,
        tau: float = 0.005,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        policy_freq: int = 2,
        num_critics: int = 2,
        hidden_dims: tuple[int, ...] = (256, 256, 256),
        actor_lr: float = 1e-3,
        critic_lr: float = 1e-3,
        batch_size: int = 1024,
        normalize_obs: bool = False,
        reward_transform: str = "r",
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__()
        check_range("actor_beta", actor_beta, 0.0)
        check_range("critic_beta", critic_beta, 0.0)
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
        self.actor = DeterministicPolicy(
            sizes.obs_dim, sizes.action_dim, h.hidden_dims, hidden_init=HIDDEN, final_init=Init("uniform", 1e-3)
        )
        self.critic = EnsembleCritic(
            sizes.obs_dim,
            sizes.action_dim,
            h.num_critics,
            h.hidden_dims,
            layer_norm="after" if h.layer_norm else None,
            layer_norm_eps=1e-6,
            hidden_init=HIDDEN,
            final_init=Init("uniform", 3e-3),
        )
        self.target_actor, self.target_critic = self.target_of(self.actor), self.target_of(self.critic)

    def learning_rates(self) -> dict[str, Rate]:
        return {"critic": self.hparams.critic_lr, "actor": self.hparams.actor_lr}

    def draws(self) -> dict[str, Draw]:
        return {"target": Draw((self.sizes.action_dim,))}

    def critic_loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        h = self.hparams
        assert batch.next_action is not None  # the view asks for it
        with torch.no_grad():
            next_action = self.target_actor(batch.next_obs)
            next_action = smoothed_action(next_action, batch.noise.target, h.policy_noise, h.noise_clip)
            penalty = (next_action - batch.next_action).square().sum(-1)
            next_q = self.target_critic(batch.next_obs, next_action).amin(-2) - h.critic_beta * penalty
            target_q = td_target(batch.reward, batch.terminated, next_q, h.discount)
        q = self.critic(batch.obs, batch.action)
        loss = squared_td(q, target_q)
        return loss, {"critic_loss": loss.detach(), "q_mean": q.detach().mean((-2, -1))}

    def actor_loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        action = self.actor(batch.obs)
        q = self.critic(batch.obs, action).amin(-2)
        lambda_ = 1.0 / self.batch_mean(q.abs()) if self.hparams.normalize_q else 1.0
        bc_loss = (action - batch.action).square().sum(-1).mean(-1)
        loss = self.hparams.actor_beta * bc_loss - lambda_ * q.mean(-1)
        return loss, {"actor_loss": loss.detach(), "bc_loss": bc_loss.detach()}

    def phase(self, step: int) -> bool:
        """Whether actor and targets move."""
        return (step - 1) % self.hparams.policy_freq == 0

    def update(self, batch: Transitions, step: int) -> Metrics:
        loss, metrics = self.critic_loss(batch)
        self.step("critic", loss)
        if (step - 1) % self.hparams.policy_freq == 0:
            loss, actor_metrics = self.actor_loss(batch)
            self.track("actor", self.hparams.tau)  # before the actor's own step, as the authors do
            self.step("actor", loss)
            self.track("critic", self.hparams.tau)
            metrics |= actor_metrics
        return metrics

    def policy(self, obs: Tensor) -> Tensor:
        return self.actor(obs)
