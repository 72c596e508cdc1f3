"""Updates per second of the control methods, through the Trainer as a user runs them, beside two yardsticks.

usage: python examples/benchmarks/control.py [--methods TD3BC IQL | all] [--threads 1 2] [--rounds 3] [--updates 2000]
                                             [--d3rlpy PATH/TO/python]

Random data: observation 17, action 6, one million rows; batch 256, networks 2x256. Each figure is a process of its own,
and the figures of a round are taken in turn, so that a drift of the machine hits all alike. Per method and threads:

  trainer   Trainer.fit with metrics, files and progress bar on; also the share of its time outside the update loop
  bare      the same updates in a bare loop; also the share of the float32 limit (the arithmetic of the products at
            the rate of a large product) and two measures of what is not arithmetic, both without a profiler's hooks:
            ``overhead_share`` is the time of the same update with two rows and all widths 4 (so Python, torch's
            dispatch, autograd's bookkeeping and allocation, while caches are warm) over the time of the real one;
            ``interpreter_share`` is the part of the samples of Linux's ``perf``, where it is installed, that fall into
            Python or torch's bindings, so outside tensor operations, whose dispatch and allocation count as theirs
  plain     an ordinary single-file PyTorch loop (plain_loop.py); TD3BC and IQL only
  d3rlpy    d3rlpy's fit, when the interpreter of an environment that has it is named; TD3BC and IQL only

PRDC is measured as in neighbors.py instead (trajectory-like data, a policy near them, rows seen before), without the
first of the two measures.
DecisionTransformer takes batches of 64 windows of 20 steps. Prints one JSON object: versions, processor, settings,
medians and ratios. ``undisturbed`` is the rate of each process in the faster quarter of its stretches of about 64
updates: other processes of the machine can only slow a stretch down, so it is what remains of a noisy sitting.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # also where it is imported from a test
from figures import about, figure  # noqa: E402

WITH_PEERS = ("TD3BC", "IQL")
ALL = ["BC", "TD3BC", "IQL", "PRDC", "A2PR", "ODICE", "CQL", "AWAC", "ReBRAC", "EDAC", "DecisionTransformer"]


def random_replay(rows: int, obs_dim: int = 17, action_dim: int = 6) -> Any:
    from offpolicy import Replay

    rng = np.random.default_rng(0)
    end = np.zeros(rows, dtype=bool)
    end[999::1000] = True
    steps = {
        "obs": rng.standard_normal((rows, obs_dim), dtype=np.float32),
        "action": rng.uniform(-1, 1, (rows, action_dim)).astype(np.float32),
        "reward": rng.standard_normal(rows, dtype=np.float32),
        "terminated": np.zeros(rows, dtype=bool),
    }
    meta = {"name": "random", "action_low": [-1.0] * action_dim, "action_high": [1.0] * action_dim}
    return Replay(steps, episode_end=end, meta=meta)


def run_trainer(method: str, updates: int, rows: int) -> dict[str, Any]:
    """The whole path: offpolicy.fit with its metrics, checkpoints, files and bar."""
    from lightning.pytorch import Callback

    import offpolicy

    marks: list[tuple[int, float, float]] = []
    in_blocks = 0.0

    class Timer(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step >= updates // 10:
                marks.append((trainer.global_step, time.perf_counter(), in_blocks))

    learner = getattr(offpolicy, method)()
    run_block = learner.run_block

    def timed(t: int, k: int) -> None:
        nonlocal in_blocks
        began = time.perf_counter()
        run_block(t, k)
        in_blocks += time.perf_counter() - began

    learner.run_block = timed
    total = updates + updates // 10
    with tempfile.TemporaryDirectory() as folder:
        offpolicy.fit(learner, random_replay(rows), max_steps=total, folder=folder, eval_every=0, callbacks=[Timer()])
    (_, began, before), (_, ended, after) = marks[0], marks[-1]
    return {"marks": [mark[:2] for mark in marks], "outside_share": 1 - (after - before) / (ended - began)}


def run_bare(method: str, updates: int, rows: int) -> dict[str, Any]:
    """The same blocks of updates without Trainer, logging, files and bar."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import offpolicy
    from offpolicy.compute import matmul
    from offpolicy.compute.memory import keep_freed_memory

    keep_freed_memory()
    make = getattr(offpolicy, method)
    learner = make().prepare(random_replay(rows))
    small = make(**shrunk(make().hparams)).prepare(random_replay(10_000, 3, 2))
    with matmul.matmul_setting(matmul.choose_matmul("auto")):
        marks, small_marks = blocks(learner, updates), blocks(small, 1280)
        with FlopCounterMode(display=False) as counter:
            learner.run_block(0, 64)
        interpreter = interpreter_share(lambda: learner.run_block(0, 64))
        large = torch.randn(1024, 1024)
        limit = max(2 * 1024**3 / seconds(lambda: large @ large) for _ in range(20))
    rate = rates(marks)["undisturbed"]
    return {
        "marks": marks,
        "gflop_per_update": counter.get_total_flops() / 64 / 1e9,
        "limit_gflop_per_s": limit / 1e9,
        "float32_share": counter.get_total_flops() / 64 * rate / limit,
        "overhead_share": rate / rates(small_marks)["undisturbed"],
        **interpreter,
    }


