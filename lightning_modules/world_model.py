"""Ensemble world model — the autoregressive baseline of policy-guided diffusion (Jackson et al., arXiv:2404.06356).

Model: E Gaussian networks p(Δs, r | s, a), as in PETS (arXiv:1805.12114) and MOPO (arXiv:2005.13239); each sees every
batch. With v = log σ², kept soft between two learnt bounds (max first, then min),

    loss = Σ_members mean[(μ − y)²·e^{−v} + v] + 0.01·Σ(max − min).

Roll-outs: from a given state the policy acts, a member among the best by held-out error is drawn for every step, and a
state is drawn from it; errors compound, which is what trajectory diffusion is compared with.
Differs from the public ensemble of the same group (`EmptyJackson/unifloral`): y is standardised per column, and whole
episodes are held out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn

from offpolicy.compute.optim import FusedAdam
from offpolicy.data import sampling
from offpolicy.data.normalize import mean_std
from offpolicy.data.replay import Replay
from offpolicy.data.views import Transitions
from offpolicy.environments.terminations import Termination
from offpolicy.errors import DataError, UsageError, check_range, check_widths
from offpolicy.nn.critics import state_action
from offpolicy.nn.stacked import MLP
from offpolicy.training.description import Description
from offpolicy.training.measurement import HeldOut
from offpolicy.training.offline import Metrics, OfflineModule, Rate, Sizes

MAX_LOG_VAR, MIN_LOG_VAR = 0.5, -10.0  # bounds at the start, of y in standard deviations
HELD_OUT_ROWS = 10_000  # at most, evenly spaced


class GaussianEnsemble(nn.Module):
    """Means and soft-clamped log-variances of several independent networks.

    Args:
        in_dim: width of the input.
        out_dim: D, numbers predicted.
        members: E, ≥ 1.
        hidden_dims: widths of the hidden layers, ReLU.
    """

    def __init__(self, in_dim: int, out_dim: int, members: int, hidden_dims: tuple[int, ...]) -> None:
        super().__init__()
        self.net = MLP(in_dim, hidden_dims, 2 * out_dim, stack=(members,))
        self.max_log_var = nn.Parameter(torch.full((members, 1, out_dim), MAX_LOG_VAR))
        self.min_log_var = nn.Parameter(torch.full((members, 1, out_dim), MIN_LOG_VAR))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (…, E, B, D) of x (…, B, in)."""
        mean, log_var = self.net(x.unsqueeze(-3)).chunk(2, -1)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        return mean, self.min_log_var + F.softplus(log_var - self.min_log_var)

    def spread(self) -> Tensor:
        """Σ(max − min) over members and columns, (…,)."""
        return (self.max_log_var - self.min_log_var).sum((-3, -2, -1))


