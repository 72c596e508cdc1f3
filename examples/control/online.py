"""Runs that collect their data: curves from scratch, and offline runs that go on online, over several seeds.

usage: python examples/control/online.py curves [--method SAC] [--envs Pendulum-v1 InvertedDoublePendulum-v5]
                                                [--steps 10000 25000] [--sb3 PYTHON] [--out runs/online.png]
       python examples/control/online.py switch [--data pendulum-stitch-v0] [--methods IQL AWAC TD3BC RLPD]
                                                [--steps 20000] [--utd 4] [--updates N]
       python examples/control/online.py learns [--data pendulum-medium-made-v0] [--utd 4]
       curves, switch: [--jobs 1]
       all: [--seeds 3] [--root runs/online]

Every run is ``python -m offpolicy.fit`` on one thread with the recipe of its method and task; ``--jobs`` of them at a
time. One that is complete under ``--root`` is read, not repeated; one that is not begins again. Prints a Markdown
table: means over seeds with the 95 % interval of Student's t.

``curves`` trains from scratch, and with ``--sb3`` (the interpreter of an environment that has it) stable-baselines3
too, with the same networks, rates, batches and uniform steps; it draws both into a figure. ``switch`` trains offline by
the recipe (with ``--updates`` updates in place of its own), then online for so many steps, all rows drawn alike; RLPD
begins at once, half of each batch offline, with ``--utd`` updates per step (the paper's is 20); on Pendulum its
networks are of 2x64, its rates 1e-3, and rewards a tenth.

``learns`` asks three things, with all seeds in one process: SAC reaches -200 on Pendulum-v1 in 6,000
steps; IQL ends 5,000 online steps above its offline score; RLPD is above SAC alone after 2,000 steps of each. A set of
``python -m offpolicy.data make`` is made first, a minute or two for Pendulum. It always begins anew.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from offpolicy.evaluation.scores import interval
from offpolicy.files import safe_name

HERE = Path(__file__).parent
ENVS, STEPS = ("Pendulum-v1", "InvertedDoublePendulum-v5"), (10_000, 25_000)
HERE_NAME, SB3 = "here", "stable-baselines3"
SMALL = [
    *("--model.hidden_dims", "[64,64]", "--model.actor_lr", "1e-3", "--model.critic_lr", "1e-3"),
    *("--model.entropy_lr", "1e-3", "--model.reward_transform", "0.1r"),
]
RLPD = [
    *("--model.num_critics", "10", "--model.num_min_critics", "2", "--model.layer_norm", "true"),
    *("--model.init", "xavier", "--model.actor_q", "mean", "--model.update_order", "critic_first"),
    *("--data.online.mix", "half"),
]
Curve = list[tuple[int, float]]


def command(words: Sequence[str]) -> float:
    """Run it; returns the seconds of processor time that it took, which other work on the machine hardly changes."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(words)} failed:\n{said.read()[-3000:]}")
    return used.ru_utime + used.ru_stime


def fit(*words: str) -> float:
    return command([sys.executable, "-m", "offpolicy.fit", *words, "--run.threads", "1"])


def once(folder: Path, work: Callable[[], float]) -> float:
    """Do the work of a folder unless it is complete; returns the seconds of processor time that it took."""
    seconds = folder / "cpu_seconds.txt"
    if not seconds.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        took = work()
        seconds.write_text(f"{took:.1f}\n")
        print(f"{folder} took {took:.0f} s of processor time", file=sys.stderr, flush=True)
    return float(seconds.read_text())


def evaluations(file: Path, value: str) -> Curve:
    """(environment steps, value) of each evaluation; 0 steps in the offline part of a run."""
    with open(file) as rows:
        return [(int(float(row.get("env/steps") or 0)), float(row[value])) for row in csv.DictReader(rows)]


# -- from scratch ------------------------------------------------------------------------------------------------------


