"""Sampling from diffusion models of trajectories, with or without guidance by a policy.

The sampler is the stochastic one of EDM (Karras et al. 2022, arXiv:2206.00364, Algorithm 2). Guidance adds the gradient
of log π(a|s) to the action channels before each of its steps (Jackson et al. 2024, Policy-Guided Diffusion,
arXiv:2404.06356). Differs from that paper's code: the predictor starts from the noised state, as in EDM, unless
``reference_predictor`` asks for theirs; a gradient of length 0 stays finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from offpolicy.data.replay import Replay
from offpolicy.diffusion.trajectories import Channels
from offpolicy.errors import DataError, UsageError, check_range

if TYPE_CHECKING:
    from offpolicy.training.offline import OfflineModule

Denoise = Callable[[Tensor, Tensor], Tensor]
PASSING = ("notes", "warnings", "file", "sha256")  # facts about the real data that synthetic ones do not share


@dataclass(frozen=True)
class SamplerOptions:
    """How EDM's sampler goes from noise to data.

    Args:
        steps: N, noise levels, ≥ 2. Each costs two calls of the network (one in first order, and at the last level).
        sigma_min: lowest noise level before 0, > 0.
        sigma_max: level that sampling starts from, > ``sigma_min``.
        rho: larger puts more levels at the low end, > 0.
        churn: new noise over all steps, ≥ 0; 0 makes the sampler deterministic after its start.
        churn_min: lowest level at which new noise is added, ≥ 0.
        churn_max: highest level at which new noise is added.
        noise_scale: factor on the new noise, > 0, slightly above 1 as networks remove a little too much.
        order: 2 for Heun's method, 1 for Euler's.
        reference_predictor: start each step's predictor from the state before the new noise, as the authors' code does;
            their samples are then wider than the data's law (covariance 1.07 times the true one with 256 steps).

    Raises:
        UsageError: a value out of its range, or ``reference_predictor`` together with first order and new noise, whose
            samples collapse.
    """

    steps: int = 256
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    churn: float = 80.0
    churn_min: float = 0.05
    churn_max: float = 50.0
    noise_scale: float = 1.003
    order: int = 2
    reference_predictor: bool = False

    def __post_init__(self) -> None:
        check_range("sampler.steps", self.steps, 2)
        check_range("sampler.sigma_min", self.sigma_min, 0.0, lower_open=True)
        check_range("sampler.sigma_max", self.sigma_max, self.sigma_min, lower_open=True)
        for name in ("rho", "noise_scale"):
            check_range(f"sampler.{name}", getattr(self, name), 0.0, lower_open=True)
        for name in ("churn", "churn_min", "churn_max"):
            check_range(f"sampler.{name}", getattr(self, name), 0.0)
        check_range("sampler.order", self.order, 1, 2)
        if self.reference_predictor and self.order == 1 and self.churn:
            raise UsageError(
                "the reference predictor forgets the new noise, and in first order nothing puts it back, so samples "
                "collapse; expected order 2, churn 0 or the default predictor. Change one of the three."
            )


@dataclass(frozen=True)
class GuidanceOptions:
    """How far a policy pulls actions.

    Args:
        coefficient: κ, ≥ 0; 0 samples without guidance.
        cosine: weight of a bump in the middle of sampling, ≥ 0.
        delay: first steps without guidance, ≥ 0.
        normalize: bring each trajectory's gradient to length 1 over all its actions, so that κ is a distance.
        denoised: take the gradient at the denoised estimate, which costs a call of the network per step, instead of at
            the noisy state.
    """

    coefficient: float = 0.0
    cosine: float = 0.3
    delay: int = 0
    normalize: bool = True
    denoised: bool = True

    def __post_init__(self) -> None:
        for name in ("coefficient", "cosine", "delay"):
            check_range(f"guidance.{name}", getattr(self, name), 0)


EDM, UNGUIDED = SamplerOptions(), GuidanceOptions()


def noise_levels(options: SamplerOptions) -> Tensor:
    """σ₀ = sigma_max … σ_{N-1} = sigma_min, σ_N = 0: float64 (N + 1,), on the host (Eq. 5)."""
    ramp = torch.linspace(0.0, 1.0, options.steps, dtype=torch.float64, device="cpu")
    high, low = options.sigma_max ** (1.0 / options.rho), options.sigma_min ** (1.0 / options.rho)
    return torch.cat([(high + ramp * (low - high)) ** options.rho, ramp.new_zeros(1)])


def guidance_schedule(steps: int, guidance: GuidanceOptions) -> Tensor:
    """Host float64 (N,): λ_i = κ·(1 - i/N + cosine·sin(π(i + 1)/N)), 0 before ``delay`` and at the last step."""
    i = torch.arange(steps, dtype=torch.float64, device="cpu")
    strength = 1.0 - i / steps + guidance.cosine * torch.sin(math.pi * (i + 1) / steps)
    return guidance.coefficient * strength * ((i >= guidance.delay) & (i < steps - 1))


@torch.no_grad()
def sample(
    denoise: Denoise,
    shape: tuple[int, int, int],
    options: SamplerOptions,
    *,
    score: Callable[[Tensor], Tensor] | None = None,
    guidance: GuidanceOptions = UNGUIDED,
    noise: Callable[[int], Tensor],
) -> Tensor:
    """Trajectories from noise.

    Args:
        denoise: D(x; σ) for x (n, T, C) and σ ().
        shape: (n, T, C).
        options: of the sampler.
        score: ∇ log π at y (n, T, C), of the same shape, 0 off the action channels; None for no guidance.
        guidance: its strength; with coefficient 0 the result is bit for bit as without guidance.
        noise: standard normal numbers (n, T, C) of step i; -1 is the start. Called once per step in either case.

    Returns:
        (n, T, C), of the type of the noise.
    """
    levels = noise_levels(options).tolist()
    strengths = guidance_schedule(options.steps, guidance).tolist() if score is not None else [0.0] * options.steps
    x = noise(-1) * levels[0]
    if x.shape != shape:
        raise UsageError(f"`noise` gives the shape {tuple(x.shape)}; expected {tuple(shape)}.")

    def slope(at: Tensor, sigma: float) -> Tensor:
        """(x - D(x; σ)) / σ, the derivative of x by the noise level."""
        return (at - denoise(at, at.new_tensor(sigma))).div_(sigma)

    for i, (sigma, lower, strength) in enumerate(zip(levels, levels[1:], strengths)):
        fresh = noise(i)
        if strength and score is not None:
            gradient = score(denoise(x, x.new_tensor(sigma)) if guidance.denoised else x)
            x = x + strength * (unit_length(gradient) if guidance.normalize else gradient)
        churns = options.churn_min <= sigma <= options.churn_max
        higher = sigma * (1.0 + churns * min(options.churn / options.steps, math.sqrt(2.0) - 1.0))
        noised = x
        if higher > sigma:
            noised = torch.add(x, fresh, alpha=math.sqrt(higher**2 - sigma**2) * options.noise_scale)
        first = slope(noised, higher)
        x = torch.add(x if options.reference_predictor else noised, first, alpha=lower - higher)
        if options.order == 2 and lower > 0.0:
            x = torch.add(noised, first.add_(slope(x, lower)), alpha=0.5 * (lower - higher))
    return x


def policy_score(channels: Channels, policy: OfflineModule) -> Callable[[Tensor], Tensor]:
    """∇ log π(a|s) of whole trajectories by their standardised action channels.

    Observations are only looked at: there is no gradient through them. With z = y·std + mean and a = tanh z the chain
    is std·(1 - a²)·∂log π/∂a; the density's own factor for the tanh is left out, as π is a law of a.

    Args:
        channels: of the model.
        policy: what guides.

    Returns:
        A function of y (n, T, C) with values of the same shape, 0 off the action channels.
    """

    def score(y: Tensor) -> Tensor:
        with torch.enable_grad(), torch.autocast(y.device.type, enabled=False):
            own = y.detach().clone()
            action = own[..., channels.actions].clone().requires_grad_()
            mean, spread = channels.mean[channels.actions], channels.spread[channels.actions]
            logp = policy.log_prob(channels.decode(own)["obs"], torch.tanh(mean + action * spread))
            (gradient,) = torch.autograd.grad(logp.sum(), action)
        found = torch.zeros_like(own)
        found[..., channels.actions] = gradient
        return found

    return score


def unit_length(gradient: Tensor) -> Tensor:
    """Each trajectory's gradient (n, T, C) divided by its own norm over steps and channels; 0 stays 0."""
    norm = torch.linalg.vector_norm(gradient, dim=(-2, -1), keepdim=True)
    return gradient / (norm + 1e-8)  # 1e-8 inside: the authors add it after dividing, and 0 / 0 is no number


