"""Score trained policies without an environment: ``python -m offpolicy.ope RUN RUN…``.

Fitted Q evaluation of all policies at once on the episodes of data, and how far its order agrees with the scores that
the runs have from an environment.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from offpolicy.cli import entry
from offpolicy.cli.reader import Parser, add_trust
from offpolicy.errors import DataError, UsageError, check_range

COLUMNS = ("checkpoint", "step", "estimator", "value", "spread", "drift", "doubt", "discount", "updates", "data")
DRIFT = 0.05  # of the largest possible span of values, over the last fifth of the updates


class Scored(NamedTuple):
    """A policy and what it was found to collect.

    Attributes:
        path: of its checkpoint.
        step: its updates.
        value: mean discounted return from the first states of episodes, mean over critics.
        spread: standard deviation over critics.
        drift: change of the value over the last fifth of the updates.
        true: what the run's own evaluation of this update gave; None where there is none.
    """

    path: Path
    step: int
    value: float
    spread: float
    drift: float
    true: float | None


def main(argv: list[str]) -> int:
    """Evaluate, print a table, and keep ``ope.csv`` in the folder of each run; returns the exit code."""
    parser = Parser("python -m offpolicy.ope", description="Score policies by fitted Q evaluation, without playing.")
    parser.add_argument("runs", nargs="+", help="run folders or checkpoint files of control methods")
    parser.add_argument("--which", default="last", help="checkpoints of each run folder: all, last, best or an update")
    parser.add_argument("--data", help="episodes to evaluate on (those that the first policy was trained on)")
    parser.add_argument("--updates", type=int, default=100_000, help="of the fit, at least 5")
    parser.add_argument("--discount", type=float, default=0.99, help="per environment step, in [0, 1)")
    parser.add_argument("--critics", type=int, default=4, help="of each policy, at least 1")
    parser.add_argument("--hidden_dims", type=int, nargs="+", default=[256, 256], help="widths of the critics")
    parser.add_argument("--policy", choices=("mean", "sample"), default="mean", help="actions of stochastic policies")
    parser.add_argument("--seed", type=int, default=0, help="of the fit")
    add_trust(parser)
    args = parser.parse_args(argv)
    check_range("--updates", args.updates, 5)

    from offpolicy.registry import find_method
    from offpolicy.training.asking import check_policy
    from offpolicy.training.opening import load
    from offpolicy.trust import trusting

    paths = [path for run in args.runs for path in checkpoints(run, args.which)]
    policies = [load(path, trust=args.trust) for path in paths]
    for policy in policies:
        check_policy(policy, *own_widths(policy), sampled=args.policy == "sample")
    with trusting(args.trust):
        data = opened(args.data, policies[0])
    method = find_method("FQE").of(
        policies,
        discount=args.discount,
        num_critics=args.critics,
        hidden_dims=tuple(args.hidden_dims),
        policy=args.policy,
    )
    method.prepare(data, args.seed)
    early = args.updates - args.updates // 5
    method.run_block(0, early)
    before = method.start_values().mean(-1)
    method.run_block(early, args.updates - early)
    after = method.start_values()
    found = [
        Scored(
            path,
            policy.updates,
            float(values.mean()),
            float(values.std(correction=0)),
            abs(float(values.mean() - old)),
            true_score(path, policy.updates),
        )
        for path, policy, values, old in zip(paths, policies, after, before, strict=True)
    ]
    span = float(method.reward_high - method.reward_low) / (1.0 - args.discount)
    doubts = [doubt(one, span, args.discount, args.updates, method.hparams.tau) for one in found]
    same = any(trained_on(path) == data.load().fingerprint() for path in paths)
    print(f"fitted Q evaluation on {data.name}, {args.updates:,} updates on the CPU, {args.policy} actions")
    print(f"values are discounted returns from first states, discount {args.discount:g}; they rank, and are no scores")
    print("\n".join(lines(found, doubts)))
    if same:
        print(
            "Policies were trained on these episodes, which makes estimates favour those that exploit errors in them."
        )
    for folder in dict.fromkeys(run_folder(path) for path in paths):
        rows = [
            (one.path.name, one.step, "fqe", *one[2:5], text, args.discount, args.updates, data.name)
            for one, text in zip(found, doubts, strict=True)
            if run_folder(one.path) == folder
        ]
        keep(folder / "ope.csv", rows)
    return 0


def own_widths(policy: Any) -> tuple[int, int]:
    """Widths of observation and action that a policy takes, 0 of what has none."""
    sizes = getattr(policy, "sizes", None)
    return (0, 0) if sizes is None else (sizes.obs_dim, sizes.action_dim)


def opened(data: str | None, policy: Any) -> Any:
    """The data that are named, or those that a policy was trained on."""
    from offpolicy import api

    if data:
        return api.load_data(data)
    name = str(policy.data_meta.get("file") or policy.data_meta.get("name"))
    try:
        return api.load_data(name)
    except (UsageError, DataError) as error:
        raise UsageError(
            f"the data {name} that {type(policy).__name__} was trained on cannot be opened ({error}); expected "
            "episodes to evaluate on. Pass --data FILE."
        ) from None


def checkpoints(run: str, which: str) -> list[Path]:
    """The checkpoints of a run that are asked for, in the order of their updates."""
    from offpolicy.training.choosing import chosen_checkpoint

    if which != "all" or Path(run).is_file():
        return [chosen_checkpoint(run, "last" if Path(run).is_file() else which)]
    found = sorted(Path(run).expanduser().glob("checkpoints/step=*.ckpt"))
    if not found:
        raise UsageError(f"{run} has no checkpoints/step=….ckpt; expected a run folder. Check the path.")
    return found


def run_folder(path: Path) -> Path:
    """The folder of the run of a checkpoint."""
    from offpolicy.training.checkpoints import run_of

    return run_of(path)


def trained_on(path: Path) -> str:
    """The fingerprint of the data that the policy of a checkpoint was trained on."""
    from offpolicy.training.checkpoints import read_checkpoint
    from offpolicy.training.opening import own_state

    return str(own_state(read_checkpoint(path), path)["data"]["fingerprint"])


def true_score(path: Path, updates: int) -> float | None:
    """What the run's own evaluation of this update gave in an environment, None where there is none."""
    from offpolicy.files import Table
    from offpolicy.training.headlines import headline

    for row in Table(run_folder(path) / "evals.csv").rows():
        judge = headline(row)
        if row.get("step") == updates and judge and isinstance(row[judge], (int, float)):
            return float(row[judge])
    return None