def ours(method: str, env: str, steps: int, seed: int, root: Path) -> tuple[Curve, float]:
    folder = root / safe_name(env) / method / f"seed{seed}"
    random = min(10_000, steps // 10)  # after 1,000 HalfCheetah stays at 1,200 for long
    words = ["--data.online.env_steps", str(steps), "--data.online.random_steps", str(random), "--data.online.env", env]
    words += ["--run.eval_every", str(steps // 20), "--run.eval_episodes", "10", "--folder", str(folder)]
    took = once(folder, lambda: fit("--model", method, *words, "--seed_everything", str(seed)))
    return evaluations(folder / "evals.csv", "eval/return_mean"), took


def theirs(method: str, env: str, steps: int, seed: int, root: Path, python: str) -> tuple[Curve, float]:
    """With the settings of the run here, which is there already."""
    config = yaml.safe_load((root / safe_name(env) / method / f"seed{seed}" / "config.yaml").read_text())
    model, online = config["model"]["init_args"], config["data"]["online"]
    settings = {
        "steps": steps,
        "random_steps": online["random_steps"],
        "eval_every": config["run"]["eval_every"],
        "eval_episodes": config["run"]["eval_episodes"],
        "hidden_dims": list(model["hidden_dims"]),
        "lr": model["critic_lr"],
        "batch_size": model["batch_size"],
    }
    folder = root / safe_name(env) / f"sb3-{method}" / f"seed{seed}"

    def work() -> float:
        folder.mkdir()
        file, given = str(folder / "evals.csv"), json.dumps(settings)
        return command([python, str(HERE / "sb3_curve.py"), method, env, str(seed), file, given])

    took = once(folder, work)
    return evaluations(folder / "evals.csv", "eval/return_mean"), took


def both(method: str, env: str, steps: int, seed: int, root: Path, sb3: str) -> dict[str, tuple[Curve, float]]:
    found = {HERE_NAME: ours(method, env, steps, seed, root)}
    return found | ({SB3: theirs(method, env, steps, seed, root, sb3)} if sb3 else {})


def curves(args: argparse.Namespace) -> None:
    steps = args.steps or list(STEPS[: len(args.envs)])
    if len(steps) != len(args.envs):
        raise SystemExit(f"--steps has {len(steps)} numbers; expected one for each of the {len(args.envs)} --envs.")
    with ThreadPoolExecutor(args.jobs) as pool:
        pending = {
            env: [pool.submit(both, args.method, env, n, seed, args.root, args.sb3) for seed in range(args.seeds)]
            for env, n in zip(args.envs, steps)
        }
        found = {env: [job.result() for job in jobs] for env, jobs in pending.items()}
    kinds = [HERE_NAME, *([SB3] if args.sb3 else [])]
    print(f"| {args.method}, {args.seeds} seeds | steps | {' | '.join(kinds)} | CPU seconds of a run |")
    print("|---|---|" + "---|" * len(kinds) + "---|")
    for env, n in zip(args.envs, steps):
        seconds = ", ".join(f"{np.mean([run[kind][1] for run in found[env]]):.0f}" for kind in kinds)
        for quarter in range(1, 5):
            at = n * quarter // 4
            cells = [mean([at_most(run[kind][0], at) for run in found[env]]) for kind in kinds]
            print(f"| {env} | {at:,} | {' | '.join(cells)} | {seconds} |")
    draw(found, args.out)


def at_most(curve: Curve, steps: int) -> float:
    """The last evaluation up to so many environment steps."""
    return [value for at, value in curve if at <= steps][-1]


def mean(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ± {interval(np.array(values)):.1f}"


def draw(found: dict[str, list[dict[str, tuple[Curve, float]]]], out: Path) -> None:
    """A panel for each environment: mean over seeds, and a band from the least to the greatest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(found), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (env, runs) in enumerate(found.items(), 1):
        axes = figure.add_subplot(1, len(found), i, title=env, xlabel="environment steps", ylabel="return")
        for color, kind in enumerate(runs[0]):
            length = min(len(run[kind][0]) for run in runs)
            steps = [at for at, _ in runs[0][kind][0][:length]]
            values = np.array([[value for _, value in run[kind][0][:length]] for run in runs])
            axes.plot(steps, values.mean(0), color=f"C{color}", label=kind, linewidth=1.2)
            axes.fill_between(steps, values.min(0), values.max(0), color=f"C{color}", alpha=0.15, linewidth=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    print(out, file=sys.stderr)


# -- offline, then online ----------------------------------------------------------------------------------------------


def switched(
    method: str, data: str, steps: int, updates: int | None, utd: int, seed: int, root: Path
) -> tuple[dict[str, float], float]:
    """Scores of one run: at the switch (missing where nothing was trained before), the dip, the mean, the end."""
    length = [] if updates is None or method == "RLPD" else ["--trainer.max_steps", str(updates)]
    folder = root / safe_name(data) / "-".join([method, *length[1:]]) / f"seed{seed}"
    online = ["--data", data, "--data.online.env_steps", str(steps)]

    def work() -> float:
        begin = ["--folder", str(folder), "--seed_everything", str(seed)]
        if method == "RLPD":
            per_step = ["--data.online.utd", str(utd), "--model.policy_freq", str(utd)]
            every = ["--run.eval_every", str(utd * 1000), "--run.eval_episodes", "20"]
            small = SMALL if data.startswith("pendulum-") else []
            return fit("--model", "SAC", *online, *small, *RLPD, *per_step, *every, *begin)
        offline = fit("--model", method, "--data", data, *length, *begin)
        return offline + fit("--model", method, "--ckpt_path", str(folder), *online)

    took = once(folder, work)
    if method == "RLPD":
        scores = [value for _, value in evaluations(folder / "evals.csv", "eval/score")]
        return {"last": scores[-1], "mean": float(np.mean(scores))}, took
    return json.loads((folder / "online.json").read_text()), took


def switch(args: argparse.Namespace) -> None:
    steps = args.steps[0] if args.steps else 20_000
    with ThreadPoolExecutor(args.jobs) as pool:
        pending = {
            method: [
                pool.submit(switched, method, args.data, steps, args.updates, args.utd, seed, args.root)
                for seed in range(args.seeds)
            ]
            for method in args.methods
        }
        found: dict[str, list[Any]] = {method: [job.result() for job in jobs] for method, jobs in pending.items()}
    head = f"| {args.data}, {args.seeds} seeds, {steps:,} steps |"
    print(f"{head} at the switch | dip | mean after it | end | CPU seconds |")
    print("|---|---|---|---|---|---|")
    for method, runs in found.items():
        names = ("at_switch", "dip", "mean", "last")
        cells = [mean([run[name] for run, _ in runs]) if name in runs[0][0] else "-" for name in names]
        print(f"| {method} | {' | '.join(cells)} | {np.mean([took for _, took in runs]):.0f} |")


# -- whether it learns -------------------------------------------------------------------------------------------------


def together(folder: Path, seeds: int, *words: str) -> list[Path]:
    """Train some seeds in one process; returns the run folder of each."""
    several = ["--seeds", f"0..{seeds - 1}"] if seeds > 1 else ["--seed_everything", "0"]
    fit(*words, *([] if "--ckpt_path" in words else ["--folder", str(folder), *several]))
    return [folder / f"seed{seed}" for seed in range(seeds)] if seeds > 1 else [folder]


def last(folder: Path) -> float:
    return evaluations(folder / "evals.csv", "eval/return_mean")[-1][1]


def learnt(args: argparse.Namespace) -> list[tuple[str, list[float], list[float]]]:
    """What was checked, what each seed reached, and what it had to."""
    root, n, pendulum = args.root / "learns", args.seeds, ("--data.online.env", "Pendulum-v1")
    shutil.rmtree(root, ignore_errors=True)
    if "-made-" in args.data:
        command([sys.executable, "-m", "offpolicy.data", "make", args.data])

    def sac(steps: int) -> list[float]:
        words = [*pendulum, "--data.online.env_steps", str(steps), "--data.online.random_steps", str(steps // 6)]
        return [last(one) for one in together(root / f"SAC-{steps}", n, "--model", "SAC", *words)]

    found = [("SAC, Pendulum-v1, 6,000 steps: return", sac(6000), [-200.0] * n)]
    iql = root / "IQL"
    together(iql, n, "--model", "IQL", "--data", args.data)
    parts = together(
        iql, n, "--model", "IQL", "--data", args.data, "--ckpt_path", str(iql), "--data.online.env_steps", "5000"
    )
    told = [json.loads((one / "online.json").read_text()) for one in parts]
    scores = [[one[name] for one in told] for name in ("last", "at_switch")]
    found.append((f"IQL, {args.data}, 5,000 online steps: score", *scores))
    updates = ["--data.online.utd", str(args.utd), "--model.policy_freq", str(args.utd)]
    words = ["--data", args.data, "--data.online.env_steps", "2000", *SMALL, *RLPD, *updates]
    ends = [last(one) for one in together(root / "RLPD", n, "--model", "SAC", *words)]
    return [*found, (f"RLPD, {args.data}, 2,000 online steps: return", ends, sac(2000))]


def learns(args: argparse.Namespace) -> None:
    print(f"| {args.seeds} seeds | each seed | mean | must be at least | |")
    print("|---|---|---|---|---|")
    failed = False
    for what, reached, least in learnt(args):
        holds = float(np.mean(reached)) >= float(np.mean(least))
        failed |= not holds
        each = ", ".join(f"{value:.1f}" for value in reached)
        print(f"| {what} | {each} | {np.mean(reached):.1f} | {np.mean(least):.1f} | {'yes' if holds else 'NO'} |")
    if failed:
        raise SystemExit("One of them does not hold.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("curves", "switch", "learns"))
    parser.add_argument("--method", default="SAC")
    parser.add_argument("--envs", nargs="+", default=list(ENVS))
    parser.add_argument("--steps", nargs="+", type=int, help="environment steps; of curves for each of --envs")
    parser.add_argument("--sb3", default="", metavar="PYTHON", help="of an environment that has stable-baselines3")
    parser.add_argument("--out", type=Path, default=Path("runs/online.png"))
    parser.add_argument("--data", help="pendulum-stitch-v0; of learns pendulum-medium-made-v0, which has room above it")
    parser.add_argument("--methods", nargs="+", default=["IQL", "AWAC", "TD3BC", "RLPD"])
    parser.add_argument("--utd", type=int, default=4, help="of RLPD")
    parser.add_argument("--updates", type=int, help="of switch before it; left out, those of the recipe")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--root", type=Path, default=Path("runs/online"))
    args = parser.parse_args()
    if args.part == "learns":
        others = [
            name
            for name in ("method", "envs", "steps", "methods", "jobs", "updates")
            if getattr(args, name) != parser.get_default(name)
        ]
        if others:
            parser.error(f"learns has no --{others[0]}")
    args.root = args.root.resolve()
    args.data = args.data or ("pendulum-medium-made-v0" if args.part == "learns" else "pendulum-stitch-v0")
    {"curves": curves, "switch": switch, "learns": learns}[args.part](args)


if __name__ == "__main__":
    main()
