"""Seconds and peak memory of loading data sets from disk, validation and hashes included.

usage: python examples/benchmarks/loading.py [--rows 1000000] [--folder DIR] [--repeats 3]

Random data: observation 17, action 6, episodes of 1,000 steps, uncompressed; 42 float32 a row when packed with next
observations. Each figure is a process of its own after a start with the same imports; `first` computes the SHA-256,
`later` only compares size and time stamp. Peak memory is the growth of the resident set over the imports, as a multiple
of the packed size. The files are in the page cache, having just been written. Prints one JSON object.

  flat        D4RL's layout: one HDF5 data set per column
  episodes    Minari's layout: an HDF5 group per episode
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

OBS, ACTION, EPISODE = 17, 6, 1000
LOAD = """
import json, resource, sys, time
import h5py, torch
from offpolicy.data.sources import open_source
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, wall, cpu = peak(), time.perf_counter(), time.process_time()
replay = open_source(sys.argv[1])
seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps([replay.num_steps, seconds, cpu_seconds, peak() - before]))
"""


def write_flat(path: Path, rows: int) -> Path:
    """A file in D4RL's layout."""
    import h5py

    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for key, width in (("observations", OBS), ("next_observations", OBS), ("actions", ACTION)):
            file[key] = np.clip(rng.standard_normal((rows, width), dtype=np.float32), -1, 1)
        file["rewards"] = rng.standard_normal(rows, dtype=np.float32)
        file["terminals"] = np.zeros(rows, dtype=bool)
        file["timeouts"] = np.arange(rows) % EPISODE == EPISODE - 1
    return path


def write_episodes(folder: Path, rows: int) -> Path:
    """A data set in Minari's layout."""
    import h5py

    rng = np.random.default_rng(0)
    (folder / "data").mkdir(parents=True)
    with h5py.File(folder / "data" / "main_data.hdf5", "w", track_order=True) as file:
        for k in range(rows // EPISODE):
            group = file.create_group(f"episode_{k}")
            columns = {
                "observations": rng.standard_normal((EPISODE + 1, OBS), dtype=np.float32),
                "actions": np.clip(rng.standard_normal((EPISODE, ACTION), dtype=np.float32), -1, 1),
                "rewards": rng.standard_normal(EPISODE),
                "terminations": np.zeros(EPISODE, dtype=bool),
                "truncations": np.arange(EPISODE) == EPISODE - 1,
            }
            for key, column in columns.items():
                group.create_dataset(key, data=column, chunks=True, maxshape=(None, *column.shape[1:]))
    spaces = {
        f"{kind}_space": json.dumps(
            {"type": "Box", "dtype": "float32", "shape": [width], "low": [-low] * width, "high": [low] * width}
        )
        for kind, width, low in (("observation", OBS, 1e9), ("action", ACTION, 1.0))
    }
    record = {
        "total_episodes": rows // EPISODE,
        "total_steps": rows,
        "data_format": "hdf5",
        "dataset_id": "bench/random-v0",
    }
    (folder / "data" / "metadata.json").write_text(json.dumps({**record, **spaces}))
    return folder


def measure(path: Path, repeats: int, packed: int) -> dict[str, object]:
    """First and later loads of one data set."""
    record = path / "data.lock.json" if path.is_dir() else path.with_name(path.name + ".lock.json")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    runs: dict[str, list[list[float]]] = {"first": [], "later": []}
    for _ in range(repeats):
        record.unlink(missing_ok=True)
        for values in runs.values():
            command = [sys.executable, "-c", LOAD, str(path)]
            values.append(json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout))
    result: dict[str, object] = {}
    for kind, values in runs.items():
        result[f"{kind}_seconds"] = round(statistics.median(v[1] for v in values), 3)
        result[f"{kind}_cpu_seconds"] = round(statistics.median(v[2] for v in values), 3)
        result[f"{kind}_peak_of_packed"] = round(max(v[3] for v in values) / packed, 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="steps, a multiple of 1,000")
    parser.add_argument("--folder", type=Path, help="where to write the files (removed afterwards)")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="loading-", dir=options.folder))
    try:
        packed = options.rows * (2 * OBS + ACTION + 2) * 4
        figures = {
            "flat": measure(write_flat(folder / "flat.hdf5", options.rows), options.repeats, packed),
            "episodes": measure(write_episodes(folder / "random-v0", options.rows), options.repeats, packed),
        }
        load = os.getloadavg()[0]
        print(
            json.dumps({"rows": options.rows, "python": platform.python_version(), "load": load, **figures}, indent=1)
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
