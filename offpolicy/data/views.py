"""Views turn a replay into batches: typed tuples of device tensors, gathered by vectorised index arithmetic.

A view is a small description that a method declares (``view = TransitionView()``). Bound to a replay it knows how many
items can be drawn and gathers any shape of item numbers at once, already normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from offpolicy.data.columns import is_float, row_width, to_numpy
from offpolicy.data.extras import ExtraColumns, checked_names
from offpolicy.data.mixing import SHARE, mixture_weights, split_items
from offpolicy.data.normalize import Normalizer
from offpolicy.data.replay import Replay
from offpolicy.data.ring import Ring
from offpolicy.data.sampling import unit
from offpolicy.errors import DataError, UsageError, check_range, listed

PACK_LIMIT = 8 << 30  # bytes: larger stores are gathered column by column
CHUNK = 1 << 14  # rows packed at a time


class Noise(SimpleNamespace):
    """Random numbers of a batch by name: ``batch.noise.target`` and the like, each (B, …)."""


class Transitions(NamedTuple):
    """A batch of transitions. With seeds every field has one more axis in front.

    ``obs (B, O)``, ``action (B, A)`` in [-1, 1], ``reward (B,)``, ``next_obs (B, O)``, ``terminated (B,)`` bool;
    ``next_action (B, A)`` when the view asks for it; ``discount (B,)``: γ^k of the k steps really summed in an n-step
    view; ``row (B,)`` int64: the replay row; ``extra``: the extra columns of that row by name.
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
    extra: Any = None


class Windows(NamedTuple):
    """A batch of windows of H consecutive steps of one episode.

    ``obs (B, H, O)``, ``action (B, H, A)``, ``reward (B, H)``, ``terminated (B, H)`` bool, ``mask (B, H)`` bool (true
    on real steps; padding is zero after normalisation), ``t (B, H)`` int64: time step in the episode, counting on
    through the padding; ``return_to_go (B, H)``: undiscounted sum of raw rewards from the step to its episode's end;
    ``extra``: the extra columns by name, (B, H, …), zero in padding.
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
    extra: Any = None


class BoundView:
    """A view bound to a replay and a device. Subclasses define ``gather``.

    Args:
        rows: row of each item that can be drawn, int64; a number n stands for the rows 0 … n - 1.
        device: where item numbers live.
        weight: sampling weights of the items, ≥ 0; None for uniform.
        split: how many items at the front are of the first kind, and the share of them in a batch; None for one kind.

    Where ``uniforms`` is not 0, ``gather`` takes that many random numbers in [0, 1) per item too.
    """

    uniforms: int = 0

    def __init__(
        self,
        rows: np.ndarray | int,
        device: torch.device,
        weight: np.ndarray | None = None,
        split: tuple[int, float] | None = None,
    ) -> None:
        self.count = rows if isinstance(rows, int) else len(rows)
        self.number: int | Tensor = self.count  # as draws take it: a tensor in its place where items become more
        self.split = split
        if split is not None and weight is not None:
            raise UsageError(
                "rows have weights, and offline and online ones a fixed share; expected one of the two. Pass "
                "--data.online.mix union."
            )
        if not self.count:
            raise DataError("no row can be drawn for training; expected at least one usable transition. See `show`.")
        self.rows = None if isinstance(rows, int) else torch.from_numpy(rows).to(device)
        self.device = device
        self.cumulative: Tensor | None = None  # probability of the items up to the end of each run of equal weights
        if weight is not None:
            w = weight.astype(np.float64)
            if not (np.isfinite(w).all() and (w >= 0).all() and w.sum() > 0):
                raise DataError("sampling weights must be finite, ≥ 0 and not all zero. Fix the weight column.")
            first = np.flatnonzero(np.append(True, w[1:] != w[:-1]))
            length = np.diff(np.append(first, len(w)))
            p = w[first] * length / (w[first] * length).sum()
            runs = np.cumsum(p), np.cumsum(p) - p, length / np.where(p > 0, p, np.inf), first, first + length - 1
            self.cumulative, *self.runs = (torch.from_numpy(x).to(device) for x in runs)

    def __len__(self) -> int:
        """Number of items that can be drawn."""
        return self.count

    def row(self, items: Tensor) -> Tensor:
        """The replay rows of items."""
        return items if self.rows is None else self.rows.take(items)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Observations (N, O) and actions (N, A) of all items, as they are gathered."""
        parts = [self.gather(part) for part in torch.arange(len(self), device=self.device).split(1 << 16)]
        return torch.cat([part.obs for part in parts]), torch.cat([part.action for part in parts])

    def pick(self, word: Tensor, row: Tensor | None = None) -> Tensor:
        """Item numbers (…, B) from 64 random bits each: uniform, by weight, or of two kinds by the row of the batch.

        Args:
            word: int64 (…, B).
            row: the rows of the global batch, int64 (B,). With a share p of the first kind, row b is of it where
                ⌊(b + 1)·p⌋ > ⌊b·p⌋: exactly ⌊B·p⌋ rows of any batch are.
        """
        if self.split is None or row is None:
            return self.items(unit(word))
        front, share = self.split
        exact = row.double()  # 100 · 0.53 is less than 53 in float32, and can be by a bit in float64
        first = ((exact + 1) * share + 1e-9).floor() > (exact * share + 1e-9).floor()
        count, start = torch.where(first, front, self.number - front), torch.where(first, 0, front)
        return start + (unit(word) * count).long()

    def items(self, u: Tensor) -> Tensor:
        """The same from float64 uniforms in [0, 1)."""
        if self.cumulative is None:
            return (u * self.number).long()
        run = torch.searchsorted(self.cumulative, u.contiguous(), right=True).clamp_(max=len(self.cumulative) - 1)
        low, density, first, last = (x[run] for x in self.runs)
        return torch.minimum(first + ((u - low) * density).long(), last)

    def gather(self, items: Tensor) -> Any:
        """The batch of these items, with fields of shape ``items.shape + …``."""
        raise NotImplementedError

    def grow(self, replay: Replay) -> bool:
        """Take up what was appended to the replay at once, in tensors that stay in their places; else return False."""
        return False


