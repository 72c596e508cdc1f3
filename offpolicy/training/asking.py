"""What trained policies do in the states of data, all at once, before anything is learned from it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from offpolicy.errors import UsageError
from offpolicy.training.acting import ActingModule

How = Literal["mean", "sample"]
CHUNK = 1 << 14  # states for which a policy is asked at a time


def check_policy(method: Any, obs_dim: int, action_dim: int, *, sampled: bool = False) -> None:
    """Whether a trained method is a policy of one observation, for states and actions of these widths.

    Args:
        method: what was trained.
        obs_dim, action_dim: of the data.
        sampled: it is asked for samples, not for the action that evaluation plays.

    Raises:
        UsageError: it is none.
    """
    name = type(method).__name__
    if not isinstance(method, ActingModule):
        raise UsageError(f"{name} is no policy of states and actions; expected a control method, such as TD3BC.")
    method.check_built()
    method.check_one_seed()
    if type(method).agent is not ActingModule.agent:
        raise UsageError(
            f"{name} acts by more than the observation (a goal, or the history of an episode); expected a policy of "
            "one observation, such as TD3BC. Evaluate it in its environment."
        )
    found = (method.sizes.obs_dim, method.sizes.action_dim)
    if found != (obs_dim, action_dim):
        raise UsageError(
            f"{name} takes observations and actions of widths {found}, the data have {(obs_dim, action_dim)}; expected "
            "the same. Pass data of its environment."
        )
    if sampled and not is_stochastic(method):
        raise UsageError(
            f"{name} is deterministic, so there is nothing to draw; expected a stochastic policy. Ask for its mean."
        )


def is_stochastic(method: Any) -> bool:
    """Whether actions can be drawn from a trained method."""
    obs = torch.zeros(1, method.sizes.obs_dim, device=method.device, dtype=method.dtype_of_weights)
    try:
        with torch.no_grad():
            method.sample_action(obs, obs.new_zeros(1, method.sizes.action_dim))
    except UsageError:
        return False
    return True


def check_density(method: Any) -> None:
    """Whether a policy gives the density of its actions, without which it has no importance weights.

    Raises:
        UsageError: it is deterministic, or draws actions of unknown density.
    """
    name = type(method).__name__
    if not is_stochastic(method):
        raise UsageError(
            f"{name} is deterministic, so its actions have no density and it has no importance weights; expected a "
            "stochastic policy, such as IQL's. Take --estimators fqe."
        )
    if type(method).log_density is ActingModule.log_density:
        raise UsageError(
            f"{name} draws actions but does not give their density; expected it to define `log_density(obs, action)` "
            "beside `sample_action`. Add it, or take --estimators fqe."
        )


def log_densities(method: Any, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
    """log π(a|s) of a trained policy.

    Args:
        method: see :func:`check_density`.
        obs: raw observations (n, O).
        action: (n, A) in [-1, 1].

    Returns:
        Nats, float64 (n,), for the density of actions in [-1, 1].
    """
    found = []
    with torch.no_grad():
        for i in range(0, len(obs), CHUNK):
            x, a = (torch.from_numpy(part[i : i + CHUNK]).to(method.device) for part in (obs, action))
            found.append(method.log_prob(x, a).double().cpu().numpy())
    return np.concatenate(found)


def asked_actions(methods: Sequence[Any], obs: np.ndarray, how: How = "mean", samples: int = 1) -> np.ndarray:
    """What policies do in states.

    Args:
        methods: P trained policies, see :func:`check_policy`.
        obs: raw observations (n, O).
        how: "mean", the action that evaluation plays; "sample", draws from a fixed seed.
        samples: M, drawn for each state; 1 with "mean".

    Returns:
        float32 (n, P, M, A), environment units, inside the range of each policy's actions.
    """
    every = []
    for method in methods:
        generator = torch.Generator(device="cpu").manual_seed(0)
        parts = [obs[i : i + CHUNK] for i in range(0, len(obs), CHUNK)]
        found = [_one(method, part, how, samples, generator) for part in parts]
        every.append(np.concatenate(found).astype(np.float32))
    return np.stack(every, 1)


def _one(method: Any, obs: np.ndarray, how: How, samples: int, generator: torch.Generator) -> np.ndarray:
    """(n, M, A)."""
    if how == "mean":
        return np.asarray(method.act(obs))[:, None]
    x = method.normalized(obs).repeat_interleave(samples, 0)
    noise = torch.randn(len(x), method.sizes.action_dim, generator=generator, device="cpu").to(x)
    with torch.no_grad():
        action = method.ask(lambda: method.normalizer.environment_action(method.sample_action(x, noise).clamp(-1, 1)))
    return action.float().cpu().numpy().reshape(len(obs), samples, -1)


def weights_mark(method: Any) -> str:
    """SHA-256 of the weights of a method."""
    digest = hashlib.sha256()
    for name, value in sorted(method.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
