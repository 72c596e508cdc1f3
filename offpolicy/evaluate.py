"""Evaluate a trained method: ``python -m offpolicy.evaluate RUN``, or ``offpolicy.evaluate(RUN)`` in Python.

For a language model it prints the held-out numbers of the run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from offpolicy.cli import entry
from offpolicy.cli.reader import Parser, add_trust, add_which
from offpolicy.errors import UsageError, amount


def main(argv: list[str]) -> int:
    """Play episodes, print the scores and keep them in a file beside the run; returns the exit code."""
    parser = Parser("python -m offpolicy.evaluate", description="Play episodes with a trained method.")
    parser.add_argument("run", help="run folder or checkpoint file")
    parser.add_argument("--episodes", type=int, default=10, help="how many, at least 1; of each task")
    parser.add_argument("--seed", type=int, help="episode k starts from seed + k (that of training's evaluations)")
    parser.add_argument("--temperature", type=float, default=0.0, help="noise of goal-conditioned policies, ≥ 0")
    add_which(parser)
    add_trust(parser)
    args = parser.parse_args(argv)

    from offpolicy import api
    from offpolicy.environments.make import EVAL_SEED
    from offpolicy.files import Table, WriteError, atomic_write
    from offpolicy.training import screen
    from offpolicy.training.checkpoints import read_checkpoint, run_of
    from offpolicy.training.choosing import chosen_checkpoint
    from offpolicy.training.headlines import headline
    from offpolicy.training.opening import own_state

    path = chosen_checkpoint(args.run, args.which)
    seed = EVAL_SEED if args.seed is None else args.seed
    content = read_checkpoint(path)
    state, updates = own_state(content, path), content["global_step"]
    folder = run_of(path)
    if "policy_config" in state:  # a language model
        rows = [row for row in Table(folder / "evals.csv").rows() if isinstance(row.get("step"), int)]
        found = [row for row in rows if int(row["step"]) <= updates and "error" not in row]
        if not found:
            raise UsageError(f"{folder} has no held-out numbers; expected some in evals.csv. Nothing was held out.")
        print(f"{path}, {updates:,} updates; held-out texts, measured in training after update {found[-1]['step']:,}")
        for name, number in found[-1].items():
            if name.startswith("eval/") and isinstance(number, float):
                print(screen.line("", f"{name.removeprefix('eval/'):<32}{number:.4g}"))
        print(screen.line("answers", f"python -m offpolicy.generate {args.run}"))
        return 0
    numbers = api.evaluate(path, episodes=args.episodes, seed=seed, temperature=args.temperature, trust=args.trust)
    noise = f"-temperature{args.temperature:g}" if args.temperature else ""
    file = Path(folder) / f"evaluation-step{updates:08d}-seed{seed}-episodes{args.episodes}{noise}.json"
    unwritten = ""
    try:
        atomic_write(file, json.dumps({"checkpoint": path.name, "updates": updates, **numbers}, indent=2) + "\n")
    except WriteError as error:  # the numbers count, whoever owns the folder
        unwritten = str(error)

    each = " of each task" if "success_mean" in numbers else ""
    print(f"{path}, {updates:,} updates, {amount(args.episodes, 'episode')}{each} ({numbers['score_kind']})")
    for name in ("score", "return", "length", "success_rate"):
        value = numbers.get(name, numbers.get(f"{name}_mean"))
        if value is not None:
            std = numbers.get(f"{name}_std")
            spread = f" ± {std:.4g} (standard deviation over episodes)" if std is not None else ""
            print(screen.line(name, f"{value:.4g}{spread}"))
        if name == "score" and numbers.get("score_interval", 0) > 0:
            print(screen.line("", f"± {numbers['score_interval']:.4g} (95 % interval of the mean)"))
    for name, value in numbers.items():
        if name.startswith(("success_task", "order_consistency")) and "_seed" not in name:
            print(screen.line("", f"{name:<24}{value:.4g}"))
    judge = (headline(f"eval/{name}" for name in numbers) or "").removeprefix("eval/")
    for seed_trained in numbers.get("seeds", ()):
        name = f"{judge}_seed{seed_trained}"
        print(screen.line("", f"{name:<24}{numbers[name]:.4g}"))
    if unwritten:
        print(f"Warning: {unwritten}", file=sys.stderr)
    else:
        print(screen.line("file", str(file)))
    return 0


sys.modules[__name__].__class__ = entry.CallableModule

if __name__ == "__main__":
    entry.run(main)
