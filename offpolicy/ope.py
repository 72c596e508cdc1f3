"""Score trained policies without an environment: ``python -m offpolicy.ope RUN RUN…``.

Fitted Q evaluation, importance sampling and doubly robust estimates of all policies on held-out episodes; how far each
is to be trusted; and how far their order agrees with scores that the policies have from an environment.

``ope.csv`` goes into the folder of each run, with a row for each policy and estimator (:data:`COLUMNS`). ``ope.json``
goes into the nearest folder that holds all runs, and is for other programs. Numbers that do not exist are null there:

- ``format`` 1; ``data``, ``fingerprint`` of the episodes, ``episodes`` and ``held_out`` of them (0: values come from
  all), ``discount``, ``updates``, ``policy`` ("mean" or "sample"), ``seen`` (whether a policy was trained on
  them, all or not those that it held out), ``unseen`` (whether training has held out those that give the values).
- ``unit`` of scores: "score" (normalised), "return" or "success_rate"; ``behaviour_score`` of the data in that unit.
- ``behaviour``: ``kind`` and ``likelihood`` of the estimated policy of the data, nats per held-out step, or ``column``.
- ``policies``: a list of ``checkpoint`` (path from the file's folder), ``method``, ``step``, ``score``, ``near``,
  ``outside``, ``episode_scores`` (null where single episodes are not known), and ``estimates`` by the name of the
  estimator: ``value low high spread drift effective episodes doubt``.
- ``rankings`` by the name of the estimator: ``policies`` with a score, ``spearman low high``, ``verdict``, and
  ``chosen``, a list of ``k best worst mean std regret normalised_regret sharpe``.
- ``budget``: what the policy chosen after so many evaluations is worth, by unifloral's protocol: ``pulls``, ``mean``,
  ``low``, ``high`` (of the mean over trials), ``policies``, ``episodes`` of each; null where episodes are not known.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offpolicy.cli import entry
from offpolicy.cli.reader import Parser, add_trust
from offpolicy.errors import DataError, UsageError, check_range
from offpolicy.evaluation.verdicts import Scored, doubt
from offpolicy.training.ranked import (
    behaviour_facts,
    budget_lines,
    first_lines,
    lines,
    method_lines,
    ranking,
    run_folder,
)

COLUMNS = (
    "checkpoint", "step", "estimator", "value", "low", "high", "spread", "drift", "effective", "near", "outside",
    "doubt", "discount", "updates", "held_out", "data",
)  # fmt: skip
NAMED = {
    "fqe": "fitted Q evaluation",
    "is": "importance sampling",
    "wis": "weighted importance sampling",
    "pdis": "per-decision importance sampling",
    "pdwis": "weighted per-decision importance sampling",
    "dr": "doubly robust",
    "wdr": "weighted doubly robust",
}


def main(argv: list[str]) -> int:
    """Estimate, print tables, and keep ``ope.csv`` and ``ope.json``; returns the exit code."""
    args = asked(argv)

    from offpolicy.training.asking import check_policy
    from offpolicy.training.estimating import checked_estimators, estimate_policies
    from offpolicy.training.fitted_values import Fitting, share_held_out
    from offpolicy.training.opening import load
    from offpolicy.trust import trusting

    names = checked_estimators([name for name in args.estimators.split(",") if name])
    ks = numbers_of(args.k)
    paths = [path for run in args.runs for path in checkpoints(run, args.which)]
    policies = [load(path, trust=args.trust) for path in paths]
    for policy in policies:
        check_policy(policy, *own_widths(policy), sampled=args.policy == "sample" and names == ["fqe"])
    with trusting(args.trust):
        data = opened(args.data, policies[0])
    replay = data.load()
    unseen = held_out_by(policies, replay.fingerprint()) if args.holdout is None else None
    fitting = Fitting(
        updates=args.updates,
        discount=args.discount,
        critics=args.critics,
        hidden_dims=tuple(args.hidden_dims),
        tau=args.tau,
        holdout=unseen or share_held_out(replay, args.holdout),
        refits=args.refits if args.intervals == "refits" else 0,
        seed=args.seed,
    )
    how = args.policy or ("mean" if names == ["fqe"] else "sample")
    fits = {"fqe", "dr", "wdr"} & set(names)
    print(f"{listed_words([NAMED[name] for name in names])} on {data.name}, {how} actions of stochastic policies")
    print(f"  {args.updates:,} updates of the critics on the CPU" if fits else "  no critics", flush=True)
    true = TrueScores(paths, policies, args.play, args.trust)
    found = estimate_policies(
        policies,
        replay,
        estimators=names,
        fitting=fitting,
        how=args.policy,
        intervals=args.intervals,
        behaviour=args.behaviour,
        paths=paths,
        true=true.scores,
    )
    result = {
        "format": 1,
        "data": str(data.name),
        "fingerprint": replay.fingerprint(),
        "episodes": replay.num_episodes,
        "held_out": found.held_out,
        "discount": args.discount,
        "updates": args.updates if fits else 0,
        "policy": how,
        "seen": unseen is None and seen_by(policies, paths, replay.fingerprint()),
        "unseen": unseen is not None,
        "unit": true.unit,
        "behaviour_score": true.of_data(replay),
        "behaviour": behaviour_facts(found, args.behaviour),
    }
    result |= told(found, result, ks, true, {path: type(policy).__name__ for path, policy in zip(paths, policies)})
    folder = args.out or common_folder(paths)
    result["policies"] = policies_of(found, policies, paths, true, folder)
    for place in dict.fromkeys(run_folder(path) for path in paths):
        keep(place / "ope.csv", rows_of_run(found, place, result))
    keep_json(folder / "ope.json", result)
    return 0


def told(
    found: Any, result: Mapping[str, Any], ks: Sequence[int], true: TrueScores, methods: Mapping[Path, str]
) -> dict[str, Any]:
    """Print the tables and what they are worth; returns the rankings and the budget."""
    from offpolicy.training.true_scores import budget_curve

    print("\n".join(first_lines(result, found)))
    rankings, behaviour = {}, result["behaviour_score"]
    for name, values in found.values.items():
        print(f"{NAMED[name]}:")
        print("\n".join(lines(values, found.doubts[name], name, ks, behaviour)))
        print("".join(f"{line}\n" for line in method_lines(values, [methods[one.path] for one in values])), end="")
        rankings[name] = ranking(values, found.doubts[name], ks, behaviour)
        print(rankings[name]["verdict"])
    budget = budget_curve(true.episodes)
    print("\n".join(budget_lines(budget, found, true.unit)))
    return {"rankings": rankings, "budget": budget}


def asked(argv: list[str]) -> Any:
    """The options of the command."""
    parser = Parser("python -m offpolicy.ope", description="Score policies by the episodes of others, without playing.")
    add = parser.add_argument
    add("runs", nargs="+", help="run folders or checkpoint files of control methods")
    add("--which", default="last", help="checkpoints of each run folder: all, last, best, selected or an update")
    add("--data", help="episodes to evaluate on (those that the first policy was trained on)")
    add("--estimators", default="fqe", help=f"with commas: {', '.join(NAMED)}; all but fqe need stochastic policies")
    add("--behaviour", help="column of the steps with the behaviour's log-probabilities, nats (they are estimated)")
    add(
        "--intervals",
        choices=("episodes", "refits", "none"),
        default="episodes",
        help="of 95 %%: by a bootstrap over episodes for all but fqe; refits: for fqe too, by fits on drawn episodes",
    )
    add("--refits", type=int, default=8, help="fits for --intervals refits, at least 2")
    add(
        "--holdout",
        type=float,
        help="share of the episodes held out of the fits, which give the values (0.2; 0 below 50)",
    )
    add("--k", default="1,3", help="of regret@k and SharpeRatio@k, with commas")
    add("--play", type=int, default=0, help="episodes to play of each policy, for true scores and the budget; 0 none")
    add("--updates", type=int, default=100_000, help="of the critics, at least 5")
    add("--discount", type=float, default=0.99, help="per environment step, in [0, 1)")
    add("--critics", type=int, default=4, help="of each policy, at least 1")
    add("--hidden_dims", type=int, nargs="+", default=[256, 256], help="widths of the critics")
    add("--tau", type=float, default=0.005, help="rate of their target networks, in (0, 1]")
    add(
        "--policy",
        choices=("mean", "sample"),
        help="actions of stochastic policies (mean with fqe alone)",
    )
    add("--seed", type=int, default=0, help="of the fits")
    add("--out", type=Path, help="folder of ope.json (the nearest that holds all runs)")
    add_trust(parser)
    args = parser.parse_args(argv)
    check_range("--updates", args.updates, 5)
    check_range("--play", args.play, 0)
    if args.intervals == "refits":
        check_range("--refits", args.refits, 2)
    return args


def numbers_of(text: str) -> list[int]:
    """The numbers of "1,3".

    Raises:
        UsageError: it holds something else, or a number below 1.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise UsageError(f"`--k` is {text!r}; expected whole numbers ≥ 1 with commas, such as 1,3.")
    return sorted({int(part) for part in parts})


