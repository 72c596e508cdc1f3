"""A small language model from scratch, tuned on solutions of GSM8K and then on pairs of right and wrong ones.

usage: python examples/preference/gsm8k.py [--seeds 3] [--sft_epochs 1] [--epochs 1] [--jobs 1] [--root runs/gsm8k]

A tokenizer (4,096 byte-level pieces) and a Llama of 2.6 million parameters are made here and trained on the
7,473 solutions (SFT). From there DPO, SimPO and RPO go over the 1,946 training pairs, and DPO and rDPO over the same
pairs of which a fifth are flipped. Prints a Markdown table over the 483 pairs of other questions:

  by reward    the method's reward prefers the right solution (log-ratio to the reference, or mean log-probability)
  by policy    the policy gives the right solution the higher mean log-probability per token

beside what can be had without understanding: taking the shorter solution, the writer that is right more often in the
training pairs, and the policy before preference tuning. Mean over seeds ± half of the 95 % interval of Student's t.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from make_policy import make_policy

DATA = Path(__file__).parent / "data"
READING = {"separator": "\n", "max_length": 384, "show": 0}
RUNS: dict[str, tuple[str, dict[str, Any], float]] = {  # label → method, its settings, share of flipped labels
    "DPO": ("DPO", {"beta": 0.1}, 0.0),
    "SimPO": ("SimPO", {"beta": 2.0, "gamma_beta_ratio": 0.25}, 0.0),
    "RPO": ("RPO", {"beta": 0.1, "eta": 0.005}, 0.0),
    "DPO, 20 % flipped": ("DPO", {"beta": 0.1}, 0.2),
    "rDPO, 20 % flipped": ("RDPO", {"beta": 0.1, "label_smoothing": 0.2}, 0.2),
}


def rows(name: str) -> Iterator[dict[str, Any]]:
    with gzip.open(DATA / name, "rt") as file:
        yield from map(json.loads, file)


def flipped(path: Path, share: float, seed: int) -> Path:
    """The training pairs with a share of the labels turned around."""
    turned = np.random.default_rng(seed).random(10_000) < share
    lines = []
    for row, turn in zip(rows("gsm8k_pairs_train.jsonl.gz"), turned):
        chosen, rejected = (row["rejected"], row["chosen"]) if turn else (row["chosen"], row["rejected"])
        lines.append(json.dumps({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}) + "\n")
    path.write_text("".join(lines))
    return path


def train(method: Any, data: Path, folder: Path, seed: int, **reading: Any) -> dict[str, float]:
    """The last evaluation of one run; a run that is complete is read, not repeated."""
    import offpolicy as op
    from offpolicy.data.texts.module import TextData
    from offpolicy.files import atomic_write
    from offpolicy.training.checkpoints import place_in

    done = folder / "done.json"
    if not done.exists():
        texts = TextData(str(data), **READING, **reading)
        options: dict[str, Any] = {"seed": seed, "eval_every": 0, "threads": 1, "verbose": False}
        atomic_write(done, json.dumps(op.fit(method, texts, **options, **place_in(folder)).complete().scores))
    return json.loads(done.read_text())


def one_seed(seed: int, root: Path, sft_epochs: float, epochs: float) -> dict[str, tuple[float, float]]:
    """Accuracies (by reward, by policy) of every run of a seed."""
    import torch

    import offpolicy as op
    from offpolicy.export import export

    torch.set_num_threads(1)
    folder = root / f"seed{seed}"
    if not (folder / "start").exists():
        make_policy(folder / "start", width=192, layers=4, vocabulary=4096, seed=seed)
    common = {"batch_size": 32, "micro_batch_size": 16}
    sft = op.SFT(policy=str(folder / "start"), lr=2e-3, epochs=sft_epochs, eval_rows=64, **common)
    train(sft, DATA / "gsm8k_train.jsonl.gz", folder / "sft", seed)
    if not (folder / "reference").exists():
        export(folder / "sft", folder / "reference")
    held_out, found = str(DATA / "gsm8k_pairs_test.jsonl.gz"), {}
    for label, (name, settings, share) in RUNS.items():
        data = flipped(folder / f"pairs-{share}.jsonl", share, seed)
        cache = str(folder / "cache")
        method = getattr(op, name)(
            policy=str(folder / "reference"), lr=1e-4, epochs=epochs, ref_cache=cache, eval_rows=0, **common, **settings
        )
        scores = train(method, data, folder / label.replace(" ", "-"), seed, eval_data=held_out)
        found[label] = (scores["rewards/accuracies"], scores["ranking_accuracy"])
        if "ref_ranking_accuracy" in scores:
            found["SFT only"] = (np.nan, scores["ref_ranking_accuracy"])
        print(f"seed {seed} {label}: {found[label]}", file=sys.stderr, flush=True)
    return found


def trivial() -> dict[str, float]:
    """Accuracies of rules that do not read the solution."""
    right = Counter()
    for row in rows("gsm8k_pairs_train.jsonl.gz"):
        right[row["chosen_by"]] += 1
        right[row["rejected_by"]] -= 1
    test = list(rows("gsm8k_pairs_test.jsonl.gz"))
    shorter = [len(row["chosen"]) < len(row["rejected"]) for row in test]
    writer = [right[row["chosen_by"]] > right[row["rejected_by"]] for row in test]
    return {"the shorter solution": float(np.mean(shorter)), "the better writer": float(np.mean(writer))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sft_epochs", type=float, default=1.0)
    parser.add_argument("--epochs", type=float, default=1.0, help="over the pairs")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--root", type=Path, default=Path("runs/gsm8k"))
    args = parser.parse_args()
    from offpolicy.evaluation.scores import interval

    with ProcessPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(one_seed, k, args.root, args.sft_epochs, args.epochs) for k in range(args.seeds)]
        results = [job.result() for job in jobs]
    print(f"| {args.seeds} seeds, 483 held-out pairs | by reward | by policy |")
    print("|---|---|---|")
    for name, share in trivial().items():
        print(f"| {name} | {100 * share:.1f} % | |")
    for label in ("SFT only", *RUNS):
        values = 100 * np.array([result[label] for result in results])
        columns = [f"{v.mean():.1f} % ± {interval(v):.1f}" if np.isfinite(v).all() else "" for v in values.T]
        print(f"| {label} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
