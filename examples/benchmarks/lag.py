"""GRPO with answers drawn ahead (``lag``): seconds of an iteration, and who waits for whom.

usage: python examples/benchmarks/lag.py [--python PATH] [--lags 0 1 2] [--rounds 3] [--iterations 10]
       [--width 256] [--layers 4] [--prompts 8] [--length 32]

PATH is an interpreter that has vLLM, which then draws in a process of its own; without it a thread of the trainer does.
Trainer and engine have one thread each. A random Llama-shaped model, 8 answers to each of the prompts of an iteration,
one optimiser step over all of them, float32. Each run is a process of its own, and the lags of a round take turns, so
that a drift of the machine hits all alike. Numbers are medians over the iterations after the first three, of the wall:

  seconds   of an iteration
  rollout   of the iteration until its first step: waiting or drawing, new weights, rewards
  wait      the trainer waits for answers (with a lag; without one it waits as long as the engine draws)
  drawing   the engine draws for an iteration
  idle      share of the iteration in which the engine does not draw

``speedup`` is the median over the rounds of the seconds of the first lag by those of each. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # also where it is imported from a test
from figures import about  # noqa: E402
from rlvr import GROUP, PROMPT, prepare  # noqa: E402

from offpolicy.language.rl.engines import TransformersEngine  # noqa: E402

SKIP = 3  # iterations


class BesideEngine(TransformersEngine):
    """Draws in a thread of the trainer, from a copy of the weights."""

    def __init__(self, batch_size: int = 256) -> None:
        super().__init__(batch_size)
        self.threads: dict[int, tuple[threading.Thread, list[Any]]] = {}
        self.drawing_seconds = 0.0

    def sync(self, model: Any, version: int) -> None:
        for thread, _ in self.threads.values():
            thread.join()
        super().sync(copy.deepcopy(model).eval(), version)

    def generate(self, *asked: Any) -> Any:
        began = time.perf_counter()
        found = super().generate(*asked)
        self.drawing_seconds += time.perf_counter() - began
        return found

    def submit(self, ticket: int, requests: Any, how: Any) -> None:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.extend(self.generate(requests, how)), daemon=True)
        self.threads[ticket] = thread, found
        thread.start()

    def collect(self, ticket: int, stopped: Any = None) -> Any:
        thread, found = self.threads.pop(ticket)
        thread.join()
        return found


def run(folder: Path, lag: int, args: argparse.Namespace) -> dict[str, float]:
    """Train, and take the medians."""
    import torch
    from lightning.pytorch import Callback

    import offpolicy
    from offpolicy.data.texts.problems import ProblemData

    torch.set_num_threads(1)
    began: list[float] = []
    drawn: list[float] = []

    class Clock(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            began.append(time.perf_counter())
            drawn.append(pl_module.answering.engine.drawing_seconds)

    answers = args.prompts * GROUP
    learner = offpolicy.GRPO(
        policy=str(folder / "policy"),
        engine={"name": "vllm", "python": args.python} if args.python else "lag.BesideEngine",
        lag=lag,
        rewards=["rlvr.evenness"],
        batch_size=answers,
        micro_batch_size=answers,
        group_size=GROUP,
        max_new_tokens=args.length,
        export="none",
        save_seconds=10_000,
    )
    out = Path(tempfile.mkdtemp(dir=folder))
    offpolicy.fit(
        learner,
        ProblemData(str(folder / "problems.jsonl"), eval_fraction=0.0, show=0),
        max_steps=args.iterations,
        folder=out,
        eval_every=0,
        log_every=1,
        callbacks=[Clock()],
        accelerator="cpu",
        threads=1,
        verbose=False,
    )
    rows = list(csv.DictReader((out / "metrics.csv").open()))[SKIP:-1]
    seconds = [b - a for a, b in pairwise(began[SKIP:])]
    drawing = [b - a for a, b in pairwise(drawn[SKIP:])]
    waits = [float(row["perf/engine_wait_seconds"]) for row in rows] if lag else drawing
    return {
        "seconds": statistics.median(seconds),
        "rollout": statistics.median(float(row["perf/rollout_seconds"]) for row in rows),
        "wait": statistics.median(waits),
        "drawing": statistics.median(drawing),
        "idle": 1.0 - sum(drawing) / sum(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python")
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--alone", nargs=2, metavar=("FOLDER", "LAG"), help="one run, made by the others")
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(run(Path(args.alone[0]), int(args.alone[1]), args)))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, 64, PROMPT + args.length, hidden_size=args.width, num_hidden_layers=args.layers)
        found: dict[int, list[dict[str, float]]] = {lag: [] for lag in args.lags}
        for _ in range(args.rounds):
            for lag in args.lags:
                command = [sys.executable, str(HERE / "lag.py"), *sys.argv[1:], "--alone", name, str(lag)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[lag].append(json.loads(done.stdout.splitlines()[-1]))
    first = found[args.lags[0]]
    table = {
        lag: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        | {"speedup": statistics.median(a["seconds"] / b["seconds"] for a, b in zip(first, runs))}
        for lag, runs in found.items()
    }
    settings = {key: value for key, value in vars(args).items() if key not in ("alone", "lags")}
    print(json.dumps({"settings": settings, "lags": table, "rounds": found, **about()}, indent=1))


if __name__ == "__main__":
    main()
