"""Fitted Q evaluation — Le, Voloshin & Yue 2019, Batch Policy Learning under Constraints (arXiv:1903.08738).

It trains no policy: it estimates what given policies would collect, J(π) = E[Q(s₀, π(s₀))] over the first states of
episodes. Critics: squared error to r + γ·(1 - terminated)·Q̄(s', π(s')), each member to its own target network; a time
limit bootstraps. Targets are clipped to [r_min, r_max] / (1 - γ), with 0 among the rewards where the data terminate,
and the networks predict Q·(1 - γ) / max|r|, as in Fu et al. 2021 (arXiv:2103.16596).

The actions of the policies are computed once, before training, so an update costs the same whatever the policy is.
Several policies are evaluated at once on the same batches. Differs from d3rlpy: the value is that of first states of
episodes, and of samples of a stochastic policy where they are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor

from offpolicy.data.columns import to_numpy
from offpolicy.data.replay import Replay
from offpolicy.data.views import BoundView, Noise, Transitions, TransitionView
from offpolicy.errors import UsageError, check_range, check_widths
from offpolicy.given import expanded
from offpolicy.losses.td import td_target
from offpolicy.nn.critics import state_action
from offpolicy.nn.stacked import MLP
from offpolicy.training.asking import asked_actions, check_policy, weights_mark
from offpolicy.training.description import Description
from offpolicy.training.measurement import HeldOut
from offpolicy.training.offline import Draw, Metrics, OfflineModule, Rate, Sizes
from offpolicy.training.opening import load
from offpolicy.training.slices import over

FEW = 50  # episodes: of fewer none are held out unless asked for
HELD_OUT_ROWS = 1 << 14


class Starts(NamedTuple):
    """First states of n episodes.

    Attributes:
        obs: raw, (n, O).
        action: of every policy there, environment units, (n, P, M, A).
        times: how often the episode counts for each seed, (n, S or 1).
        held_out: whether it is kept from training, bool (n,).
    """

    obs: np.ndarray
    action: np.ndarray
    times: np.ndarray
    held_out: np.ndarray


class FQE(OfflineModule):
    """Fitted Q evaluation.

    Args:
        runs: run folders or checkpoint files of the policies, several to evaluate them at once; none evaluates the
            policy that collected the data, by the next actions of the data.
        policy: "mean" takes the action that evaluation plays; "sample" draws from stochastic policies.
        samples: drawn for each state with "sample", ≥ 1; an update takes one of them at random, a value their mean.
        discount: γ per environment step, in [0, 1).
        num_critics: critics of each policy, ≥ 1; the value is their mean.
        hidden_dims: widths of the hidden layers.
        layer_norm: normalise the hidden layers.
        critic_lr: Adam's learning rate.
        tau: Polyak rate of the target critics, in [0, 1].
        clip: keep targets inside what the rewards of the data make possible.
        holdout: share of the episodes kept from training, for the error and the value there, in [0, 1); None is 0.1,
            and 0 of fewer than 50 episodes.
        resample: with several seeds, each sees episodes drawn with replacement, so that the spread of its values over
            seeds is that of a bootstrap with refits (Hao et al. 2021, arXiv:2102.03607).
        batch_size: transitions per update over all processes.
        normalize_obs: standardise observations.
        max_grad_norm: limit on the gradient norm, > 0; None for no limit.
    """

    compiled = ("critic_loss",)
    reward_low: Tensor
    reward_high: Tensor
    reward_unit: Tensor

    def __init__(
        self,
        *,
        runs: str | tuple[str, ...] = (),
        policy: Literal["mean", "sample"] = "mean",
        samples: int = 10,
        discount: float = 0.99,
        num_critics: int = 4,
        hidden_dims: tuple[int, ...] = (256, 256),
        layer_norm: bool = True,
        critic_lr: float = 3e-4,
        tau: float = 0.005,
        clip: bool = True,
        holdout: float | None = None,
        resample: bool = False,
        batch_size: int = 256,
        normalize_obs: bool = True,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__()
        check_range("discount", discount, 0.0, 1.0, upper_open=True)
        check_range("samples", samples, 1)
        check_range("num_critics", num_critics, 1)
        check_range("tau", tau, 0.0, 1.0)
        if holdout is not None:
            check_range("holdout", holdout, 0.0, 1.0, upper_open=True)
        check_widths("hidden_dims", hidden_dims)
        if policy not in ("mean", "sample"):
            raise UsageError(f"`policy` is {policy!r}; expected 'mean' or 'sample'.")
        self.save_hyperparameters()
        self._policies: tuple[Any, ...] = ()
        self._asked: tuple[Any, Replay] | None = None  # data, and the same with the actions of the policies
        self._held_out: Replay | None = None
        self._held_out_view: BoundView | None = None
        self._starts: Starts | None = None
        extra = (*(("policy_action",) if self.run_names else ()), *(("episode_count",) if resample else ()))
        self.view = TransitionView(next_action=not self.run_names, extra=extra)

    @classmethod
    def of(cls, policies: Sequence[Any], **options: Any) -> Self:
        """For trained methods at hand instead of runs on disk; options as those of the class."""
        made = cls(runs=tuple(f"policy {k}" for k in range(len(policies))), **options)
        made._policies = tuple(policies)
        return made

    @property
    def run_names(self) -> tuple[str, ...]:
        """Where the policies come from; empty for the policy of the data."""
        runs = self.hparams.runs
        return (runs,) if isinstance(runs, str) else tuple(runs)

    @property
    def num_policies(self) -> int:
        return max(1, len(self.run_names))

    # -- policies ------------------------------------------------------------------------------------------------------

    @property
    def policies(self) -> tuple[Any, ...]:
        """The trained methods, opened when first asked for; none for the policy of the data."""
        if not self._policies:
            self._policies = tuple(load(expanded(name)) for name in self.run_names)
        return self._policies

    def actions(self, obs: np.ndarray) -> np.ndarray:
        """What every policy does in raw observations (n, O): (n, P, samples or 1, A), environment units."""
        h = self.hparams
        return asked_actions(self.policies, obs, h.policy, h.samples if h.policy == "sample" else 1)

    def marks(self) -> list[str]:
        """What tells these policies from others."""
        return [weights_mark(method) for method in self.policies]

    def extra_state(self) -> dict[str, Any]:
        return {**super().extra_state(), "policies": self.marks() if self._policies else []}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state(state)
        if self._asked and state["policies"] != self.marks():
            raise UsageError(
                "the checkpoint evaluates other policies than those given now; expected the same ones. Pass the runs "
                "that it began with, or start a fresh run."
            )

    # -- data ----------------------------------------------------------------------------------------------------------

    @property
    def held_out_episodes(self) -> Replay | None:
        """The episodes that are not trained on, once the data are known; None where all are."""
        return self._held_out

    def select(self, replay: Replay) -> Replay:
        """The episodes that are not held out, with what the policies do after every step as a column."""
        if self._asked is None or self._asked[0] is not replay:
            self._asked = (replay, self._with_actions(replay))
        return self._asked[1]

    def _with_actions(self, replay: Replay) -> Replay:
        steps, rows = dict(replay.steps), replay.usable_rows()
        starts = replay.take(replay.start, ("obs", "action"))
        obs, action = (starts[name].cpu().numpy() for name in ("obs", "action"))
        action = action.reshape(len(obs), 1, 1, -1)
        if self.run_names:
            sizes = Sizes.of(replay)
            for method in self.policies:
                check_policy(method, sizes.obs_dim, sizes.action_dim, sampled=self.hparams.policy == "sample")
            found = self.actions(replay.next_obs(rows).cpu().numpy())
            answers = np.zeros((len(steps["action"]), *found.shape[1:]), np.float32)
            answers[rows] = found
            steps["policy_action"] = answers
            action = self.actions(obs)
        times = self._drawn_episodes(replay.num_episodes)
        if self.hparams.resample:
            steps["episode_count"] = np.ones((len(steps["action"]), times.shape[1]), np.float32)
            steps["episode_count"][replay.rows] = times[replay.episode_of]
        whole, held_out = replay.derive(steps, replay.tail), np.zeros(replay.num_episodes, bool)
        self._held_out = self._held_out_view = None
        share = self.hparams.holdout
        share = 0.1 * (replay.num_episodes >= FEW) if share is None else share
        if share:
            whole, self._held_out = whole.split(share)
            held_out = np.isin(replay.start, self._held_out.start)
        whole.version = replay.version
        self._starts = Starts(obs, action, times, held_out)
        return whole

    def _drawn_episodes(self, count: int) -> np.ndarray:
        """How often each episode counts, (n, S or 1)."""
        if not self.hparams.resample:
            return np.ones((count, 1))
        if not self.seeds:
            raise UsageError("`resample` draws episodes anew for each of several seeds; expected `seeds`. Pass some.")
        rows = [np.random.default_rng(seed).integers(count, size=count) for seed in self.seeds]
        return np.stack([np.bincount(row, minlength=count) for row in rows], 1).astype(np.float64)

    def build(self, sizes: Sizes) -> None:
        h = self.hparams
        self.critic = MLP(
            sizes.obs_dim + sizes.action_dim,
            h.hidden_dims,
            1,
            stack=(self.num_policies, h.num_critics),
            layer_norm="before" if h.layer_norm else None,
        )
        self.target_critic = self.target_of(self.critic)
        for name in ("reward_low", "reward_high", "reward_unit"):
            self.register_buffer(name, torch.ones(()))

    def fit_normalizer(self, replay: Replay) -> None:
        """Besides observations and actions, the smallest and largest reward."""
        super().fit_normalizer(replay)
        reward, terminated = (to_numpy(replay.steps[name])[replay.rows] for name in ("reward", "terminated"))
        low, high = float(reward.min()), float(reward.max())
        ends = bool(terminated.any())  # in a state without reward
        self.reward_low.fill_(min(low, 0.0) if ends else low)
        self.reward_high.fill_(max(high, 0.0) if ends else high)
        self.reward_unit.fill_(max(abs(low), abs(high)) or 1.0)

    # -- training ------------------------------------------------------------------------------------------------------

    def learning_rates(self) -> dict[str, Rate]:
        return {"critic": self.hparams.critic_lr}

    def draws(self) -> dict[str, Draw]:
        return {"choice": Draw((1,), "uniform")} if self.run_names and self.hparams.policy == "sample" else {}

    def next_action(self, batch: Transitions) -> Tensor:
        """π(s') of every policy, (…, P, B, A) in [-1, 1]."""
        if not self.run_names:
            assert batch.next_action is not None
            return batch.next_action.unsqueeze(-3)
        every = self.normalizer.action(batch.extra.policy_action).clamp(-1.0, 1.0)  # (…, B, P, M, A)
        if self.hparams.policy == "sample":
            chosen = (batch.noise.choice * every.shape[-2]).long()[..., None, None]
            every = every.take_along_dim(chosen, -2)
        return every[..., 0, :].movedim(-2, -3)

    def scaled_q(self, network: MLP, obs: Tensor, action: Tensor) -> Tensor:
        """Q·(1 - γ) / max|r|, (…, P, E, B), of obs (…, B, O) and action (…, P, B, A), or of 1 for all policies."""
        return network(state_action(obs.unsqueeze(-3), action).unsqueeze(-3)).squeeze(-1)

    def scaled_target(self, batch: Transitions) -> Tensor:
        """The target in the same unit, (…, P, E, B)."""
        h, unit = self.hparams, self.reward_unit
        next_q = self.scaled_q(self.target_critic, batch.next_obs, self.next_action(batch))
        reward = (batch.reward * ((1.0 - h.discount) / unit))[..., None, None, :]
        target = td_target(reward, batch.terminated[..., None, None, :], next_q, h.discount)
        return target.clamp(self.reward_low / unit, self.reward_high / unit) if h.clip else target

    def critic_loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        """Mean squared error, summed over policies and their critics."""
        with torch.no_grad():
            target = self.scaled_target(batch)
        q = self.scaled_q(self.critic, batch.obs, batch.action.unsqueeze(-3))
        error = (q - target).square()
        if self.hparams.resample:
            times = batch.extra.episode_count.diagonal(dim1=0, dim2=-1).movedim(-1, 0)  # (S, B)
            error = error * times[..., None, None, :]
        loss = error.mean(-1).sum((-2, -1))
        return loss, {"critic_loss": loss.detach(), "q_mean": self.unscaled(q.detach()).mean((-3, -2, -1))}

    def update(self, batch: Transitions, step: int) -> Metrics:
        loss, metrics = self.critic_loss(batch)
        self.step("critic", loss)
        self.track("critic", self.hparams.tau)
        return metrics

    # -- values --------------------------------------------------------------------------------------------------------

    def unscaled(self, q: Tensor) -> Tensor:
        """Values in the unit of the rewards."""
        return q * (self.reward_unit / (1.0 - self.hparams.discount))

    @torch.no_grad()
    def values(self, obs: Any, action: Any) -> Tensor:
        """Q of every policy and critic, in the unit of the rewards.

        Args:
            obs: raw observations (n, O).
            action: environment units, (n, A); or (n, P, M, A), M for each policy, of which the mean value is taken.

        Returns:
            (P, E, n); with S seeds (S, P, E, n).
        """
        x = self.normalized(obs)
        a = torch.as_tensor(action, device=x.device, dtype=x.dtype)
        a = a[:, None, None] if a.dim() == 2 else a
        a = self.normalizer.action(a).clamp(-1.0, 1.0)
        found = [self.scaled_q(self.critic, x, one.movedim(1, 0)) for one in a.unbind(2)]
        return self.unscaled(torch.stack(found).mean(0))

    def start_values(self, *, held_out: bool = False) -> Tensor:
        """The mean value of the first states of episodes, (P, E), with seeds (S, P, E): what a policy would collect.

        Args:
            held_out: of the episodes that are not trained on, instead of all.
        """
        if self._starts is None:
            raise UsageError("FQE has no episodes to start from; expected data. Fit it, or call `prepare(replay)`.")
        obs, action, times, kept = self._starts
        chosen = kept if held_out else np.ones(len(obs), bool)
        value = self.values(obs[chosen], action[chosen])
        weight = torch.as_tensor(times[chosen].T, device=value.device, dtype=value.dtype)  # (S or 1, n)
        return (value * (weight / weight.sum(-1, keepdim=True))[:, None, None]).sum(-1).reshape(value.shape[:-1])

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """The "value" of each policy, its spread over critics, and the squared error on held-out steps as "loss"."""
        numbers: dict[str, Tensor] = {}
        value = self.start_values()
        for k in range(self.num_policies):
            end = f"_{k}" if self.num_policies > 1 else ""
            numbers[f"value{end}"] = value[..., k, :].mean(-1)
            numbers[f"value_spread{end}"] = value[..., k, :].std(-1, correction=0)
        if self._held_out is not None:
            numbers["loss"] = self._held_out_error(self._held_out)
        columns: dict[str, float] = {}
        for name, number in numbers.items():
            columns |= over(name, dict(zip(self.seeds, number.tolist()))) if self.seeds else {name: float(number)}
        return columns

    def _held_out_error(self, replay: Replay) -> Tensor:
        """Mean squared difference to the targets on held-out steps, squared units of reward, () or (S,)."""
        if self._held_out_view is None:
            self._held_out_view = self.view.bind(replay, self.normalizer, self.device)
        count = len(self._held_out_view)
        items = torch.arange(0, count, -(-count // HELD_OUT_ROWS), device=self._held_out_view.device)
        batch = self._held_out_view.gather(items)
        batch = batch._replace(noise=Noise(choice=batch.reward.new_zeros(len(items), 1)))  # the first of the samples
        q = self.scaled_q(self.critic, batch.obs, batch.action.unsqueeze(-3))
        return self.unscaled(q - self.scaled_target(batch)).square().mean((-3, -2, -1))

    def measurement(self) -> Callback:
        return HeldOut()

    def describe(self) -> Description:
        named = ", ".join(self.run_names) or "the one that collected the data, by its next actions"
        found = super().describe()
        return replace(
            found,
            facts=[*found.facts, ("policies" if self.num_policies > 1 else "policy", named)],
            evaluates="the value of first states" + (", and the error on held-out episodes" if self._held_out else ""),
            look='offpolicy.load("{folder}").values(obs, action)',
        )

    def policy(self, obs: Tensor) -> Tensor:
        raise UsageError("FQE estimates values and does not act; expected a policy. Ask for `values(obs, action)`.")
