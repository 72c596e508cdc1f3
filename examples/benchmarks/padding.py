"""Tokens per second of processor time with rows of mixed lengths, padded and packed.

usage: python examples/benchmarks/padding.py [--layers 4] [--width 256] [--rows 8] [--rounds 5] [--medians 32 128 384]

A random Qwen2-shaped model (vocabulary 8,192), one thread, float32. A forward and a backward pass over pairs of a
prompt and two answers, and over single answers, whose lengths are drawn from a log-normal distribution (σ = 0.8, as of
chats). Rows of one pass are a random sample, so that they are as unlike as where a step is one pass; "sorted" takes
them from a step of eight passes that is ordered by length, as training does. Padded and packed passes take turns, and
the median over the rounds counts. Losses of both must agree. With --compile, packed passes of random pairs take turns
with the same passes through layers that torch.compile has made for any length. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch
from figures import about

VOCABULARY, SIGMA, LONGEST = 8_192, 0.8, 1024


def make_model(layers: int, width: int) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": max(1, width // 128)}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, max_position_embeddings=4 * LONGEST, **sizes, **heads))


def batch_of(kind: str, order: str, median: int, rows: int, rng: np.random.Generator) -> Any:
    """Pairs or single answers of one pass."""
    from offpolicy.data.texts.sequences import Pairs, Ragged, Singles

    step = 8 * rows if order == "sorted" else rows
    lengths = np.clip(np.exp(rng.normal(np.log(median), SIGMA, (step, 3))), 2, LONGEST).astype(np.int64)
    if order == "sorted":
        used = lengths if kind == "pairs" else lengths[:, :2]
        lengths = lengths[np.argsort(-used.sum(1))][3 * rows : 4 * rows]

    def ragged(i: int) -> Any:
        token = torch.from_numpy(rng.integers(1, VOCABULARY, lengths[:, i].sum()))
        return Ragged(token, torch.from_numpy(lengths[:, i]))

    prompt, chosen, rejected, row = ragged(0), ragged(1), ragged(2), torch.arange(rows)
    return Pairs(prompt, chosen, prompt, rejected, {}, row) if kind == "pairs" else Singles(prompt, chosen, {}, row)


def seconds(model: Any, layout: Any) -> tuple[float, float]:
    """Processor time of a forward and a backward pass, and the loss."""
    from offpolicy.language.answer_scores import score

    model.zero_grad()
    began = time.process_time()
    loss = -score(model, layout).sum_logps.mean()
    loss.backward()
    return time.process_time() - began, loss.item()


def measure(model: Any, kind: str, order: str, median: int, args: argparse.Namespace) -> dict[str, float]:
    from offpolicy.language.layout import pair_layout, single_layout

    rng = np.random.default_rng(0)
    rates: list[tuple[float, float]] = []
    share: list[float] = []
    for i in range(args.rounds + 1):
        batch = batch_of(kind, order, median, args.rows, rng)
        if kind == "pairs":
            layouts = [pair_layout(batch, 0, shared_prompt=True, padding_free=free) for free in (False, True)]
        else:
            layouts = [single_layout(batch, 0, padding_free=free) for free in (False, True)]
        (padded, loss), (packed, other) = (seconds(model, layout) for layout in layouts)
        if abs(loss - other) > 1e-4 * abs(loss):
            raise SystemExit(f"the losses differ: {loss} and {other}")
        if i:  # the first pass warms up
            tokens, places = layouts[0].real_tokens, layouts[0].input_ids.numel()
            rates.append((tokens / padded, tokens / packed))
            share.append(1 - tokens / places)
    return {
        "padding": round(statistics.fmean(share), 3),
        "padded_tokens_per_s": round(statistics.median(a for a, _ in rates)),
        "packed_tokens_per_s": round(statistics.median(b for _, b in rates)),
        "gain": round(statistics.median(b / a for a, b in rates), 2),
    }


def measure_compiled(model: Any, median: int, args: argparse.Namespace) -> dict[str, float]:
    from offpolicy.language.layout import pair_layout

    rng = np.random.default_rng(0)
    batches = [batch_of("pairs", "random", median, args.rows, rng) for _ in range(args.rounds + 2)]
    layouts = [pair_layout(batch, 0, shared_prompt=True, padding_free=True) for batch in batches]
    eager = [seconds(model, layout) for layout in layouts]
    began = time.perf_counter()
    for layer in model.model.layers:
        layer.compile(dynamic=True)
    for layout in layouts[:2]:
        seconds(model, layout)
    took = time.perf_counter() - began
    compiled = [seconds(model, layout) for layout in layouts]
    for layer in model.model.layers:
        layer._compiled_call_impl = None
    return {
        "compiling_s": round(took, 1),
        "gain": round(statistics.median(a / b for (a, _), (b, _) in zip(eager[2:], compiled[2:])), 2),
        "largest_difference": max(abs(a - b) / abs(a) for (_, a), (_, b) in zip(eager, compiled)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 4), ("width", 256), ("rows", 8), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--medians", type=int, nargs="+", default=[32, 128, 384], help="tokens of a text")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = make_model(args.layers, args.width)
    if args.compile:
        found = {f"{median} tokens": measure_compiled(model, median, args) for median in args.medians}
        print(json.dumps({"about": about(**vars(args)), "results": found}, indent=1))
        return
    results = {
        f"{kind}, {order}, {median} tokens": measure(model, kind, order, median, args)
        for kind in ("pairs", "singles")
        for order in ("random", "sorted")
        for median in args.medians
    }
    print(json.dumps({"about": about(**vars(args)), "results": results}, indent=1))


if __name__ == "__main__":
    main()
