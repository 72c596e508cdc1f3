"""Published variants of the objective on two made tasks, at equal numbers of written answers.

usage: python examples/rlvr/variants.py [--variants grpo dapo …] [--lags 0 4 16] [--tasks addition order] [--seeds 3]
                                        [--answers 10240] [--lr 1e-4] [--jobs 1] [--root runs/variants]
                                        [--lagged NAMES]

``addition``: two-digit sums by the warmed-up policy of addition.py, checked by arithmetic; a reward of 0 or 1.
``order``: four digits are to be written in ascending order; the reward is the share of the places that are right, so
half-right answers are paid. Every variant starts from the same weights, with its published defaults, and writes the
same number of answers: 32 problems with 8 answers per iteration, two updates of 128 (``mc_grpo`` takes odd groups: 28
problems with 9, two of 126). With a lag L all answers are of the policy of L iterations ago. Measured at the end: on
held-out problems the most likely answer, the mean of 4 sampled ones, and any of the 4, on sums with a carry too; on the
last training answers the entropy per token and the length.
A variant is compared with GRPO at the same task and lag by Student's test of the differences, since both runs of a seed
start from the same policy, corrected by Holm's rule for all variants of a column.
Prints Markdown tables; a run that is there is not made again.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from addition import results, steps_for, warm_up

from offpolicy.cli import entry
from offpolicy.cli.reader import Parser, at_least
from offpolicy.files import atomic_write
from offpolicy.losses.variants.choosing import variant_of

VARIANTS = ["grpo", "dr_grpo", "dapo", "gspo", "mc_grpo", "ngrpo", "bnpo", "unlikeliness", "canon", "clip_cov"]
VARIANTS += ["kl_cov", "bapo", "steer", "lp_reg", "vcpo", "rover"]
LAGGED = ["grpo", "gspo", "bapo", "vcpo", "unlikeliness", "clip_cov"]  # what stale answers are tried on
COMMON: dict[str, Any] = {"batch_size": 128, "minibatches": 2, "group_size": 8, "eval_rows": 0}
RATE = 1e-4
SETTINGS: dict[str, dict[str, Any]] = {"mc_grpo": {"group_size": 9, "batch_size": 126}}  # where they must differ
CLAIMS = {  # name → what its paper says it improves
    "unlikeliness": "pass@4",
    "clip_cov": "entropy",
    "kl_cov": "entropy",
    "bapo": "entropy, and learning from stale answers",
    "steer": "entropy",
    "lp_reg": "entropy",
    "vcpo": "learning from stale answers",
    "rover": "pass@4",
    "ngrpo": "pass@4",
    "capo": "learning at high rates",
}
MEASURES = {"addition": ("accuracy", "mean@4", "pass@4", "carry/pass@4", "entropy"),
            "order": ("accuracy", "mean@4", "pass@4", "entropy", "length")}  # fmt: skip


def right_places(prompt: str, answer: str, reference: str) -> float:
    """The share of the places of an answer that are right; one of another length has none."""
    return float(np.mean([a == b for a, b in zip(answer, reference)])) if len(answer) == len(reference) else 0.0


def order_data(root: Path) -> tuple[Path, Path, Path]:
    """Problems, held-out problems and answered problems of the task ``order``."""
    from offpolicy.data.sampling import permutation

    files = [root / f"order_{name}.jsonl" for name in ("train", "test", "answered")]
    numbers = permutation(0, 0, 10_000).numpy()
    root.mkdir(parents=True, exist_ok=True)
    for path, chosen in zip(files, (numbers[400:], numbers[:400], numbers[400:1400])):
        key = "completion" if path.stem.endswith("answered") else "answer"
        rows = [{"prompt": f"{n:04d}=", key: "".join(sorted(f"{n:04d}"))} for n in chosen]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files[0], files[1], files[2]


def task_data(task: str, root: Path) -> tuple[str, dict[str, Any]]:
    """Name and options of the problems of a task."""
    if task == "addition":
        return "addition", {}
    train, test, _ = order_data(root)
    return str(train), {"eval_data": str(test)}


def start(task: str, root: Path, seed: int) -> Path:
    """The policy that all variants of a seed start from."""
    folder = root / task / f"seed{seed}"
    if task == "addition":
        return warm_up(folder, seed)
    name, options = task_data(task, root)
    return warm_up(folder, seed, until=0.3, data=name, rows=order_data(root)[2], **options)


def one_run(task: str, variant: str, lag: int, seed: int, root: Path, answers: int, lr: float = RATE) -> dict[str, Any]:
    """What is measured after one run."""
    import torch

    import offpolicy as op
    from offpolicy.data.texts.problems import ProblemData
    from offpolicy.training.checkpoints import place_in

    folder = root / task / f"seed{seed}" / f"{variant}-lag{lag}-{answers}{'' if lr == RATE else f'-lr{lr:g}'}"
    done = folder / "measured.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    torch.set_num_threads(1)
    policy = root / task / f"seed{seed}" / "policy"
    name, options = task_data(task, root)
    rewards = None if task == "addition" else ["variants.right_places"]
    longest = 4 if task == "addition" else 6
    settings = {"lr": lr, **COMMON, **SETTINGS.get(variant, {}), "max_new_tokens": longest, "export": "none"}
    method = op.GRPO(policy=str(policy), variant=variant, lag=lag, rewards=rewards, **settings)
    result = op.fit(
        method,
        ProblemData(name, show=0, **options),
        max_steps=steps_for(method, answers),
        seed=seed,
        **place_in(folder),
        eval_every=0,
        log_every=20,
        threads=1,
        verbose=False,
        gradient_clip_val=1.0,
        save_every=0,
    ).complete()
    last = list(csv.DictReader((folder / "metrics.csv").open()))[-1]
    found = {"task": task, "variant": variant, "lag": lag, "seed": seed, **result.scores}
    found |= {"entropy": float(last["train/entropy"]), "length": float(last["train/answers/length"])}
    atomic_write(done, json.dumps(found))
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def table(rows: list[dict[str, Any]], task: str, lag: int) -> str:
    """Means over seeds ± half of the 95 % interval; a star where Holm's p of the difference from GRPO is below 5 %."""
    from scipy.stats import ttest_rel

    from offpolicy.evaluation.aggregates import holm
    from offpolicy.evaluation.scores import interval

    chosen = [row for row in rows if (row["task"], row["lag"]) == (task, lag)]
    names = list(dict.fromkeys(row["variant"] for row in chosen))
    values = {
        (name, measure): np.array([row[measure] for row in chosen if row["variant"] == name])
        for name in names
        for measure in MEASURES[task]
    }
    seeds = len(next(iter(values.values())))
    star: set[tuple[str, str]] = set()
    others = [name for name in names if name != "grpo"]
    if "grpo" in names and others and seeds > 1:
        for measure in MEASURES[task]:
            p = holm([float(ttest_rel(values[name, measure], values["grpo", measure]).pvalue) for name in others])
            star |= {(name, measure) for name, one in zip(others, p) if one < 0.05}
    lines = [f"| {task}, lag {lag}, {seeds} seeds | " + " | ".join(MEASURES[task]) + " | claimed |"]
    lines.append("|---" * (len(MEASURES[task]) + 2) + "|")
    for name in names:
        cells = []
        for measure in MEASURES[task]:
            found = values[name, measure]
            half = f" ± {interval(found):.3f}" if len(found) > 1 else ""
            cells.append(f"{found.mean():.3f}{half}{' *' if (name, measure) in star else ''}")
        lines.append(f"| {name} | {' | '.join(cells)} | {CLAIMS.get(name, '')} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--lagged", nargs="+", default=list(LAGGED), help="variants of the tables with a lag")
    parser.add_argument("--lags", type=at_least(0), nargs="+", default=[0, 4, 16])
    parser.add_argument("--tasks", nargs="+", default=["addition", "order"], choices=list(MEASURES))
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--answers", type=at_least(1), default=10_240, help="that each run writes")
    parser.add_argument("--lr", type=float, default=RATE)
    parser.add_argument("--jobs", type=at_least(1), default=1)
    parser.add_argument("--root", type=Path, default=Path("runs/variants"))
    args = parser.parse_args(argv)
    variants, lagged = ([variant_of(name).name for name in names] for names in (args.variants, args.lagged))
    plan = [
        (task, name, lag, seed)
        for task in dict.fromkeys(args.tasks)
        for lag in dict.fromkeys(args.lags if task == "addition" else args.lags[:1])
        for name in dict.fromkeys(lagged if lag else variants)
        for seed in range(args.seeds)
    ]
    with ProcessPoolExecutor(args.jobs) as pool:
        begun = [pool.submit(start, task, args.root, seed) for task in args.tasks for seed in range(args.seeds)]
        results(pool, begun)
        jobs = [
            pool.submit(one_run, task, name, lag, seed, args.root, args.answers, args.lr)
            for task, name, lag, seed in plan
        ]
        rows = results(pool, jobs)
    (args.root / "rows.json").write_text(json.dumps(rows, indent=1))
    for task, lag in dict.fromkeys((task, lag) for task, _, lag, _ in plan):
        print(table(rows, task, lag), end="\n\n")
    return 0


if __name__ == "__main__":
    entry.run(main)
