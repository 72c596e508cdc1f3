"""Draw trajectories from a diffusion model: ``python -m offpolicy.sample RUN OUT``, or ``offpolicy.sample(RUN, OUT)``.

OUT is a replay folder: ``--data OUT`` trains on it and ``python -m offpolicy.data show OUT`` tells of it. The same call
again goes on with an interrupted one; ``torchrun -m offpolicy.sample …`` shares the work between processes.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

from offpolicy.cli import entry


def main(argv: list[str]) -> int:
    """Draw, write and say how long it took; returns the exit code."""
    from offpolicy.cli.reader import Parser, add_trust

    parser = Parser(
        "python -m offpolicy.sample", description="Draw trajectories from a diffusion model into a data folder."
    )
    parser.add_argument("run", help="run folder of TrajectoryDiffusion (its newest checkpoint) or checkpoint file")
    parser.add_argument("out", help="new folder; the same call goes on with one that was interrupted")
    parser.add_argument("--policy", metavar="RUN", help="trained method whose actions are preferred (none)")
    parser.add_argument("--guidance", type=float, metavar="K", help="how far they are, ≥ 0 (1 with a policy)")
    parser.add_argument("--cosine", type=float, default=0.3, metavar="C", help="more of it half-way, ≥ 0")
    parser.add_argument("--trajectories", type=int, default=1024, metavar="N", help="how many, ≥ 1")
    parser.add_argument("--horizon", type=int, metavar="T", help="steps of each, ≥ 2 (as in the model's training)")
    parser.add_argument("--sampling_steps", type=int, default=32, metavar="N", help="noise levels, ≥ 2")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="trajectory k is one of this stream")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="number of the first in the stream")
    parser.add_argument("--batch_size", type=int, default=256, metavar="N", help="drawn and written at once")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16, faster on GPUs")
    parser.add_argument("--compile", action="store_true", help="compile the network, faster on GPUs")
    add_trust(parser)
    args = vars(parser.parse_args(argv))

    from offpolicy.api import sample
    from offpolicy.compute.processes import is_first_process, joined_processes
    from offpolicy.compute.progress import counting
    from offpolicy.training import screen

    run, out, total = args.pop("run"), Path(args.pop("out")), args["trajectories"]
    began, first = time.perf_counter(), is_first_process()
    with joined_processes(), counting(total if first else 0, "trajectories") as progress:
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


sys.modules[__name__].__class__ = entry.CallableModule

if __name__ == "__main__":
    entry.run(main)
