"""Trajectory diffusion — Jackson et al. 2024, Policy-Guided Diffusion (arXiv:2404.06356), with EDM (arXiv:2206.00364).

A denoiser D of sub-trajectories x = [s, arctanh a, r, terminated]₁…T, trained on the offline data:
  mean w(σ)·(D(x + σε; σ) - x)², ln σ ~ N(P_mean, P_std²), w the weight of EDM.
New trajectories come from EDM's sampler on the averaged weights. With a policy π their actions are moved along
∇ log π(a|s), so that they follow p(τ) ∝ p_data(τ)·Π π(a|s)^λ: what π would do, where the data can tell what follows.

Differs from the authors' code:
  - the sampler's predictor starts from the noised state (see :mod:`offpolicy.diffusion.sampler`);
  - the small number that keeps a guidance gradient of length 0 finite is added to its norm, not after the division;
  - guidance is normalised and taken at the denoised estimate by default, which their command line leaves off;
  - batches are drawn uniformly with replacement, not as shuffled epochs without the last incomplete batch;
  - episodes are held out by a hash;
  - actions are scaled to ±1 by the bounds of the data before arctanh, which theirs takes of the actions as they are;
  - pieces are as long as those of training unless another length is asked for; theirs have 129 steps after 32;
  - a last step that terminates is kept, and constant channels are generated exactly;
  - the width of the network is 128 by default, theirs 1024.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor

from offpolicy.compute.memory import keep_freed_memory
from offpolicy.data import sampling
from offpolicy.data.replay import Replay
from offpolicy.data.views import BoundView, Noise
from offpolicy.diffusion.sampler import EDM, UNGUIDED, GuidanceOptions, SamplerOptions, policy_score, sample
from offpolicy.diffusion.trajectories import ACTION_LIMIT, BoundTrajectories, Channels, Trajectories, TrajectoryView
from offpolicy.errors import UsageError, check_range
from offpolicy.losses.diffusion import denoise, denoising_loss, noise_level
from offpolicy.nn.unet import TrajectoryUNet
from offpolicy.training.description import Description
from offpolicy.training.drawing import draw_noise
from offpolicy.training.measurement import HeldOut
from offpolicy.training.offline import Draw, Metrics, OfflineModule, Rate, Sizes

HELD_OUT_ROWS = 1024  # sub-trajectories of an evaluation at most


class TrajectoryDiffusion(OfflineModule):
    """Diffusion model of sub-trajectories. It generates data and is no policy; one seed per process.

    Args:
        horizon: T, steps of a sub-trajectory, ≥ 2^(num_blocks - 1).
        stride: spacing of their starts, ≥ 1.
        num_features: F, width of the first block, a multiple of 8, ≥ 16; the authors' is 1024 (178 million weights).
            Below 32 groups have two channels, of which a norm leaves little more than which one is larger.
        num_blocks: B, blocks of widths F, 2F, 4F, …, ≥ 1.
        groupnorm_over_time: let group norms average over time as well; the authors' do not.
        p_mean: mean of ln σ in training.
        p_std: standard deviation of ln σ, > 0.
        held_out: share of the episodes kept for the evaluation loss, in [0, 1).
        lr: Adam's learning rate at its peak.
        lr_decay_steps: updates over which the rate rises from a tenth (the first 10 %) and falls to 0 along a cosine;
            None takes ``max_steps`` of the run that started, 0 keeps the rate constant.
        ema_decay: of the averaged weights that generate, in [0, 1].
        ema_every: updates between two steps of the average, ≥ 1.
        batch_size: sub-trajectories per update over all processes.
        max_grad_norm: limit on the gradient norm, > 0; None for no limit.
    """

    compiled = ("denoiser_loss",)
    seed_axis = False

    def __init__(
        self,
        *,
        horizon: int = 32,
        stride: int = 8,
        num_features: int = 128,
        num_blocks: int = 3,
        groupnorm_over_time: bool = False,
        p_mean: float = -1.2,
        p_std: float = 1.2,
        held_out: float = 0.05,
        lr: float = 2e-3,
        lr_decay_steps: int | None = None,
        ema_decay: float = 0.995,
        ema_every: int = 10,
        batch_size: int = 32,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__()
        check_range("num_blocks", num_blocks, 1)
        check_range("horizon", horizon, 2 ** (num_blocks - 1))
        check_range("p_mean", p_mean)
        check_range("p_std", p_std, 0.0, lower_open=True)
        check_range("held_out", held_out, 0.0, 1.0, upper_open=True)
        check_range("lr", lr, 0.0)
        check_range("ema_decay", ema_decay, 0.0, 1.0)
        check_range("ema_every", ema_every, 1)
        if lr_decay_steps is not None:
            check_range("lr_decay_steps", lr_decay_steps, 0)
        self.save_hyperparameters()
        self.view = TrajectoryView(horizon, stride)
        self.clipped = 0.0  # share of the actions
        self._held_out: Trajectories | None = None

    def build(self, sizes: Sizes) -> None:
        h = self.hparams
        self.channels = Channels(sizes.obs_dim, sizes.action_dim)
        self.denoiser = TrajectoryUNet(
            self.channels.count, h.num_features, h.num_blocks, groupnorm_over_time=h.groupnorm_over_time
        )
        self.target_denoiser = self.target_of(self.denoiser)  # the averaged weights

    # -- data ----------------------------------------------------------------------------------------------------------

    def split(self, replay: Replay) -> tuple[Replay, Replay | None]:
        """The episodes to train on and those held out; None where the share makes less than one episode."""
        share = self.hparams.held_out
        return replay.split(share) if round(share * replay.num_episodes) else (replay, None)

    def select(self, replay: Replay) -> Replay:
        return self.split(replay)[0]

    def fit_normalizer(self, replay: Replay) -> None:
        """Bounds of actions, and the statistics of the channels over all sub-trajectories and their steps."""
        self.normalizer.fit(replay, None, normalize_obs=False, reward_transform="r", eps=0.0)
        self.clipped = self.channels.fit(replay, replay.rows, self.view.coverage(replay), self.normalizer)
        for name, at in (("action_low", -1.0), ("action_high", 1.0)):  # what generated actions are scaled back by
            bound = self.normalizer.environment_action(torch.full_like(self.normalizer.action_scale, at))
            known = self.data_meta.get(name)
            if known is None or self.data_meta.get("action_bounds") == "data" or not np.isfinite(known).all():
                self.data_meta[name] = bound.tolist()

    def on_bind(self, bound: BoundView) -> None:
        assert isinstance(bound, BoundTrajectories)
        bound.channels = self.channels

    def held_out_batch(self, replay: Replay) -> Trajectories | None:
        """Sub-trajectories of held-out episodes with noise, the same in every run; None where there are none."""
        rest = self.split(replay)[1]
        if rest is None or not len(self.view.places(rest)):
            return None
        bound = self.view.bind(rest, self.normalizer, self.device)
        self.on_bind(bound)
        chosen = sampling.permutation(0, 0, len(bound))[:HELD_OUT_ROWS].sort().values
        batch, rows = bound.gather(chosen), torch.arange(len(chosen), device=chosen.device)
        update = torch.zeros(1, dtype=torch.int64, device=rows.device)
        drawn = draw_noise(self.draws(), 0, update, rows, batch.x.dtype)
        noise = {name: value[0].to(batch.x) for name, value in drawn.items()}
        return batch._replace(noise=Noise(**noise))

    # -- training ------------------------------------------------------------------------------------------------------

    def learning_rates(self) -> dict[str, Rate]:
        return {"denoiser": self.decayed_lr}

    def decayed_lr(self, step: int) -> float:
        """From a tenth of ``lr`` to ``lr`` over the first tenth of ``decay_steps``, then a cosine to 0."""
        peak = self.hparams.lr
        if not self.decay_steps:
            return peak
        warm = self.decay_steps // 10
        if step <= warm:
            return peak * (0.1 + 0.9 * (step - 1) / warm)
        progress = min((step - 1 - warm) / (self.decay_steps - warm), 1.0)
        return 0.5 * (1.0 + math.cos(math.pi * progress)) * peak

    def draws(self) -> dict[str, Draw]:
        return {"sigma": Draw(()), "data": Draw((self.hparams.horizon, self.channels.count))}

    def denoiser_loss(self, batch: Trajectories) -> tuple[Tensor, Metrics]:
        """Mean over batch, steps and channels of w(σ)·(D(x; σ) - x₀)²."""
        loss = self.losses(self.denoiser, batch).mean()
        return loss, {"loss": loss.detach()}

    def losses(self, network: TrajectoryUNet, batch: Trajectories) -> Tensor:
        """Loss of each sub-trajectory (B,)."""
        sigma = noise_level(batch.noise.sigma, self.hparams.p_mean, self.hparams.p_std)
        noisy = torch.addcmul(batch.x, sigma[:, None, None], batch.noise.data)
        return denoising_loss(denoise(network, noisy, sigma), batch.x, sigma)

    def phase(self, step: int) -> bool:
        """Whether the average of the weights moves."""
        return step % self.hparams.ema_every == 0

    def update(self, batch: Trajectories, step: int) -> Metrics:
        loss, metrics = self.denoiser_loss(batch)
        self.step("denoiser", loss)
        if step % self.hparams.ema_every == 0:
            self.track("denoiser", 1.0 - self.hparams.ema_decay)
        return metrics

    # -- generating ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        count: int,
        *,
        first: int = 0,
        seed: int = 0,
        horizon: int | None = None,
        policy: OfflineModule | None = None,
        sampler: SamplerOptions = EDM,
        guidance: GuidanceOptions = UNGUIDED,
        batch_size: int = 1024,
        bf16: bool = False,
        compile: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, Tensor]:
        """Trajectories ``first`` … ``first + count - 1`` of the stream ``seed``.

        A trajectory is a function of its number, the seed, the weights, the options and the policy; the batches in
        which it is made change the last bits of products at most.

        Args:
            count: n ≥ 1.
            first: number of the first one, ≥ 0.
            seed: of the noise.
            horizon: T, steps of each; None for that of training.
            policy: whose log-probability guides the actions, with ``guidance.coefficient`` > 0.
            sampler: how noise becomes data.
            guidance: how far the policy pulls.
            batch_size: trajectories made at once; changes speed and memory.
            bf16: compute the network's products in bfloat16, which GPUs do faster.
            compile: compile the network with ``torch.compile``; pays on GPUs.
            progress: called with the number of trajectories made by each batch.

        Returns:
            On the CPU: ``obs (n, T, O)`` in environment units, ``action (n, T, A)`` in [-1, 1], ``reward (n, T)``,
            ``terminated (n, T)`` bool.

        Raises:
            UsageError: a count or horizon out of range, guidance without a policy, or a policy of other sizes.
        """
        check_range("count", count, 1, option="trajectories")
        check_range("batch_size", batch_size, 1, option="batch_size")
        horizon = self.hparams.horizon if horizon is None else horizon
        check_range("horizon", horizon, self.denoiser.shortest, option="horizon")
        if policy is None and guidance.coefficient:
            raise UsageError(
                f"`guidance.coefficient` is {guidance.coefficient} and there is no policy; expected one. Pass `policy`."
            )
        score = None
        if policy is not None and guidance.coefficient:
            mine, its = (self.sizes.obs_dim, self.sizes.action_dim), (policy.sizes.obs_dim, policy.sizes.action_dim)
            if mine != its:
                raise UsageError(
                    f"the policy has observations and actions of {its} numbers, the diffusion model of {mine}; "
                    "expected the same. Pass a policy for the data that the model was trained on."
                )
            score = policy_score(self.channels, policy)
        if self.device.type == "cpu":
            keep_freed_memory()
        network = torch.compile(self.target_denoiser, dynamic=False) if compile else self.target_denoiser
        parts: list[dict[str, Tensor]] = []
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            for start in range(first, first + count, batch_size):
                rows = torch.arange(start, min(start + batch_size, first + count), device=self.device)
                shape = (len(rows), horizon, self.channels.count)

                def noise(i: int, rows: Tensor = rows, shape: tuple[int, ...] = shape) -> Tensor:
                    key = sampling.keys(seed, "sampler", torch.tensor([i + 1], device=self.device))
                    return sampling.normals(key, rows, shape[1:])[0].to(self.dtype_of_weights)

                def denoised(x: Tensor, sigma: Tensor) -> Tensor:
                    return denoise(network, x, sigma)

                x = sample(denoised, shape, sampler, score=score, guidance=guidance, noise=noise)
                parts.append({name: value.cpu() for name, value in self.channels.decode(x).items()})
                if progress is not None:
                    progress(len(rows))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def agent(self) -> Any:
        raise UsageError(
            "TrajectoryDiffusion generates data and is no policy; expected a method that acts. Train one on its data."
        )

    def policy(self, obs: Tensor) -> Tensor:
        return self.agent()

    # -- a run ---------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self._held_out = None

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Loss of the averaged weights on held-out episodes, on the first process; empty where nothing is held out."""
        if not (self.trainer.is_global_zero and self.run.eval_episodes):
            return {}
        if self._held_out is None:
            self._held_out = self.held_out_batch(self.trainer.datamodule.replay)  # type: ignore[attr-defined]
        if self._held_out is None:
            return {}
        with self.trainer.precision_plugin.forward_context():
            return {"loss": float(self.losses(self.target_denoiser, self._held_out).mean())}

    def measurement(self) -> Callback:
        return HeldOut()

    def describe(self) -> Description:
        notes = []
        if self.clipped:
            notes.append(
                f"{100 * self.clipped:.3g} % of the actions lie beyond ±{ACTION_LIMIT} of their bounds and are moved "
                "there, as arctanh is infinite at ±1"
            )
        if self.split(self.trainer.datamodule.replay)[1] is None:  # type: ignore[attr-defined]
            notes.append("too few episodes to hold one out: no evaluation loss")
        return replace(
            super().describe(),
            evaluates="loss of held-out episodes" if self.hparams.held_out else "",
            notes=notes,
            look="python -m offpolicy.sample {folder} synthetic",
        )
