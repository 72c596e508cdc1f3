"""Scores of the control methods on one task over several seeds, as a table.

usage: python examples/control/table.py [--data pendulum-stitch-v0] [--methods BC BC-10% TD3BC …] [--seeds 5]
                                        [--jobs 2] [--root runs/table]

Every run is ``python -m offpolicy.fit`` with the recipe of its method and task, on one thread; ``--jobs`` of them at a
time. A run whose folder is already complete under ``--root`` is read, not repeated, and one that was interrupted goes
on; its seconds are not known then. Prints a Markdown table: mean over
seeds of the last and of the best score with the 95 % interval of Student's t, and the scores of the seeds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from offpolicy.cli import entry
from offpolicy.cli.reader import Parser, at_least
from offpolicy.errors import UsageError
from offpolicy.evaluation.scores import interval
from offpolicy.files import Table, atomic_write, safe_name
from offpolicy.training.checkpoints import newest_checkpoint

METHODS = ("BC", "BC-10%", "TD3BC", "IQL", "PRDC", "A2PR", "ODICE", "CQL", "AWAC", "ReBRAC", "EDAC")


def run(data: str, label: str, seed: int, root: Path) -> tuple[float, float, float]:
    """Last score, best score and seconds of one run."""
    folder = root / safe_name(data) / safe_name(label) / f"seed{seed}"
    seconds = folder / "seconds.txt"
    if not seconds.exists():
        method, extra = ("BC", ["--model.top", "0.1"]) if label == "BC-10%" else (label, [])
        begun = newest_checkpoint(folder) is not None
        words = ["--model", method, "--data", data, *extra, "--seed_everything", str(seed), "--folder", str(folder)]
        words = ["--ckpt_path", str(folder)] if begun else [*words, "--run.threads", "1"]
        command = [sys.executable, "-m", "offpolicy.fit", *words]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode in (130, 143):
            raise KeyboardInterrupt
        if done.returncode:
            raise UsageError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        took = float("nan") if begun else time.perf_counter() - began
        atomic_write(seconds, f"{took:.1f}\n")
    scores = [row["eval/score"] for row in Table(folder / "evals.csv").rows() if "eval/score" in row]
    if not scores:
        raise UsageError(f"{folder} has no evaluation with a score; expected data of a known task. Choose other data.")
    print(f"{label} seed {seed}: last {scores[-1]:.1f}, best {max(scores):.1f}", file=sys.stderr)
    return scores[-1], max(scores), float(seconds.read_text())


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="pendulum-stitch-v0")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=at_least(1), default=5)
    parser.add_argument("--jobs", type=at_least(1), default=2)
    parser.add_argument("--root", type=Path, default=Path("runs/table"))
    args = parser.parse_args(argv)
    with ThreadPoolExecutor(args.jobs) as pool:
        pending = {
            label: [pool.submit(run, args.data, label, seed, args.root) for seed in range(args.seeds)]
            for label in dict.fromkeys(args.methods)
        }
        try:
            results = {label: np.array([job.result() for job in jobs]) for label, jobs in pending.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what has not begun; the rest saves
            raise
    print(f"| {args.data}, {args.seeds} seeds | last score | best score | last score of each seed | seconds |")
    print("|---|---|---|---|---|")
    for label, values in results.items():
        last, best, seconds = values.T
        seeds = ", ".join(f"{value:.1f}" for value in last)
        columns = (f"{x.mean():.1f}" + (f" ± {interval(x):.1f}" if len(x) > 1 else "") for x in (last, best))
        took = seconds[np.isfinite(seconds)]
        print(f"| {label} | {' | '.join(columns)} | {seeds} | {f'{took.mean():.0f}' if len(took) else '–'} |")
    return 0


if __name__ == "__main__":
    entry.run(main)