def listed_words(words: Sequence[str]) -> str:
    """Words with commas and an "and", the first letter large."""
    text = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return text[0].upper() + text[1:]


# -- what is there -----------------------------------------------------------------------------------------------------


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


def trained_on(path: Path) -> str:
    """The fingerprint of the data that the policy of a checkpoint was trained on."""
    from offpolicy.training.checkpoints import read_checkpoint
    from offpolicy.training.opening import own_state

    return str(own_state(read_checkpoint(path), path)["data"]["fingerprint"])


def seen_by(policies: Sequence[Any], paths: Sequence[Path], fingerprint: str) -> bool:
    """Whether a policy was trained on these episodes, on all of them or on those that it did not hold out."""
    part = any((policy.data_meta.get("held_out") or {}).get("of") == fingerprint for policy in policies)
    return part or any(trained_on(path) == fingerprint for path in paths)


def held_out_by(policies: Sequence[Any], fingerprint: str) -> float | None:
    """The share of these episodes that no policy has seen in training; None where they do not agree on any."""
    known = [policy.data_meta.get("held_out") or {} for policy in policies]
    shares = {float(one["share"]) for one in known if one.get("of") == fingerprint}
    return shares.pop() if len(shares) == 1 and all(one.get("of") == fingerprint for one in known) else None