@dataclass(frozen=True)
class TransitionView:
    """Single transitions, or n-step ones, drawn uniformly or by weight over all usable rows.

    Args:
        n_step: rewards summed, ≥ 1. The sum stops at the end of the episode.
        discount: γ inside the n-step sum, in [0, 1]; unused for one step.
        next_action: also gather the action at the next step. Where the episode ends (and the value is multiplied by
            nothing or was cut) it is the row's own action.
        weight: name of a steps column with sampling weights ≥ 0; None for uniform.
        reward: whether the method needs rewards; without, they are 0 where the data have none.
        extra: names of steps columns that come along as ``batch.extra.<name>``, as the data have them; of an n-step
            sum those of its first row.
    """

    n_step: int = 1
    discount: float = 0.99
    next_action: bool = False
    weight: str | None = None
    reward: bool = True
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checked_names(self.extra)
        check_range("n_step", self.n_step, 1)
        check_range("discount", self.discount, 0.0, 1.0)

    def rows(self, replay: Replay) -> np.ndarray | None:
        """The rows that can be drawn, int64; None when that is every row."""
        needed = {"obs", "action", "terminated", *(["reward"] * self.reward), self.weight} - {None}
        require_columns(replay, sorted(map(str, needed)))
        return None if replay.all_usable else replay.usable_rows()

    def bind(self, replay: Replay, normalizer: Normalizer, device: torch.device) -> BoundView:
        """Gather from one packed table on the device where it fits, column by column otherwise."""
        obs, action = replay.steps["obs"], replay.steps["action"]
        width, growing = 2 * row_width(obs) + 2 * row_width(action) + 3, grows(self, replay)
        fits = (len(obs) if growing else replay.num_steps) * width * 4 <= PACK_LIMIT
        floats = all(is_float(replay.steps[k]) for k in ("obs", "action", "reward") if k in replay.steps)
        if fits and obs.ndim == 2 and not replay.is_mapped and floats:
            kind: Any = GrowingTransitions if growing else PackedTransitions
            return kind(self, replay, normalizer, device)
        return ColumnTransitions(self, replay, normalizer, device)

    def weights(self, replay: Replay) -> np.ndarray | None:
        """Sampling weights of the rows that can be drawn; None for uniform."""
        rows = self.rows(replay)
        column = None if self.weight is None else to_numpy(replay.steps[self.weight])
        return mixture_weights(replay, rows, column if column is None or rows is None else column[rows])

    def fields(self, replay: Replay, rows: np.ndarray, normalizer: Normalizer) -> dict[str, Tensor]:
        """Normalised fields of the transitions that start at these rows (n,), on the normaliser's device."""
        dtype, device = normalizer.obs_scale.dtype, normalizer.obs_scale.device
        last = self.last_rows(replay, rows)

        def numbers(x: Tensor) -> Tensor:
            return x.to(device, dtype)

        def observation(x: Tensor) -> Tensor:
            return normalizer.obs(numbers(x)) if x.is_floating_point() else x.to(device)  # images stay as they are

        first = replay.take(rows, ("obs", "action"))
        fields = {
            "obs": observation(first["obs"]),
            "action": normalizer.action(numbers(first["action"])),
            "next_obs": observation(replay.next_obs(last)),
            "reward": self._reward(replay, rows, last, normalizer, numbers),
            "terminated": replay.take(last, ("terminated",))["terminated"].to(device).bool(),
        }
        if self.next_action:
            after = np.minimum(last + 1, replay.episode_end(last))
            fields["next_action"] = normalizer.action(numbers(replay.take(after, ("action",))["action"]))
        if self.n_step > 1:
            fields["discount"] = numbers(torch.from_numpy(np.power(self.discount, last - rows + 1)))
        return fields

    def _reward(
        self,
        replay: Replay,
        rows: np.ndarray,
        last: np.ndarray,
        normalizer: Normalizer,
        numbers: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Σ γ^k r over the rows of each sum; the transformation of rewards applies to every r."""
        if "reward" not in replay.steps:
            return numbers(torch.zeros(len(rows), device="cpu"))
        if self.n_step == 1:
            return normalizer.reward(numbers(replay.take(rows, ("reward",))["reward"]))
        each = rows[:, None] + np.arange(self.n_step)
        reward = normalizer.reward(numbers(replay.take(np.minimum(each, last[:, None]), ("reward",))["reward"]))
        weight = np.where(each <= last[:, None], self.discount ** np.arange(self.n_step), 0.0)
        return (reward * numbers(torch.from_numpy(weight))).sum(-1)

    def last_rows(self, replay: Replay, rows: np.ndarray) -> np.ndarray:
        """Last row of each sum: n - 1 further, but inside the episode and before any row without a successor."""
        if self.n_step == 1:
            return rows
        stops = np.append(replay.unusable, np.iinfo(np.int64).max)
        last = np.minimum(rows + self.n_step - 1, replay.episode_end(rows))
        return np.minimum(last, stops[np.searchsorted(stops, rows)] - 1)


class PackedTransitions(BoundView):
    """One normalised row per usable transition on the device; one ``index_select`` for any number of batches."""

    def __init__(self, view: TransitionView, replay: Replay, normalizer: Normalizer, device: torch.device) -> None:
        rows = view.rows(replay)
        split = split_items(replay, rows)
        super().__init__(replay.num_steps if rows is None else rows, device, view.weights(replay), split)
        self.lay_out(view, replay, normalizer, len(self))
        every = np.arange(replay.num_steps) if rows is None else rows
        self.write(replay, every, np.arange(len(self)))

    def lay_out(self, view: TransitionView, replay: Replay, normalizer: Normalizer, rows: int) -> None:
        """Room for so many transitions, with nothing in it."""
        obs, act = row_width(replay.steps["obs"]), row_width(replay.steps["action"])
        self.view, self.normalizer = view, normalizer
        self.widths = {"obs": obs, "action": act, "next_obs": obs, "reward": 0, "terminated": 0}
        self.widths |= {"next_action": act} if view.next_action else {}
        self.widths |= {"discount": 0} if view.n_step > 1 else {}
        dtype = normalizer.obs_scale.dtype
        self.extra = ExtraColumns(view.extra, replay, self.device, self.device, dtype)
        width = sum(max(w, 1) for w in self.widths.values())
        self.table = torch.empty(rows, width, dtype=dtype, device=self.device)

    def write(self, replay: Replay, rows: np.ndarray, places: np.ndarray) -> None:
        """Put the transitions that start at these rows at these places of the table; places that follow each other are
        written as one."""
        for i in range(0, len(rows), CHUNK):  # no second copy of the data at any time
            part, place = self.view.fields(replay, rows[i : i + CHUNK], self.normalizer), places[i : i + CHUNK]
            columns = [part[name].reshape(-1, max(w, 1)).to(self.table.dtype) for name, w in self.widths.items()]
            if place[-1] - place[0] == len(place) - 1:
                torch.cat(columns, dim=-1, out=self.table[place[0] : place[-1] + 1])
            else:
                self.table[torch.from_numpy(place).to(self.device)] = torch.cat(columns, dim=-1)

    def gather(self, items: Tensor) -> Transitions:
        return self.read(items, self.row(items))

    def read(self, places: Tensor, row: Tensor) -> Transitions:
        """The batch of the transitions at these places of the table, which are these rows of the replay."""
        flat = self.table.index_select(0, places.reshape(-1))
        columns = flat.split([max(w, 1) for w in self.widths.values()], dim=-1)
        fields = {
            name: column.contiguous().reshape((*places.shape, w) if w else places.shape)
            for (name, w), column in zip(self.widths.items(), columns, strict=True)
        }
        fields["terminated"] = fields["terminated"] != 0
        return Transitions(**fields, row=row, extra=self.extra.take(row))

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Observations (N, O) and actions (N, A) of all items: columns of the table, not copies."""
        obs, action = self.widths["obs"], self.widths["action"]
        return self.table[:, :obs], self.table[:, obs : obs + action]


class GrowingTransitions(PackedTransitions):
    """A row of the table for each row of a ring, usable or not; items are its usable rows in their order.

    What an append changes is written into tensors that stay in their places, so that work which was recorded or
    compiled with them goes on.

    Args:
        view: without weights and extra columns.
        ring: every row that may leave it is usable (see :func:`grows`).
    """

    def __init__(self, view: Any, ring: Ring, normalizer: Normalizer, device: torch.device) -> None:
        self.view, self.ring, self.normalizer, self.appends = view, ring, normalizer, ring.appends
        rows = np.sort(ring.usable_rows())
        front = rows[rows < ring.kept]
        self.front = len(front)
        self.front_rows = None if self.front == ring.kept else torch.from_numpy(front).to(device)
        self.place = torch.zeros(3, dtype=torch.int64, device=device)  # items, write head, rows skipped after it
        BoundView.__init__(self, len(rows), device, split=split_items(ring, rows))
        self.lay_out(view, ring, normalizer, ring.capacity)
        self.write(ring, rows, rows)
        self.number = self.place[0]
        self._count()

    def _count(self) -> None:
        head, low, high = self.ring.spans()
        self.count = self.front + head - self.ring.kept + high - low
        self.place.copy_(torch.tensor([self.count, head, low - head], device="cpu"))

    def grow(self, replay: Replay) -> bool:
        if replay is not self.ring or self.ring.appends != self.appends + 1:
            return False
        new, first = self.ring.newest
        types = [(to_numpy(new.steps[name]).dtype, to_numpy(column).dtype) for name, column in self.ring.steps.items()]
        if len(new.unusable) or not all(np.can_cast(*pair, "safe") for pair in types):
            return False  # else it would not be what the ring holds
        for start, length, place in zip(new.start, new.length, first):  # a later one may take the place of an earlier
            self.write(new, np.arange(start, start + length), np.arange(place, place + length))
        self.appends += 1
        self._count()
        return True

    def row(self, items: Tensor) -> Tensor:
        _, head, skipped = self.place.unbind()
        row = items + (self.ring.kept - self.front)
        row = torch.where(row < head, row, row + skipped)
        if self.front_rows is None or not self.front:
            return row
        return torch.where(items < self.front, self.front_rows.take(items.clamp(max=self.front - 1)), row)

    @property
    def rows(self) -> Tensor:  # type: ignore[override]
        return self.row(torch.arange(self.count, device=self.device))

    @rows.setter
    def rows(self, rows: Tensor | None) -> None:
        pass  # they follow from `place`

    def gather(self, items: Tensor) -> Transitions:
        row = self.row(items)
        return self.read(row, row)

    def pairs(self) -> tuple[Tensor, Tensor]:
        return BoundView.pairs(self)


def grows(view: Any, replay: Replay) -> bool:
    """Whether a replay is a ring whose transitions are packed as they come: all rows that may leave are usable."""
    if not isinstance(replay, Ring) or view.weight is not None or view.extra or SHARE in replay.meta:
        return False
    return int((replay.usable_rows() >= replay.kept).sum()) == replay.num_steps - replay.kept


class ColumnTransitions(BoundView):
    """The same batches gathered column by column: memory maps, images, stores larger than the device."""

    def __init__(self, view: TransitionView, replay: Replay, normalizer: Normalizer, device: torch.device) -> None:
        rows = view.rows(replay)
        count, split = replay.num_steps if rows is None else rows, split_items(replay, rows)
        super().__init__(count, torch.device("cpu"), view.weights(replay), split)
        self.view, self.replay, self.normalizer, self.target = view, replay, normalizer, device
        self.extra = ExtraColumns(view.extra, replay, self.device, device, normalizer.obs_scale.dtype)

    def gather(self, items: Tensor) -> Transitions:
        rows = self.row(items.to(self.device))
        flat = self.view.fields(self.replay, rows.reshape(-1).numpy(), self.normalizer)
        fields = {name: x.reshape(*items.shape, *x.shape[1:]) for name, x in flat.items()}
        return Transitions(**fields, row=rows.to(self.target), extra=self.extra.take(rows))


@dataclass(frozen=True)
class WindowView:
    """Windows of consecutive steps inside one episode.

    Args:
        horizon: H, steps in a window, ≥ 1.
        pad: "right": start anywhere, zeros after the episode's end; "left": end anywhere, zeros before its start;
            "none": only windows that lie inside an episode, so episodes shorter than H give none.
        extra: names of steps columns that come along as ``batch.extra.<name>``, as the data have them.
    """

    horizon: int
    pad: str = "right"
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checked_names(self.extra)
        check_range("horizon", self.horizon, 1)
        if self.pad not in ("right", "left", "none"):
            raise UsageError(f"`pad` is {self.pad!r}; expected 'right', 'left' or 'none'.")

    def rows(self, replay: Replay) -> np.ndarray | None:
        """First rows of windows (last rows when padding on the left), int64, each equally likely; None: every row."""
        require_columns(replay, ("obs", "action", "reward", "terminated"))
        if self.pad != "none":
            return None if replay.is_whole else replay.rows
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
        rows, on_disk = view.rows(replay), replay.is_mapped
        where = torch.device("cpu") if on_disk else device
        super().__init__(replay.num_steps if rows is None else rows, where, mixture_weights(replay, rows))
        self.view, self.normalizer, self.target = view, normalizer, device
        self.replay = replay if on_disk else replay.to(device)
        self.extra = ExtraColumns(view.extra, self.replay, where, device, normalizer.obs_scale.dtype)
        order = np.argsort(replay.start)
        self.first, self.last = (torch.from_numpy(x[order]).to(self.device) for x in (replay.start, replay.end))
        reward = to_numpy(replay.steps["reward"])
        to_go = np.zeros(len(reward), dtype=np.float32)
        covered = slice(None) if replay.is_whole else replay.rows
        to_go[covered] = return_to_go(reward[covered], replay.length)
        self.return_to_go = torch.from_numpy(to_go).to(self.device)

    def gather(self, items: Tensor) -> Windows:
        anchor = self.row(items.to(self.device))[..., None]
        offset = torch.arange(self.view.horizon, device=self.device)
        if self.view.pad == "left":
            offset = offset - (self.view.horizon - 1)
        episode = torch.searchsorted(self.first, anchor, right=True) - 1
        first, last = self.first[episode], self.last[episode]
        row = anchor + offset
        mask, t, inside = (row >= first) & (row <= last), row - first, row.clamp(first, last)
        raw = self.replay.take(inside, ("obs", "action", "reward", "terminated"))
        raw["to_go"], raw["t"], raw["mask"], raw["row"] = self.return_to_go[inside], t, mask, inside
        raw = {name: x.to(self.target) for name, x in raw.items()}
        mask, dtype = raw["mask"], self.normalizer.obs_scale.dtype
        return Windows(
            obs=self.normalizer.obs(raw["obs"].to(dtype)) * mask[..., None],
            action=self.normalizer.action(raw["action"].to(dtype)) * mask[..., None],
            reward=self.normalizer.reward(raw["reward"].to(dtype)) * mask,
            terminated=raw["terminated"].bool() & mask,
            mask=mask,
            t=raw["t"].clamp(min=0),
            return_to_go=raw["to_go"].to(dtype) * mask,
            row=raw["row"],
            extra=self.extra.take(inside, mask),
        )


def return_to_go(reward: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Undiscounted sum of rewards from each step to the end of its episode; rows episode by episode, float64."""
    total = np.concatenate([[0.0], np.cumsum(reward, dtype=np.float64)])
    end = np.repeat(np.cumsum(length), length)
    return total[end] - total[:-1]


def require_columns(replay: Replay, columns: Sequence[str]) -> None:
    """Stop where the data lack a column that the method needs."""
    missing = [name for name in columns if name not in replay.steps]
    if missing:
        raise DataError(
            f"the data have columns {listed(sorted(replay.steps))} but the method needs {missing} too; expected all of "
            f"{list(columns)}. Add the columns or choose a method that does not need them."
        )
