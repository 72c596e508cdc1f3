"""Updates per second of the control methods, through the Trainer as a user runs them, beside two yardsticks.

usage: python examples/benchmarks/control.py [--methods TD3BC IQL] [--threads 1 2] [--rounds 3] [--updates 2000]
                                             [--d3rlpy PATH/TO/python]

Random data: observation 17, action 6, one million rows; batch 256, networks 2x256. Each figure is a process of its own,
and the figures of a round are taken in turn, so that a drift of the machine hits all alike. Per method and threads:

  trainer   Trainer.fit with metrics, files and progress bar on
  bare      the same updates in a bare loop: what the Trainer, logging and bar cost is trainer against bare
  plain     an ordinary single-file PyTorch loop (plain_loop.py); TD3BC and IQL only
  d3rlpy    d3rlpy's fit, when the interpreter of an environment that has it is named; TD3BC and IQL only

Prints one JSON object: versions, processor, settings, medians and ratios.
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
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
WITH_PEERS = ("TD3BC", "IQL")


def random_replay(rows: int) -> Any:
    from offpolicy import Replay

    rng = np.random.default_rng(0)
    end = np.zeros(rows, dtype=bool)
    end[999::1000] = True
    steps = {
        "obs": rng.standard_normal((rows, 17), dtype=np.float32),
        "action": rng.uniform(-1, 1, (rows, 6)).astype(np.float32),
        "reward": rng.standard_normal(rows, dtype=np.float32),
        "terminated": np.zeros(rows, dtype=bool),
    }
    meta = {"name": "random", "action_low": [-1.0] * 6, "action_high": [1.0] * 6}
    return Replay(steps, episode_end=end, meta=meta)


def run_trainer(method: str, updates: int, rows: int) -> float:
    """The whole path: offpolicy.fit with its metrics, checkpoints, files and bar."""
    from lightning.pytorch import Callback

    import offpolicy

    marks: list[tuple[int, float]] = []

    class Timer(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step >= updates // 10:
                marks.append((trainer.global_step, time.perf_counter()))

    learner = getattr(offpolicy, method)()
    total = updates + updates // 10
    with tempfile.TemporaryDirectory() as folder:
        offpolicy.fit(learner, random_replay(rows), max_steps=total, folder=folder, eval_every=0, callbacks=[Timer()])
    (first, began), (last, ended) = marks[0], marks[-1]
    return (last - first) / (ended - began)


def run_bare(method: str, updates: int, rows: int) -> float:
    """The same blocks of updates without Trainer, logging, files and bar."""
    import offpolicy
    from offpolicy import matmul

    learner = getattr(offpolicy, method)().prepare(random_replay(rows))
    with matmul.matmul_setting(matmul.choose_matmul("auto")):
        t, first, began = 0, 0, 0.0
        while t < updates + updates // 10:
            if not began and t >= updates // 10:
                first, began = t, time.perf_counter()
            learner.run_block(t, 64)
            t += 64
    return (t - first) / (time.perf_counter() - began)


def run_plain(method: str, updates: int, rows: int) -> float:
    import plain_loop
    import torch

    generator = torch.Generator().manual_seed(0)
    columns = {
        "obs": torch.randn(rows, 17, generator=generator),
        "action": torch.rand(rows, 6, generator=generator) * 2 - 1,
        "reward": torch.randn(rows, 1, generator=generator),
        "next_obs": torch.randn(rows, 17, generator=generator),
        "terminated": torch.zeros(rows, 1),
    }
    return plain_loop.rate(method, columns, updates)


def worker(kind: str, method: str, threads: int, updates: int, rows: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    run = {"trainer": run_trainer, "bare": run_bare, "plain": run_plain}[kind]
    rate = run(method, updates, rows)
    return {"updates_per_s": rate, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def measure(kind: str, method: str, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    """One figure in a process of its own."""
    numbers = [method, str(threads), str(args.updates), str(args.rows)]
    if kind == "d3rlpy":
        command = [args.d3rlpy, str(HERE / "d3rlpy_fit.py"), *numbers]
    else:
        command = [sys.executable, __file__, "--worker", kind, *numbers]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(WITH_PEERS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--d3rlpy", help="Python interpreter of an environment with d3rlpy 2.8")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        kind, method, *numbers = args.worker
        print(json.dumps(worker(kind, method, *map(int, numbers))))
        return

    import torch

    from offpolicy.matmul import choose_matmul

    samples: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.rounds):
        for threads in args.threads:
            for method in args.methods:
                kinds = ["trainer", "bare", *(["plain"] if method in WITH_PEERS else [])]
                kinds += ["d3rlpy"] if method in WITH_PEERS and args.d3rlpy else []
                for kind in kinds:
                    figure = measure(kind, method, threads, args)
                    samples.setdefault(f"{method}/{threads}/{kind}", []).append(figure)
                    print(f"{method} {threads} threads {kind}: {figure['updates_per_s']:.0f}/s", file=sys.stderr)
    results = []
    for threads in args.threads:
        for method in args.methods:
            kinds = [k for k in ("trainer", "bare", "plain", "d3rlpy") if f"{method}/{threads}/{k}" in samples]
            rates = {k: [s["updates_per_s"] for s in samples[f"{method}/{threads}/{k}"]] for k in kinds}
            row: dict[str, Any] = {"method": method, "threads": threads}
            row["updates_per_s"] = {k: round(statistics.median(r), 1) for k, r in rates.items()}
            row["trainer_over"] = {
                k: round(statistics.median(a / b for a, b in zip(rates["trainer"], r, strict=True)), 3)
                for k, r in rates.items()
                if k != "trainer"
            }
            row["peak_mib"] = {k: round(max(s["peak_mib"] for s in samples[f"{method}/{threads}/{k}"])) for k in kinds}
            results.append(row)
    about = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "matmul": choose_matmul("auto"),
        "rows": args.rows,
        "updates": args.updates,
        "rounds": args.rounds,
    }
    print(json.dumps({"about": about, "results": results}, indent=1))


if __name__ == "__main__":
    main()
