"""Margins of single pairs at the newest evaluation of a run, kept in its folder for histograms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from offpolicy.compute.processes import gathered, is_first_process
from offpolicy.files import MARGINS, atomic_write

MOST = 5_000  # pairs of a file


def keep_pair_margins(folder: Path, updates: int, found: Sequence[tuple[np.ndarray, Tensor, Tensor | None]]) -> None:
    """Write the margins of all processes; every process calls it. The file of an earlier evaluation is replaced.

    Args:
        folder: of the run.
        updates: of the evaluation.
        found: of each forward pass the rows of the held-out table, (B,), their margins, (B,), and the losses below
            which they are ranked right, (B,), None for methods without such a loss.
    """
    mine: dict[int, tuple[float, ...]] = {}
    for numbers, *columns in found:
        values = [column.double().tolist() for column in columns if column is not None]
        mine |= dict(zip(numbers.tolist(), zip(*values)))
    every: dict[int, tuple[float, ...]] = {}
    for part in gathered(mine):
        every |= part
    if not is_first_process() or not every:
        return
    rows = sorted(every)
    rows = [rows[i] for i in np.linspace(0, len(rows) - 1, min(MOST, len(rows))).astype(int)]
    lines = "".join(f"{updates},{row},{','.join(f'{value:.7g}' for value in every[row])}\n" for row in rows)
    ranked = ",loss_to_rank" if len(every[rows[0]]) > 1 else ""
    atomic_write(folder / MARGINS, f"step,row,margin{ranked}\n{lines}")
