"""DPO: tokens per second of processor time and peak memory, beside TRL's ``DPOTrainer`` and a plain loop.

usage: python examples/benchmarks/preference.py [--trl PATH/TO/python] [--parts] [--rounds 3] [--steps 20] [--pairs 4]

A random Qwen2-shaped model (4 layers of width 256, vocabulary 32,000), random pairs of a prompt of 128 tokens and two
answers of 128, float32, one thread, the same pairs in the same order everywhere. Each figure is a process of its own,
and the figures of a round are taken in turn, so that a drift of the machine hits all alike:

  trainer      offpolicy.fit with metrics, files and progress bar on, the reference in columns
  trainer1024  the same with ``chunk=1024``, so that no logits are computed twice
  loop         the same steps as the latter in a bare loop
  trl          DPOTrainer as it comes; the interpreter of an environment with TRL 1.16 is named by --trl
  trl_tuned    the same with its reference precomputed and without gradient checkpointing

With --parts, a second table: a plain loop (all logits at once, a live reference, torch's AdamW), and each part added.
Tokens count what a row per answer would hold, 2 · pairs · 256 per step, for all. Time spent on reference columns is not
in the rates of those that use columns; it is reported as ``reference_cpu_s`` per step's worth of pairs, and paid once
per data set. Losses of the first steps stand side by side. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # also where it is imported from a test
from figures import about, figure, save_tokenizer  # noqa: E402

VOCABULARY, LAYERS, WIDTH = 32_000, 4, 256
PROMPT, ANSWER = 128, 128
BETA, LR = 0.1, 1e-5
EOS = 0
# each part of the second table with all above it
PARTS = (
    "plain",
    "cached reference",
    "head on answers only",
    "tiles",
    "shared prompt",
    "fused optimiser",
    "oneDNN",
    "kept memory",
    "no tile twice",
)


def prepare(folder: Path, rows: int) -> None:
    """The policy, its tokenizer (a word per token) and the pairs as text and as ids."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    save_tokenizer(folder / "policy", VOCABULARY)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "policy")
    ids = torch.randint(1, VOCABULARY, (rows, PROMPT + 2 * ANSWER))
    with open(folder / "pairs.jsonl", "w") as file:
        for row in ids.tolist():
            prompt, chosen, rejected = row[:PROMPT], row[PROMPT : PROMPT + ANSWER - 1], row[PROMPT + ANSWER + 1 :]
            texts = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            line = {k: ("" if k == "prompt" else " ") + " ".join(f"w{i}" for i in v) for k, v in texts.items()}
            file.write(json.dumps(line) + "\n")


def read_ids(folder: Path) -> list[dict[str, list[int]]]:
    """The pairs of the file as ids, each answer with its end token."""
    rows = []
    for line in (folder / "pairs.jsonl").read_text().splitlines():
        ids = {name: [int(word[1:]) for word in text.split()] for name, text in json.loads(line).items()}
        rows.append({name: text if name == "prompt" else [*text, EOS] for name, text in ids.items()})
    return rows


def batch_of(rows: list[dict[str, list[int]]]) -> Any:
    import torch

    from offpolicy.data.texts.sequences import Pairs, Ragged

    prompt, chosen, rejected = (
        Ragged(torch.tensor([i for row in rows for i in row[name]]), torch.tensor([len(row[name]) for row in rows]))
        for name in ("prompt", "chosen", "rejected")
    )
    return Pairs(prompt, chosen, prompt, rejected, {}, torch.arange(len(rows)))


def run_trainer(folder: Path, steps: int, size: int, **options: Any) -> dict[str, Any]:
    """The whole path: offpolicy.fit with its metrics, checkpoints, files and bar."""
    import numpy as np
    from lightning.pytorch import Callback

    import offpolicy
    from offpolicy.data.replay import Replay
    from offpolicy.data.sampling import permutation
    from offpolicy.data.texts.module import TextData

    rows = read_ids(folder)
    texts = [np.array(row[name]) for row in rows for name in ("prompt", "chosen", "rejected")]
    length = np.array([len(text) for text in texts])
    first = 3 * np.arange(len(rows))
    table = np.empty((len(rows), 4), dtype=np.int64)
    # the fit takes rows in the order of its permutation, which is to be the order of the file
    table[permutation(0, 0, len(rows)).numpy()] = np.stack([first, first + 1, first, first + 2], axis=1)
    replay = Replay(
        {"token": np.concatenate(texts)},
        start=np.cumsum(length) - length,
        length=length,
        tables={"pairs": table},
        meta={"name": "random pairs", "source": "text"},
    )
    losses: list[float] = []
    marks: list[float] = []

    class Clock(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            marks.append(time.process_time())

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))
            last[:] = [time.process_time()]

    last: list[float] = []
    learner = offpolicy.DPO(
        policy=str(folder / "policy"),
        beta=BETA,
        lr=LR,
        batch_size=size,
        warmup_ratio=0.0,
        lr_schedule="linear",
        ref_cache=str(folder / "cache"),
        **options,
    )
    offpolicy.fit(
        learner,
        TextData.of(replay),
        max_steps=steps,
        folder=folder / f"run-{os.getpid()}",
        eval_every=0,
        gradient_clip_val=1.0,
        callbacks=[Clock()],
        accelerator="cpu",
    )
    skip = min(2, steps - 1)
    return {"cpu_s_per_step": (last[0] - marks[skip]) / (steps - skip), "losses": losses}


