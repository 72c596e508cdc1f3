"""Policies by their estimates: how far their order agrees with scores of an environment, in numbers and in words.

Nothing heavy is imported before it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offpolicy.evaluation.verdicts import Scored, verdict

PULLS = (1, 2, 5, 10, 20, 50, 100, 200)  # of the budget that are printed


def run_folder(path: Path) -> Path:
    """The folder of the run of a checkpoint."""
    from offpolicy.training.checkpoints import run_of

    return run_of(path)


def first_lines(result: Mapping[str, Any], found: Any) -> list[str]:
    """What the numbers are, of which episodes, and by which behaviour."""
    text = [
        f"values are discounted returns from first states, discount {result['discount']:g}; they rank, and are no "
        "scores",
        f"of {found.held_out:,} episodes held out of the {result['episodes']:,}"
        if found.held_out
        else f"of all {result['episodes']:,} episodes, which the fits see too",
    ]
    behaviour = result["behaviour"]
    if behaviour and "column" in behaviour:
        text.append(f"log-probabilities of the behaviour are the column {behaviour['column']}")
    elif behaviour:
        text.append(
            f"the behaviour is estimated: a {behaviour['kind']}, {behaviour['likelihood']:.4g} nats per held-out step "
            f"(the other kind: {behaviour['other']:.4g}; actions in [-1, 1])"
        )
    text += [*found.notes, *dict.fromkeys(found.without)]
    if result["unseen"]:
        text.append("Training has held these episodes out too, so that no policy has seen them.")
    if result["seen"]:
        text.append(
            "Policies were trained on these episodes, which makes estimates favour those that exploit errors in them."
        )
    return text


def behaviour_facts(found: Any, column: str | None) -> dict[str, Any] | None:
    """What the behaviour was taken for; None where no estimator asked."""
    if found.behaviour is not None:
        kept = found.behaviour
        return {"kind": kept.kind, "likelihood": kept.likelihood, "other": kept.other}
    return {"column": column} if column and set(found.values) - {"fqe"} else None


def lines(
    found: Sequence[Scored],
    doubts: Sequence[str],
    estimator: str = "fqe",
    ks: Sequence[int] = (1,),
    behaviour: float | None = None,
) -> list[str]:
    """The table, best value first, and how its order agrees with scores of an environment.

    Args:
        found: the policies.
        doubts: of each, empty where nothing speaks against its value.
        estimator: its columns: a spread over critics, or an effective sample size.
        ks: numbers of policies that are chosen, of which those with as many scores are shown.
        behaviour: what the data collected, in the unit of the scores.
    """
    fitted = estimator == "fqe"
    order = sorted(range(len(found)), key=lambda k: -found[k].value if math.isfinite(found[k].value) else math.inf)
    between = any(math.isfinite(one.low) for one in found)
    head = f"  {'value':>12}  {'over critics' if fitted else 'effective':>12}"
    head += f"  {'95 % interval':>21}" if between else ""
    text = [f"{head}  {'outside':>7}  {'score':>8}  checkpoint"]
    for k in order:
        one, told = found[k], f"  do not trust ({doubts[k]})" if doubts[k] else ""
        true = "–" if one.true is None else f"{one.true:.4g}"
        second = f"± {one.spread:10.3g}" if fitted else f"{one.effective:6.3g} of {one.episodes:<4}"
        row = f"  {one.value:12.5g}  {second:>12}"
        row += f"  {one.low:9.4g} … {one.high:9.4g}" if between else ""
        text.append(
            f"{row}  {'–' if math.isnan(one.outside) else f'{one.outside:.0%}':>7}  {true:>8}  {one.path}{told}"
        )
    scored = ranking(found, doubts, ks, behaviour)
    if scored["policies"] < 2:
        text.append("Fewer than two policies have a score of an environment, so the order is not compared with one.")
        return text
    rank, low, high = (scored[name] for name in ("spearman", "low", "high"))
    told = "not defined, as all of one are equal" if math.isnan(rank) else f"{rank:.2f}"
    told += "" if math.isnan(low) else f" (95 % interval over policies {low:.2f} to {high:.2f})"
    chosen = [f"regret@{one['k']} {one['regret']:.4g}" for one in scored["chosen"]]
    chosen += [
        f"SharpeRatio@{one['k']} {one['sharpe']:.3g}" for one in scored["chosen"] if one["sharpe"] == one["sharpe"]
    ]
    count = f"{scored['policies']} policies with a score of an environment"
    text.append(f"Spearman {told}; {'; '.join([*chosen, count])}")
    return text


def method_lines(found: Sequence[Scored], methods: Sequence[str]) -> list[str]:
    """A row for each method, best mean value first: values, scores, and whether orders agree with scores.

    Args:
        found: the policies.
        methods: of each the name.

    Returns:
        Nothing where there is one method, or every method has one policy. A method's own rank correlation is "within";
        "down to here" is that of all policies of the table's rows until then. Both are "–" where they do not exist.
    """
    groups: dict[str, list[Scored]] = {}
    for one, name in zip(found, methods, strict=True):
        if math.isfinite(one.value):
            groups.setdefault(name, []).append(one)
    if len(groups) < 2 or all(len(group) == 1 for group in groups.values()):
        return []
    order = sorted(groups, key=lambda name: -_mean([one.value for one in groups[name]]))
    width = max(map(len, order))
    head = f"{'value, mean (least, largest)':>30}  outside     score  within  down to here"
    text = [f"  {'method':<{width}}  policies  {head}"]
    above: list[Scored] = []
    for name in order:
        group = groups[name]
        above += group
        values = [one.value for one in group]
        span = f"{_mean(values):.4g} ({min(values):.4g}, {max(values):.4g})"
        outside, score = (
            _mean([one.outside for one in group]),
            _mean([one.true for one in group if one.true is not None]),
        )
        numbers = [f"{outside:.0%}", f"{score:.4g}", *(f"{_agreement(part):.2f}" for part in (group, above))]
        cells = ["–" if "nan" in number else number for number in numbers]
        columns = "  ".join(f"{cell:>{wide}}" for cell, wide in zip(cells, (7, 8, 6, 12)))
        text.append(f"  {name:<{width}}  {len(group):>8}  {span:>30}  {columns}")
    return text


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _agreement(found: Sequence[Scored]) -> float:
    """Spearman's correlation of values and scores, NaN where there are not two of them."""
    from offpolicy.evaluation.ranking import spearman

    known = [(one.true, one.value) for one in found if one.true is not None]
    return spearman(*zip(*known, strict=True)) if len(known) > 1 else math.nan


