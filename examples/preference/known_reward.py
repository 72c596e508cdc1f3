"""Robust DPO under flipped labels, on a task whose reward is known.

usage: python examples/preference/known_reward.py [--flips 0 0.2 0.4] [--seeds 3] [--jobs 1] [--root runs/known-reward]

A prompt names one of four topics. An answer is six words, and its reward is the sum of the words' values under the
topic. A small Llama is first trained on random answers (SFT): the reference. Pairs of random answers are labelled by
the Bradley-Terry law of the true reward, then labels are flipped at the stated rate, which DPO does not know and cDPO
and rDPO do. Judged by the truth: the mean reward of sampled answers, beside that of the reference and of the best
possible policy π* ∝ π_ref·exp(r/β), which is known in closed form, and the share of held-out pairs without noise that
are ordered rightly. Prints a Markdown table: mean over seeds ± half of the 95 % interval of Student's t.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

TOPICS, WORDS, LENGTH = 4, 24, 6
BETA = 1.0
METHODS = ("DPO", "CDPO", "RDPO")


def values(seed: int) -> np.ndarray:
    """The value of each word under each topic, (TOPICS, WORDS)."""
    return np.random.default_rng([seed, 0]).normal(0.0, 1.0, (TOPICS, WORDS))


def best_reward(value: np.ndarray) -> float:
    """Mean reward of π* ∝ π_ref·exp(r/β) where π_ref draws words uniformly: words stay independent under it."""
    weight = np.exp(value / BETA)
    return float(LENGTH * ((weight / weight.sum(1, keepdims=True)) * value).sum(1).mean())


def make_policy(folder: Path, seed: int) -> None:
    """A tokenizer of whole words and a Llama of 0.1 million parameters with random weights."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<s>", "</s>", "<pad>", *(f"t{i}" for i in range(TOPICS)), *(f"w{i}" for i in range(WORDS))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(names),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text(words: np.ndarray) -> str:
    return " ".join(f"w{word}" for word in words)


def pairs(seed: int, count: int, flips: float, *, noise: bool) -> list[dict[str, str]]:
    """Random pairs, ordered by the Bradley-Terry law (with ``noise``) or by the truth, and flipped at a rate."""
    rng = np.random.default_rng([seed, 1 if noise else 2])
    topic, words = rng.integers(0, TOPICS, count), rng.integers(0, WORDS, (count, 2, LENGTH))
    reward = values(seed)[topic[:, None, None], words].sum(-1)
    gap = reward[:, 0] - reward[:, 1]
    first = rng.random(count) < 1 / (1 + np.exp(-gap)) if noise else gap > 0
    first ^= np.random.default_rng([seed, 3]).random(count) < flips
    return [
        {"prompt": f"t{t}", "chosen": text(w[1 - int(f)]), "rejected": text(w[int(f)])}
        for t, w, f in zip(topic, words, first)
    ]


def train(method: Any, texts: Path, folder: Path, reading: dict[str, Any], **options: Any) -> Any:
    """One run, or the one that lies in the folder."""
    import offpolicy as op
    from offpolicy.data.texts.module import TextData
    from offpolicy.files import atomic_write
    from offpolicy.training.checkpoints import place_in

    if (folder / "done.json").exists():
        return op.load(folder)
    data = TextData(str(texts), separator=" ", show=0, **reading)
    result = op.fit(method, data, verbose=False, threads=1, **options, **place_in(folder)).complete()
    atomic_write(folder / "done.json", json.dumps(result.scores))
    return result.method


def one_seed(seed: int, flips: list[float], root: Path) -> list[dict[str, Any]]:
    """All methods at all rates from one reference."""
    import torch

    import offpolicy as op
    from offpolicy.export import export

    torch.set_num_threads(1)
    folder, value = root / f"seed{seed}", values(seed)
    if not (folder / "start").exists():
        make_policy(folder / "start", seed)
    rng = np.random.default_rng([seed, 4])
    answers = [{"prompt": f"t{i % TOPICS}", "completion": text(rng.integers(0, WORDS, LENGTH))} for i in range(4000)]
    own = write(folder / "answers.jsonl", answers)
    sft = op.SFT(policy=str(folder / "start"), lr=3e-3, batch_size=64)
    reference = train(sft, own, folder / "sft", {"eval_fraction": 0.0}, seed=seed, eval_every=0)
    if not (folder / "reference").exists():
        export(folder / "sft", folder / "reference")
    rows = [{"seed": seed, "method": "reference", "flips": 0.0, "reward": mean_reward(reference, value)}]
    rows += [{"seed": seed, "method": "π*", "flips": 0.0, "reward": best_reward(value)}]
    clean = write(folder / "clean.jsonl", pairs(seed, 1000, 0.0, noise=False))
    for rate in flips:
        data = write(folder / f"pairs-{rate}.jsonl", pairs(seed, 8000, rate, noise=True))
        for name in METHODS:
            extra = {} if name == "DPO" else {"label_smoothing": rate}
            policy = str(folder / "reference")
            method = getattr(op, name)(policy=policy, beta=BETA, lr=2e-3, batch_size=64, epochs=3, **extra)
            run, reading = folder / f"{name}-{rate}", {"eval_data": str(clean)}
            trained = train(method, data, run, reading, seed=seed, eval_every=0)
            scores = json.loads((run / "done.json").read_text())
            row = {"seed": seed, "method": name, "flips": rate, "reward": mean_reward(trained, value)}
            rows.append(row | {"accuracy": scores["rewards/accuracies"]})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def mean_reward(method: Any, value: np.ndarray, count: int = 512) -> float:
    """Mean true reward of answers sampled at temperature 1, the same number per topic; unknown words count 0."""
    import torch

    method.eval()
    tokenizer, total = method.tokenizer, []
    torch.manual_seed(0)
    for topic in range(TOPICS):
        start = tokenizer(f"<s> t{topic}", return_tensors="pt", add_special_tokens=False)
        out = method.model.generate(
            **{k: start[k] for k in ("input_ids", "attention_mask")},
            do_sample=True,
            top_k=0,
            num_return_sequences=count,
            max_new_tokens=LENGTH + 2,
        )
        for answer in tokenizer.batch_decode(out[:, start["input_ids"].shape[1] :], skip_special_tokens=True):
            words = [int(word[1:]) for word in answer.split() if word.startswith("w")]
            total.append(value[topic, words].sum())
    return float(np.mean(total))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=float, nargs="+", default=[0.0, 0.2, 0.4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--root", type=Path, default=Path("runs/known-reward"))
    args = parser.parse_args()
    from offpolicy.evaluation.scores import interval

    with ProcessPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(one_seed, seed, args.flips, args.root) for seed in range(args.seeds)]
        rows = [row for job in jobs for row in job.result()]
    print(f"| {args.seeds} seeds | flipped | mean true reward | clean pairs ordered rightly |")
    print("|---|---|---|---|")
    for name, rate in dict.fromkeys((row["method"], row["flips"]) for row in rows):
        chosen = [row for row in rows if (row["method"], row["flips"]) == (name, rate)]
        reward = np.array([row["reward"] for row in chosen])
        columns = [f"{reward.mean():.2f} ± {interval(reward):.2f}"]
        if "accuracy" in chosen[0]:
            accuracy = 100 * np.array([row["accuracy"] for row in chosen])
            columns.append(f"{accuracy.mean():.1f} % ± {interval(accuracy):.1f}")
        print(f"| {name} | {rate:.0%} | {' | '.join(columns)}{' | ' * (2 - len(columns))}|")


if __name__ == "__main__":
    main()
