"""Opening and sampling of replays: memory maps of any size against the packed table in memory.

usage: python examples/benchmarks/replay.py [--rows 10000 1000000 10000000] [--folder DIR] [--blocks 100]

Random data: observation 17, action 6, episodes of 1,000 steps; batch 256, TD3+BC's noise, blocks of 64 updates, one
thread. Every store is written as a folder, opened as a memory map, and measured in a process of its own:

  open_ms      Replay.load
  bind_ms      what the start of a fit adds: rows that can be drawn, weights; without statistics for normalisation
  draw_us      indices, noise and gathered batches per update once the pages are warm: median over blocks, CPU time
  memory_mb    growth of the resident set by opening, binding and drawing, pages of the files not counted
  packed       the same for a store in memory, as one table of normalised rows (up to 1,000,000 rows)

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

OBS, ACTION, EPISODE, BATCH, BLOCK = 17, 6, 1000, 256, 64
PACKED_ROWS = 1_000_000


def write(folder: Path, rows: int) -> None:
    """A store of random steps, each episode with its last observation in the side table."""
    from offpolicy import Replay

    rng = np.random.default_rng(0)
    start = np.arange(0, rows, EPISODE)
    steps = {
        "obs": rng.standard_normal((rows, OBS), dtype=np.float32),
        "action": rng.random((rows, ACTION), dtype=np.float32),
        "reward": rng.standard_normal(rows, dtype=np.float32),
        "terminated": np.zeros(rows, dtype=bool),
    }
    tail = {"obs": rng.standard_normal((len(start), OBS), dtype=np.float32)}
    length = np.minimum(EPISODE, rows - start)
    Replay(steps, start=start, length=length, tail=tail, meta={"name": "random"}).save(folder)


def own_memory() -> float:
    """Resident memory in MB without pages of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return float("nan")


def measure(folder: Path, blocks: int, packed: bool) -> dict[str, Any]:
    import torch

    from lightning_modules.td3bc import TD3BC
    from offpolicy import Replay, Sizes

    torch.set_num_threads(1)
    method = TD3BC(batch_size=BATCH)
    method.initialize(Sizes(OBS, ACTION), seed=0)
    memory = own_memory()
    began = time.perf_counter()
    replay = Replay.load(folder)
    opened = time.perf_counter() - began
    if packed:
        replay = replay.to("cpu")
    else:
        warm = [int(np.asarray(column).reshape(-1).view(np.uint8)[::4096].sum()) for column in replay.steps.values()]
        assert len(warm) == len(replay.steps)
    began = time.perf_counter()
    method.bind(replay)
    bound = time.perf_counter() - began
    seconds = []
    for block in range(blocks):
        began = time.process_time()
        method.draw(block * BLOCK, BLOCK)
        seconds.append(time.process_time() - began)
    return {
        "open_ms": round(1e3 * opened, 2),
        "bind_ms": round(1e3 * bound, 2),
        "draw_us": round(1e6 * float(np.median(seconds)) / BLOCK, 1),
        "draw_us_best": round(1e6 * min(seconds) / BLOCK, 1),
        "memory_mb": round(own_memory() - memory, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, help="where the stores are written; a temporary one by default")
    parser.add_argument("--blocks", type=int, default=100)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), args.blocks, args.measure[1] == "packed")))
        return

    def child(folder: Path, kind: str) -> dict[str, Any]:
        command = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--blocks",
            str(args.blocks),
            "--measure",
            str(folder),
            kind,
        ]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return json.loads(output.splitlines()[-1])

    import torch

    result: dict[str, Any] = {"processor": platform.processor(), "torch": torch.__version__, "mapped": {}, "packed": {}}
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        for rows in args.rows:
            folder = Path(root) / str(rows)
            write(folder, rows)
            result["mapped"][rows] = child(folder, "mapped")
            if rows <= PACKED_ROWS:
                result["packed"][rows] = child(folder, "packed")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
