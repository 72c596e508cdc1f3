"""Environment steps per second of processor time, collecting and training, beside stable-baselines3's.

usage: python examples/benchmarks/online.py [--sb3 PATH/TO/python] [--methods SAC TD3] [--env HalfCheetah-v5]
                                            [--steps 3000] [--round_steps 1000] [--rounds 3] [--full]

One thread, one update per environment step, networks of 2x256, batches of 256, the same learning rates, no evaluation.
Every figure is a process of its own, ours and theirs in turn; its speed is counted from a round after the uniform
steps on. ``--full`` measures ours a second time with a store that is full from the beginning of the measurement. Prints
one JSON object: versions, processor, medians, ratios within rounds, and the share of the time that collecting took.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from figures import about  # noqa: E402

OURS, FULL, THEIRS = "ours", "ours_full", "sb3"


def collect(method: str, env: str, steps: int, each: int, capacity: int) -> dict[str, Any]:
    """Train as ``python -m offpolicy.fit`` does; marks are (environment steps, seconds, seconds of the processor)."""
    from lightning.pytorch import Callback

    import offpolicy
    from offpolicy.data.module import DataModule
    from offpolicy.data.online import OnlineOptions
    from offpolicy.files import Table

    marks: list[tuple[int, float, float]] = []

    class Mark(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step % each == 0:
                marks.append((each + trainer.global_step, time.perf_counter(), time.process_time()))

    online = OnlineOptions(env=env, env_steps=steps, random_steps=each, round_steps=each, capacity=capacity or None)
    learner = getattr(offpolicy, method)()
    with tempfile.TemporaryDirectory() as folder:
        offpolicy.fit(
            learner, DataModule(env, online=online), folder=folder, eval_every=0, threads=1, callbacks=[Mark()]
        )
        rows = Table(Path(folder) / "metrics.csv").rows()
    share = statistics.median(row["perf/collecting_share"] for row in rows)
    return {"marks": marks, "collecting_share": share}


def speeds(marks: list[list[float]], each: int) -> dict[str, float]:
    """Steps per second, and per second of the processor, from a round after the uniform steps on."""
    kept = [mark for mark in marks if mark[0] >= 2 * each]
    steps = kept[-1][0] - kept[0][0]
    return {"steps_per_s": steps / (kept[-1][1] - kept[0][1]), "steps_per_cpu_s": steps / (kept[-1][2] - kept[0][2])}


def measure(kind: str, method: str, env: str, steps: int, each: int, python: str) -> dict[str, Any]:
    """One figure, in a process of its own."""
    if kind == THEIRS:
        words = [python, str(HERE / "sb3_learn.py"), method, env, str(steps), str(each), "1000000"]
    else:
        capacity = 3 * each if kind == FULL else 0
        words = [sys.executable, __file__, "--one", method, "--env", env, "--steps", str(steps)]
        words += ["--round_steps", str(each), "--rows", str(capacity)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(kind, method, {k: round(v, 1) for k, v in speeds(found["marks"], each).items()}, file=sys.stderr, flush=True)
    return {**found, **speeds(found.pop("marks"), each)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sb3", default="", metavar="PYTHON", help="of an environment that has stable-baselines3")
    parser.add_argument("--methods", nargs="+", default=["SAC", "TD3"])
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--round_steps", type=int, default=1000, help="of a round, and uniform ones first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(collect(options.one, options.env, options.steps, options.round_steps, options.rows)))
        return
    if options.steps < 3 * options.round_steps:
        parser.error(f"--steps is {options.steps}; expected at least {3 * options.round_steps}")
    kinds = [OURS, *([FULL] if options.full else []), *([THEIRS] if options.sb3 else [])]
    report: dict[str, Any] = {**about(threads=1), "env": options.env, "steps": options.steps, "methods": {}}
    for method in options.methods:
        found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        for _ in range(options.rounds):
            for kind in kinds:
                found[kind].append(measure(kind, method, options.env, options.steps, options.round_steps, options.sb3))
        names = ("steps_per_s", "steps_per_cpu_s", "collecting_share")
        medians = {
            kind: {name: statistics.median(one[name] for one in ones) for name in names if name in ones[0]}
            for kind, ones in found.items()
        }
        ratios = {
            f"{OURS}_over_{kind}": [
                a["steps_per_cpu_s"] / b["steps_per_cpu_s"] for a, b in zip(found[OURS], found[kind])
            ]
            for kind in kinds[1:]
        }
        report["methods"][method] = {**medians, "cpu_ratios": ratios}
        report |= {k: v for one in found.get(THEIRS, []) for k, v in one.items() if k == "stable_baselines3"}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
