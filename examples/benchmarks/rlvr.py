"""GRPO: sequences per second of whole iterations, answers drawn and learned from, beside TRL's ``GRPOTrainer``.

usage: python examples/benchmarks/rlvr.py [--trl PATH/TO/python] [--threads 1] [--rounds 3] [--steps 20] [--length 8]
       [--only KIND …]

A random Llama-shaped model (3 layers of width 128, vocabulary 64), 32 random prompts of 8 tokens × 8 answers of at most
8 tokens per iteration, one optimiser step over all of them, float32, the same problems, loss and learning rate
everywhere. The reward is the share of an answer's words with an even number. Each figure is a process of its own, and
the figures of a round are taken in turn, so that a drift of the machine hits all alike:

  grpo        offpolicy.fit with metrics, files and progress bar on
  tiny        the same with the engine "tiny", which has no cache
  remix       ReMix with p = 0.4 and m = 2: two optimiser steps per iteration, both divergences of KL-Convex measured
  trl         GRPOTrainer as it comes; the interpreter of an environment with TRL 1.16 is named by --trl
  trl_tuned   the same without gradient checkpointing

Rates are medians over the steps after the first four: of processor time with one thread, of the wall with more. (ReMix
takes two steps per iteration, of which the first has the answers drawn, so for it the mean of pairs counts.) The mean
reward of every ten steps says that they learn the same. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # also where it is imported from a test
from figures import about, figure, save_tokenizer  # noqa: E402

VOCABULARY, LAYERS, WIDTH, HEADS = 64, 3, 128, 4
PROMPTS, GROUP, PROMPT, LENGTH = 32, 8, 8, 8
LR = 1e-3
SKIP = 4  # steps
KINDS = ("grpo", "tiny", "remix", "trl", "trl_tuned")
EOS = 0


def evenness(prompt: str, answer: str, reference: str | None) -> float:
    """The share of an answer's words with an even number."""
    words = answer.split()
    return sum(int(word[1:]) % 2 == 0 for word in words) / max(1, len(words))


def clock() -> float:
    """Seconds: of processor time with one thread, which other programs hardly disturb, else of the wall."""
    return time.process_time() if os.environ["OMP_NUM_THREADS"] == "1" else time.perf_counter()


def prepare(folder: Path, problems: int, positions: int = PROMPT + LENGTH, **shape: int) -> None:
    """The policy, its tokenizer (a word per token) and the problems; ``shape``: settings of a Llama in other sizes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    save_tokenizer(folder / "policy", VOCABULARY)
    shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, **shape}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        **shape,
        intermediate_size=8 * shape["hidden_size"] // 3,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "policy")
    with open(folder / "problems.jsonl", "w") as file:
        for row in torch.randint(1, VOCABULARY, (problems, PROMPT)).tolist():
            file.write(json.dumps({"prompt": " ".join(f"w{i}" for i in row), "answer": "none"}) + "\n")


def run(kind: str, folder: Path, steps: int, length: int) -> dict[str, Any]:
    """The whole path: offpolicy.fit with its metrics, checkpoints, files and bar."""
    import csv

    import torch
    from lightning.pytorch import Callback

    import offpolicy
    from offpolicy.data.texts.problems import ProblemData

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    began: list[float] = []

    class Clock(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            began.append(clock())

        def on_train_end(self, *_: Any) -> None:
            began.append(clock())

    method = offpolicy.ReMix if kind == "remix" else offpolicy.GRPO
    learner = method(
        policy=str(folder / "policy"),
        rewards=["rlvr.evenness"],
        lr=LR,
        batch_size=PROMPTS * GROUP,
        micro_batch_size=PROMPTS * GROUP,
        group_size=GROUP,
        max_new_tokens=length,
        export="none",
        **({"engine": "tiny"} if kind == "tiny" else {}),
    )
    out = folder / f"run-{os.getpid()}"
    offpolicy.fit(
        learner,
        ProblemData(str(folder / "problems.jsonl"), eval_fraction=0.0, show=0),
        max_steps=steps,
        folder=out,
        eval_every=0,
        log_every=10,
        gradient_clip_val=1.0,
        callbacks=[Clock()],
        accelerator="cpu",
    )
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    return {
        "seconds": [b - a for a, b in pairwise(began)],
        "rewards": [float(row["train/reward/own"]) for row in rows],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def measure(kind: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One figure in a process of its own."""
    if kind.startswith("trl"):
        numbers = [args.steps, PROMPTS, GROUP, args.length, LR]
        tuned = ["gradient_checkpointing=false"] if kind == "trl_tuned" else []
        command = [args.trl, str(HERE / "trl_grpo.py"), str(folder), *map(str, numbers), *tuned]
    else:
        command = [sys.executable, __file__, "--worker", kind, str(folder), str(args.steps), str(args.length)]
    found = figure(command, args.threads)
    times = found["seconds"][SKIP:]
    if kind == "remix":
        times = [(a + b) / 2 for a, b in zip(times[::2], times[1::2])]
    found["step_ms"] = 1e3 * statistics.median(times)
    found["mean_step_ms"] = 1e3 * statistics.fmean(times)
    print(f"{kind}: {found['step_ms']:.1f} ms per step, {found['peak_mib']:.0f} MiB", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="Python interpreter of an environment with TRL 1.16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=LENGTH, help="longest answer in tokens")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        kind, folder, *numbers = args.worker
        print(json.dumps(run(kind, Path(folder), *map(int, numbers))))
        return

    kinds = [kind for kind in KINDS if kind in args.only and (args.trl or not kind.startswith("trl"))]
    samples: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), args.steps * PROMPTS, PROMPT + args.length)
        for _ in range(args.rounds):
            for kind in kinds:
                samples[kind].append(measure(kind, Path(name), args))
    results: dict[str, dict[str, Any]] = {}
    for kind, found in samples.items():
        numbers = ("step_ms", "mean_step_ms", "peak_mib")
        results[kind] = {name: round(statistics.median(f[name] for f in found), 1) for name in numbers}
        if kind != "remix":
            rate = statistics.median(1e3 * PROMPTS * GROUP / f["step_ms"] for f in found)
            results[kind]["sequences_per_s"] = round(rate)
        results[kind]["rewards"] = [round(x, 3) for x in found[0]["rewards"]]
        for peer in (peer for peer in kinds if peer.startswith("trl") and not kind.startswith("trl")):
            faster = [b["step_ms"] / a["step_ms"] for a, b in zip(found, samples[peer])]
            results[kind][f"times_{peer}"] = round(statistics.median(faster), 2)
    if {"remix", "grpo"} <= set(kinds):
        steps = [a["step_ms"] / b["step_ms"] for a, b in zip(samples["remix"], samples["grpo"])]
        results["remix"]["step_of_grpo"] = round(statistics.median(steps), 2)
    versions = next((found[0]["versions"] for found in samples.values() if "versions" in found[0]), {})
    settings = {name: getattr(args, name) for name in ("threads", "steps", "rounds", "length")}
    print(json.dumps({"about": about(**settings) | versions, "results": results}, indent=1))


if __name__ == "__main__":
    main()
