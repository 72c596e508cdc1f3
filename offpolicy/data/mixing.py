"""Several replays as one: their episodes one after the other, and the share of a batch that comes from each kind.

A mixed replay carries what sampling has to know in ordinary places, so it survives :meth:`Replay.filter` and its kin:
the episode column ``synthetic`` (bool) and ``meta["synthetic_share"]``, the probability that a row of a batch is from
a synthetic episode. Views turn both into weights with :func:`mixture_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offpolicy.data.columns import Column, to_numpy
from offpolicy.data.replay import Replay
from offpolicy.errors import DataError

SHARE = "synthetic_share"
SPLIT = "online_split"  # in meta: rows at the front that are offline, and their share of every batch, exactly


def joined(parts: Sequence[Replay], folder: Path | None = None, meta: Mapping[str, Any] | None = None) -> Replay:
    """The episodes of all parts, one after the other, laid end to end.

    Step and episode columns are those that all parts have, with the types of the first part; ``next_obs`` and
    ``valid_td`` are completed where only some have them.

    Args:
        parts: at least one; where the first stores ``next_obs``, the others must know the successor of every row.
        folder: write the columns there as memory maps, one part at a time, instead of into memory.
        meta: of the result; that of the first part when None.

    Raises:
        DataError: rows of different shapes, or no common column.
    """
    derived = ("next_obs", "valid_td")
    names = [n for n in parts[0].steps if n not in derived and all(n in part.steps for part in parts)]
    names += [n for n in derived if any(n in part.steps for part in parts)]
    steps: dict[str, Column] = {}
    for name in names:
        first, rows = _column(parts[0], name), sum(part.num_steps for part in parts)
        shape = (rows, *first.shape[1:])
        if folder is None:
            column = np.empty(shape, first.dtype)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            column = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", first.dtype, shape)
        place = 0
        for i, part in enumerate(parts):
            values = first if i == 0 else _column(part, name)
            if values.shape[1:] != first.shape[1:]:
                raise DataError(f"`{name}` has rows of {values.shape[1:]}; expected {first.shape[1:]} as in the first.")
            column[place : place + len(values)] = values
            place += len(values)
        steps[name] = column
    length = np.concatenate([part.length for part in parts])
    return Replay(
        steps,
        start=np.cumsum(length) - length,
        length=length,
        tail=_tails(parts),
        episodes={
            name: np.concatenate([part.episodes[name] for part in parts])
            for name in parts[0].episodes
            if all(name in part.episodes for part in parts)
        },
        meta=parts[0].meta if meta is None else meta,
    )


def _column(part: Replay, name: str) -> np.ndarray:
    """A step column in the order of the episodes."""
    if name not in part.steps:
        return np.ones(part.num_steps, bool) if name == "valid_td" else to_numpy(part.next_obs(part.rows))
    column = to_numpy(part.steps[name])
    return column if part.is_whole else column[part.rows]


def _tails(parts: Sequence[Replay]) -> dict[str, Column]:
    """The observations after the episodes, with ``valid`` where some are unknown."""
    known = next((part.tail["obs"] for part in parts if "obs" in part.tail), None)
    if known is None:
        return {}
    obs, valid = [], []
    for part in parts:
        count, has = part.num_episodes, "obs" in part.tail
        obs.append(to_numpy(part.tail["obs"]) if has else np.zeros((count, *known.shape[1:]), to_numpy(known).dtype))
        valid.append(to_numpy(part.tail["valid"]).astype(bool) if "valid" in part.tail else np.full(count, has))
    whole = np.concatenate(valid)
    tail: dict[str, Column] = {"obs": np.concatenate(obs)}
    return tail if whole.all() else tail | {"valid": whole}


def mixed(real: Replay, synthetic: Replay, share: float) -> Replay:
    """Both kinds of episodes in one replay, the real ones first, from which synthetic rows are drawn by a share.

    Args:
        real: the data; ``meta`` of the result is theirs.
        synthetic: episodes of the same environment.
        share: probability that a row of a batch is synthetic, in (0, 1]; with 1 the real data are left out.
    """
    if share >= 1.0:
        both = joined([synthetic], meta=real.meta)
    else:
        both = joined([real, synthetic], meta={**real.meta, SHARE: share})
        both.episodes["synthetic"] = np.repeat([False, True], [real.num_episodes, synthetic.num_episodes])
    both.version = synthetic.version
    return both


def mixture_weights(
    replay: Replay, rows: np.ndarray | None = None, weight: np.ndarray | None = None
) -> np.ndarray | None:
    """Sampling weights of items, such that synthetic ones are drawn with exactly the share of a mixed replay.

    Args:
        replay: any; one that is not mixed leaves ``weight`` as it is.
        rows: replay row of each item; None for all rows of a whole replay.
        weight: of the items inside their kind, ≥ 0; None for uniform.
    """
    share = replay.meta.get(SHARE)
    if share is None:
        return weight
    kind = replay.episodes["synthetic"]
    synthetic = np.repeat(kind, replay.length) if rows is None else kind[replay.episode_at(rows)]
    found = np.ones(len(synthetic)) if weight is None else weight.astype(np.float64)
    for part, probability in ((~synthetic, 1.0 - share), (synthetic, share)):
        total = found[part].sum()
        if total > 0:  # a filter may have left one kind only
            found[part] *= probability / total
    return found


def split_items(replay: Replay, rows: np.ndarray | None) -> tuple[int, float] | None:
    """How many of the items are offline ones, which come first, and their share of a batch; None without a share.

    Args:
        replay: of which ``meta`` may ask for one.
        rows: replay row of each item; None for all rows.
    """
    if SPLIT not in replay.meta:
        return None
    front, share = replay.meta[SPLIT]
    return int(front if rows is None else np.searchsorted(rows >= front, True)), float(share)
