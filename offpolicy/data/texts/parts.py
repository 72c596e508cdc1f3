"""Parts of texts to learn from: rows that are held out, or kept."""

from __future__ import annotations

import numpy as np

from offpolicy.data.replay import Replay


def table_of(replay: Replay) -> str:
    """The table of rows that texts have: ``pairs`` or ``singles``."""
    return "pairs" if "pairs" in replay.tables else "singles"


def split_by_prompt(replay: Replay, fraction: float) -> tuple[Replay, Replay | None]:
    """Hold out the rows of some prompts.

    The prompts with the lowest hashes of their text go, so that a row stays on its side when others are added, and a
    prompt is never on both. Prompts that pairs tie together (two-prompt pairs) stay together.

    Args:
        replay: language data with ``<table>/prompt_hash``.
        fraction: share of the prompts, in (0, 1); at least one goes where there are two.

    Returns:
        The training part, and the held-out part or None when there is but one prompt. Tokens are shared.
    """
    table = table_of(replay)
    key = replay.tables[f"{table}/prompt_hash"]
    if table == "pairs":
        key = tied_keys(replay.tables["pairs"][:, [0, 2]], key)
    distinct = np.unique(key)  # ascending
    if len(distinct) < 2:
        return replay, None
    count = min(len(distinct) - 1, max(1, round(fraction * len(distinct))))
    held = key <= distinct[count - 1]
    return select_rows(replay, ~held), select_rows(replay, held)


def select_rows(replay: Replay, keep: np.ndarray) -> Replay:
    """The rows of the index table that a mask (P,) keeps, with the texts they need; tokens are shared."""
    table = table_of(replay)
    index = replay.tables[table][keep]
    used, renumbered = np.unique(index, return_inverse=True)
    tables = {k: v[keep] for k, v in replay.tables.items() if k.startswith(f"{table}/")}
    return Replay(
        replay.steps,
        start=replay.start[used],
        length=replay.length[used],
        episodes={k: v[used] for k, v in replay.episodes.items()},
        tables={table: renumbered.reshape(index.shape).astype(np.int64), **tables},
        meta={**replay.meta, table: len(index), "lengths": lengths(index, replay.length)},
    )


def lengths(index: np.ndarray, length: np.ndarray) -> dict[str, list[int]]:
    """Median, 95 % quantile and largest number of tokens by role, from an index table and the lengths of the texts."""
    roles = {"prompt": 0, "chosen": 1, "rejected": 3} if index.shape[1] == 4 else {"prompt": 0, "answer": 1}
    levels = [0.5, 0.95, 1.0]
    return {
        role: [int(q) for q in np.quantile(length[index[:, column]], levels, method="higher")]
        for role, column in roles.items()
    }


def tied_keys(index: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The smallest key among rows that are tied together by prompts in common."""
    if (index[:, 0] == index[:, 1]).all():
        return key
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    size = int(index.max()) + 1
    edges = coo_matrix((np.ones(len(index)), (index[:, 0], index[:, 1])), shape=(size, size))
    group = connected_components(edges, directed=False)[1][index[:, 0]]
    smallest = np.full(group.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(smallest, group, key)
    return smallest[group]
