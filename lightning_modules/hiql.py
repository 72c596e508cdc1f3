"""HIQL — Park, Ghosh, Eysenbach & Levine 2023, HIQL: Offline Goal-Conditioned RL with Latent States as Actions
(arXiv:2307.11949), as OGBench's reference agent has it (arXiv:2410.20092, code).

One value V(s, φ(s, g)), 0 at the goal and -1 per step before it, by expectile regression without actions; φ is a
representation of the goal as seen from the state. Two policies by advantage-weighted regression on it:

  low:  log π(a | s, φ(s, w)), w the state k steps ahead,       A = V(s', w) - V(s, w);
  high: log π(φ(s, w) | s, g), w at most k steps ahead on the way to g,  A = V(w, g) - V(s, g).

All weights move in one step on the sum of the losses. φ has no target copy: targets of V see the current φ. It learns
from the value loss, and from the low policy with ``low_actor_rep_grad``; never from the high one.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from offpolicy.data.goals import GoalMix, GoalTransitions, GoalView
from offpolicy.errors import check_range, check_widths
from offpolicy.losses.goal import awr_loss, implicit_value_loss
from offpolicy.nn.goals import Representation, UnitGaussian, Values, to_length, unit_log_prob
from offpolicy.training.goals import GoalModule, Perturb
from offpolicy.training.offline import Metrics, Sizes


class HIQL(GoalModule):
    """Hierarchical implicit Q-learning.

    Args:
        low_alpha: α of the low policy's weights min(exp(α·A), 100), ≥ 0; 0 is plain cloning.
        high_alpha: α of the high policy's weights, likewise.
        subgoal_steps: k, steps from a state to its sub-goal, ≥ 1.
        expectile: τ of the value regression, in (0, 1).
        discount: γ per environment step, in [0, 1); also of the geometric law of goals.
        tau: Polyak rate of the target value, in [0, 1].
        rep_dim: Z, width of φ.
        low_actor_rep_grad: let the low policy's gradient reach φ; for pixels.
        value_p_current: probability that a value goal is the state itself.
        value_p_trajectory: probability that it is a later state of the episode.
        value_p_random: probability that it is any state; the three sum to 1.
        value_geometric: later states are Geometric(1 - γ) steps ahead, else uniform over the rest of the episode.
        actor_p_random: probability that a goal of the high policy is any state instead of a later one, in [0, 1].
        actor_geometric: as ``value_geometric``, for goals of the high policy.
        hidden_dims: widths of the hidden layers of all networks.
        lr: Adam's learning rate.
        batch_size: transitions per update over all processes.
        normalize_obs: standardise observations; off in published results.
        max_grad_norm: limit on the norm of all gradients together, > 0; None for no limit.
    """

    losses: ClassVar[tuple[str, ...]] = ("value_loss", "low_actor_loss", "high_actor_loss")
    compiled = losses
    targets: ClassVar[tuple[str, ...]] = ("value",)

    def __init__(
        self,
        *,
        low_alpha: float = 3.0,
        high_alpha: float = 3.0,
        subgoal_steps: int = 25,
        expectile: float = 0.7,
        discount: float = 0.99,
        tau: float = 0.005,
        rep_dim: int = 10,
        low_actor_rep_grad: bool = False,
        value_p_current: float = 0.2,
        value_p_trajectory: float = 0.5,
        value_p_random: float = 0.3,
        value_geometric: bool = True,
        actor_p_random: float = 0.0,
        actor_geometric: bool = False,
        hidden_dims: tuple[int, ...] = (512, 512, 512),
        lr: float = 3e-4,
        batch_size: int = 1024,
        normalize_obs: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__()
        check_range("low_alpha", low_alpha, 0.0)
        check_range("high_alpha", high_alpha, 0.0)
        check_range("expectile", expectile, 0.0, 1.0, lower_open=True, upper_open=True)
        check_range("tau", tau, 0.0, 1.0)
        check_range("rep_dim", rep_dim, 1)
        check_range("actor_p_random", actor_p_random, 0.0, 1.0)
        check_widths("hidden_dims", hidden_dims)
        self.save_hyperparameters()
        self.view = GoalView(
            discount=discount,
            value=GoalMix(value_p_current, value_p_trajectory, value_p_random, value_geometric),
            actor=GoalMix(0.0, 1.0 - actor_p_random, actor_p_random, actor_geometric),
            subgoal_steps=subgoal_steps,
        )

    def build(self, sizes: Sizes) -> None:
        h = self.hparams
        self.phi = Representation(sizes.obs_dim, h.hidden_dims, h.rep_dim)
        self.value = Values(sizes.obs_dim + h.rep_dim, h.hidden_dims)
        self.low_actor = UnitGaussian(sizes.obs_dim + h.rep_dim, sizes.action_dim, h.hidden_dims)
        self.high_actor = UnitGaussian(2 * sizes.obs_dim, h.rep_dim, h.hidden_dims)
        self.target_value = self.target_of(self.value)

    def v(self, value: Values, obs: Tensor, goal: Tensor) -> Tensor:
        """Vⱼ(s, φ(s, g)), (…, E, B), by the heads of a value network."""
        return value(obs, self.phi(obs, goal))

    def high_values(self) -> Values:
        """The value network that the high policy follows."""
        return self.value

    def regression(
        self,
        value: Values,
        target: Values,
        obs: Tensor,
        next_obs: Tensor,
        goal: Tensor,
        reward: Tensor,
        mask: Tensor,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss of a value network with its target copy, (…,), and its values of ``obs``, (…, E, B)."""
        rep = self.phi(obs, goal)
        v = value(obs, rep)
        with torch.no_grad():
            both, reps = torch.cat((obs, next_obs), -2), torch.cat((rep, self.phi(next_obs, goal)), -2)
            target_v, target_next_v = target(both, reps).chunk(2, -1)
        h = self.hparams
        loss = implicit_value_loss(
            v, target_v, target_next_v, reward, mask, discount=h.discount, expectile=h.expectile, weight=weight
        )
        return loss, v.detach()

    @torch.no_grad()
    def progress(self, value: Values, obs: Tensor, later: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """A = V(later, g) - V(obs, g), the mean over the heads, (…, B); and φ(obs, g)."""
        both = torch.cat((obs, later), -2)
        reps = self.phi(both, torch.cat((goal, goal), -2))
        now, then = value(both, reps).mean(-2).chunk(2, -1)
        return then - now, reps.chunk(2, -2)[0]

    def value_loss(self, batch: GoalTransitions) -> tuple[Tensor, Metrics]:
        loss, v = self.regression(
            self.value,
            self.target_value,
            batch.obs,
            batch.next_obs,
            batch.value_goal,
            batch.value_reward,
            batch.value_mask,
        )
        return loss, {"value_loss": loss.detach(), "v_mean": v.mean((-2, -1))}

    def low_actor_loss(self, batch: GoalTransitions) -> tuple[Tensor, Metrics]:
        advantage, z = self.progress(self.value, batch.obs, batch.next_obs, batch.low_goal)
        if self.hparams.low_actor_rep_grad:
            z = self.phi(batch.obs, batch.low_goal)
        log_prob = unit_log_prob(self.low_actor(batch.obs, z), batch.action)
        loss = awr_loss(log_prob, advantage, self.hparams.low_alpha)
        return loss, {"low_actor_loss": loss.detach(), "low_advantage": advantage.mean(-1)}

    def high_actor_loss(self, batch: GoalTransitions) -> tuple[Tensor, Metrics]:
        advantage, _ = self.progress(self.high_values(), batch.obs, batch.high_target, batch.high_goal)
        with torch.no_grad():
            target = self.phi(batch.obs, batch.high_target)
        log_prob = unit_log_prob(self.high_actor(batch.obs, batch.high_goal), target)
        loss = awr_loss(log_prob, advantage, self.hparams.high_alpha)
        return loss, {"high_actor_loss": loss.detach(), "high_advantage": advantage.mean(-1)}

    def goal_policy(self, obs: Tensor, goal: Tensor, perturb: Perturb) -> Tensor:
        z = to_length(perturb(self.high_actor(obs, goal)))
        return perturb(self.low_actor(obs, z))

    def values(self, obs: Tensor, goal: Tensor) -> dict[str, Tensor]:
        return {"value": self.v(self.value, obs, goal).mean(-2)}

    def subgoals(self, obs: Tensor, goal: Tensor) -> Tensor:
        return to_length(self.high_actor(obs, goal))

    def representation(self, obs: Tensor, goal: Tensor) -> Tensor:
        return self.phi(obs, goal)
