"""Updates per second of the control methods, through the Trainer as a user runs them, beside three yardsticks.

usage: python examples/benchmarks/control.py [--methods TD3BC IQL | all] [--threads 1 2] [--rounds 3] [--updates 2000]
                                             [--seeds 8] [--hidden 256] [--compile] [--chart FILE.png]
                                             [--d3rlpy PATH/TO/python] [--jax-python PATH/TO/python]
       python examples/benchmarks/control.py --graph eager graph --seeds 8      # updates as CUDA graphs: graphs.py

Random data: observation 17, action 6, one million rows; batch 256, networks 2x256. Each figure is a process of its own,
and the figures of a round are taken in turn, so that a drift of the machine hits all alike. Per method and threads:

  trainer   Trainer.fit with metrics, files and progress bar on; also the share of its time outside the update loop
  bare      the same updates in a bare loop; also the share of the float32 limit (the arithmetic of the products at
            the rate of a large product) and two measures of what is not arithmetic, both without a profiler's hooks:
            ``overhead_share`` is the time of the same update with two rows and all widths 4 (so Python, torch's
            dispatch, autograd's bookkeeping and allocation, while caches are warm) over the time of the real one;
            ``interpreter_share`` is the part of the samples of Linux's ``perf``, where it is installed, that fall into
            Python or torch's bindings, so outside tensor operations, whose dispatch and allocation count as theirs
  compiled  as bare with ``run.compile`` "update" (``--compile``); the time that compiling takes is not counted
  seeds     so many seeds at once (``--seeds``) in a bare loop: the updates of all together
  plain     an ordinary single-file PyTorch loop (plain_loop.py), as CORL's; TD3BC and IQL only
  d3rlpy    d3rlpy's fit, when the interpreter of an environment that has it is named; TD3BC and IQL only
  jax       one compiled scan (control_jax.py), when the interpreter of an environment that has jax is named; TD3BC and
            IQL only

PRDC is measured as in neighbors.py instead (trajectory-like data, a policy near them, rows seen before), without the
first of the two measures.
DecisionTransformer takes batches of 64 windows of 20 steps. Prints a table to the error stream and one JSON object:
versions, processor, settings, medians and ratios within rounds. ``undisturbed`` is the rate of each process in the
faster quarter of its stretches of about 64 updates: other processes of the machine can only slow a stretch down, so it
is what remains of a noisy sitting. ``updates_per_cpu_s`` counts processor time, of which others cost less; the table
shows it with one thread.
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
import graphs  # noqa: E402
from figures import about, figure  # noqa: E402

WITH_PEERS = ("TD3BC", "IQL")
KINDS = ("trainer", "bare", "compiled", "seeds", "plain", "d3rlpy", "jax", "seen")
CLOCKS = (("updates_per_s", "trainer_over"), ("updates_per_cpu_s", "cpu_over"), ("undisturbed", "undisturbed_over"))
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


def clocks() -> tuple[float, float]:
    """Seconds that have passed, and those of processor time."""
    return time.perf_counter(), time.process_time()


def made(method: str, hidden: int) -> Any:
    """A method with hidden layers of a width where it has the usual two."""
    import offpolicy

    make = getattr(offpolicy, method)
    return make() if hidden == 256 else make(hidden_dims=(hidden, hidden))


def run_trainer(method: str, updates: int, rows: int, hidden: int) -> dict[str, Any]:
    """The whole path: offpolicy.fit with its metrics, checkpoints, files and bar."""
    from lightning.pytorch import Callback

    import offpolicy

    marks: list[tuple[int, float, float, float]] = []
    in_blocks = 0.0

    class Timer(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step >= updates // 10:
                marks.append((trainer.global_step, *clocks(), in_blocks))

    learner = made(method, hidden)
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
    (_, began, _, before), (_, ended, _, after) = marks[0], marks[-1]
    return {"marks": [mark[:3] for mark in marks], "outside_share": 1 - (after - before) / (ended - began)}


def run_blocks(
    method: str, updates: int, rows: int, hidden: int, count: int = 1, compiled: bool = False
) -> dict[str, Any]:
    """Blocks of updates, of many seeds at once or compiled; an update of each seed counts as one."""
    from offpolicy.compute import matmul
    from offpolicy.compute.memory import keep_freed_memory

    keep_freed_memory()
    learner = made(method, hidden)
    learner.seeds = tuple(range(count)) if count > 1 else ()
    learner.run.compile = "update" if compiled else False
    learner.prepare(random_replay(rows))
    with matmul.matmul_setting(matmul.choose_matmul("auto")):
        return {"marks": [(count * n, *clock) for n, *clock in blocks(learner, max(updates // count, 64))]}


def run_bare(method: str, updates: int, rows: int, hidden: int) -> dict[str, Any]:
    """The same blocks of updates without Trainer, logging, files and bar."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import offpolicy
    from offpolicy.compute import matmul
    from offpolicy.compute.memory import keep_freed_memory

    keep_freed_memory()
    make = getattr(offpolicy, method)
    learner = made(method, hidden).prepare(random_replay(rows))
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


