"""Some hundred damaged files of every kind: each opens, or is one clear error. `fuzzing.py` makes larger tables."""

from __future__ import annotations

import random
from pathlib import Path

import fuzzing
import pytest

MUTATIONS = 240
pytestmark = pytest.mark.xdist_group("fuzz")  # the files are made once


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    fuzzing.make_all(folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_damaged_files_are_clear_errors(root: Path) -> None:
    table = fuzzing.run(root, MUTATIONS, seed=3)
    faults = [f"{kind} {seed}: {text}" for kind, row in table.items() for seed, text in row["faults"]]
    assert not faults, "\n\n".join(faults[:3])
    refused = sum(row["counts"]["data"] + row["counts"]["usage"] for row in table.values())
    assert refused > MUTATIONS // 3, fuzzing.show(table)  # else nothing was damaged


def test_whole_files_open(root: Path, tmp_path: Path) -> None:
    """What is damaged above was sound, and its kinds of damage are damage."""
    for name, opened, _ in (fuzzing.KINDS[kind] for kind in ("folder", "hdf5", "npz", "minari-arrow")):
        kind = next(k for k, v in fuzzing.KINDS.items() if v[0] == name and v[1] is opened)
        opened(root / kind / name)
    rng = random.Random(0)
    content = b'{"a": 12, "b": [1, 2, 3]}' * 20
    assert all(fuzzing.damage(content, rng, text=True) != content for _ in range(200))
