"""Two-digit addition from scratch: what GRPO, ReMix and RL-PLUS make of a policy that has hardly seen a carry.

usage: python examples/rlvr/addition.py [--seeds 3] [--jobs 1] [--answers 10240 40960] [--only NAME] [--root runs/rlvr]

A Llama of 0.6 million parameters reads ``ab+cd=`` and writes three digits. It is first trained on 2,500 sums of which
one in ten carries, until 45 % of its sampled answers to held-out sums are right; then each method trains it on all
9,600 sums with the answer checked by arithmetic. All start from the same weights and may write the same number of
answers: 32 problems with 8 answers per iteration for GRPO, while ReMix writes 152 new ones beside 104 old ones, and
RL-PLUS 7 beside a demonstration. Reported on 400 held-out sums, and on those with a carry: the most likely answer, the
mean of 4 sampled ones, and whether any of the 4 is right. Prints a Markdown table over seeds and draws a figure.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from offpolicy.cli import entry
from offpolicy.cli.reader import Parser, at_least
from offpolicy.files import atomic_write

SYMBOLS = [*"0123456789+=", "<eos>", "<pad>"]
MEASURES = ("accuracy", "mean@4", "pass@4")
COMMON: dict[str, Any] = {"lr": 1e-4, "batch_size": 128, "minibatches": 2, "max_new_tokens": 4, "eval_rows": 0}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {  # label → method, its settings
    "GRPO": ("GRPO", {}),
    "ReMix": ("ReMix", {}),
    "RL-PLUS, U = 1/V": ("RLPlus", {}),
    "RL-PLUS, U = 1": ("RLPlus", {"uniform": "one"}),
}


def make_policy(folder: Path, seed: int, width: int = 128, layers: int = 3) -> None:
    """A tokenizer of 14 symbols and a Llama with random weights."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({s: i for i, s in enumerate(SYMBOLS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # type: ignore[assignment]
    inner.decoder = decoders.Fuse()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SYMBOLS),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=None,
        eos_token_id=12,
        pad_token_id=13,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def warm_up_data(path: Path, seed: int, count: int = 2500, carry: float = 0.1) -> Path:
    """Training sums with their answers, a share of which carry."""
    from offpolicy.data.texts.sums import addition

    source = addition("train")
    prompts, answers = np.asarray(source.column("prompt")), np.asarray(source.column("answer"))
    kind, rng = np.asarray(source.column("carry")), np.random.default_rng(seed)
    few = rng.choice(np.flatnonzero(kind), round(carry * count), replace=False)
    most = rng.choice(np.flatnonzero(~kind), count - len(few), replace=False)
    rows = [{"prompt": str(prompts[i]), "completion": str(answers[i])} for i in np.concatenate([most, few])]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def warm_up(
    folder: Path, seed: int, until: float = 0.45, data: str = "addition", rows: Path | None = None, **options: Any
) -> Path:
    """A policy tuned on a few answered problems until this share of its sampled answers to held-out ones is right.

    Args:
        folder: of the policy; one that is there is taken.
        seed: of the weights and of the training.
        until: the share.
        data: the problems, some of which are held out.
        rows: the answered problems; None for the warm-up sums.
        **options: of :class:`ProblemData`.
    """
    import torch
    from lightning.pytorch import Callback

    import offpolicy as op
    from offpolicy.data.texts.module import TextData
    from offpolicy.data.texts.problems import ProblemData
    from offpolicy.data.texts.sequences import token_ids
    from offpolicy.export import export
    from offpolicy.language.reference import evaluating
    from offpolicy.language.rl.engine import Request, Sampling
    from offpolicy.language.rl.engines import TransformersEngine

    if (folder / "policy").exists():
        return folder / "policy"
    make_policy(folder / "start", seed)
    problems = ProblemData(data, tokenizer=str(folder / "start"), show=0, **options)
    problems.load()
    held_out: Any = problems.eval_replay
    table, answers = held_out.tables["problems"], held_out.tables["problems/answer"]
    requests = [Request(token_ids(held_out, prompt), i, 1) for i, prompt in enumerate(table[:, 0])]
    longest = max(len(answer) for answer in answers) + 1
    how, engine = Sampling(stop=(12,), max_new_tokens=longest), TransformersEngine(400)

    class Until(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step % 10 == 0 and pl_module.step_ended:
                engine.sync(pl_module.model, 0)
                with evaluating(pl_module.model):
                    found = engine.generate(requests, how)
                texts = [problems.tokenizer.decode(a[0].token, skip_special_tokens=True) for a in found]
                trainer.should_stop = float(np.mean([t == a for t, a in zip(texts, answers)])) >= until

    torch.set_num_threads(1)
    sft = op.SFT(policy=str(folder / "start"), lr=1e-3, batch_size=128, warmup_ratio=0.0, lr_schedule="constant")
    texts = TextData(str(rows or warm_up_data(folder / "warm-up.jsonl", seed)), eval_fraction=0.0, show=0)
    run: dict[str, Any] = {"eval_every": 0, "log_every": 50, "verbose": False, "callbacks": [Until()]}
    shutil.rmtree(folder / "sft", ignore_errors=True)  # of a warm-up that was interrupted: it is short
    op.fit(sft, texts, max_steps=1000, seed=seed, folder=folder / "sft", threads=1, **run).complete()
    export(folder / "sft", folder / "policy")
    return folder / "policy"


def steps_for(method: Any, answers: int) -> int:
    """Optimiser steps after which a method has written this many answers."""
    own = method.hparams.group_size - method.hparams.demonstrations
    return next(steps for steps, problems in method.schedule() if problems * own >= answers)


def make_method(label: str, policy: Path, answers: int) -> Any:
    """A method with the settings of this comparison; ReMix is reincarnated after 40 % of its iterations."""
    import offpolicy as op

    name, settings = RUNS[label]
    method = getattr(op, name)(policy=str(policy), **COMMON, **settings)
    if name != "ReMix":
        return method
    for last in range(1, 10_000):
        method.hparams.reincarnation = last
        iterations = next(i for i, (_, problems) in enumerate(method.schedule(), 1) if problems * 8 >= answers)
        if last >= 0.4 * iterations:
            return op.ReMix(policy=str(policy), **COMMON, **settings, reincarnation=last)
    raise ValueError(f"`answers` is {answers}; expected fewer.")


def results(pool: Executor, jobs: list[Future[Any]]) -> list[Any]:
    """What the jobs return; after an error or Ctrl-C no other begins."""
    try:
        return [job.result() for job in jobs]
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def one_run(label: str, folder: Path, policy: Path, seed: int, answers: list[int]) -> list[dict[str, Any]]:
    """Held-out numbers of a method after each number of answers."""
    import torch

    import offpolicy as op
    from offpolicy.data.texts.problems import ProblemData
    from offpolicy.training.checkpoints import place_in

    torch.set_num_threads(1)
    found = []
    run = folder / label.replace(" ", "").replace("/", "-").replace(",", "-").replace("=", "")
    for count in answers:
        method = make_method(label, policy, max(answers))
        result = op.fit(
            method,
            ProblemData("addition", show=0),
            max_steps=steps_for(method, count),
            seed=seed,
            **place_in(run),
            eval_every=0,
            log_every=20,
            threads=1,
            verbose=False,
            gradient_clip_val=1.0,
        ).complete()
        found.append({"seed": seed, "method": label, "answers": count, **result.scores})
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def one_seed(seed: int, root: Path, answers: list[int], labels: list[str]) -> list[dict[str, Any]]:
    """The warm-up's numbers and those of every method, from the same policy."""
    import offpolicy as op
    from offpolicy.data.texts.problems import ProblemData

    folder = root / f"seed{seed}"
    policy = warm_up(folder, seed)
    still = op.GRPO(policy=str(policy), **COMMON | {"lr": 0.0, "minibatches": 1, "batch_size": 8, "export": "none"})
    options: dict[str, Any] = {"threads": 1, "verbose": False, "eval_every": 0}
    measured = folder / "warm-up.json"
    if not measured.exists():
        shutil.rmtree(folder / "still", ignore_errors=True)
        result = op.fit(
            still, ProblemData("addition", show=0), max_steps=1, seed=seed, folder=folder / "still", **options
        ).complete()
        atomic_write(measured, json.dumps(result.scores))
    rows = [{"seed": seed, "method": "warm-up", "answers": 0, **json.loads(measured.read_text())}]
    for label in labels:
        rows += one_run(label, folder, policy, seed, answers)
    return rows


def table(rows: list[dict[str, Any]], seeds: int) -> str:
    """Means over seeds ± half of the 95 % interval, per method and number of answers."""
    from offpolicy.evaluation.scores import interval

    names = [*MEASURES, *(f"carry/{name}" for name in MEASURES)]
    lines = [f"| {seeds} seeds, 400 held-out sums | answers | " + " | ".join(names) + " |", "|---" * 8 + "|"]
    for method, answers in dict.fromkeys((row["method"], row["answers"]) for row in rows):
        chosen = [row for row in rows if (row["method"], row["answers"]) == (method, answers)]
        cells = []
        for name in names:
            values = np.array([row[name] for row in chosen])
            cells.append(f"{values.mean():.3f}" + (f" ± {interval(values):.3f}" if len(values) > 1 else ""))
        lines.append(f"| {method} | {answers:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy, and pass@4 on carries, over the answers written: every seed as a dot, means as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, name, title in zip(axes, ("accuracy", "carry/pass@4"), ("most likely answer", "carry: any of 4 answers")):
        start = [row for row in rows if row["answers"] == 0]
        for label in dict.fromkeys(row["method"] for row in rows if row["answers"]):
            points = [*start, *(row for row in rows if row["method"] == label)]
            places = sorted({row["answers"] for row in points})
            means = [np.mean([row[name] for row in points if row["answers"] == place]) for place in places]
            (line,) = axis.plot(places, means, label=label)
            axis.scatter([row["answers"] for row in points], [row[name] for row in points], s=9, color=line.get_color())
        axis.set(title=title, xlabel="answers written", ylabel="share right")
    axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--jobs", type=at_least(1), default=1)
    parser.add_argument("--answers", type=at_least(1), nargs="+", default=[10_240, 40_960], help="when to measure")
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=RUNS, help="methods of the table")
    parser.add_argument("--root", type=Path, default=Path("runs/rlvr"))
    args = parser.parse_args(argv)
    with ProcessPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(one_seed, seed, args.root, sorted(args.answers), args.only) for seed in range(args.seeds)]
        rows = [row for found in results(pool, jobs) for row in found]
    print(table(rows, args.seeds))
    (args.root / "rows.json").write_text(json.dumps(rows, indent=1))
    draw(rows, args.root / "addition.png")
    print(f"\n{args.root / 'addition.png'}")
    return 0


if __name__ == "__main__":
    entry.run(main)