class TrueScores:
    """What policies have collected in an environment.

    Args:
        paths: of the checkpoints.
        policies: what they hold.
        play: episodes of each to play now; 0 takes those that ``python -m offpolicy.evaluate`` has kept.
        trust: as of ``load``.

    Attributes:
        episodes: the scores of single episodes of each policy, empty where they are not known.
        scores: their mean, or what the run's own evaluation gave; None where there is none.
        unit: "score", "return" or "success_rate"; empty where no policy has any.
    """

    def __init__(self, paths: Sequence[Path], policies: Sequence[Any], play: int, trust: Any) -> None:
        from offpolicy import api
        from offpolicy.training.true_scores import episode_scores, kept_returns, true_score, unit_of

        self.episodes: list[list[float]] = []
        self.scores: list[float | None] = []
        self.unit = ""
        for path, policy in zip(paths, policies, strict=True):
            if play:
                returns = api.evaluate(policy, episodes=play, trust=trust)["returns"]
            else:
                returns = kept_returns(path, policy.updates)
            single = episode_scores(policy, returns)
            self.episodes.append(single)
            self.scores.append(sum(single) / len(single) if single else true_score(path, policy.updates))
            self.unit = self.unit or unit_of(path, policy, single)

    def of_data(self, replay: Any) -> float | None:
        """What the episodes of the data collected on average, in the same unit; None where it has none."""
        from offpolicy.training.true_scores import behaviour_score

        return behaviour_score(replay, self.unit)


# -- files -------------------------------------------------------------------------------------------------------------


def policies_of(
    found: Any,
    policies: Sequence[Any],
    paths: Sequence[Path],
    true: TrueScores,
    folder: Path,
) -> list[dict[str, Any]]:
    """The policies as they stand in ``ope.json``."""
    every = []
    for path, policy, score, single in zip(paths, policies, true.scores, true.episodes, strict=True):
        own = {
            name: (one, text)
            for name, values in found.values.items()
            for one, text in zip(values, found.doubts[name], strict=True)
            if one.path == path
        }
        some = next((one for one, _ in own.values()), None)
        shown = ("value", "low", "high", "spread", "drift", "effective", "episodes")
        every.append(
            {
                "checkpoint": os.path.relpath(path, folder),
                "method": type(policy).__name__,
                "step": policy.updates,
                "score": score,
                "near": some and some.near,
                "outside": some and some.outside,
                "episode_scores": list(single) or None,
                "estimates": {
                    name: {**{key: getattr(one, key) for key in shown}, "doubt": text}
                    for name, (one, text) in own.items()
                },
            }
        )
    return every


def rows_of_run(found: Any, place: Path, result: Mapping[str, Any]) -> list[list[Any]]:
    """The rows of ``ope.csv`` of one run."""
    rows = []
    for name, values in found.values.items():
        for one, text in zip(values, found.doubts[name], strict=True):
            if run_folder(one.path) == place:
                facts = one._asdict() | {key: result[key] for key in ("discount", "updates", "held_out", "data")}
                facts |= {"checkpoint": one.path.name, "estimator": name, "doubt": text}
                rows.append([blank_if_none(facts[column]) for column in COLUMNS])
    return rows


def blank_if_none(value: Any) -> Any:
    """Nothing in place of a number that does not exist."""
    return "" if isinstance(value, float) and math.isnan(value) else value


def common_folder(paths: Sequence[Path]) -> Path:
    """The nearest folder that holds the runs of all checkpoints."""
    return Path(os.path.commonpath([run_folder(path).absolute() for path in paths]))


def keep(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Write the rows of one run."""
    from offpolicy.files import atomic_write

    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([COLUMNS, *rows])
    atomic_write(path, buffer.getvalue())
    print(f"file  {path}")


def keep_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write what was found for other programs."""
    from offpolicy.files import atomic_write

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(finite(result), indent=1, allow_nan=False) + "\n")
    print(f"file  {path}")


def finite(value: Any) -> Any:
    """The same with None for numbers that are not finite, which JSON has none of."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["COLUMNS", "Scored", "checkpoints", "doubt", "lines", "main"]

if __name__ == "__main__":
    entry.run(main)
