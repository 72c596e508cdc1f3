"""GCIQL — goal-conditioned implicit Q-learning, as OGBench's reference agent has it (arXiv:2410.20092, code).

Value: the τ-expectile of min Q̄(s, g, a) over the actions of the data.  Critics: squared error to r + γ·m·V(s', g), with
V as it is, no target copy.  Actor, one of two:

  "ddpgbc" (arXiv:2406.09329): -mean q / mean|q| - α·mean log π(a|s, g), q = min Q(s, g, clip(π(s, g), -1, 1));
  "awr": -mean min(exp(α·A), 100)·log π(a|s, g), A = min Q(s, g, a) - V(s, g).

All weights move in one step on the sum of the three losses; the actor's gradient passes through the critics but does
not move them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call

from offpolicy.data.goals import GoalMix, GoalTransitions, GoalView
from offpolicy.errors import UsageError, check_range, check_widths
from offpolicy.losses.goal import awr_loss, ddpg_bc_loss
from offpolicy.losses.td import expectile_loss, squared_td
from offpolicy.nn.goals import UnitGaussian, Values, unit_log_prob
from offpolicy.training.goals import GoalModule, Perturb
from offpolicy.training.offline import Metrics, Sizes


class GCIQL(GoalModule):
    """Goal-conditioned implicit Q-learning.

    Args:
        alpha: "ddpgbc": weight of cloning against Q, ≥ 0, 0.003 to 1 by task; "awr": inverse temperature, ≥ 0.
        actor_loss_kind: "ddpgbc" or "awr", see the top of this file.
        expectile: τ of the value regression, in (0, 1).
        discount: γ per environment step, in [0, 1); also of the geometric law of goals.
        tau: Polyak rate of the target critics, in [0, 1].
        value_p_current: probability that a goal of values and critics is the state itself.
        value_p_trajectory: probability that it is a later state of the episode.
        value_p_random: probability that it is any state; the three sum to 1.
        value_geometric: later states are Geometric(1 - γ) steps ahead, else uniform over the rest of the episode.
        actor_p_current: as ``value_p_current``, for goals of the policy.
        actor_p_trajectory: as ``value_p_trajectory``, for goals of the policy.
        actor_p_random: as ``value_p_random``, for goals of the policy.
        actor_geometric: as ``value_geometric``, for goals of the policy.
        hidden_dims: widths of the hidden layers of all networks.
        lr: Adam's learning rate.
        batch_size: transitions per update over all processes.
        normalize_obs: standardise observations; off in published results.
        max_grad_norm: limit on the norm of all gradients together, > 0; None for no limit.
    """

    losses = compiled = ("value_loss", "critic_loss", "actor_loss")
    targets = ("critic",)

    def __init__(
        self,
        *,
        alpha: float = 0.3,
        actor_loss_kind: Literal["ddpgbc", "awr"] = "ddpgbc",
        expectile: float = 0.9,
        discount: float = 0.99,
        tau: float = 0.005,
        value_p_current: float = 0.2,
        value_p_trajectory: float = 0.5,
        value_p_random: float = 0.3,
        value_geometric: bool = True,
        actor_p_current: float = 0.0,
        actor_p_trajectory: float = 1.0,
        actor_p_random: float = 0.0,
        actor_geometric: bool = False,
        hidden_dims: tuple[int, ...] = (512, 512, 512),
        lr: float = 3e-4,
        batch_size: int = 1024,
        normalize_obs: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__()
        check_range("alpha", alpha, 0.0)
        check_range("expectile", expectile, 0.0, 1.0, lower_open=True, upper_open=True)
        check_range("tau", tau, 0.0, 1.0)
        if actor_loss_kind not in ("ddpgbc", "awr"):
            raise UsageError(f"`actor_loss_kind` is {actor_loss_kind!r}; expected 'ddpgbc' or 'awr'.")
        check_widths("hidden_dims", hidden_dims)
        self.save_hyperparameters()
        self.view = GoalView(
            discount=discount,
            value=GoalMix(value_p_current, value_p_trajectory, value_p_random, value_geometric),
            actor=GoalMix(actor_p_current, actor_p_trajectory, actor_p_random, actor_geometric),
        )

    def build(self, sizes: Sizes) -> None:
        h = self.hparams
        self.value = Values(2 * sizes.obs_dim, h.hidden_dims, num_values=1)
        self.critic = Values(2 * sizes.obs_dim + sizes.action_dim, h.hidden_dims)
        self.target_critic = self.target_of(self.critic)
        self.actor = UnitGaussian(2 * sizes.obs_dim, sizes.action_dim, h.hidden_dims)

    def v(self, obs: Tensor, goal: Tensor) -> Tensor:
        """V(s, g), (…, B)."""
        return self.value(obs, goal).squeeze(-2)

    def value_loss(self, batch: GoalTransitions) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            target_q = self.target_critic(batch.obs, batch.value_goal, batch.action).amin(-2)
        v = self.v(batch.obs, batch.value_goal)
        loss = expectile_loss(target_q - v, self.hparams.expectile).mean(-1)
        return loss, {"value_loss": loss.detach(), "v_mean": v.detach().mean(-1)}

    def critic_loss(self, batch: GoalTransitions) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            next_v = self.v(batch.next_obs, batch.value_goal)
        target_q = batch.value_reward + self.hparams.discount * batch.value_mask * next_v
        q = self.critic(batch.obs, batch.value_goal, batch.action)
        loss = squared_td(q, target_q)
        return loss, {"critic_loss": loss.detach(), "q_mean": q.detach().mean((-2, -1))}

    def actor_loss(self, batch: GoalTransitions) -> tuple[Tensor, Metrics]:
        mean = self.actor(batch.obs, batch.actor_goal)
        log_prob = unit_log_prob(mean, batch.action)
        if self.hparams.actor_loss_kind == "ddpgbc":
            q = self.frozen_q(batch.obs, batch.actor_goal, mean.clamp(-1.0, 1.0))
            loss = ddpg_bc_loss(q, log_prob, self.batch_mean(q.abs()), self.hparams.alpha)
            return loss, {"actor_loss": loss.detach(), "actor_q_mean": q.detach().mean(-1)}
        with torch.no_grad():
            q = self.critic(batch.obs, batch.actor_goal, batch.action).amin(-2)
            advantage = q - self.v(batch.obs, batch.actor_goal)
        loss = awr_loss(log_prob, advantage, self.hparams.alpha)
        return loss, {"actor_loss": loss.detach(), "advantage": advantage.mean(-1)}

    def frozen_q(self, obs: Tensor, goal: Tensor, action: Tensor) -> Tensor:
        """min Q(s, g, a), (…, B), with a gradient for the action but none for the critics."""
        weights = {name: p.detach() for name, p in self.critic.named_parameters()}
        return functional_call(self.critic, weights, (obs, goal, action)).amin(-2)

    def goal_policy(self, obs: Tensor, goal: Tensor, perturb: Perturb) -> Tensor:
        return perturb(self.actor(obs, goal))

    def values(self, obs: Tensor, goal: Tensor) -> dict[str, Tensor]:
        return {"value": self.v(obs, goal)}