def doubt(one: Scored, span: float, discount: float, updates: int, tau: float) -> str:
    """Why a value is not to be trusted, empty where nothing speaks against it.

    Args:
        one: the policy.
        span: of possible values.
        discount, updates, tau: of the fit. A target network that moves by tau passes about tau·updates rewards back.
    """
    if not math.isfinite(one.value):
        return "not finite"
    needed = round(3.0 / ((1.0 - discount) * tau)) if tau else 0
    if updates < needed:
        return f"too few updates for this discount: {needed:,} or more"
    if one.drift > DRIFT * span:
        return f"did not settle: moved by {one.drift:.3g} in the last fifth"
    return ""


def lines(found: Sequence[Scored], doubts: Sequence[str]) -> list[str]:
    """The table, best value first, and how its order agrees with scores of an environment."""
    from offpolicy.evaluation.ranking import chosen_policies, spearman, spearman_interval

    order = sorted(range(len(found)), key=lambda k: -found[k].value if math.isfinite(found[k].value) else math.inf)
    text = [f"  {'value':>12}  {'over critics':>12}  {'score':>8}  checkpoint"]
    for k in order:
        one, told = found[k], f"  ({doubts[k]})" if doubts[k] else ""
        true = "–" if one.true is None else f"{one.true:.4g}"
        text.append(f"  {one.value:12.5g}  ± {one.spread:10.3g}  {true:>8}  {one.path}{told}")
    known = [(one.true, one.value) for one in found if one.true is not None and math.isfinite(one.value)]
    if len(known) < 2:
        text.append("Fewer than two policies have a score of an environment, so the order is not compared with one.")
        return text
    true_values, estimates = zip(*known, strict=True)
    rank, best = spearman(true_values, estimates), chosen_policies(true_values, estimates, 1)
    low, high = spearman_interval(true_values, estimates)
    told = "not defined, as all of one are equal" if math.isnan(rank) else f"{rank:.2f}"
    told += "" if math.isnan(low) else f" (95 % interval over policies {low:.2f} to {high:.2f})"
    text.append(f"Spearman {told}; regret@1 {best.regret:.4g}; {len(known)} policies with a score of an environment")
    if len({run_folder(one.path) for one in found}) == 1:
        text.append("All are checkpoints of one run and nearly the same policy: their order is mostly noise.")
    return text


def keep(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Write the rows of one run."""
    from offpolicy.files import atomic_write

    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([COLUMNS, *rows])
    atomic_write(path, buffer.getvalue())
    print(f"file  {path}")


if __name__ == "__main__":
    entry.run(main)
