"""Log-probabilities under a reference, kept on disk: an entry for each reference and table, filled by all processes.

An entry is named by a hash of everything that the numbers depend on: weights and configuration of the model, the tokens
of all texts and their table, precision and attention. Runs that agree in these share it, whatever they train.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offpolicy.compute import processes
from offpolicy.data.columns import to_numpy
from offpolicy.data.texts.sequences import SCORED, BoundGroups, BoundTexts
from offpolicy.files import atomic_write

log = logging.getLogger(__name__)
Columns = dict[str, np.ndarray]
TOGETHER = 512  # rows of one process between two exchanges
PATIENCE = 30.0  # seconds between two writes, so that an interruption loses little


class Cache:
    """The columns of one reference over one table.

    Args:
        folder: of all entries; None keeps nothing.
        parts: what the numbers depend on, JSON-able; becomes the entry's ``manifest.json``.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, parts: Mapping[str, Any]) -> None:
        self.parts = dict(parts)
        self.key = hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()[:24]
        self.path = Path(folder) / self.key if folder is not None else None

    def load(self, names: Iterable[str], rows: int) -> Columns:
        """The columns, (rows,) each; NaN where nothing was computed yet."""
        columns = {name: np.full(rows, np.nan, dtype=np.float32) for name in names}
        file = self.path / "columns.npz" if self.path is not None else None
        if file is not None and file.is_file():
            try:
                with np.load(file, allow_pickle=False) as kept:
                    found = {name: kept[name] for name in columns}
            except Exception:  # not whole, in one of many ways: compute again
                return columns
            if all(column.shape == (rows,) and column.dtype.kind == "f" for column in found.values()):
                return found
        return columns

    def save(self, columns: Columns) -> None:
        if self.path is None:
            return
        file = io.BytesIO()
        np.savez(file, **columns)  # type: ignore[arg-type]
        atomic_write(self.path / "columns.npz", file.getvalue())
        atomic_write(self.path / "manifest.json", json.dumps(self.parts, indent=2, sort_keys=True) + "\n")


def references_folder(option: str | None) -> Path:
    """Where references are kept: the option, else ``$OFFPOLICY_REF_CACHE``, else below the user's caches."""
    return Path(option or os.environ.get("OFFPOLICY_REF_CACHE") or "~/.cache/offpolicy/references").expanduser()


def columns_of(
    bound: BoundTexts,
    rows: np.ndarray,
    cache: Cache,
    compute: Callable[[np.ndarray], Columns],
    *,
    rank: int = 0,
    world: int = 1,
) -> tuple[Columns, int]:
    """The reference's columns over a table, with at least these rows filled in.

    Every process computes its share of the rows that the cache lacks, the same number on each; the first one writes.

    Args:
        bound: the table.
        rows: needed ones, (m,).
        cache: where they may lie already.
        compute: rows → columns of summed log-probabilities for them.

    Returns:
        The columns, (n,) each with NaN elsewhere, and how many rows were computed now.
    """
    names = column_names(bound)
    columns = cache.load(names, len(bound))
    if world > 1:  # what the first process sees counts for all
        shared = [columns]
        torch.distributed.broadcast_object_list(shared)
        columns = shared[0]
    missing = rows[np.isnan(columns[names[0]][rows])]
    began = saved = time.perf_counter()
    missing = missing[np.argsort(-bound.lengths[missing].sum(1), kind="stable")]
    for start in range(0, len(missing), TOGETHER * world):
        part = missing[start : start + TOGETHER * world]
        padded = np.concatenate([part, np.repeat(part[-1:], -len(part) % world)])
        mine = padded[rank::world]
        for theirs, values in processes.gathered((mine, compute(mine))):
            for name in names:
                columns[name] = columns[name].astype(values[name].dtype, copy=False)
                columns[name][theirs] = values[name]
        done, now = start + len(part), time.perf_counter()
        if rank == 0 and (done == len(missing) or now - saved > PATIENCE):
            cache.save(columns)
            if now - saved > PATIENCE:
                log.warning("Reference: %s of %s rows after %.0f s.", f"{done:,}", f"{len(missing):,}", now - began)
            saved = now
    return columns, len(missing)


def column_names(bound: BoundTexts) -> list[str]:
    if isinstance(bound, BoundGroups):
        return [f"ref_logps_{i}" for i in range(bound.index.shape[1] // 2)]
    return ["ref_chosen_logps", "ref_rejected_logps"] if bound.index.shape[1] == 4 else ["ref_logps"]


def texts_digest(bound: BoundTexts) -> str:
    """A hash of the tokens of every row of a table."""
    digest = hashlib.blake2b(digest_size=16)
    replay = bound.replay
    token = np.ascontiguousarray(to_numpy(replay.steps["token"]))
    digest.update(str(token.dtype).encode())
    scored = [to_numpy(replay.steps[SCORED])] if SCORED in replay.steps else []
    for array in (token, replay.start, replay.length, bound.index, *scored):
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
