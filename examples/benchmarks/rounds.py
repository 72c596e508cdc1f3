"""Milliseconds that a round of collected steps costs beside its updates, by the rows that are kept.

usage: python examples/benchmarks/rounds.py [--rows 10000 100000 1000000] [--steps 100] [--rounds 5] [--features 17 6]

Rounds of random steps are appended to a full store: ``grown`` adds them to the packed rows in place, as training does,
and ``anew`` packs all rows again. Prints one JSON object of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offpolicy.data.normalize import Normalizer
from offpolicy.data.replay import Replay
from offpolicy.data.ring import Ring
from offpolicy.data.views import PackedTransitions, TransitionView

sys.path.insert(0, str(Path(__file__).parent))
from figures import about


def some_steps(rows: int, each: int, obs: int, action: int) -> Replay:
    """Episodes of ``each`` steps that were all cut."""
    rng = np.random.default_rng(0)
    length = np.full(rows // each, each)
    steps = {
        "obs": rng.standard_normal((rows, obs), np.float32),
        "action": rng.uniform(-1.0, 1.0, (rows, action)).astype(np.float32),
        "reward": np.zeros(rows, np.float32),
        "terminated": np.zeros(rows, bool),
    }
    tail = {"obs": np.zeros((len(length), obs), np.float32)}
    return Replay(steps, start=np.cumsum(length) - length, length=length, tail=tail)


def measure(rows: int, steps: int, rounds: int, obs: int, action: int) -> dict[str, float]:
    ring, new = Ring(some_steps(rows, steps, obs, action), rows), some_steps(steps, steps, obs, action)
    view, normalizer, cpu = TransitionView(), Normalizer((obs,), action), torch.device("cpu")
    bound: Any = view.bind(ring, normalizer, cpu)
    found: dict[str, list[float]] = {"grown": [], "anew": []}
    for _ in range(rounds):
        began = time.process_time()
        ring.append(new)
        assert bound.grow(ring)
        found["grown"].append(time.process_time() - began)
        began = time.process_time()
        PackedTransitions(view, ring, normalizer, cpu)
        found["anew"].append(time.process_time() - began)
    return {name: 1000 * statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=100, help="of a round, each an episode's piece")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--features", nargs=2, type=int, default=[17, 6], help="of observations and of actions")
    options = parser.parse_args()
    torch.set_num_threads(1)
    medians = {str(rows): measure(rows, options.steps, options.rounds, *options.features) for rows in options.rows}
    print(json.dumps({**about(threads=1), "steps": options.steps, "milliseconds": medians}))


if __name__ == "__main__":
    main()
