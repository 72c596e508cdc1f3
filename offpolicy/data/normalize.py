"""Normalisers as buffers of the method, so that a checkpoint is enough to act.

Every transformation is affine per column, ``x ↦ (x - center) · scale``, fitted once on the rows that training can draw,
stored in the checkpoint, and used by training and evaluation alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from offpolicy.data.columns import to_numpy
from offpolicy.data.replay import Replay
from offpolicy.data.spaces import known_bounds, scale_bounds
from offpolicy.errors import DataError, UsageError

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_AFFINE = re.compile(rf"^(?P<scale>[+-]?(?:{_NUMBER})?)\*?r(?P<shift>[+-]{_NUMBER})?$")


def parse_reward_transform(text: str) -> tuple[float, float] | None:
    """``"10r-5"`` → (10, -5); ``"return_range"`` → None, as its scale comes from the data.

    Raises:
        UsageError: anything else.
    """
    if text == "return_range":
        return None
    match = _AFFINE.match(text.replace(" ", ""))
    scale = {"": 1.0, "+": 1.0, "-": -1.0}.get(match["scale"]) if match else None
    if match and scale is None:
        scale = float(match["scale"])
    if not match or not scale:
        raise UsageError(
            f"`reward_transform` is {text!r}; expected 'r' (unchanged), an affine form such as '0.1r', 'r-1' or "
            "'10r-5', or 'return_range' (r·1000 / (largest − smallest episode return))."
        )
    return scale, float(match["shift"] or 0.0)


class Normalizer(nn.Module):
    """Affine maps of observations, actions and rewards.

    Args:
        obs_shape: shape of one observation.
        action_dim: A.

    Observations: ``(x - mean) / (std + eps)``. Actions: environment bounds to [-1, 1]. Rewards: ``scale·r + shift``.
    """

    obs_center: Tensor
    obs_scale: Tensor
    action_center: Tensor
    action_scale: Tensor
    reward_center: Tensor
    reward_scale: Tensor

    def __init__(self, obs_shape: tuple[int, ...], action_dim: int) -> None:
        super().__init__()
        self.register_buffer("obs_center", torch.zeros(obs_shape))
        self.register_buffer("obs_scale", torch.ones(obs_shape))
        self.register_buffer("action_center", torch.zeros(action_dim))
        self.register_buffer("action_scale", torch.ones(action_dim))
        self.register_buffer("reward_center", torch.zeros(()))
        self.register_buffer("reward_scale", torch.ones(()))

    def obs(self, obs: Tensor) -> Tensor:
        return (obs - self.obs_center) * self.obs_scale

    def action(self, action: Tensor) -> Tensor:
        """Environment units to [-1, 1]."""
        return (action - self.action_center) * self.action_scale

    def reward(self, reward: Tensor) -> Tensor:
        return (reward - self.reward_center) * self.reward_scale

    def environment_action(self, action: Tensor) -> Tensor:
        """[-1, 1] to environment units."""
        return action / self.action_scale + self.action_center

    @torch.no_grad()
    def fit(
        self, replay: Replay, rows: np.ndarray | None, *, normalize_obs: bool, reward_transform: str, eps: float
    ) -> None:
        """Set the buffers from data.

        Args:
            replay: the data; its ``meta`` may hold ``action_low`` and ``action_high``.
            rows: rows that training draws, int64; None for all of the index. Observations are measured on them, and
                actions where no environment bounds them, so rows of dropped or unchosen episodes never count.
            normalize_obs: standardise observations; constant columns are left alone.
            reward_transform: see :func:`parse_reward_transform`.
            eps: added to the standard deviation.
        """
        if normalize_obs:
            mean, std = mean_std(replay.steps["obs"], rows)
            varies = std > 0
            self.obs_center.copy_(torch.from_numpy(np.where(varies, mean, 0.0)))
            self.obs_scale.copy_(torch.from_numpy(1.0 / np.where(varies, std + eps, 1.0)))
        low, high = action_bounds(replay, rows)
        self.action_center.copy_(torch.from_numpy((high + low) / 2))
        self.action_scale.copy_(torch.from_numpy(2 / np.where(high > low, high - low, 2.0)))
        affine = parse_reward_transform(reward_transform)
        if affine is None:
            returns = replay.returns()
            span = float(returns.max() - returns.min())
            if span <= 0:
                raise UsageError(
                    f"reward_transform 'return_range' divides by the range of episode returns, which is {span}; "
                    "expected returns that differ. Use 'r'."
                )
            affine = 1000.0 / span, 0.0
        scale, shift = affine
        self.reward_center.fill_(-shift / scale)
        self.reward_scale.fill_(scale)


def action_bounds(replay: Replay, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest action per dimension, float64 (A,) each: the environment's where it bounds that side.

    Elsewhere those of the rows, int64, that training draws; None for all rows of the episode index.
    """
    low, high = replay.meta.get("action_low"), replay.meta.get("action_high")
    if low is not None and high is not None and replay.meta.get("action_bounds") != "data":
        low, high = known_bounds(low, high)
        if np.isfinite([low, high]).all():
            return low, high
    action = to_numpy(replay.steps["action"])
    if rows is None and not replay.is_whole:
        rows = replay.rows
    return scale_bounds(replay.meta, action if rows is None else action[rows])


def mean_std(
    column: np.ndarray | Tensor, rows: np.ndarray | None = None, chunk: int = 1 << 18
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population standard deviation over rows (all when None), two passes in float64 and in chunks."""
    array = to_numpy(column)
    count = len(array) if rows is None else len(rows)
    if not count:
        raise DataError("no row can be drawn for training; expected at least one usable transition. See `show`.")

    def chunks() -> Iterator[np.ndarray]:
        for i in range(0, count, chunk):
            yield array[i : i + chunk] if rows is None else array[rows[i : i + chunk]]

    mean = sum(c.sum(0, dtype=np.float64) for c in chunks()) / count
    square = sum(np.square(c - mean).sum(0) for c in chunks()) / count
    return mean, np.sqrt(square)