def ranking(
    found: Sequence[Scored], doubts: Sequence[str], ks: Sequence[int], behaviour: float | None = None
) -> dict[str, Any]:
    """How well an order agrees with scores, what choosing the first k gives, and a verdict; arguments as of `lines`."""
    from offpolicy.evaluation.ranking import chosen_policies, spearman, spearman_interval

    known = [(one.true, one.value) for one in found if one.true is not None and math.isfinite(one.value)]
    true, estimates = zip(*known, strict=True) if known else ((), ())
    compared = len(known) > 1
    rank = spearman(true, estimates) if compared else math.nan
    low, high = spearman_interval(true, estimates) if compared else (math.nan, math.nan)
    runs = len({run_folder(one.path) for one in found})
    return {
        "policies": len(known),
        "spearman": rank,
        "low": low,
        "high": high,
        "verdict": verdict(found, doubts, rank, low, high, runs),
        "chosen": [
            chosen_policies(true, estimates, k, behaviour)._asdict() for k in ks if compared and k <= len(known)
        ],
    }


def budget_lines(budget: Mapping[str, Any] | None, found: Any, unit: str) -> list[str]:
    """The budget curve in a few points, beside what the estimates choose without any evaluation."""
    if budget is None:
        return [
            "No budget curve: it needs single episodes of two policies. --play 20 plays them where they can be played."
        ]
    shown = [p for p in PULLS if p <= len(budget["mean"])]
    return [
        f"{unit} of the policy chosen after so many evaluations of one episode (unifloral's protocol: "
        f"{budget['policies']} policies, {budget['episodes']} episodes of each, 8 policies at most in a trial):",
        "  evaluations  " + "  ".join(f"{p:>6}" for p in shown),
        f"  {unit:<11}  " + "  ".join(f"{budget['mean'][p - 1]:6.4g}" for p in shown),
        *(
            f"  none, first by {name}: {best.true:.4g}"
            for name, values in found.values.items()
            for best in [max(values, key=lambda one: one.value if math.isfinite(one.value) else -math.inf)]
            if best.true is not None
        ),
    ]
