"""The trajectory view: sub-trajectories of fixed length as one array of channels, for models that generate them.

The channels of a step are [obs (O), arctanh of the action (A), reward, terminated], each standardised. Which
sub-trajectories are taken follows Policy-Guided Diffusion (Jackson et al. 2024, arXiv:2404.06356, authors' code).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from offpolicy.data.columns import is_float, to_numpy
from offpolicy.data.extras import ExtraColumns, checked_names
from offpolicy.data.mixing import mixture_weights
from offpolicy.data.normalize import Normalizer
from offpolicy.data.replay import Replay
from offpolicy.data.views import CHUNK, PACK_LIMIT, BoundView, require_columns
from offpolicy.errors import DataError, check_range

ACTION_LIMIT = 0.999  # actions are clipped to ±0.999 before the arctanh, which is infinite at ±1 (the authors' bound)
COLUMNS = ("obs", "action", "reward", "terminated")


class Trajectories(NamedTuple):
    """A batch of sub-trajectories: ``x (B, T, C)``, standardised channels, and ``row (B,)`` int64, their first rows.

    ``extra``: the extra columns by name, (B, T, …).
    """

    x: Tensor
    row: Tensor | None = None
    noise: Any = None
    extra: Any = None


class Channels(nn.Module):
    """Steps of trajectories as channels and back; an affine map per channel, kept in the checkpoint.

    A channel that is constant in the data is only centred, and decoded to its constant whatever the model says.

    Args:
        obs_dim: O.
        action_dim: A.
    """

    mean: Tensor
    std: Tensor
    spread: Tensor

    def __init__(self, obs_dim: int, action_dim: int) -> None:
        super().__init__()
        self.obs_dim, self.count = obs_dim, obs_dim + action_dim + 2
        self.actions = slice(obs_dim, obs_dim + action_dim)
        self.register_buffer("mean", torch.zeros(self.count))
        self.register_buffer("std", torch.ones(self.count))  # of the data; 1 where it is 0
        self.register_buffer("spread", torch.ones(self.count))  # of the data

    @staticmethod
    def raw(obs: Tensor, action: Tensor, reward: Tensor, terminated: Tensor) -> Tensor:
        """Channels (…, C) before standardisation of obs (…, O), action (…, A) in [-1, 1], reward and terminated (…)."""
        bounded = action.clamp(-ACTION_LIMIT, ACTION_LIMIT)
        return torch.cat([obs, torch.atanh(bounded), reward[..., None], terminated[..., None].to(obs.dtype)], -1)

    def encode(self, obs: Tensor, action: Tensor, reward: Tensor, terminated: Tensor) -> Tensor:
        """Standardised channels; arguments as of :meth:`raw`."""
        return (self.raw(obs, action, reward, terminated) - self.mean) / self.std

    def decode(self, x: Tensor) -> dict[str, Tensor]:
        """Standardised channels (…, C) to ``obs action reward terminated``; terminated is what exceeds 0.5."""
        raw = torch.addcmul(self.mean, x, self.spread)
        return {
            "obs": raw[..., : self.obs_dim],
            "action": torch.tanh(raw[..., self.actions]),
            "reward": raw[..., -2],
            "terminated": raw[..., -1] > 0.5,
        }

    @torch.no_grad()
    def fit(self, replay: Replay, rows: np.ndarray, weight: np.ndarray, normalizer: Normalizer) -> float:
        """Set the buffers to mean and population deviation over rows (n,), each counted ``weight (n,)`` times.

        Returns:
            The share of the actions that are clipped, in [0, 1].

        Raises:
            DataError: numbers that are not finite.
        """
        used = weight > 0
        rows, weight = rows[used], weight[used].astype(np.float64)
        count = weight.sum()

        def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for i in range(0, len(rows), CHUNK):
                yield raw_rows(replay, rows[i : i + CHUNK], normalizer).double().cpu().numpy(), weight[i : i + CHUNK]

        parts = [(w @ x, x.min(0), x.max(0)) for x, w in chunks()]
        mean = sum(total for total, _, _ in parts) / count
        bad = np.flatnonzero(~np.isfinite(mean))
        if len(bad):
            names = (*["obs"] * self.obs_dim, *["action"] * (self.count - self.obs_dim - 2), "reward", "terminated")
            raise DataError(
                f"`{names[bad[0]]}` has numbers that are not finite; expected finite ones. Remove the episodes that "
                "have them."
            )
        low, high = np.min([low for _, low, _ in parts], 0), np.max([high for _, _, high in parts], 0)
        square = sum(w @ np.square(x - mean) for x, w in chunks())
        varies = high > low
        spread = np.where(varies, np.sqrt(square / count), 0.0)
        self.mean.copy_(torch.from_numpy(np.where(varies, mean, low)))
        self.spread.copy_(torch.from_numpy(spread))
        self.std.copy_(torch.from_numpy(np.where(varies, spread, 1.0)))
        action = normalizer.action(replay.take(rows, ("action",))["action"].to(normalizer.action_scale))
        return float((action.abs() > ACTION_LIMIT).double().mean())


@dataclass(frozen=True)
class TrajectoryView:
    """Sub-trajectories of consecutive steps inside one episode.

    Of all starts whose sub-trajectory stays in its episode every ``stride``-th is drawn from, the first of each
    episode, and the one whose last step terminates; never one whose last step was cut by a time limit.

    Args:
        horizon: T, steps of a sub-trajectory, ≥ 2.
        stride: spacing in the list of all starts, ≥ 1.
        extra: names of steps columns that come along as ``batch.extra.<name>``, as the data have them.
    """

    horizon: int = 32
    stride: int = 8
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checked_names(self.extra)
        check_range("horizon", self.horizon, 2)
        check_range("stride", self.stride, 1)

    def places(self, replay: Replay) -> np.ndarray:
        """Places in ``replay.rows`` where sub-trajectories start, ascending int64; may be none."""
        require_columns(replay, COLUMNS)
        if replay.steps["obs"].ndim != 2 or not is_float(replay.steps["action"]):
            found = f"shape {tuple(replay.steps['obs'].shape[1:])} and actions of type {replay.steps['action'].dtype}"
            raise DataError(
                f"the data have observations of {found}; expected vectors of state and continuous actions. Choose a "
                "state-based data set."
            )
        first = np.cumsum(replay.length) - replay.length
        count = np.maximum(replay.length - self.horizon + 1, 0)  # starts of each episode
        offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        place = np.repeat(first, count) + offset
        terminates = np.repeat(to_numpy(replay.steps["terminated"])[replay.end].astype(bool), count)
        final = offset == np.repeat(count, count) - 1  # the sub-trajectory ends where the episode does
        chosen = (np.arange(len(place)) % self.stride == 0) | (offset == 0) | (final & terminates)
        chosen &= ~final | terminates
        if "valid_td" in replay.steps:  # a step whose successor is another one's may only be last
            broken = np.append(0, np.cumsum(~to_numpy(replay.steps["valid_td"]).astype(bool)[replay.rows]))
            chosen &= broken[place + self.horizon - 1] == broken[place]
        return place[chosen]

    def starts(self, replay: Replay) -> np.ndarray:
        """As :meth:`places`. Raises :class:`DataError` when there is none."""
        places = self.places(replay)
        if not len(places):
            raise DataError(
                f"no episode has a sub-trajectory of {self.horizon} steps (the longest has {replay.length.max()} steps;"
                " where a time limit cut it, its last step is left out). Choose a shorter one: --model.horizon."
            )
        return places

    def coverage(self, replay: Replay) -> np.ndarray:
        """In how many sub-trajectories each of ``replay.rows`` is, int64."""
        places = self.starts(replay)
        change = np.zeros(replay.num_steps + 1, dtype=np.int64)
        np.add.at(change, places, 1)
        np.add.at(change, places + self.horizon, -1)
        return np.cumsum(change)[:-1]

    def bind(self, replay: Replay, normalizer: Normalizer, device: torch.device) -> BoundTrajectories:
        return BoundTrajectories(self, replay, normalizer, device)


class BoundTrajectories(BoundView):
    """One row of raw channels per step on the device where they fit; gathered from the columns otherwise.

    ``channels`` standardises what is gathered; until a method sets it, channels are raw.
    """

    channels: Channels | None = None

    def __init__(self, view: TrajectoryView, replay: Replay, normalizer: Normalizer, device: torch.device) -> None:
        width = replay.steps["obs"].shape[1] + replay.steps["action"].shape[1] + 2
        fits = replay.num_steps * width * 4 <= PACK_LIMIT and not replay.is_mapped
        places = view.starts(replay)
        first_row = replay.rows[places]
        super().__init__(places, device if fits else torch.device("cpu"), mixture_weights(replay, first_row))
        self.first_row = torch.from_numpy(first_row).to(self.device)
        self.replay, self.normalizer, self.target = replay, normalizer, device
        self.offset = torch.arange(view.horizon, device=self.device)
        self.extra = ExtraColumns(view.extra, replay, self.device, device, normalizer.obs_scale.dtype)
        self.rows_of_places = torch.from_numpy(replay.rows).to(self.device) if view.extra else None
        self.table: Tensor | None = None
        if fits:
            chunks = [replay.rows[i : i + CHUNK] for i in range(0, replay.num_steps, CHUNK)]
            self.table = torch.cat([raw_rows(replay, rows, normalizer).to(device) for rows in chunks])

    def row(self, items: Tensor) -> Tensor:
        """The replay rows in which sub-trajectories start."""
        return self.first_row.take(items)

    def gather(self, items: Tensor) -> Trajectories:
        items = items.to(self.device)
        place = super().row(items)[..., None] + self.offset
        if self.table is not None:
            x = self.table.index_select(0, place.reshape(-1))
        else:
            x = raw_rows(self.replay, self.replay.rows[place.reshape(-1).numpy()], self.normalizer)
        if self.channels is not None:
            x = (x - self.channels.mean) / self.channels.std
        row = self.row(items).to(self.target)
        extra = None if self.rows_of_places is None else self.extra.take(self.rows_of_places[place])
        return Trajectories(x=x.reshape(*place.shape, -1), row=row, extra=extra)


def raw_rows(replay: Replay, rows: np.ndarray, normalizer: Normalizer) -> Tensor:
    """Raw channels (n, C) of these rows, on the normaliser's device."""
    scale = normalizer.obs_scale
    found = {name: column.to(scale) for name, column in replay.take(rows, COLUMNS).items()}
    return Channels.raw(found["obs"], normalizer.action(found["action"]), found["reward"], found["terminated"])