def to_replay(trajectories: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Replay:
    """Generated trajectories as a replay that every method of control trains on.

    The last step is the next observation of the one before it, so T steps give T - 1 transitions. An episode ends at
    its first terminated step; where that is step T, it is kept, as it needs no next observation (the authors' code
    drops it), which is marked as unknown.

    Args:
        trajectories: ``obs (n, T, O)`` in environment units, ``action (n, T, A)`` in [-1, 1], ``reward (n, T)`` and
            ``terminated (n, T)`` bool.
        meta: facts about the real data: environment, action bounds, reference scores. They are carried on, so scores
            and evaluations are those of the real data.

    Raises:
        DataError: ``meta`` has no action bounds, or numbers are not finite.
    """
    arrays = {name: trajectories[name].cpu().numpy() for name in ("obs", "action", "reward", "terminated")}
    for name in ("obs", "action", "reward"):
        bad = ~np.isfinite(arrays[name]).reshape(len(arrays[name]), -1).all(1)
        if bad.any():
            raise DataError(
                f"{bad.sum()} of {len(bad)} generated trajectories have a `{name}` that is not finite (first: "
                f"{bad.argmax()}); expected numbers. Train the model longer or with a smaller learning rate."
            )
    low, high = meta.get("action_low"), meta.get("action_high")
    if low is None or high is None:
        raise DataError("`meta` has no `action_low` and `action_high`; expected those of the real data. Pass them.")
    low, high = np.asarray(low, dtype=np.float32), np.asarray(high, dtype=np.float32)
    arrays["action"] = np.clip((high + low) / 2 + arrays["action"] * (high - low) / 2, low, high)

    ended, horizon = arrays["terminated"].astype(bool), arrays["terminated"].shape[1]
    length = np.where(ended.any(1), ended.argmax(1) + 1, horizon - 1)
    kept = np.arange(horizon) < length[:, None]
    known = length < horizon
    tail = {"obs": arrays["obs"][np.arange(len(length)), np.minimum(length, horizon - 1)]}
    return Replay(
        {name: np.ascontiguousarray(array[kept]) for name, array in arrays.items()},
        start=np.cumsum(length) - length,
        length=length,
        tail=tail if known.all() else tail | {"valid": known},
        meta={
            **{key: value for key, value in meta.items() if key not in PASSING},
            "name": f"{meta.get('name', 'data')} synthetic",
            "source": "synthetic",
        },
    )
