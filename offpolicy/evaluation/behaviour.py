"""The policy that collected data, estimated from its actions: densities of actions given states.

A normal and a mixture of five tanh-normals are fitted by maximum likelihood, and the one with the larger likelihood on
episodes held out of the fit is taken.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from offpolicy.nn.policies import HALF_LOG_TWO_PI, tanh_log_det
from offpolicy.nn.stacked import MLP

LIMIT = 0.999  # actions nearer to ±1 are moved there: densities of squashed actions are infinite at ±1
BATCH, STEPS = 256, 10  # rows of an update; parts after each of which the held-out likelihood is looked at
CHUNK = 1 << 14


class ActionDensity(nn.Module):
    """log p(a|s) of a mixture of normals with diagonal covariance, of actions or of their inverse tanh.

    Args:
        obs_dim: O.
        action_dim: A.
        components: normals in the mixture, ≥ 1.
        squashed: the normals are those of atanh(a).
        hidden_dims: widths of the hidden layers.
    """

    def __init__(
        self, obs_dim: int, action_dim: int, components: int, squashed: bool, hidden_dims: tuple[int, ...] = (128, 128)
    ) -> None:
        super().__init__()
        self.components, self.squashed = components, squashed
        self.net = MLP(obs_dim, hidden_dims, components * (2 * action_dim + 1))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """Nats, (B,), of standardised obs (B, O) and actions (B, A) in [-0.999, 0.999]."""
        x = torch.atanh(action) if self.squashed else action
        size = self.components * action.shape[1]
        mean, log_std, weight = self.net(obs).split([size, size, self.components], -1)
        mean, log_std = (part.unflatten(-1, (self.components, -1)) for part in (mean, log_std.clamp(-5.0, 2.0)))
        z = (x.unsqueeze(-2) - mean) * torch.exp(-log_std)
        each = -(0.5 * z * z + log_std + HALF_LOG_TWO_PI).sum(-1)
        found = torch.logsumexp(weight.log_softmax(-1) + each, -1)
        return found - tanh_log_det(x) if self.squashed else found


class Behaviour(NamedTuple):
    """The estimated policy of the data.

    Attributes:
        kind: "normal" or "mixture of 5 tanh-normals".
        likelihood: mean log-density of held-out actions in [-1, 1], nats per step.
        other: that of the kind that was not taken.
        density: the network.
        center, scale: of the observations, (1, O).
    """

    kind: str
    likelihood: float
    other: float
    density: ActionDensity
    center: np.ndarray
    scale: np.ndarray

    @torch.no_grad()
    def log_prob(self, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
        """log π_b(a|s), nats, (n,), of raw observations (n, O) and actions (n, A) in [-1, 1]."""
        x, a = _tensors((obs - self.center) * self.scale, action)
        return torch.cat([self.density(*part) for part in zip(x.split(CHUNK), a.split(CHUNK), strict=True)]).numpy()


def inside_limits(action: np.ndarray) -> np.ndarray:
    """Actions in [-0.999, 0.999], where every density is finite."""
    return np.clip(action, -LIMIT, LIMIT)


def fit_behaviour(
    obs: np.ndarray,
    action: np.ndarray,
    held_obs: np.ndarray,
    held_action: np.ndarray,
    *,
    updates: int | None = None,
    seed: int = 0,
) -> Behaviour:
    """The policy of data by maximum likelihood.

    Args:
        obs, action: of the episodes that are learned from, raw (N, O), and (N, A) in [-1, 1].
        held_obs, held_action: of those held out, by which the kind and the number of updates are chosen.
        updates: for each of the two kinds, ≥ 1; None for twenty passes over the data, at least 100 and at most 2,000.
        seed: of weights and batches.
    """
    updates = min(max(100, 20 * len(obs) // BATCH), 2_000) if updates is None else updates
    center, std = obs.mean(0, keepdims=True), obs.std(0, keepdims=True)
    scale = 1.0 / np.where(std > 1e-6, std, 1.0)
    train, held = _tensors((obs - center) * scale, action), _tensors((held_obs - center) * scale, held_action)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kinds = {"normal": (1, False), "mixture of 5 tanh-normals": (5, True)}
        found = {
            kind: _fitted(ActionDensity(obs.shape[1], action.shape[1], *made), train, held, updates)
            for kind, made in kinds.items()
        }
    kind = max(found, key=lambda name: found[name][0])
    (other,) = (likelihood for name, (likelihood, _) in found.items() if name != kind)
    return Behaviour(kind, found[kind][0], other, found[kind][1], center, scale)


def _fitted(
    density: ActionDensity, train: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], updates: int
) -> tuple[float, ActionDensity]:
    """The largest held-out likelihood on the way, and the network as it was there."""
    optimizer = torch.optim.Adam(density.parameters(), 1e-3)
    best, kept = -math.inf, density.state_dict()
    for part in range(STEPS):
        for _ in range(-(-updates // STEPS)):
            rows = torch.randint(len(train[0]), (BATCH,), device="cpu")
            loss = -density(train[0][rows], train[1][rows]).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            now = float(
                torch.cat([density(*rows) for rows in zip(*(x.split(CHUNK) for x in held), strict=True)]).mean()
            )
        if now > best or part == 0:
            best, kept = now, {name: value.clone() for name, value in density.state_dict().items()}
    density.load_state_dict(kept)
    return best, density


def _tensors(obs: np.ndarray, action: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(obs.astype(np.float32)), torch.from_numpy(inside_limits(action).astype(np.float32))
