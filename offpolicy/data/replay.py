"""The store: named columns of steps laid end to end, and an index of episodes over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offpolicy.data.columns import Column, gather_rows, is_mapped, to_numpy
from offpolicy.data.sampling import bits, keys, unit
from offpolicy.data.store import check_content, digest, read_parts, write_folder
from offpolicy.errors import DataError, UsageError, amount, listed
from offpolicy.moved import names_of
from offpolicy.trust import check_environment


class Replay:
    """Steps of many episodes in flat columns (the only store of the library).

    Args:
        steps: name → array of shape (N, …). Control data use ``obs (N, O)``, ``action (N, A)`` in environment units,
            ``reward (N,)``, ``terminated (N,)`` bool and, when the source has it, ``next_obs (N, O)``; an optional
            ``valid_td (N,)`` bool marks the rows whose successor may be used. Arrays are kept, not copied: NumPy
            arrays in memory, memory maps, or torch tensors on a device.
        start: first row of each episode, int64 (E,).
        length: steps of each episode, int64 (E,), each ≥ 1.
        episode_end: alternative to ``start``/``length``: bool (N,), true on the last step of each episode. Rows after
            the last end form an unfinished episode, which is kept.
        tail: ``{"obs": (E, O)}``, the observation after the last step of each episode, and optionally
            ``{"valid": (E,)}`` bool when only some episodes have one.
        episodes: name → array of shape (E, …).
        tables: name → array of any shape: tables of episode numbers and facts about their rows, as the pairs of
            preference data (:mod:`offpolicy.data.texts.sequences`). :meth:`filter` does not carry them over.
        meta: JSON-able facts about the data (name, environment, action bounds, reference scores, recipe).

    The index need not cover all rows: :meth:`filter` gives another index over the same columns. ``terminated`` means
    that the environment ended the episode, so there is nothing to bootstrap from; a step that is last in its episode
    without it was merely cut.

    Raises:
        DataError: columns of unequal length, or an index that leaves the columns or overlaps itself.
    """

    version = 0  # grows whenever the content changes during training

    def __init__(
        self,
        steps: Mapping[str, Column],
        *,
        start: np.ndarray | None = None,
        length: np.ndarray | None = None,
        episode_end: np.ndarray | None = None,
        tail: Mapping[str, Column] | None = None,
        episodes: Mapping[str, np.ndarray] | None = None,
        tables: Mapping[str, np.ndarray] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        self.steps: dict[str, Column] = dict(steps)
        self.tail: dict[str, Column] = dict(tail or {})
        self.episodes: dict[str, np.ndarray] = dict(episodes or {})
        self.tables: dict[str, np.ndarray] = dict(tables or {})
        self.meta: dict[str, Any] = dict(meta or {})
        sizes = {name: len(column) for name, column in self.steps.items()}
        if not sizes or len(set(sizes.values())) != 1:
            lengths = listed(f"{name} {size}" for name, size in sizes.items())
            raise DataError(
                f"columns have lengths {lengths}; expected one common length. Pass one row per step in each."
            )
        for name in ("reward", "terminated"):
            shape = tuple(getattr(self.steps.get(name), "shape", (0,)))
            if len(shape) != 1:
                raise DataError(
                    f"`{name}` has shape {shape}; expected ({shape[0]},), one number per step, since a further axis "
                    f"would turn losses into tables of all pairs of rows. Pass `{name}.reshape(-1)`, or leave the axis "
                    "of several rewards out."
                )
        rows = next(iter(sizes.values()))
        if episode_end is not None:
            ends = np.flatnonzero(np.asarray(episode_end)) + 1
            if rows and (not len(ends) or ends[-1] != rows):
                ends = np.append(ends, rows)
            start = np.concatenate([[0], ends[:-1]])
            length = ends - start
        elif start is None or length is None:
            start, length = np.zeros(1), np.full(1, rows)
        self.start = np.asarray(start, dtype=np.int64)
        self.length = np.asarray(length, dtype=np.int64)
        self._check_index(rows)

    def _check_index(self, rows: int) -> None:
        if self.start.shape != self.length.shape or self.start.ndim != 1:
            raise DataError(f"start has shape {self.start.shape} and length {self.length.shape}; expected two (E,).")
        if not len(self.start) or self.length.min() < 1:
            raise DataError("the episode index is empty or has an episode without steps; expected ≥ 1 step in each.")
        order = np.argsort(self.start, kind="stable")
        stop = (self.start + self.length)[order]
        if self.start.min() < 0 or stop.max() > rows or (stop[:-1] > self.start[order][1:]).any():
            raise DataError(f"episodes overlap or leave the {rows} rows; expected disjoint spans inside the columns.")
        for name, column in {**self.tail, **self.episodes}.items():
            if len(column) != len(self.start):
                raise DataError(f"'{name}' has {len(column)} rows; expected one per episode ({len(self.start)}).")

    # -- sizes and derived columns ------------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        """Steps covered by the episode index."""
        return int(self.length.sum())

    @property
    def num_episodes(self) -> int:
        return len(self.start)

    @property
    def nbytes(self) -> int:
        return sum(int(c.nbytes) for c in self.steps.values())

    @property
    def is_mapped(self) -> bool:
        """Whether a column lies on disk (a memory map)."""
        return any(is_mapped(c) for c in self.steps.values())

    @cached_property
    def episode_of(self) -> np.ndarray:
        """Episode of each row covered by the index, aligned with :attr:`rows`, int64."""
        return np.repeat(np.arange(self.num_episodes), self.length)

    @cached_property
    def t(self) -> np.ndarray:
        """Time step inside the episode, aligned with :attr:`rows`, int64."""
        return np.arange(self.num_steps) - np.repeat(np.cumsum(self.length) - self.length, self.length)

    @cached_property
    def rows(self) -> np.ndarray:
        """The rows covered by the index, episode by episode, int64 (num_steps,)."""
        return np.repeat(self.start, self.length) + self.t

    @cached_property
    def end(self) -> np.ndarray:
        """Last row of each episode, int64 (E,)."""
        return self.start + self.length - 1

    def returns(self) -> np.ndarray:
        """Undiscounted, untransformed return of each episode, float64 (E,)."""
        if "reward" not in self.steps:
            raise DataError("the data have no `reward`, so episodes have no returns; expected one reward per step.")
        reward = to_numpy(self.steps["reward"])
        if self.is_whole:
            return np.add.reduceat(reward, self.start, dtype=np.float64)
        sums = np.concatenate([[0.0], np.cumsum(reward[self.rows], dtype=np.float64)])
        stop = np.cumsum(self.length)
        return sums[stop] - sums[stop - self.length]

    @cached_property
    def is_whole(self) -> bool:
        """Whether the episodes lie end to end in order and cover every row."""
        rows = len(next(iter(self.steps.values())))
        return self.start[0] == 0 and bool((self.end[:-1] + 1 == self.start[1:]).all()) and self.end[-1] + 1 == rows

    @cached_property
    def unusable(self) -> np.ndarray:
        """Rows that no transition may be drawn from, as their successor is needed and unknown, ascending int64."""
        return self._without_successor(to_numpy(self.steps["terminated"])[self.end].astype(bool))

    def _without_successor(self, exempt: np.ndarray) -> np.ndarray:
        """Rows whose successor is unknown, ascending int64, less the ends of the exempt episodes (E,) bool."""
        rows = np.zeros(0, dtype=np.int64)
        if "next_obs" not in self.steps:
            known = to_numpy(self.tail["valid"]).astype(bool) if "valid" in self.tail else "obs" in self.tail
            rows = self.end[~(known | exempt)]
        if "valid_td" in self.steps:
            rows = np.union1d(rows, np.flatnonzero(~to_numpy(self.steps["valid_td"]).astype(bool)))
        return np.sort(rows)

    @cached_property
    def all_usable(self) -> bool:
        """Whether every row of the columns may be drawn, so that no list of rows is needed."""
        return self.is_whole and not len(self.unusable)

    def usable_rows(self) -> np.ndarray:
        """Rows whose successor is known or not needed: what a transition may be drawn from, int64."""
        return self._rows_less(self.unusable)

    def rows_with_successor(self) -> np.ndarray:
        """As :meth:`usable_rows`, without terminated rows whose successor is unknown: what shows the dynamics."""
        return self._rows_less(self._without_successor(np.zeros(self.num_episodes, dtype=bool)))

    def showing_successors(self) -> Replay:
        """This replay without the use of terminated rows whose successor is unknown."""
        rows = self.rows_with_successor()
        if len(rows) == len(self.usable_rows()):
            return self
        valid = np.zeros(len(next(iter(self.steps.values()))), dtype=bool)
        valid[rows] = True
        return self.derive({**self.steps, "valid_td": valid}, self.tail)

    def _rows_less(self, left_out: np.ndarray) -> np.ndarray:
        if not len(left_out):
            return self.rows
        keep = np.ones(len(next(iter(self.steps.values()))), dtype=bool)
        keep[left_out] = False
        return self.rows[keep[self.rows]]

    # -- reading ------------------------------------------------------------------------------------------------------

    def take(self, indices: Tensor | np.ndarray, columns: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Gather rows of the named columns (all when None); any shape of indices, which comes first in the result."""
        return {name: gather_rows(self.steps[name], indices) for name in (columns or self.steps)}

    def next_obs(self, indices: Tensor | np.ndarray) -> Tensor:
        """The observation after each row; never one of another episode.

        Where an episode ends and its last observation was not stored, the row's own observation is returned (see
        :meth:`usable_rows`).
        """
        if "next_obs" in self.steps:
            return gather_rows(self.steps["next_obs"], indices)
        index = to_numpy(indices)
        last = np.take(self._is_last, index)
        result = gather_rows(self.steps["obs"], index + ~last)
        if "obs" in self.tail and last.any():
            episode = self.episode_at(index[last])
            if "valid" in self.tail:
                known = to_numpy(self.tail["valid"])[episode].astype(bool)
                last[last], episode = known, episode[known]
            result[torch.from_numpy(last)] = gather_rows(self.tail["obs"], episode).to(result.dtype)
        return result

    @cached_property
    def _is_last(self) -> np.ndarray:
        """Whether a row is the last of its episode, bool, for all rows of the columns."""
        last = np.zeros(len(next(iter(self.steps.values()))), dtype=bool)
        last[self.end] = True
        return last

    def episode_at(self, rows: np.ndarray) -> np.ndarray:
        """The episode that each of these covered rows belongs to."""
        return self._row_order[np.searchsorted(self._ordered_start, rows, side="right") - 1]

    def episode_end(self, rows: np.ndarray) -> np.ndarray:
        """The last row of the episode of each of these rows."""
        return self.end[self.episode_at(rows)]

    @cached_property
    def _row_order(self) -> np.ndarray:
        return np.argsort(self.start, kind="stable")

    @cached_property
    def _ordered_start(self) -> np.ndarray:
        return self.start[self._row_order]

    def to(self, device: torch.device | str) -> Replay:
        """The same replay with its columns as tensors on a device."""
        return self.derive(
            {k: torch.as_tensor(v, device=device) for k, v in self.steps.items()},
            {k: torch.as_tensor(v, device=device) for k, v in self.tail.items()},
        )

    # -- other indices over the same columns --------------------------------------------------------------------------

    def derive(self, steps: dict[str, Column], tail: dict[str, Column], keep: np.ndarray | None = None) -> Replay:
        pick = slice(None) if keep is None else keep
        return Replay(
            steps,
            start=self.start[pick],
            length=self.length[pick],
            tail={k: v[pick] for k, v in tail.items()},
            episodes={k: v[pick] for k, v in self.episodes.items()},
            meta=self.meta,
        )

    def filter(self, keep: np.ndarray | Sequence[int]) -> Replay:
        """Only the chosen episodes: a bool mask (E,) or episode numbers, in the given order. Columns are shared."""
        chosen = np.asarray(keep)
        chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64)
        if not len(chosen):
            raise DataError("the filter keeps no episode; expected at least one. Loosen the filter.")
        return self.derive(self.steps, self.tail, chosen)

    def top(self, fraction: float, discount: float = 1.0) -> Replay:
        """The best share of the episodes by return: max(1, ⌊fraction·E⌋ episodes), ties to the earlier one.

        Args:
            fraction: share kept, in (0, 1].
            discount: weight γ^t of the reward at step t in the ranking, in [0, 1].
        """
        if not 0.0 < fraction <= 1.0:
            raise UsageError(f"fraction is {fraction}; expected a value in (0, 1]. Pass 0.1 for the best tenth.")
        returns = self.returns()
        if discount != 1.0:
            weighted = to_numpy(self.steps["reward"])[self.rows] * np.power(discount, self.t, dtype=np.float64)
            returns = np.bincount(self.episode_of, weights=weighted, minlength=self.num_episodes)
        best = np.argsort(-returns, kind="stable")[: max(1, int(fraction * self.num_episodes))]
        return self.filter(np.sort(best))

    def split(self, fraction: float, seed: int = 0) -> tuple[Replay, Replay]:
        """Two replays without a common episode; ``fraction`` of the episodes, chosen by a hash, go to the second."""
        key = keys(seed, "split", torch.zeros(1, dtype=torch.int64, device="cpu"))[0]
        order = unit(bits(key, torch.arange(self.num_episodes, device="cpu"))).argsort(stable=True).numpy()
        count = round(fraction * self.num_episodes)
        if not 0 < count < self.num_episodes:
            raise DataError(
                f"splitting {self.num_episodes} episodes at {fraction} leaves one side empty; expected ≥ 1 episode on "
                "each. Choose another fraction or pass more episodes."
            )
        return self.filter(np.sort(order[count:])), self.filter(np.sort(order[:count]))

    # -- identity and disk --------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """SHA-256 over index and columns: two replays with the same one train alike."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return digest(self.parts())

    def parts(self) -> dict[str, dict[str, Any]]:
        """What a folder holds of it beside facts, by kind: ``index steps tail episodes tables``."""
        return {
            "index": {"start": self.start, "length": self.length},
            "steps": self.steps,
            "tail": self.tail,
            "episodes": self.episodes,
            "tables": self.tables,
        }

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the replay as a folder: ``steps/<name>.npy``, ``index.npz``, ``meta.json``.

        All files go to a temporary folder beside the target, which is renamed when complete, so a folder of this name
        is always whole.

        Raises:
            FileExistsError: the folder exists and ``overwrite`` is false.
            OSError: the disk is full or not writable; nothing is left behind.
        """
        return write_folder(Path(folder), self.parts(), self.meta, self.fingerprint(), overwrite)

    @classmethod
    def load(cls, folder: str | Path, *, mmap: bool = True) -> Replay:
        """Open a folder written by :meth:`save`; with ``mmap`` the columns stay on disk.

        The fingerprint is compared with the content up to 2 GiB; above that, columns open at once and it is believed.

        Raises:
            DataError: damaged, changed, or with names that lead out of the folder.
        """
        path = Path(folder)
        if not (path / "meta.json").is_file():
            raise FileNotFoundError(f"{path} has no meta.json; expected a folder written by Replay.save.")
        parts, fingerprint = read_parts(path, mmap)
        try:
            replay = cls(parts.pop("steps"), **parts)
        except DataError as error:
            raise DataError(f"{path} is damaged: {error}") from None
        check_content(replay.parts(), replay.meta, path, fingerprint, replay.fingerprint)
        check_environment(replay.meta, str(path))
        replay.__dict__["_fingerprint"] = fingerprint
        return replay

    def __repr__(self) -> str:
        columns = ", ".join(f"{k} {tuple(v.shape)}" for k, v in self.steps.items())
        name = self.meta.get("name", "Replay")
        return f"<{name}: {amount(self.num_steps, 'step')} in {amount(self.num_episodes, 'episode')}; {columns}>"


__getattr__ = names_of("offpolicy.data.replay")  # the names that stood here in version 0.1
