"""Sets of policies that were trained in a simulator here: random, medium, expert and their kin, by a written rule.

One run of SAC per family (``datasets_cfg/simulated/<family>.yaml``) makes all its levels. What the run collected is the
level "full-replay". Its evaluations say by a rule which policy is "medium" and whether the last one is "expert". Sets
are opened here; ``python -m offpolicy.data make`` makes them, as training stands above data.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from offpolicy.data.names import Target, root
from offpolicy.data.replay import Replay
from offpolicy.data.sources.fetch import facts
from offpolicy.errors import DataError, UsageError, check_range
from offpolicy.version import __version__

RUNS = "simulated-runs"  # the folder of runs beside the sets
OF_A_POLICY = ("medium", "expert", "best", "medium-expert")  # levels that a trained policy plays


class Mark(NamedTuple):
    """Where a run reached a mark.

    Attributes:
        updates: of the policy.
        returns: mean returns of the newest evaluations, whose mean was compared, oldest first.
    """

    updates: int
    returns: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.returns) / len(self.returns)


def family_facts(family: str) -> dict[str, Any]:
    """What is written about a family, completed by what all have in common."""
    common, own = facts("simulated.yaml"), facts(f"simulated/{family}.yaml")
    return {**common, **own, "model": {**common["model"], **own.get("model", {})}}


def simulated_recipe(
    target: Target, *, steps: int | None = None, rows: int | None = None, seed: int | None = None
) -> dict[str, Any]:
    """Everything that decides the content of a set, but its level.

    Args:
        target: of a set.
        steps: environment steps of the run; None takes the family's. Fewer also shorten sets that are played.
        rows: least number of rows of a set that is played.
        seed: of the run and the episodes, ≥ 0; None takes the family's.

    Raises:
        UsageError: numbers out of range, too few steps for the rule, or MuJoCo is not installed.
    """
    found = family_facts(target.info["family"])
    for name, value, low in (("steps", steps, 2), ("rows", rows, 1), ("seed", seed, 0)):
        if value is not None:
            check_range(name, value, low, option=name)
    packages = ["gymnasium", "numpy", "torch"] + ["mujoco"] * (found["env_id"] != "Pendulum-v1")
    if importlib.util.find_spec(packages[-1]) is None:
        raise UsageError(
            f"{target.name} is made with {packages[-1]}, which is not installed. pip install 'offpolicy[mujoco]'."
        )
    found["rows"] = rows or min(found["rows"], steps or found["rows"])
    found["steps"] = steps or found["steps"]
    found["random_steps"] = max(1, min(found["random_steps"], found["steps"] // 10))
    found["seed"] = found["seed"] if seed is None else seed
    _check_room_for_rule(target, found)
    versions = {"offpolicy": __version__, **{name: importlib.metadata.version(name) for name in packages}}
    return {"family": target.info["family"], **found, "versions": versions}


def _check_room_for_rule(target: Target, recipe: Mapping[str, Any]) -> None:
    least = recipe["random_steps"] + recipe["evaluations"] * recipe["eval_every"]
    judged = {"medium", "expert"} & {*target.info["level"].split("-")}
    if judged and recipe["steps"] < least:
        raise UsageError(
            f"--steps is {recipe['steps']:,}, and the rule for {target.name} compares {recipe['evaluations']} "
            f"evaluations, {recipe['eval_every']:,} steps apart; expected at least {least:,}. Raise it."
        )


def mark_return(recipe: Mapping[str, Any], level: str) -> float:
    """The mean return that "medium" or "expert" takes."""
    low, high = recipe["scale"]
    return low + recipe["marks"][level] * (high - low)


def first_mark(evaluations: Sequence[tuple[int, float]], threshold: float, count: int) -> Mark | None:
    """The first evaluation at which the mean of the newest ``count`` is at least the threshold; None where none is.

    Args:
        evaluations: updates and mean return of each, in order.
    """
    for last in range(count, len(evaluations) + 1):
        mark = newest_mark(evaluations[:last], count)
        if mark.mean >= threshold:
            return mark
    return None


def newest_mark(evaluations: Sequence[tuple[int, float]], count: int) -> Mark:
    """The last policy, with the newest ``count`` evaluations, or as many as there are, ≥ 1."""
    newest = evaluations[-count:]
    return Mark(newest[-1][0], tuple(value for _, value in newest))


def rule_words(recipe: Mapping[str, Any], level: str) -> str:
    """The rule for a policy of a level, as a sentence without its end."""
    count, every = recipe["evaluations"], recipe["eval_every"]
    judged = f"the mean return of the newest {count} evaluations ({recipe['eval_episodes']} episodes, every {every:,} "
    judged += "steps, deterministic)"
    if level == "best":
        return f"the last policy of the run of {recipe['steps']:,} steps, whatever it reaches"
    which = "the first policy of the run" if level == "medium" else "the last policy of the run, if"
    link = " at which" if level == "medium" else ""
    low, high = recipe["scale"]
    return (
        f"{which}{link} {judged} is at least {mark_return(recipe, level):,.1f}, {recipe['marks'][level]:g} of the way "
        f"from {low:g} to {high:g}"
    )


def run_place(recipe: Mapping[str, Any]) -> Path:
    """The folder of the run that all levels of a recipe share; its hash leaves out what the run does not depend on."""
    deciding = {name: value for name, value in recipe.items() if name not in ("rows", "marks", "scale")}
    deciding = {name: value for name, value in deciding.items() if not name.startswith("ref_")}
    key = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:12]
    return root("made") / RUNS / f"{recipe['family']}-{key}"


def simulated_meta(target: Target, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """``meta`` of a set, without what only its making tells."""
    named = ("env_id", "max_episode_steps", "ref_min_score", "ref_max_score")
    return {
        "name": target.name,
        "source": "made",
        "env_kwargs": {},
        **{name: recipe[name] for name in named},
        "score_kind": "made-normalised",
        "recipe": dict(recipe),
        "level": target.info["level"],
    }


def open_simulated(target: Target) -> Replay:
    """A set that was made before.

    Raises:
        DataError: it was not.
    """
    folder = target.location()
    assert folder is not None  # only texts have none
    if not (folder / "meta.json").is_file():
        raise DataError(
            f"{target.name} has not been made here; expected it in {folder}. Make it: python -m offpolicy.data make "
            f"{target.name}"
        )
    replay = Replay.load(folder, mmap=False)
    replay.meta = {**replay.meta, "file": str(folder)}
    return replay
