"""GCIVL — goal-conditioned implicit value learning, as OGBench's reference agent has it (arXiv:2410.20092, code).

The flat relative of HIQL: one value V(s, g) by expectile regression without actions, one policy by advantage-weighted
regression with A = V(s', g) - V(s, g). All weights move in one step on the sum of both losses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offpolicy.data.goals import GoalMix, GoalTransitions, GoalView
from offpolicy.errors import check_range, check_widths
from offpolicy.losses.goal import awr_loss, implicit_value_loss
from offpolicy.nn.goals import UnitGaussian, Values, unit_log_prob
from offpolicy.training.goals import GoalModule, Perturb
from offpolicy.training.offline import Metrics, Sizes


class GCIVL(GoalModule):
    """Goal-conditioned implicit value learning.

    Args:
        alpha: α of the policy's weights min(exp(α·A), 100), ≥ 0; 0 is plain cloning.
        expectile: τ of the value regression, in (0, 1).
        discount: γ per environment step, in [0, 1); also of the geometric law of goals.
        tau: Polyak rate of the target value, in [0, 1].
        value_p_current: probability that a value goal is the state itself.
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

    losses = compiled = ("value_loss", "actor_loss")
    targets = ("value",)

    def __init__(
        self,
        *,
        alpha: float = 10.0,
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
        check_widths("hidden_dims", hidden_dims)
        self.save_hyperparameters()
        self.view = GoalView(
            discount=discount,
            value=GoalMix(value_p_current, value_p_trajectory, value_p_random, value_geometric),
            actor=GoalMix(actor_p_current, actor_p_trajectory, actor_p_random, actor_geometric),
        )

    def build(self, sizes: Sizes) -> None:
        h = self.hparams
        self.value = Values(2 * sizes.obs_dim, h.hidden_dims)
        self.target_value = self.target_of(self.value)
        self.actor = UnitGaussian(2 * sizes.obs_dim, sizes.action_dim, h.hidden_dims)

    def value_loss(self, batch: GoalTransitions) -> tuple[Tensor, Metrics]:
        h = self.hparams
        v = self.value(batch.obs, batch.value_goal)
        with torch.no_grad():
            target_v, target_next_v = pair(self.target_value, batch.obs, batch.next_obs, batch.value_goal)
        loss = implicit_value_loss(
            v,
            target_v,
            target_next_v,
            batch.value_reward,
            batch.value_mask,
            discount=h.discount,
            expectile=h.expectile,
        )
        return loss, {"value_loss": loss.detach(), "v_mean": v.detach().mean((-2, -1))}

    def actor_loss(self, batch: GoalTransitions) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            v, next_v = pair(self.value, batch.obs, batch.next_obs, batch.actor_goal)
            advantage = (next_v - v).mean(-2)
        log_prob = unit_log_prob(self.actor(batch.obs, batch.actor_goal), batch.action)
        loss = awr_loss(log_prob, advantage, self.hparams.alpha)
        return loss, {"actor_loss": loss.detach(), "advantage": advantage.mean(-1)}

    def goal_policy(self, obs: Tensor, goal: Tensor, perturb: Perturb) -> Tensor:
        return perturb(self.actor(obs, goal))

    def values(self, obs: Tensor, goal: Tensor) -> dict[str, Tensor]:
        return {"value": self.value(obs, goal).mean(-2)}


def pair(value: Values, obs: Tensor, next_obs: Tensor, goal: Tensor) -> tuple[Tensor, ...]:
    """v of obs and of next_obs towards the same goals, each (…, E, B), in one pass."""
    return value(torch.cat((obs, next_obs), -2), torch.cat((goal, goal), -2)).chunk(2, -1)
