"""Scores of the control methods on one task over several seeds, as a table.

usage: python examples/control/table.py [--data pendulum-stitch-v0] [--methods BC BC-10% TD3BC …] [--seeds 5]
                                        [--jobs 2] [--root runs/table]

Every run is ``python -m offpolicy.fit`` with the recipe of its method and task, on one thread; ``--jobs`` of them at a
time. A run whose folder is already complete under ``--root`` is read, not repeated. Prints a Markdown table: mean over
seeds of the last and of the best score with the 95 % interval of Student's t, and the scores of the seeds.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from offpolicy.evaluation.scores import interval
from offpolicy.files import safe_name

METHODS = ("BC", "BC-10%", "TD3BC", "IQL", "PRDC", "A2PR", "ODICE", "CQL", "AWAC", "ReBRAC", "EDAC")


def run(data: str, label: str, seed: int, root: Path) -> tuple[float, float, float]:
    """Last score, best score and seconds of one run."""
    folder = root / safe_name(data) / safe_name(label) / f"seed{seed}"
    seconds = folder / "seconds.txt"
    if not seconds.exists():
        method, extra = ("BC", ["--model.top", "0.1"]) if label == "BC-10%" else (label, [])
        command = [sys.executable, "-m", "offpolicy.fit", "--model", method, "--data", data, *extra]
        command += ["--seed_everything", str(seed), "--folder", str(folder), "--run.threads", "1"]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        seconds.write_text(f"{time.perf_counter() - began:.1f}\n")
    with open(folder / "evals.csv") as file:
        scores = [float(row["eval/score"]) for row in csv.DictReader(file)]
    print(f"{label} seed {seed}: last {scores[-1]:.1f}, best {max(scores):.1f}", file=sys.stderr)
    return scores[-1], max(scores), float(seconds.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="pendulum-stitch-v0")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--root", type=Path, default=Path("runs/table"))
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        pending = {
            label: [pool.submit(run, args.data, label, seed, args.root) for seed in range(args.seeds)]
            for label in args.methods
        }
        results = {label: np.array([job.result() for job in jobs]) for label, jobs in pending.items()}
    print(f"| {args.data}, {args.seeds} seeds | last score | best score | last score of each seed | seconds |")
    print("|---|---|---|---|---|")
    for label, values in results.items():
        last, best, seconds = values.T
        seeds = ", ".join(f"{value:.1f}" for value in last)
        columns = (f"{x.mean():.1f} ± {interval(x):.1f}" for x in (last, best))
        print(f"| {label} | {' | '.join(columns)} | {seeds} | {seconds.mean():.0f} |")


if __name__ == "__main__":
    main()
