"""Updates per second of goal-conditioned methods, and what sampling their batches costs.

usage: python examples/benchmarks/goals.py [--methods OTA HIQL | all] [--threads 1 2] [--rounds 3] [--updates 20]
                                           [--jax PATH/TO/python]

Random data: observation 29, action 8, episodes of 1,000 steps, one million steps; batch 1024, networks 3x512. Every
figure is a process of its own, and the figures of a round are taken in turn, so that a drift of the machine hits all
alike. Per method and threads:

  updates_per_s    in a bare loop, draws included; the best half of the updates
  float32_share    the arithmetic of the matrix products at this rate, as a share of the rate of one large product,
                   measured just before and after
  sampling_ms      drawing one batch, as a share of an update in sampling_share
  over_jax         updates per second over those of goals_jax.py, which draws nothing, in the same round; OTA and HIQL
                   only, when the interpreter of an environment that has jax is named

Prints one JSON object: versions, processor, settings, medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ALL = ["OTA", "HIQL", "GCIVL", "GCIQL", "GCBC"]
BLOCK = 4  # updates drawn and timed at once
DRAWN = 16  # updates drawn at once where drawing alone is timed, as in training


def random_replay(steps: int) -> Any:
    from offpolicy import Replay

    rng = np.random.default_rng(0)
    end = np.zeros(steps, dtype=bool)
    end[999::1000] = True
    end[-1] = True
    columns = {
        "obs": rng.standard_normal((steps, 29), dtype=np.float32),
        "action": rng.uniform(-1, 1, (steps, 8)).astype(np.float32),
        "terminated": np.zeros(steps, dtype=bool),
    }
    tail = {"obs": rng.standard_normal((int(end.sum()), 29), dtype=np.float32)}
    meta = {"name": "random", "action_low": [-1.0] * 8, "action_high": [1.0] * 8}
    return Replay(columns, episode_end=end, tail=tail, meta=meta)


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def worker(method: str, threads: int, updates: int, steps: int) -> dict[str, float]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import offpolicy
    from offpolicy.compute import matmul
    from offpolicy.compute.memory import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()
    learner = getattr(offpolicy, method)().prepare(random_replay(steps))
    large = torch.randn(1024, 1024)

    def limit() -> float:
        return 2 * 1024**3 / min(seconds(lambda: large @ large) for _ in range(20))

    with matmul.matmul_setting(matmul.choose_matmul("auto")):
        with FlopCounterMode(display=False) as counter:
            learner.run_block(0, 1)  # the first update also makes the moments of Adam
        flops, before = counter.get_total_flops(), limit()
        blocks = sorted(seconds(lambda t=t: learner.run_block(t, BLOCK)) for t in range(1, updates + 1, BLOCK))
        update = statistics.mean(blocks[: (len(blocks) + 1) // 2]) / BLOCK
        peak = max(before, limit())
        draw = min(seconds(lambda: learner.draw(0, DRAWN)) for _ in range(5)) / DRAWN
    return {
        "updates_per_s": 1 / update,
        "gflop_per_update": flops / 1e9,
        "limit_gflop_per_s": peak / 1e9,
        "float32_share": flops / update / peak,
        "sampling_ms": 1e3 * draw,
        "sampling_share": draw / update,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def measure(method: str, threads: int, args: argparse.Namespace) -> dict[str, float]:
    """One row of figures, the library's and its yardstick's, each in a process of its own."""
    numbers = [method, str(threads), str(args.updates)]
    figure = output([sys.executable, __file__, "--worker", *numbers, str(args.steps)], threads)
    if args.jax and method in ("OTA", "HIQL"):
        rate = output([args.jax, str(Path(__file__).with_name("goals_jax.py")), *numbers], threads)["updates_per_s"]
        figure |= {"jax_updates_per_s": rate, "over_jax": figure["updates_per_s"] / rate}
    return figure


def output(command: list[str], threads: int) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["OTA", "HIQL"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1_000_000, help="of the data")
    parser.add_argument("--jax", help="Python interpreter of an environment with jax")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        method, *numbers = args.worker
        print(json.dumps(worker(method, *map(int, numbers))))
        return

    import torch

    from offpolicy.compute.matmul import choose_matmul

    methods = ALL if args.methods == ["all"] else args.methods
    samples: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for threads in args.threads:
            for method in methods:
                figure = measure(method, threads, args)
                samples.setdefault((method, threads), []).append(figure)
                text = f"{figure['updates_per_s']:.2f}/s, {figure['float32_share']:.2f} of the limit"
                print(f"{method} {threads} threads: {text}", file=sys.stderr)
    about = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "matmul": choose_matmul("auto"),
        "steps": args.steps,
        "updates": args.updates,
        "rounds": args.rounds,
    }
    results = [
        {"method": method, "threads": threads}
        | {name: float(f"{statistics.median(f[name] for f in figures):.4g}") for name in figures[0]}
        for (method, threads), figures in samples.items()
    ]
    print(json.dumps({"about": about, "results": results}, indent=1))


if __name__ == "__main__":
    main()
