"""Readers allocate each column once: the peak stays well under 2.5 times the packed data."""

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from examples.benchmarks.loading import ACTION, OBS, write_episodes, write_flat
from offpolicy.data.sources import open_source

ROWS = 50_000


@pytest.mark.parametrize("write", [write_flat, write_episodes])
def test_peak_memory(write: Callable[[Path, int], Path], tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5" if write is write_flat else tmp_path / "random-v0", ROWS)
    packed = ROWS * (2 * OBS + ACTION + 2) * 4
    open_source(path)  # imports and the record of the hash
    gc.collect()
    tracemalloc.start()
    replay = open_source(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert replay.num_steps == ROWS
    assert (
        peak < 1.7 * packed
    )  # the pass over the rows works in chunks of constant size, which weigh more here than at 1M
