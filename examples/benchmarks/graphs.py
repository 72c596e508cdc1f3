"""Updates per second one by one, as CUDA graphs, and as graphs with several seeds, on the GPU where there is one.

usage: python examples/benchmarks/control.py --graph eager graph dry --seeds 8 [--methods TD3BC IQL] [--updates 2000]

On the data of control.py, in blocks of 64 updates after a warm-up, waiting for the device at both ends. With N seeds an
update of each counts. ``difference`` is the largest between weights after 256 updates one by one and in the other form;
where updates are not graphs, ``reason`` says why.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

METHODS = ["TD3BC", "IQL", "A2PR", "PRDC", "ODICE", "HIQL", "OTA"]
FORMS = {"eager": False, "graph": "auto", "dry": "dry"}
BLOCK = 64
COMPARED = 4 * BLOCK


def prepared(method: str, replay: Any, form: str, seeds: int, options: dict[str, Any]) -> Any:
    """A method on the device, with networks, optimisers and data."""
    import offpolicy
    from offpolicy import Sizes

    learner = getattr(offpolicy, method)(**options)
    learner.run.graph = FORMS[form]
    if seeds:
        learner.seeds = tuple(range(seeds))
    learner.initialize(Sizes.of(learner.select(replay)), 0).to(device())
    return learner.prepare(replay, max_steps=10**6)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def speed(learner: Any, updates: int) -> dict[str, Any]:
    """Updates per second after the first four blocks, and the weights after those."""
    from offpolicy.compute.devices import finish_work

    for t in range(0, COMPARED, BLOCK):
        learner.run_block(t, BLOCK)
    weights = {name: p.detach().cpu().clone() for name, p in learner.named_parameters()}
    finish_work(learner.device)
    began, last = time.perf_counter(), COMPARED + max(updates // BLOCK, 1) * BLOCK
    for t in range(COMPARED, last, BLOCK):
        learner.run_block(t, BLOCK)
    finish_work(learner.device)
    rate = (last - COMPARED) / (time.perf_counter() - began) * max(len(learner.seeds), 1)
    return {"updates_per_s": round(rate, 1), "reason": learner.one_by_one, "weights": weights}


def measured(
    methods: Sequence[str], replay: Any, forms: Sequence[str], seeds: int, updates: int, **options: Any
) -> list[dict[str, Any]]:
    """A row per method: rates by form, the largest difference of weights from those of updates one by one, reasons."""
    results = []
    for method in methods:
        row: dict[str, Any] = {"method": method, "updates_per_s": {}, "difference": {}, "reason": {}}
        found = {form: speed(prepared(method, replay, form, 0, options), updates) for form in forms}
        if seeds:
            found[f"{forms[-1]}, {seeds} seeds"] = speed(prepared(method, replay, forms[-1], seeds, options), updates)
        for form, one in found.items():
            row["updates_per_s"][form] = one["updates_per_s"]
            if form in FORMS and "eager" in found:
                pairs = ((one["weights"][n], p) for n, p in found["eager"]["weights"].items())
                row["difference"][form] = max(float((a - b).abs().max()) for a, b in pairs)
            if one["reason"] and form != "eager":
                row["reason"][form] = one["reason"]
        results.append(row)
        print(f"{method}: {row['updates_per_s']}", file=sys.stderr)
    return results


def table(results: list[dict[str, Any]]) -> str:
    """The rates in columns."""
    forms = list(results[0]["updates_per_s"])
    lines = [" | ".join(["method", *forms]), " | ".join(["---"] * (1 + len(forms)))]
    for row in results:
        lines.append(" | ".join([row["method"], *(f"{row['updates_per_s'][form]:,.0f}" for form in forms)]))
    return "\n".join(f"| {line} |" for line in lines)
