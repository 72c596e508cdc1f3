"""Policy-guided diffusion on one task: what the synthetic data are like, and what agents learn from them.

usage: python examples/diffusion/table.py [--data pendulum-stitch-v0] [--seeds 3] [--jobs 2] [--model RUN]
                                          [--root runs/diffusion] [--guidance 0.5 1 2] [--trajectories 1024]
                                          [--world RUN] [--updates N]

Trains, each with the recipe of its method and task and on one thread: a trajectory diffusion model and a world model
(unless ``--model`` and ``--world`` name them), and every agent of ``--methods`` on real data, on unguided synthetic
data, and on data guided by itself with each coefficient of ``--used``: four pools as it trains, the first unguided.
``--updates`` are those of an agent in place of its recipe's. What is complete under ``--root`` is read, not repeated.

Prints Markdown. First, for the agent of seed 0 on real data as target policy: the real data, synthetic ones by
coefficient, and roll-outs of the policy in the world model, of equal length; errors are root mean squares in standard
deviations of the real data, novelty is a median; with pictures under ``--root``. Then, unless ``--seeds`` is 0, the
last scores, mean over seeds ± half of the 95 % interval of Student's t.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

import offpolicy
from offpolicy.data.sampling import permutation
from offpolicy.diffusion.measures import Comparison, compare, plot
from offpolicy.diffusion.sampler import to_replay
from offpolicy.evaluation.scores import interval
from offpolicy.files import safe_name

POOLS = 4  # in the training of an agent on guided data
MEASURES = ("log_prob", "dynamics_error", "dynamics_error_median", "drift", "reward_error", "novelty_median")


def train(folder: Path, model: str, data: str, seed: int, *options: str) -> Path:
    """A run of the command line, unless it is complete."""
    seconds = folder / "seconds.txt"
    if not seconds.exists():
        command = [sys.executable, "-m", "offpolicy.fit", "--model", model, "--data", data, *options]
        command += ["--seed_everything", str(seed), "--folder", str(folder), "--run.threads", "1"]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        seconds.write_text(f"{time.perf_counter() - began:.1f}\n")
    return folder


def agent(args: argparse.Namespace, method: str, source: str, guidance: float, seed: int) -> Path:
    """An agent on real ("real"), unguided ("unguided") or guided data ("policy-guided")."""
    label = f"guided-{guidance:g}" if source == "policy-guided" else source
    length = [] if args.updates is None else ["--trainer.max_steps", str(args.updates)]
    name = "-".join([method, label, *length[1:]])
    folder = args.root / safe_name(args.data) / name / f"seed{seed}"
    if source == "real":
        return train(folder, method, args.data, seed, *length)
    known = offpolicy.recipe(method, args.data)
    steps = args.updates or (known.settings["trainer.max_steps"] if known else 1_000_000)
    options = {
        "source": source,
        "synthetic.model": str(args.model),
        "synthetic.guidance": f"{guidance:g}",
        "synthetic.trajectories": str(args.trajectories),
        "synthetic.sampling_steps": str(args.sampling_steps),
        "synthetic.every": str(-(-steps // POOLS)),
    }
    given = [text for name, value in options.items() for text in (f"--data.{name}", value)]
    return train(folder, method, args.data, seed, *length, *given)


def measures(args: argparse.Namespace, method: str, policy_run: Path, world_run: Path) -> Comparison:
    """Real data, synthetic ones by coefficient, and roll-outs in the world model, under one policy."""
    from offpolicy.diffusion.drawing import sample

    real = offpolicy.load_data(args.data).replay
    policy, world, model = (offpolicy.load(run) for run in (policy_run, world_run, args.model))
    place = args.root / safe_name(args.data) / f"samples-{args.sampling_steps}"
    sets = {}
    for guidance in (0.0, *args.guidance):
        out = place / (f"{method}-{guidance:g}" if guidance else "unguided")
        options: dict[str, Any] = {"policy": policy, "guidance": guidance} if guidance else {}
        sets[f"guided, κ = {guidance:g}" if guidance else "unguided"] = sample(
            model, out, trajectories=args.trajectories, sampling_steps=args.sampling_steps, **options
        )
    chosen = permutation(0, 0, real.num_steps)[: args.trajectories]
    start = torch.from_numpy(real.steps["obs"][real.rows[chosen.numpy()]])
    rolled = world.rollout(start, policy, model.hparams.horizon)
    sets["world model"] = to_replay(rolled, real.meta)
    found = compare(real, sets, policy)
    plot(found, place.parent / f"measures-{method}.png")
    (place.parent / f"measures-{method}.json").write_text(json.dumps(found.as_dict(), indent=1) + "\n")
    return found


def last_score(folder: Path) -> float:
    with open(folder / "evals.csv") as file:
        return float(list(csv.DictReader(file))[-1]["eval/score"])


def print_measures(args: argparse.Namespace, method: str, found: Comparison) -> None:
    heads = ("log π(a\\|s)", "dynamics error", "its median", "drift", "reward error", "novelty")
    print(f"\n| {args.data}, policy {method} | {' | '.join(heads)} |")
    print(f"|{'---|' * (1 + len(MEASURES))}")
    found.real.name = "real data"
    for one in (found.real, *found.synthetic):
        cells = (f"{one.numbers[key]:.3g}" if key in one.numbers else "–" for key in MEASURES)
        print(f"| {one.name} | {' | '.join(cells)} |")
    *guided, world = found.synthetic
    likely, errors = ([one.numbers.get(key, np.nan) for one in guided] for key in MEASURES[:2])
    print(
        f"\nlog π rises with κ: {'yes' if (np.diff(likely) > 0).all() else 'no'}; dynamics error below the world ",
        end="",
    )
    better = [one.name for one, error in zip(guided, errors) if error < world.numbers.get(MEASURES[1], np.nan)]
    print(f"model's: {', '.join(better) or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="pendulum-stitch-v0")
    parser.add_argument("--methods", nargs="+", default=["TD3BC", "IQL"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--model", type=Path, help="run folder of a trajectory diffusion model of these data")
    parser.add_argument("--world", type=Path, help="run folder of a world model of these data")
    parser.add_argument("--updates", type=int, help="of every agent; left out, those of its recipe")
    parser.add_argument("--root", type=Path, default=Path("runs/diffusion"))
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="coefficients measured")
    parser.add_argument("--used", type=float, nargs="+", default=[1.0], help="coefficients that agents train with")
    parser.add_argument("--trajectories", type=int, default=1024)
    parser.add_argument("--sampling_steps", type=int, default=32)
    args = parser.parse_args()
    place = args.root / safe_name(args.data)
    offpolicy.load_data(args.data)  # made once, before several processes want it
    kinds = [("real", 0.0), ("unguided", 0.0), *(("policy-guided", kappa) for kappa in args.used)]
    with ThreadPoolExecutor(args.jobs) as pool:
        first = [pool.submit(agent, args, method, "real", 0.0, 0) for method in args.methods]
        kinds_of_model = {"model": "TrajectoryDiffusion", "world": "WorldModel"}
        made = {
            option: pool.submit(train, place / name, name, args.data, 0)
            for option, name in kinds_of_model.items()
            if getattr(args, option) is None
        }
        for option, job in made.items():
            setattr(args, option, job.result())
        policies = {method: job.result() for method, job in zip(args.methods, first)}
        jobs = {
            (method, source, kappa): [pool.submit(agent, args, method, source, kappa, k) for k in range(args.seeds)]
            for method in args.methods
            for source, kappa in kinds
        }
        for method, run in policies.items():
            print_measures(args, method, measures(args, method, run, args.world))
        sys.stdout.flush()
        scores = {key: np.array([last_score(job.result()) for job in pending]) for key, pending in jobs.items()}
    if not args.seeds:
        return
    print(f"\n| {args.data}, {args.seeds} seeds | data | last score | of each seed | seconds |\n|---|---|---|---|---|")
    for (method, source, kappa), values in scores.items():
        words = f"{source}, κ = {kappa:g}" if kappa else source
        folders = [job.result() for job in jobs[method, source, kappa]]
        seconds = np.mean([float((folder / "seconds.txt").read_text()) for folder in folders])
        seeds = ", ".join(f"{value:.1f}" for value in values)
        print(f"| {method} | {words} | {values.mean():.1f} ± {interval(values):.1f} | {seeds} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
