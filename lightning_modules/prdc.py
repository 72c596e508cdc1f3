"""PRDC — Ran et al. 2023, Policy Regularization with Dataset Constraint for Offline RL (arXiv:2306.06569).

TD3+BC whose imitation target is the action of the stored pair nearest to (β·s, π(s)), not the batch's own.

  Critic: twin TD error with smoothed target actions (TD3, arXiv:1802.09477).
  Actor, every second update: -λ·Q₁(s, p) + (p - a_j)² with p = π(s), λ = α / mean|Q₁(s, p)| and
          j = argmin_i β²·‖s - s_i‖² + ‖p - a_i‖² over all training rows, s normalised; no gradient through the search.

With large β, j is always the batch's own row and PRDC *is* TD3+BC: watch the metric ``own_transition``.

| detail     | paper                | authors' code                            | here                              |
|------------|----------------------|------------------------------------------|-----------------------------------|
| penalty    | distance to the data | mean squared error to the neighbour      | as the code                       |
| neighbours | 1                    | k; fails or broadcasts wrongly for k > 1 | mean over k of the squared error  |
| β          | per task             | class 2.0, command line 1.0              | 2.0; recipes per task             |
| rewards    | per task             | scale·r + shift (once on next states,    | `reward_transform`, rewards alone |
|            |                      | by mistake)                              |                                   |
| search     | KD-tree              | KD-tree at every actor step              | rows remembered, tree or products |
| actions    | -                    | in ±A_max, losses in those units         | in ±1                             |
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from offpolicy.data.neighbors import NeighborIndex
from offpolicy.data.views import BoundView, Transitions
from offpolicy.errors import UsageError, check_range, check_widths
from offpolicy.losses.td import mean_squared_action, smoothed_action, squared_td, td_target
from offpolicy.nn.critics import EnsembleCritic
from offpolicy.nn.policies import DeterministicPolicy
from offpolicy.training.offline import Draw, Metrics, OfflineModule, Rate, Sizes


class PRDC(OfflineModule):
    """TD3 that stays near the closest transitions of the data.

    Args:
        alpha: α; larger trusts Q more, 0 is plain imitation. Range ≥ 0; 2.5, and 40 on HalfCheetah.
        state_weight: β, weight of a state's distance against an action's, ≥ 0. Large: TD3+BC. Small: actions of other
            states are borrowed. Paper 2.0, and 7.5 on AntMaze.
        num_neighbors: k ≥ 1, stored pairs that the policy is drawn to.
        search: "exact"; "cached": among the ``candidates`` nearest states only, faster while the policy is far from
            the data; "tree" and "brute": exact without memory of earlier searches. On a GPU the exact ones are one, by
            products, and the metric ``certified`` is the share of answers that are proven; "cached" makes its lists
            when training begins, and again whenever the data change.
        candidates: rows remembered for each row, ≥ 1; 4 bytes each.
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
        reward_transform: "r", an affine form such as "0.1r" or "10000r-1", or "return_range".
        max_grad_norm: limit on each network's gradient norm, > 0; None for no limit.

    The losses can be had without training: build, load weights, then either give :meth:`actor_loss` the target
    actions, or lay the data out with :meth:`index_rows` and number the batch's rows in ``batch.row``.
    """

    compiled = ("critic_loss", "actor_loss")

    def __init__(
        self,
        *,
        alpha: float = 2.5,
        state_weight: float = 2.0,
        num_neighbors: int = 1,
        search: Literal["exact", "cached", "tree", "brute"] = "exact",
        candidates: int = 64,
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
    ) -> None:
        super().__init__()
        check_range("alpha", alpha, 0.0)
        NeighborIndex.check(state_weight, search, candidates, num_neighbors)
        check_range("discount", discount, 0.0, 1.0, upper_open=True)
        check_range("tau", tau, 0.0, 1.0)
        check_range("policy_noise", policy_noise, 0.0)
        check_range("noise_clip", noise_clip, 0.0, infinite=True)
        check_range("policy_freq", policy_freq, 1)
        check_range("num_critics", num_critics, 1)
        check_widths("hidden_dims", hidden_dims)
        self.save_hyperparameters()
        self.index: NeighborIndex | None = None

    def build(self, sizes: Sizes) -> None:
        h = self.hparams
        self.actor = DeterministicPolicy(sizes.obs_dim, sizes.action_dim, h.hidden_dims)
        self.critic = EnsembleCritic(sizes.obs_dim, sizes.action_dim, h.num_critics, h.hidden_dims)
        self.target_actor, self.target_critic = self.target_of(self.actor), self.target_of(self.critic)

    def on_bind(self, bound: BoundView) -> None:
        self.index_rows(*bound.pairs(), rows=bound.rows)

    def index_rows(self, obs: Tensor, action: Tensor, rows: Tensor | None = None) -> None:
        """Lay out the pairs in which neighbours are sought.

        Args:
            obs: normalised states, (N, O).
            action: scaled actions, (N, A).
            rows: their numbers in ``batch.row``, int64 (N,); 0 … N-1 when None.
        """
        h = self.hparams
        self.index = NeighborIndex(obs, action, h.state_weight, search=h.search, candidates=h.candidates, rows=rows)
        if obs.device.type != "cpu":
            self.index.build()  # now, so that updates read nothing back to the host

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        self.index = None

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

    def actor_loss(self, batch: Transitions, target: Tensor | None = None) -> tuple[Tensor, Metrics]:
        """The loss of the actor and its metrics.

        Args:
            batch: its rows must be rows of the index, unless the targets are given.
            target: actions to be drawn to, (…, k, B, A), instead of those of the nearest pairs.
        """
        metrics: Metrics = {}
        action = self.actor(batch.obs)
        q = self.critic.member(batch.obs, action)
        lambda_ = self.hparams.alpha / self.batch_mean(q.abs())
        if target is None:
            target, metrics = self.targets(batch, action)
        dc_loss = mean_squared_action(action.unsqueeze(-3), target).mean(-1)
        loss = dc_loss - lambda_ * q.mean(-1)
        return loss, {"actor_loss": loss.detach(), "dc_loss": dc_loss.detach()} | metrics

    @torch.compiler.disable  # lists of any length, and the KD-tree
    def targets(self, batch: Transitions, action: Tensor) -> tuple[Tensor, Metrics]:
        """The stored actions nearest to (β·s, action), (…, k, B, A), and how they were found."""
        if self.index is None or batch.row is None:
            raise UsageError("the actor loss needs rows of an index; expected index_rows and batch.row, or `target`.")
        found = self.index.query(action, batch.row, k=self.hparams.num_neighbors)
        own = self.index.own(batch.row) == found.row[..., 0]
        metrics = {"own_transition": own.float().mean(-1), "neighbor_distance": found.distance[..., 0].mean(-1).float()}
        if found.certified is not None:
            metrics["certified"] = found.certified.float().mean(-1)
        return found.action.movedim(-2, -3).to(batch.action), metrics

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