class WorldModel(OfflineModule):
    """Probabilistic ensemble of the dynamics and the reward.

    Args:
        members: networks in the ensemble, ≥ 1.
        elites: how many of them roll out, those with the smallest held-out error, in 1 … members.
        hidden_dims: widths of the hidden layers.
        lr: AdamW's learning rate.
        weight_decay: AdamW's decay, ≥ 0.
        held_out: share of the episodes kept for choosing the elites, in [0, 1); 0 takes the first members.
        batch_size: transitions per update over all processes.
        normalize_obs: standardise observations.
        max_grad_norm: limit on the gradient norm, > 0; None for no limit.
    """

    compiled = ("model_loss",)
    seed_axis = False
    elite: Tensor
    target_center: Tensor
    target_scale: Tensor

    def __init__(
        self,
        *,
        members: int = 7,
        elites: int = 5,
        hidden_dims: tuple[int, ...] = (200, 200, 200, 200),
        lr: float = 1e-3,
        weight_decay: float = 2.5e-5,
        held_out: float = 0.2,
        batch_size: int = 256,
        normalize_obs: bool = True,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__()
        check_range("members", members, 1)
        check_range("elites", elites, 1, members)
        check_range("weight_decay", weight_decay, 0.0)
        check_range("held_out", held_out, 0.0, 1.0, upper_open=True)
        check_widths("hidden_dims", hidden_dims)
        self.save_hyperparameters()
        self._held_out: Replay | None = None

    def build(self, sizes: Sizes) -> None:
        h, out_dim = self.hparams, sizes.obs_dim + 1
        self.model = GaussianEnsemble(sizes.obs_dim + sizes.action_dim, out_dim, h.members, h.hidden_dims)
        self.register_buffer("target_center", torch.zeros(out_dim))
        self.register_buffer("target_scale", torch.ones(out_dim))
        self.register_buffer("elite", torch.arange(h.elites))

    # -- data ----------------------------------------------------------------------------------------------------------

    def select(self, replay: Replay) -> Replay:
        replay = replay.showing_successors()
        if not len(replay.usable_rows()):
            raise DataError(
                f"{replay.meta.get('name', 'the replay')} shows no step's successor (its longest episode has "
                f"{replay.length.max()} steps), so there are no dynamics to learn; expected `next_obs` or longer "
                "episodes."
            )
        if not self.hparams.held_out:
            return replay
        kept, self._held_out = replay.split(self.hparams.held_out)
        for part, what in ((kept, "trained on"), (self._held_out, "held out")):
            if not len(part.usable_rows()):
                raise DataError(
                    f"no step of the {part.num_episodes} episodes {what} shows its successor; expected some. Change "
                    "--model.held_out, or pass more or longer episodes."
                )
        return kept

    def fit_normalizer(self, replay: Replay) -> None:
        """Besides observations and actions, standardise what is predicted: Δs of normalised observations, and r."""
        super().fit_normalizer(replay)
        rows = replay.usable_rows()
        first = replay.take(rows, ("obs", "reward"))
        scale = self.normalizer.obs_scale.double().cpu().numpy()
        change = (replay.next_obs(rows).double() - first["obs"].double()).cpu().numpy() * scale
        found = [mean_std(change), mean_std(first["reward"][:, None])]
        mean, std = (np.concatenate(parts) for parts in zip(*found))
        self.target_center.copy_(torch.from_numpy(mean))
        self.target_scale.copy_(torch.from_numpy(np.where(std > 0, std, 1.0)))

    # -- training ------------------------------------------------------------------------------------------------------

    def learning_rates(self) -> dict[str, Rate]:
        return {"model": self.hparams.lr}

    def make_optimizer(self, name: str, params: list[Tensor]) -> FusedAdam:
        return FusedAdam(params, weight_decay=self.hparams.weight_decay, decoupled=True)

    def target(self, batch: Transitions) -> Tensor:
        """y (…, B, O + 1): standardised change of the observation and reward."""
        y = torch.cat([batch.next_obs - batch.obs, batch.reward.unsqueeze(-1)], -1)
        return (y - self.target_center) / self.target_scale

    def model_loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        mean, log_var = self.model(state_action(batch.obs, batch.action))
        square = (mean - self.target(batch).unsqueeze(-3)).square()
        likelihood = (square * torch.exp(-log_var) + log_var).mean((-2, -1)).sum(-1)
        loss = likelihood + 0.01 * self.model.spread()
        return loss, {"loss": loss.detach(), "error": square.detach().mean((-3, -2, -1))}

    def update(self, batch: Transitions, step: int) -> Metrics:
        loss, metrics = self.model_loss(batch)
        self.step("model", loss)
        return metrics

    # -- elites --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Choose the elites; their mean squared error in standard deviations of y is the "loss"."""
        if self._held_out is None:
            return {}
        rows = self._held_out.usable_rows()
        rows = rows[:: -(-len(rows) // HELD_OUT_ROWS)]
        batch = Transitions(**self.view.fields(self._held_out, rows, self.normalizer))
        mean, _ = self.model(state_action(batch.obs, batch.action))
        error = (mean - self.target(batch)).square().mean((-2, -1))
        self.elite.copy_(error.argsort()[: self.hparams.elites].sort().values)
        return {"loss": float(error[self.elite].mean())}

    def measurement(self) -> Callback:
        return HeldOut()

    def describe(self) -> Description:
        share = self.hparams.held_out
        return replace(
            super().describe(),
            evaluates=f"on {share:.0%} of the episodes, held out" if share else "",
            look='offpolicy.load("{folder}").rollout(obs, policy, steps)',
        )

    # -- rolling out ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rollout(
        self,
        start_obs: Any,
        policy: OfflineModule | Callable[[Tensor], Tensor],
        steps: int,
        seed: int = 0,
        *,
        first: int = 0,
        termination: Termination | None = None,
        sampled: bool = False,
        successors: bool = False,
    ) -> dict[str, Tensor]:
        """Trajectories of the policy in the model, in the form of trajectory diffusion's.

        Args:
            start_obs: (n, O), environment units.
            policy: a trained method, whose deterministic action is taken unless ``sampled``; or a function of
                observations (n, O) in environment units that gives actions (n, A) in [-1, 1].
            steps: T, ≥ 1.
            seed: of the members and the noise, which are functions of (seed, trajectory, step) alone.
            first: number of the first trajectory.
            termination: (obs, action, next_obs) in environment units and [-1, 1] → bool (n,); None never ends. Steps
                after an end go on, and whoever makes episodes of them cuts there.
            sampled: take actions drawn from the method's policy.
            successors: give ``next_obs (n, T, O)`` too, the observation after each step.

        Returns:
            ``obs (n, T, O)`` in environment units, ``action (n, T, A)`` in [-1, 1], ``reward (n, T)``, ``terminated
            (n, T)`` bool.

        Raises:
            UsageError: a method of several seeds, or one without a law that actions are drawn from.
        """
        check_range("steps", steps, 1)
        act = self._actions(policy, sampled)
        obs = torch.as_tensor(start_obs, device=self.device, dtype=self.dtype_of_weights)
        rows = torch.arange(first, first + len(obs), device=self.device)
        names = ("obs", "action", "reward", "terminated", *(["next_obs"] if successors else []))
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for t in range(steps):
            noise = self._normals(seed, "action", t, rows, self.sizes.action_dim)
            action = act(obs, noise).to(obs).clamp(-1.0, 1.0)
            next_obs, reward = self.sample(obs, action, rows, t, seed)
            over = termination(obs, action, next_obs) if termination else torch.zeros_like(reward, dtype=torch.bool)
            for name, value in zip(names, (obs, action, reward, over, next_obs)):
                found[name].append(value)
            obs = next_obs
        return {name: torch.stack(values, 1) for name, values in found.items()}

    def _normals(self, seed: int, name: str, t: int, rows: Tensor, width: int) -> Tensor:
        """Standard normal numbers (n, width) of step t of the trajectories ``rows``."""
        key = sampling.keys(seed, name, torch.tensor([t], device=rows.device))
        return sampling.normals(key, rows, (width,))[0]

    def sample(self, obs: Tensor, action: Tensor, rows: Tensor, t: int, seed: int) -> tuple[Tensor, Tensor]:
        """Next observation (n, O) and reward (n,), environment units, of one elite member per row."""
        mean, log_var = self.model(state_action(self.normalizer.obs(obs), action))
        key = sampling.keys(seed, "member", torch.tensor([t], device=rows.device))
        member = self.elite[sampling.uniform_indices(key, rows, len(self.elite))[0]]
        noise = self._normals(seed, "transition", t, rows, mean.shape[-1]).to(mean)
        each = torch.arange(len(obs), device=obs.device)
        y = mean[member, each] + torch.exp(0.5 * log_var[member, each]) * noise
        y = y * self.target_scale + self.target_center
        return obs + y[:, :-1] / self.normalizer.obs_scale, y[:, -1]

    def _actions(
        self, policy: OfflineModule | Callable[[Tensor], Tensor], sampled: bool
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Actions (n, A) in this model's [-1, 1] for observations (n, O) in environment units and noise (n, A)."""
        if not isinstance(policy, OfflineModule):
            return lambda obs, noise: policy(obs)
        method, ours, theirs = policy, self.normalizer, policy.normalizer
        if method.seeds:
            raise UsageError(
                f"the policy holds the seeds {', '.join(map(str, method.seeds))}; expected one policy. Take one out: "
                f"take_seed({method.seeds[0]})."
            )
        # without bounds of the environment each scales by the data that it was trained on
        scale = ours.action_scale / theirs.action_scale.to(ours.action_scale)
        shift = ours.action(theirs.action_center.to(scale))

        def act(obs: Tensor, noise: Tensor) -> Tensor:
            x = method.normalized(obs)
            action = method.sample_action(x, noise.to(x)) if sampled else method.policy(x)
            return action.clamp(-1.0, 1.0).to(obs) * scale + shift

        return act

    @torch.no_grad()
    def uncertainty(self, obs: Tensor, action: Tensor) -> Tensor:
        """The largest norm among members of a step's standard deviations, (n,): what MOPO penalises rewards by.

        Deviations are those of the next observation and the reward, in units of the environment.

        Args:
            obs: (n, O), environment units.
            action: (n, A) in [-1, 1].
        """
        _, log_var = self.model(state_action(self.normalizer.obs(obs), action))
        units = self.target_scale / torch.cat([self.normalizer.obs_scale, self.target_scale.new_ones(1)])
        return torch.linalg.vector_norm(torch.exp(0.5 * log_var) * units, dim=-1).amax(-2)

    def policy(self, obs: Tensor) -> Tensor:
        raise UsageError(
            "a world model does not act; expected a policy. Roll one out in it: `rollout(obs, policy, T)`."
        )
