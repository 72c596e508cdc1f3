"""Success of goal-conditioned methods on a maze made here, over several seeds, as a table.

usage: python examples/goals/table.py [--data pointmaze-medium-navigate-v0] [--steps 250000] [--methods GCBC HIQL OTA]
                                      [--seeds 3] [--jobs 2] [--recipe small] [--episodes 10] [--root runs/goals]

Makes the data where they are not there (``python -m offpolicy.data make``). A run is ``python -m offpolicy.fit`` with
the named recipe (small networks, batches and update counts of ours; ``--recipe auto`` takes the published settings), on
one thread; ``--jobs`` of them at a time. A run whose folder is already complete under ``--root`` is read, not repeated.
Prints a Markdown table of the mean of each run's last three evaluations, as OGBench's protocol has it: success over
the five tasks, mean over seeds ± half of the 95 % interval of Student's t; and the order consistency of the values (of
OTA's: low, high) at the distance of the sub-goals.
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

ORDER = "eval/order_consistency"


def call(*command: str) -> None:
    """Run a command of the library."""
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")


def run(args: argparse.Namespace, file: Path, method: str, seed: int) -> dict[str, float]:
    """Mean of the last three evaluations of one run, with its seconds."""
    folder = args.root / file.stem / method / f"seed{seed}"
    seconds = folder / "seconds.txt"
    if not seconds.exists():
        began = time.perf_counter()
        call(
            "offpolicy.fit", "--model", method, "--data", str(file), "--recipe", args.recipe, "--seed_everything",
            str(seed), "--folder", str(folder), "--run.threads", "1", "--run.eval_episodes", str(args.episodes),
        )  # fmt: skip
        seconds.write_text(f"{time.perf_counter() - began:.1f}\n")
    with open(folder / "evals.csv") as table:
        last = list(csv.DictReader(table))[-3:]
    names = [name for name, value in last[-1].items() if name.startswith("eval/") and value]
    numbers = {name: float(np.mean([float(row[name]) for row in last])) for name in names}
    print(f"{method} seed {seed}: success {100 * numbers['eval/success_mean']:.1f} %", file=sys.stderr)
    return numbers | {"seconds": float(seconds.read_text())}


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.1f}" + (f" ± {interval(np.array(values)):.1f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="pointmaze-medium-navigate-v0")
    parser.add_argument("--steps", type=int, default=250_000)
    parser.add_argument("--methods", nargs="+", default=["GCBC", "HIQL", "OTA"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--recipe", default="small")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--root", type=Path, default=Path("runs/goals"))
    args = parser.parse_args()
    file = args.root / f"{args.data}.npz"
    call("offpolicy.data", "make", args.data, "--steps", str(args.steps), "--out", str(args.root))
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {m: [pool.submit(run, args, file, m, seed) for seed in range(args.seeds)] for m in args.methods}
        results = {method: [job.result() for job in pending] for method, pending in jobs.items()}
    tasks = sorted(name for name in results[args.methods[0]][0] if name.startswith("eval/success_task"))
    print(f"| {args.data}, {args.seeds} seeds | success % | {' | '.join(f'task {t[-1]}' for t in tasks)} ", end="")
    print(f"| order consistency % | of each seed | seconds |\n|{'---|' * (len(tasks) + 5)}")
    for method, rows in results.items():
        success = [100 * row["eval/success_mean"] for row in rows]
        each = " | ".join(f"{100 * np.mean([row[task] for row in rows]):.0f}" for task in tasks)
        names = [name for name in (ORDER, f"{ORDER}/low", f"{ORDER}/high") if name in rows[0]]
        order = ", ".join(
            (f"{name.rpartition('/')[2]} " if "/low" in name or "/high" in name else "")
            + spread([100 * row[name] for row in rows])
            for name in names
        )
        seeds = ", ".join(f"{value:.1f}" for value in success)
        seconds = np.mean([row["seconds"] for row in rows])
        print(f"| {method} | {spread(success)} | {each} | {order or '–'} | {seeds} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