def blocks(learner: Any, updates: int) -> list[tuple[int, float, float]]:
    """(Updates made, seconds, those of the processor) around blocks of 64, at least one, after a tenth of warm-up."""
    marks = []
    for t in range(0, max(65, updates + updates // 10), 64):
        if t >= updates // 10:
            marks.append((t, *clocks()))
        learner.run_block(t, 64)
    return [*marks, (t + 64, *clocks())]


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


def run_plain(method: str, updates: int, rows: int, hidden: int) -> dict[str, Any]:
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


def worker(kind: str, method: str, threads: int, updates: int, rows: int, hidden: int, count: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "trainer": lambda: run_trainer(method, updates, rows, hidden),
        "bare": lambda: run_bare(method, updates, rows, hidden),
        "seeds": lambda: run_blocks(method, updates, rows, hidden, count),
        "compiled": lambda: run_blocks(method, updates, rows, hidden, compiled=True),
        "plain": lambda: run_plain(method, updates, rows, hidden),
        "seen": lambda: run_prdc(rows),
    }
    return {**run[kind](), "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def measure(kind: str, method: str, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    """One figure in a process of its own."""
    numbers = [method, str(threads), str(args.updates), str(args.rows)]
    if kind in ("d3rlpy", "jax"):
        python, script = {"d3rlpy": (args.d3rlpy, "d3rlpy_fit.py"), "jax": (args.jax_python, "control_jax.py")}[kind]
        command = [python, str(HERE / script), *numbers]
    else:
        command = [sys.executable, __file__, "--worker", kind, *numbers, str(args.hidden), str(args.seeds)]
    found = figure(command, threads)
    return {**rates(found.pop("marks")), **found} if "marks" in found else found


def rates(marks: list[tuple[int, float, float]]) -> dict[str, float]:
    """Updates per second from (updates made, seconds, seconds of the processor).

    Over all by both clocks, and in the faster quarter of the stretches.
    """
    (first, began, busy), (last, ended, done) = marks[0], marks[-1]
    stretches = sorted(((b[1] - a[1]) / (b[0] - a[0]), b[0] - a[0]) for a, b in pairwise(marks))
    fast = stretches[: max(1, len(stretches) // 4)]
    undisturbed = sum(n for _, n in fast) / sum(seconds * n for seconds, n in fast)
    updates = last - first
    both = {"updates_per_s": updates / (ended - began), "updates_per_cpu_s": updates / (done - busy)}
    return {**both, "undisturbed": undisturbed}


def table(results: list[dict[str, Any]]) -> str:
    """The medians as a table in Markdown, each with the Trainer's rate over it."""
    kinds = list(dict.fromkeys(kind for row in results for kind in row["updates_per_s"]))
    lines = ["| updates/s | " + " | ".join(kinds) + " |", "|" + "---|" * (len(kinds) + 1)]
    for row in results:
        clock = shown(row)
        over = row["trainer_over" if clock == "updates_per_s" else "cpu_over"]
        cells = [f"{row[clock][k]:.0f}" + (f" ({over[k]:.2f})" if k in over else "") for k in kinds if k in row[clock]]
        unit = "1 thread, per CPU second" if clock == "updates_per_cpu_s" else f"{row['threads']} threads"
        lines.append(f"| {row['method']}, {unit} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(row: dict[str, Any]) -> str:
    """By which clock a row of results is shown."""
    return "updates_per_cpu_s" if row["threads"] == 1 and row.get("updates_per_cpu_s") else "updates_per_s"


def draw(results: list[dict[str, Any]], path: str) -> None:
    """The same as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure_, axes = pyplot.subplots(1, len(results), figsize=(3 * len(results), 3), squeeze=False, layout="constrained")
    for row, axis in zip(results, axes[0], strict=True):
        clock = shown(row)
        bars = axis.bar(list(row[clock]), list(row[clock].values()), color="0.6")
        bars[0].set_color("C0")
        axis.set_title(f"{row['method']}, {row['threads']} thread{'s' * (row['threads'] > 1)}", fontsize=10)
        axis.tick_params("x", rotation=45)
        axis.set_ylabel("updates per CPU second" if clock == "updates_per_cpu_s" else "updates per second")
    figure_.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="default: TD3BC and IQL, with --graph those of graphs.py")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=0, help="also measure so many seeds at once")
    parser.add_argument("--compile", action="store_true", help="also measure compiled updates")
    parser.add_argument("--hidden", type=int, default=256, help="width of our hidden layers; yardsticks keep 256")
    parser.add_argument("--d3rlpy", help="Python interpreter of an environment with d3rlpy 2.8")
    parser.add_argument("--jax-python", help="Python interpreter of an environment with jax")
    parser.add_argument("--chart", help="draw the rates as bars into this file")
    parser.add_argument("--graph", nargs="+", choices=graphs.FORMS, help="only these forms of updates, on a GPU if any")
    parser.add_argument("--worker", nargs=7, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        kind, method, *numbers = args.worker
        print(json.dumps(worker(kind, method, *map(int, numbers))))
        return

    if args.graph:
        replay, names = random_replay(args.rows), args.methods or graphs.METHODS
        results = graphs.measured(names, replay, args.graph, args.seeds, args.updates)
        print(graphs.table(results), file=sys.stderr)
        settings = about(rows=args.rows, updates=args.updates, seeds=args.seeds, device=str(graphs.device()))
        print(json.dumps({"about": settings, "results": results}, indent=1))
        return
    args.methods = ALL if args.methods == ["all"] else args.methods or list(WITH_PEERS)
    samples: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.rounds):
        for threads in args.threads:
            for method in args.methods:
                kinds = ["trainer", "bare"] if method != "PRDC" else ["seen"]
                kinds += ["compiled"] if args.compile and method != "PRDC" else []
                kinds += ["seeds"] if args.seeds and method != "PRDC" else []
                peers = {"plain": True, "d3rlpy": args.d3rlpy, "jax": args.jax_python}
                compared = method in WITH_PEERS and args.hidden == 256
                kinds += [name for name, asked in peers.items() if asked and compared]
                for kind in kinds:
                    found = measure(kind, method, threads, args)
                    samples.setdefault(f"{method}/{threads}/{kind}", []).append(found)
                    shown = ", ".join(f"{n} {found[n]:.0f}" for n in ("updates_per_s", "undisturbed") if n in found)
                    print(f"{method} {threads} threads {kind}: {shown}", file=sys.stderr)
    results = []
    for threads in args.threads:
        for method in args.methods:
            kinds = [k for k in KINDS if f"{method}/{threads}/{k}" in samples]
            row: dict[str, Any] = {"method": method, "threads": threads}
            for name, ratio in CLOCKS:
                found = {k: [s[name] for s in samples[f"{method}/{threads}/{k}"] if name in s] for k in kinds}
                row[name] = {k: round(statistics.median(r), 1) for k, r in found.items() if r}
                row[ratio] = {
                    k: round(statistics.median(a / b for a, b in zip(found["trainer"], r, strict=True)), 3)
                    for k, r in found.items()
                    if r and k not in ("trainer", "seen")
                }
            for k in kinds:
                names = [name for name in samples[f"{method}/{threads}/{k}"][0] if name.endswith(("share", "td3bc"))]
                for name in names:
                    values = [s[name] for s in samples[f"{method}/{threads}/{k}"]]
                    row[name] = round(statistics.median(values), 4)
            row["peak_mib"] = {k: round(max(s["peak_mib"] for s in samples[f"{method}/{threads}/{k}"])) for k in kinds}
            results.append(row)
    settings = about(rows=args.rows, updates=args.updates, rounds=args.rounds, seeds=args.seeds, hidden=args.hidden)
    print(table(results), file=sys.stderr)
    if args.chart:
        draw(results, args.chart)
    print(json.dumps({"about": settings, "results": results}, indent=1))


if __name__ == "__main__":
    main()
