"""Views turn a replay into batches: typed tuples of device tensors, gathered by vectorised index arithmetic.

A view is a small description that a method declares (``view = TransitionView()``). Bound to a replay it knows how many
items can be drawn and gathers any shape of item numbers at once, already normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from offpolicy.data.normalize import Normalizer
from offpolicy.data.replay import Replay, _numpy
from offpolicy.data.sampling import unit
from offpolicy.errors import DataError, check_range

PACK_LIMIT = 8 << 30  # bytes: larger stores are gathered column by column


class Noise(SimpleNamespace):
    """Random numbers of a batch by name: ``batch.noise.target`` and the like, each (B, …)."""


class Transitions(NamedTuple):
    """A batch of transitions. With seeds every field has one more axis in front.

    ``obs (B, O)``, ``action (B, A)`` in [-1, 1], ``reward (B,)``, ``next_obs (B, O)``, ``terminated (B,)`` bool;
    ``next_action (B, A)`` when the view asks for it; ``discount (B,)``: γ^k of the k steps really summed in an n-step
    view; ``row (B,)`` int64: the replay row.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    terminated: Tensor
    next_action: Tensor | None = None
    discount: Tensor | None = None
    row: Tensor | None = None
    noise: Any = None


class Windows(NamedTuple):
    """A batch of windows of H consecutive steps of one episode.

    ``obs (B, H, O)``, ``action (B, H, A)``, ``reward (B, H)``, ``terminated (B, H)`` bool, ``mask (B, H)`` bool (true
    on real steps; padding is zero after normalisation), ``t (B, H)`` int64: time step in the episode, counting on
    through the padding; ``return_to_go (B, H)``: undiscounted sum of raw rewards from the step to its episode's end.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    mask: Tensor
    t: Tensor
    return_to_go: Tensor
    row: Tensor | None = None
    noise: Any = None


class BoundView:
    """A view bound to a replay and a device. Subclasses fill ``rows`` and ``gather``."""

    def __init__(self, rows: np.ndarray, device: torch.device, weight: np.ndarray | None = None) -> None:
        if not len(rows):
            raise DataError("no row can be drawn for training; expected at least one usable transition. See `show`.")
        self.rows = torch.from_numpy(rows).to(device)
        self.device = device
        self.cumulative = None
        if weight is not None:
            w = weight.astype(np.float64)
            if not (np.isfinite(w).all() and (w >= 0).all() and w.sum() > 0):
                raise DataError("sampling weights must be finite, ≥ 0 and not all zero. Fix the weight column.")
            self.cumulative = torch.from_numpy(np.cumsum(w) / w.sum()).to(device)

    def __len__(self) -> int:
        """Number of items that can be drawn."""
        return len(self.rows)

    def pick(self, word: Tensor) -> Tensor:
        """Item numbers from 64 random bits each: uniform, or by weight."""
        u = unit(word)
        if self.cumulative is None:
            return (u * len(self.rows)).long()
        return torch.searchsorted(self.cumulative, u, right=True).clamp_(max=len(self.rows) - 1)

    def gather(self, items: Tensor) -> Any:
        """The batch of these items, with fields of shape ``items.shape + …``."""
        raise NotImplementedError


@dataclass(frozen=True)
class TransitionView:
    """Single transitions, or n-step ones, drawn uniformly or by weight over all usable rows.

    Args:
        n_step: rewards summed, ≥ 1. The sum stops at the end of the episode.
        discount: γ inside the n-step sum, in [0, 1]; unused for one step.
        next_action: also gather the action at the next step. Where the episode ends (and the value is multiplied by
            nothing or was cut) it is the row's own action.
        weight: name of a steps column with sampling weights ≥ 0; None for uniform.
    """

    n_step: int = 1
    discount: float = 0.99
    next_action: bool = False
    weight: str | None = None

    def __post_init__(self) -> None:
        check_range("n_step", self.n_step, 1)
        check_range("discount", self.discount, 0.0, 1.0)

    def rows(self, replay: Replay) -> np.ndarray:
        """The rows that can be drawn, int64."""
        _require(replay, ("obs", "action", "reward", "terminated", *([self.weight] if self.weight else [])))
        return replay.usable_rows()

    def bind(self, replay: Replay, normalizer: Normalizer, device: torch.device) -> BoundView:
        """Gather from one packed table on the device where it fits, column by column otherwise."""
        floats = all(_numpy(c).dtype.kind in "fb" for k, c in replay.steps.items() if k in ("obs", "action", "reward"))
        width = 2 * _width(replay.steps["obs"]) + 2 * _width(replay.steps["action"]) + 3
        fits = replay.num_steps * width * 4 <= PACK_LIMIT
        if floats and fits and not replay.is_mapped and _numpy(replay.steps["obs"]).ndim == 2:
            return PackedTransitions(self, replay, normalizer, device)
        return ColumnTransitions(self, replay, normalizer, device)

    def _weights(self, replay: Replay, rows: np.ndarray) -> np.ndarray | None:
        return None if self.weight is None else _numpy(replay.steps[self.weight])[rows]

    def assemble(self, replay: Replay, rows: np.ndarray, last: np.ndarray) -> dict[str, np.ndarray]:
        """Raw fields of the transitions from the first rows to the last rows (the same rows for one step)."""
        steps = {k: _numpy(replay.steps[k]) for k in ("obs", "action", "reward", "terminated")}
        fields = {"obs": steps["obs"][rows], "action": steps["action"][rows], "terminated": steps["terminated"][last]}
        if self.n_step == 1:
            fields["reward"] = steps["reward"][rows]
        else:
            offset = np.arange(self.n_step)
            inside = rows[:, None] + offset <= last[:, None]
            reward = steps["reward"][np.minimum(rows[:, None] + offset, last[:, None])]
            fields["reward"] = (reward * inside * self.discount**offset).sum(1)
            fields["discount"] = np.power(self.discount, last - rows + 1)
        fields["next_obs"] = replay.next_obs(last).cpu().numpy()
        if self.next_action:
            fields["next_action"] = steps["action"][np.minimum(last + 1, replay.episode_end(last))]
        return fields

    def last_rows(self, replay: Replay, rows: np.ndarray) -> np.ndarray:
        """Last row of each sum: n - 1 further, but inside the episode and on a row with a successor."""
        if self.n_step == 1:
            return rows
        last = np.minimum(rows + self.n_step - 1, replay.episode_end(rows))
        usable = np.zeros(len(next(iter(replay.steps.values()))), dtype=bool)
        usable[replay.usable_rows()] = True
        nearest = np.maximum.accumulate(np.where(usable, np.arange(len(usable)), -1))
        return np.maximum(nearest[last], rows)


class PackedTransitions(BoundView):
    """One float32 row per usable transition on the device; one ``index_select`` for any number of batches."""

    def __init__(self, view: TransitionView, replay: Replay, normalizer: Normalizer, device: torch.device) -> None:
        rows = view.rows(replay)
        super().__init__(rows, device, view._weights(replay, rows))
        last = view.last_rows(replay, rows)
        obs, act = _width(replay.steps["obs"]), _width(replay.steps["action"])
        self.fields = {"obs": obs, "action": act, "next_obs": obs, "reward": 1, "terminated": 1}
        self.fields |= {"next_action": act} if view.next_action else {}
        self.fields |= {"discount": 1} if view.n_step > 1 else {}
        table = torch.empty(len(rows), sum(self.fields.values()))
        for i in range(0, len(rows), 1 << 17):  # in chunks: no second copy of the data at any time
            raw = view.assemble(replay, rows[i : i + (1 << 17)], last[i : i + (1 << 17)])
            parts = [torch.from_numpy(np.asarray(raw[k], np.float32)).reshape(-1, w) for k, w in self.fields.items()]
            torch.cat(parts, dim=-1, out=table[i : i + len(parts[0])])
        self.table = table.to(device)
        center, scale = _affine_rows(self.fields, normalizer)
        self.center, self.scale = center.to(device), scale.to(device)

    def gather(self, items: Tensor) -> Transitions:
        flat = self.table.index_select(0, items.reshape(-1))
        flat = (flat - self.center).mul_(self.scale)
        columns = flat.split(list(self.fields.values()), dim=-1)
        fields: dict[str, Tensor] = {}
        for (name, width), column in zip(self.fields.items(), columns, strict=True):
            vector = width > 1 or name in ("obs", "next_obs", "action", "next_action")
            shape = (*items.shape, width) if vector else items.shape
            fields[name] = column.contiguous().reshape(shape)
        fields["terminated"] = fields["terminated"] != 0
        return Transitions(**fields, row=self.rows[items])


class ColumnTransitions(BoundView):
    """The same batches gathered column by column: memory maps, images, stores larger than the device."""

    def __init__(self, view: TransitionView, replay: Replay, normalizer: Normalizer, device: torch.device) -> None:
        rows = view.rows(replay)
        super().__init__(rows, torch.device("cpu"), view._weights(replay, rows))
        self.view, self.replay, self.normalizer, self.target = view, replay, normalizer, device
        self.last = view.last_rows(replay, rows)

    def gather(self, items: Tensor) -> Transitions:
        items = items.to(self.device)
        rows = self.rows[items]
        raw = self.view.assemble(self.replay, rows.reshape(-1).numpy(), self.last[items.reshape(-1).numpy()])
        fields = {}
        for name, value in raw.items():
            x = torch.from_numpy(np.ascontiguousarray(value)).to(self.target).reshape(*items.shape, *value.shape[1:])
            if name in ("obs", "next_obs") and x.is_floating_point():
                x = self.normalizer.obs(x)
            elif name in ("action", "next_action"):
                x = self.normalizer.action(x)
            elif name == "reward":
                x = self.normalizer.reward(x)
            fields[name] = x
        return Transitions(**fields, row=rows.to(self.target))


@dataclass(frozen=True)
class WindowView:
    """Windows of consecutive steps inside one episode.

    Args:
        horizon: H, steps in a window, ≥ 1.
        pad: "right": start anywhere, zeros after the episode's end; "left": end anywhere, zeros before its start;
            "none": only windows that lie inside an episode, so episodes shorter than H give none.
    """

    horizon: int
    pad: str = "right"

    def __post_init__(self) -> None:
        check_range("horizon", self.horizon, 1)
        if self.pad not in ("right", "left", "none"):
            raise ValueError(f"pad is {self.pad!r}; expected 'right', 'left' or 'none'.")

    def rows(self, replay: Replay) -> np.ndarray:
        """First rows of windows (last rows when padding on the left), int64, each equally likely."""
        _require(replay, ("obs", "action", "reward", "terminated"))
        if self.pad != "none":
            return replay.rows
        count = np.maximum(replay.length - self.horizon + 1, 0)
        if not count.any():
            raise DataError(
                f"no episode has {self.horizon} steps (the longest has {replay.length.max()}); expected at least one "
                "as long as the horizon. Choose a shorter horizon or pad the windows."
            )
        offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return np.repeat(replay.start, count) + offset

    def bind(self, replay: Replay, normalizer: Normalizer, device: torch.device) -> BoundView:
        return BoundWindows(self, replay, normalizer, device)


class BoundWindows(BoundView):
    def __init__(self, view: WindowView, replay: Replay, normalizer: Normalizer, device: torch.device) -> None:
        on_disk = replay.is_mapped
        super().__init__(view.rows(replay), torch.device("cpu") if on_disk else device)
        self.view, self.normalizer, self.target = view, normalizer, device
        self.replay = replay if on_disk else replay.to(device)
        self.first, self.last = (torch.from_numpy(x).to(self.device) for x in (replay.start, replay.end))
        episode = np.zeros(len(next(iter(replay.steps.values()))), dtype=np.int64)
        episode[replay.rows] = replay.episode_of
        self.episode = torch.from_numpy(episode).to(self.device)
        to_go = np.zeros(len(episode), dtype=np.float32)
        to_go[replay.rows] = return_to_go(_numpy(replay.steps["reward"])[replay.rows], replay.length)
        self.return_to_go = torch.from_numpy(to_go).to(self.device)

    def gather(self, items: Tensor) -> Windows:
        anchor = self.rows[items.to(self.device)]
        offset = torch.arange(self.view.horizon, device=self.device)
        if self.view.pad == "left":
            offset = offset - (self.view.horizon - 1)
        episode = self.episode[anchor][..., None]
        row = anchor[..., None] + offset
        mask = (row >= self.first[episode]) & (row <= self.last[episode])
        inside = row.clamp(self.first[episode], self.last[episode])
        raw = self.replay.take(inside, ("obs", "action", "reward", "terminated"))
        t = row - self.first[episode]
        to = self.target
        mask, t, to_go = mask.to(to), t.to(to), self.return_to_go[inside].to(to)
        obs, action = self.normalizer.obs(raw["obs"].to(to)), self.normalizer.action(raw["action"].to(to))
        return Windows(
            obs=obs * mask[..., None],
            action=action * mask[..., None],
            reward=self.normalizer.reward(raw["reward"].to(to)) * mask,
            terminated=raw["terminated"].to(to).bool() & mask,
            mask=mask,
            t=t.clamp(min=0),
            return_to_go=to_go * mask,
            row=inside.to(to),
        )


def return_to_go(reward: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Undiscounted sum of rewards from each step to the end of its episode; rows episode by episode, float64."""
    total = np.concatenate([[0.0], np.cumsum(reward, dtype=np.float64)])
    end = np.repeat(np.cumsum(length), length)
    return total[end] - total[:-1]


def _affine_rows(fields: dict[str, int], normalizer: Normalizer) -> tuple[Tensor, Tensor]:
    """Centre and scale of every column of a packed row."""
    one = torch.ones(1, dtype=normalizer.obs_center.dtype, device=normalizer.obs_center.device)
    maps = {
        "obs": (normalizer.obs_center, normalizer.obs_scale),
        "action": (normalizer.action_center, normalizer.action_scale),
        "reward": (normalizer.reward_center[None], normalizer.reward_scale[None]),
        "plain": (one * 0, one),
    }
    alias = {"next_obs": "obs", "next_action": "action", "terminated": "plain", "discount": "plain"}
    pairs = [maps[alias.get(name, name)] for name in fields]
    return torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])


def _width(column: np.ndarray | Tensor) -> int:
    return int(np.prod(column.shape[1:]))


def _require(replay: Replay, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in replay.steps]
    if missing:
        raise DataError(
            f"the data have columns {sorted(replay.steps)} but the method needs {missing} too; expected all of "
            f"{list(columns)}. Add the columns or choose a method that does not need them."
        )
