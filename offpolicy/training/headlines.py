"""The numbers by which an evaluation is judged, and those that a bar shows: named here and nowhere else.

Nothing heavy is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Shown(NamedTuple):
    """A number that is shown to the user.

    Attributes:
        name: of its column.
        words: what it is called at the end of a run; empty for numbers that judge no evaluation.
        spread: the column of its standard deviation over episodes, where there is one.
    """

    name: str
    words: str = ""
    spread: str = ""


SHOWN = (  # in the order of the bar, which takes the first five that exist; those with words from the best judge down
    Shown("eval/score", "normalised score", "eval/score_std"),
    Shown("eval/score_best"),
    Shown("eval/order_consistency"),
    Shown("eval/order_consistency/high"),
    Shown("eval/success_rate", "success rate"),
    Shown("eval/return_mean", "return", "eval/return_std"),
    Shown("eval/value"),
    Shown("train/critic_loss"),
    Shown("train/actor_loss"),
    Shown("train/q_mean"),
    Shown("eval/rewards/accuracies", "held-out reward accuracy"),
    Shown("eval/accuracy", "held-out accuracy"),
    Shown("train/reward/own"),
    Shown("train/iteration"),
    Shown("eval/loss"),
    Shown("train/loss"),
    Shown("train/rewards/accuracies"),
    Shown("train/rewards/margins"),
)
HEADLINES = tuple(one for one in SHOWN if one.words)


def headline(names: Iterable[str]) -> str | None:
    """The number by which an evaluation is judged, the first headline that exists; None when there is none."""
    known = set(names)
    return next((one.name for one in HEADLINES if one.name in known), None)


def judged_by(names: Iterable[str]) -> str | None:
    """The headline, or the held-out loss where there is no other: what a run is chosen or compared by."""
    known = set(names)
    return headline(known) or ("eval/loss" if "eval/loss" in known else None)


def is_loss_name(name: str) -> bool:
    """Whether a metric of this name is a loss: "loss" or "…_loss" at its end."""
    last = name.rpartition("/")[2]
    return last == "loss" or last.endswith("_loss")


def is_better(value: float, best: float | None) -> bool:
    """Whether a value beats the best so far; NaN (a policy that diverged) never does."""
    return value == value and (best is None or value > best)


def is_better_by(name: str, value: float, best: float | None) -> bool:
    """The same of the number that judges a run; a held-out loss is better when it is lower."""
    if name != "eval/loss":
        return is_better(value, best)
    return value == value and (best is None or value < best)


def keep_best(numbers: dict[str, float], best: float | None, of: str = "") -> float | None:
    """Add the best headline so far to the numbers of an evaluation; returns it.

    Args:
        numbers: of the evaluation.
        best: of the evaluations before; None when there is none.
        of: the end of the columns of one seed of several, "_seed3".
    """
    key = headline(numbers)
    if key is not None and f"{key}{of}" in numbers:
        if is_better(numbers[f"{key}{of}"], best):
            best = numbers[f"{key}{of}"]
        if best is not None:
            numbers[f"{key}_best{of}"] = best
    return best


def scores_line(scores: Mapping[str, Any]) -> str:
    """The last evaluation and the best, in one sentence.

    Args:
        scores: numbers of an evaluation by their short names, without "eval/".
    """
    judge = next((one for one in HEADLINES if f"{one.name.removeprefix('eval/')}_seed_std" in scores), None)
    if judge is not None:
        return seeds_line(scores, judge)
    if "success_mean" in scores:
        half, best = 100 * scores["success_interval"], scores.get("score_best")
        return f"success: last {scores['score']:.1f} % ± {half:.1f} (half of the 95 % interval)" + (
            f", best {best:.1f} %" if best is not None else ""
        )
    for name, words, spread in HEADLINES:
        key = name.removeprefix("eval/")
        if key in scores:
            std = scores.get(spread.removeprefix("eval/"))
            told = f" ± {std:.1f} (standard deviation over episodes)" if std is not None else ""
            best = scores.get(f"{key}_best")
            return f"{words}: last {scores[key]:.4g}{told}" + (f", best {best:.4g}" if best is not None else "")
    if "loss" in scores:
        return f"held-out loss: {scores['loss']:.4g}"
    return "no evaluation"


def seeds_line(scores: Mapping[str, Any], judge: Shown) -> str:
    """The last evaluation of several seeds, with the interval of their mean, and what each had at its best."""
    from offpolicy.evaluation.scores import FEWEST, interval  # as it is heavy

    key = judge.name.removeprefix("eval/")
    found = {name: value for name, value in scores.items() if re.fullmatch(rf"{key}(_best)?_seed\d+", name)}
    best = [found.pop(name) for name in list(found) if "_best_" in name]
    each = list(found.values())
    if len(each) < FEWEST:
        shown = ", ".join(f"{value:.4g}" for value in each)
        spread = f" (mean of {len(each)} seeds, too few for an interval: {shown})"
    else:
        spread = f" ± {interval(each):.3g} (95 % interval of the mean of {len(each)} seeds)"
    at_best = f", each at its best {sum(best) / len(best):.4g}" if best else ""
    return f"{judge.words}: last {scores[key]:.4g}{spread}{at_best}"