def run_prdc(rows: int) -> dict[str, float]:
    """PRDC near the data on rows seen before, per second of processor time."""
    import neighbors

    settings = argparse.Namespace(candidates=64, clone=1000, turns=5)
    found = neighbors.methods(settings, *neighbors.trajectories(rows, 17, 6), watch=interpreter_share)
    shares = {name: value for name, value in found.items() if name.endswith("share")}
    return {"updates_per_s": found["updates_per_cpu_s"]["PRDC"], "over_td3bc": found["prdc_over_td3bc"], **shares}


def blocks(learner: Any, updates: int) -> list[tuple[int, float]]:
    """(Updates made, seconds) around every block of 64, one at least, after a tenth of warm-up."""
    marks = []
    for t in range(0, max(65, updates + updates // 10), 64):
        if t >= updates // 10:
            marks.append((t, time.perf_counter()))
        learner.run_block(t, 64)
    return [*marks, (t + 64, time.perf_counter())]


def shrunk(hparams: dict[str, Any]) -> dict[str, Any]:
    """Options with which an update makes the same operations on hardly any numbers."""
    widths = {name: (4,) * len(value) for name, value in hparams.items() if name.endswith("hidden_dims") and value}
    return widths | {name: value for name, value in {"embed_dim": 4, "batch_size": 2}.items() if name in hparams}


def interpreter_share(call: Callable[[], Any], seconds_long: float = 3.0) -> dict[str, float]:
    """The part of the samples in Python and torch's bindings while a call is repeated; nothing without ``perf``."""
    if shutil.which("perf") is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        record = ["perf", "record", "-e", "cpu-clock", "-F", "997", "-p", str(os.getpid()), "-o", f"{folder}/data"]
        recorder = subprocess.Popen(record, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.5)  # until it listens
        began = time.perf_counter()
        while time.perf_counter() - began < seconds_long:
            call()
        recorder.send_signal(signal.SIGINT)
        recorder.wait()
        report = ["perf", "report", "-i", f"{folder}/data", "--stdio", "-q", "--sort", "dso", "-t", ";"]
        lines = subprocess.run(report, capture_output=True, text=True).stdout.splitlines()
    parts = {
        name.strip(): float(share.strip(" %")) for share, found, name in (x.partition(";") for x in lines) if found
    }
    python = sum(parts[name] for name in parts if name.startswith(("libpython", "python", "libtorch_python")))
    return {"interpreter_share": python / 100} if parts else {}


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def run_plain(method: str, updates: int, rows: int) -> dict[str, Any]:
    import plain_loop
    import torch

    generator = torch.Generator().manual_seed(0)
    columns = {
        "obs": torch.randn(rows, 17, generator=generator),
        "action": torch.rand(rows, 6, generator=generator) * 2 - 1,
        "reward": torch.randn(rows, 1, generator=generator),
        "next_obs": torch.randn(rows, 17, generator=generator),
        "terminated": torch.zeros(rows, 1),
    }
    return {"marks": plain_loop.marks(method, columns, updates)}


def worker(kind: str, method: str, threads: int, updates: int, rows: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    run = {"trainer": run_trainer, "bare": run_bare, "plain": run_plain}
    found = run_prdc(rows) if kind == "seen" else run[kind](method, updates, rows)
    return {**found, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def measure(kind: str, method: str, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    """One figure in a process of its own."""
    numbers = [method, str(threads), str(args.updates), str(args.rows)]
    if kind == "d3rlpy":
        command = [args.d3rlpy, str(HERE / "d3rlpy_fit.py"), *numbers]
    else:
        command = [sys.executable, __file__, "--worker", kind, *numbers]
    found = figure(command, threads)
    return {**rates(found.pop("marks")), **found} if "marks" in found else found


def rates(marks: list[tuple[int, float]]) -> dict[str, float]:
    """Updates per second from (updates made, seconds): over all, and in the faster quarter of the stretches."""
    (first, began), (last, ended) = marks[0], marks[-1]
    stretches = sorted(((b[1] - a[1]) / (b[0] - a[0]), b[0] - a[0]) for a, b in pairwise(marks))
    fast = stretches[: max(1, len(stretches) // 4)]
    undisturbed = sum(n for _, n in fast) / sum(seconds * n for seconds, n in fast)
    return {"updates_per_s": (last - first) / (ended - began), "undisturbed": undisturbed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(WITH_PEERS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--d3rlpy", help="Python interpreter of an environment with d3rlpy 2.8")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        kind, method, *numbers = args.worker
        print(json.dumps(worker(kind, method, *map(int, numbers))))
        return

    args.methods = ALL if args.methods == ["all"] else args.methods
    samples: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.rounds):
        for threads in args.threads:
            for method in args.methods:
                kinds = ["trainer", "bare"] if method != "PRDC" else ["seen"]
                kinds += ["plain"] if method in WITH_PEERS else []
                kinds += ["d3rlpy"] if method in WITH_PEERS and args.d3rlpy else []
                for kind in kinds:
                    found = measure(kind, method, threads, args)
                    samples.setdefault(f"{method}/{threads}/{kind}", []).append(found)
                    shown = ", ".join(f"{n} {found[n]:.0f}" for n in ("updates_per_s", "undisturbed") if n in found)
                    print(f"{method} {threads} threads {kind}: {shown}", file=sys.stderr)
    results = []
    for threads in args.threads:
        for method in args.methods:
            kinds = [k for k in ("trainer", "bare", "plain", "d3rlpy", "seen") if f"{method}/{threads}/{k}" in samples]
            row: dict[str, Any] = {"method": method, "threads": threads}
            for name, ratio in (("updates_per_s", "trainer_over"), ("undisturbed", "undisturbed_over")):
                found = {k: [s[name] for s in samples[f"{method}/{threads}/{k}"] if name in s] for k in kinds}
                row[name] = {k: round(statistics.median(r), 1) for k, r in found.items() if r}
                row[ratio] = {
                    k: round(statistics.median(a / b for a, b in zip(found["trainer"], r, strict=True)), 3)
                    for k, r in found.items()
                    if k not in ("trainer", "seen")
                }
            for k in kinds:
                names = [name for name in samples[f"{method}/{threads}/{k}"][0] if name.endswith(("share", "td3bc"))]
                for name in names:
                    values = [s[name] for s in samples[f"{method}/{threads}/{k}"]]
                    row[name] = round(statistics.median(values), 4)
            row["peak_mib"] = {k: round(max(s["peak_mib"] for s in samples[f"{method}/{threads}/{k}"])) for k in kinds}
            results.append(row)
    settings = about(rows=args.rows, updates=args.updates, rounds=args.rounds)
    print(json.dumps({"about": settings, "results": results}, indent=1))


if __name__ == "__main__":
    main()
