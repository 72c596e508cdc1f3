"""Draw trajectories from a diffusion model: ``python -m offpolicy.sample RUN OUT``, or ``offpolicy.sample(RUN, OUT)``.

OUT is a replay folder: ``--data OUT`` trains on it and ``python -m offpolicy.data show OUT`` tells of it. The same call
again goes on with an interrupted one; ``torchrun -m offpolicy.sample …`` shares the work between processes.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from offpolicy.cli import entry


def main(argv: list[str]) -> int:
    """Draw, write and say how long it took; returns the exit code."""
    from offpolicy.evaluate import Parser, add_trust

    parser = Parser(
        "python -m offpolicy.sample", description="Draw trajectories from a diffusion model into a data folder."
    )
    parser.add_argument("run", help="run folder of TrajectoryDiffusion (its newest checkpoint) or checkpoint file")
    parser.add_argument("out", help="new folder; the same call goes on with one that was interrupted")
    parser.add_argument("--policy", metavar="RUN", help="trained method whose actions are preferred (none)")
    parser.add_argument("--guidance", type=float, metavar="K", help="how far they are, ≥ 0 (1 with a policy)")
    parser.add_argument("--cosine", type=float, default=0.3, metavar="C", help="more of it half-way, ≥ 0 (0.3)")
    parser.add_argument("--trajectories", type=int, default=1024, metavar="N", help="how many, ≥ 1 (1024)")
    parser.add_argument("--horizon", type=int, metavar="T", help="steps of each, ≥ 2 (as in the model's training)")
    parser.add_argument("--sampling_steps", type=int, default=32, metavar="N", help="noise levels, ≥ 2 (32)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="trajectory k is one of this stream (0)")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="number of the first in the stream (0)")
    parser.add_argument("--batch_size", type=int, default=256, metavar="N", help="drawn and written at once (256)")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16, faster on GPUs")
    parser.add_argument("--compile", action="store_true", help="compile the network, faster on GPUs")
    add_trust(parser)
    args = vars(parser.parse_args(argv))

    from offpolicy.api import sample
    from offpolicy.training import screen

    run, out, total = args.pop("run"), Path(args.pop("out")), args["trajectories"]
    began, first = time.perf_counter(), int(os.environ.get("RANK") or 0) == 0
    with processes(), progress_bar(total if first else 0) as progress:
        try:
            replay = sample(run, out, **args, progress=progress)
        except KeyboardInterrupt:
            kept = len(list(out.with_name(out.name + ".parts").glob("[0-9]*"))) * args["batch_size"]
            print(
                f"Interrupted; {min(kept, total):,} trajectories are kept. The same command goes on.", file=sys.stderr
            )
            return entry.CTRL_C
    if first:
        took, where = time.perf_counter() - began, shlex.quote(str(out))
        print(f"{replay.num_episodes:,} trajectories, {replay.num_steps:,} transitions, in {took:,.0f} s")
        print(screen.line("folder", str(out)))
        print(screen.line("look", f"python -m offpolicy.data show {where}"))
        print(screen.line("train", f"python -m offpolicy.fit --data {where}"))
    return 0


@contextmanager
def processes() -> Iterator[None]:
    """Join the group of processes that ``torchrun`` started, each with its own device; alone there is none."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        yield
        return
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0) % torch.cuda.device_count())
    torch.distributed.init_process_group("gloo")  # nothing but waiting for one another
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int], Any] | None]:
    """A bar on a terminal, lines elsewhere, nothing when ``total`` is 0."""
    if not total:
        yield None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("trajectories"), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=total)
            yield lambda done: bar.update(task, completed=min(done, total))
    else:
        said = 0

        def say(done: int) -> None:
            nonlocal said
            if min(done, total) > said:
                said = min(done, total)
                print(f"{said:,}/{total:,} trajectories", file=sys.stderr, flush=True)

        yield say


sys.modules[__name__].__class__ = entry.CallableModule

if __name__ == "__main__":
    entry.run(main)