def run_loop(folder: Path, steps: int, size: int, part: int) -> dict[str, Any]:
    """A bare loop with the first parts of `PARTS`, up to number `part`."""
    import torch
    from torch import Tensor, nn
    from torch.nn.functional import logsigmoid
    from transformers import AutoModelForCausalLM

    from offpolicy.compute.matmul import choose_matmul, matmul_setting
    from offpolicy.compute.memory import keep_freed_memory
    from offpolicy.language.answer_scores import score
    from offpolicy.language.layout import Layout, pair_layout

    has = {name: part >= i for i, name in enumerate(PARTS)}
    if has["kept memory"]:
        keep_freed_memory()
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    reference = None if has["cached reference"] else copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(
        policy.parameters(), LR, weight_decay=0.0, **({"fused": True} if has["fused optimiser"] else {"foreach": True})
    )
    rows = read_ids(folder)
    layouts = [
        pair_layout(batch_of(rows[i * size : (i + 1) * size]), EOS, shared_prompt=has["shared prompt"])
        for i in range(steps)
    ]

    def sums(model: nn.Module, layout: Layout) -> Tensor:
        if has["tiles"]:
            return score(model, layout, chunk=1024 if has["no tile twice"] else 256).sum_logps
        if has["head on answers only"]:
            hidden = model.model(input_ids=layout.input_ids, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden.flatten(0, 1)[layout.predict])
        else:
            logits = model(input_ids=layout.input_ids, use_cache=False).logits.flatten(0, 1)
        logps = logits.log_softmax(-1)
        logps = logps if has["head on answers only"] else logps[layout.predict]
        logps = logps.gather(1, layout.target[:, None])[:, 0]
        return logps.new_zeros(layout.num_answers).index_add(0, layout.answer, logps)

    with matmul_setting(choose_matmul("auto") if has["oneDNN"] else "mkl"):
        began = time.process_time()
        with torch.no_grad():
            columns = [sums(policy, layout) for layout in layouts] if reference is None else []
        reference_time = (time.process_time() - began) / steps
        losses, marks = [], []
        for step, layout in enumerate(layouts):
            marks.append(time.process_time())
            found = sums(policy, layout)
            with torch.no_grad():
                base = columns[step] if reference is None else sums(reference, layout)
            ratio = found - base
            loss = -logsigmoid(BETA * (ratio[:size] - ratio[size:])).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = LR * (1 - step / steps)
            optimizer.step()
            losses.append(float(loss.detach()))
        marks.append(time.process_time())
    skip = min(2, steps - 1)
    found = {"cpu_s_per_step": (marks[-1] - marks[skip]) / (steps - skip), "losses": losses}
    return found if reference is not None else {**found, "reference_cpu_s": reference_time}


def worker(kind: str, folder: Path, steps: int, size: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    if kind.startswith("trainer"):
        found = run_trainer(folder, steps, size, **({"chunk": 1024} if kind == "trainer1024" else {}))
    else:
        found = run_loop(folder, steps, size, len(PARTS) - 1 if kind == "loop" else PARTS.index(kind))
    return {**found, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def measure(kind: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One figure in a process of its own."""
    numbers = [str(folder), str(args.steps), str(args.pairs)]
    if kind.startswith("trl"):
        tuned = ["precompute_ref_log_probs=true", "gradient_checkpointing=false"] if kind == "trl_tuned" else []
        command = [args.trl, str(HERE / "trl_dpo.py"), *numbers, str(LR), *tuned]
    else:
        command = [sys.executable, __file__, "--worker", kind, *numbers]
    found = figure(command, 1)
    found["tokens_per_cpu_s"] = 2 * args.pairs * (PROMPT + ANSWER) / found["cpu_s_per_step"]
    print(f"{kind}: {found['tokens_per_cpu_s']:.0f} tokens/cpu s, {found['peak_mib']:.0f} MiB", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="Python interpreter of an environment with TRL 1.16")
    parser.add_argument("--parts", action="store_true", help="also measure what each part brings")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=4, help="per step")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        kind, folder, *numbers = args.worker
        print(json.dumps(worker(kind, Path(folder), *map(int, numbers))))
        return

    kinds = [
        "trainer",
        "trainer1024",
        "loop",
        *(["trl", "trl_tuned"] if args.trl else []),
        *(PARTS[:-1] if args.parts else ()),
    ]
    samples: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), args.steps * args.pairs)
        for _ in range(args.rounds):
            for kind in kinds:
                samples[kind].append(measure(kind, Path(name), args))
    results: dict[str, dict[str, Any]] = {}
    for kind, found in samples.items():
        names = ("cpu_s_per_step", "tokens_per_cpu_s", "reference_cpu_s", "peak_mib")
        results[kind] = {
            name: round(statistics.median(f[name] for f in found), 3) for name in names if name in found[0]
        }
    peers = [kind for kind in kinds if kind.startswith("trl")]
    for kind in kinds:
        for peer in peers if kind not in peers else ():
            rates = [a["tokens_per_cpu_s"] / b["tokens_per_cpu_s"] for a, b in zip(samples[kind], samples[peer])]
            results[kind][f"times_{peer}"] = round(statistics.median(rates), 2)
            apart = [abs(a - b) for a, b in zip(samples[kind][0]["losses"], samples[peer][0]["losses"])]
            results[kind][f"losses_from_{peer}"] = {"first": round(apart[0], 7), "largest": round(max(apart), 7)}
            results[kind][f"memory_of_{peer}"] = round(results[kind]["peak_mib"] / results[peer]["peak_mib"], 2)
    facts = about(steps=args.steps, rounds=args.rounds) | (samples["trl"][0]["versions"] if args.trl else {})
    losses = {kind: [round(x, 6) for x in found[0]["losses"]] for kind, found in samples.items()}
    print(json.dumps({"about": facts, "results": results, "losses": losses}, indent=1))


if __name__ == "__main__":
    main()
