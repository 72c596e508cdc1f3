"""Makes the sets of policies that are trained in a simulator: one run, whose policies are played and whose rounds are
kept, as ``offpolicy.data.sources.simulated`` says. Run again, it goes on where it was interrupted."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback

from offpolicy.api import fit
from offpolicy.data.collection import round_name
from offpolicy.data.mixing import joined
from offpolicy.data.module import DataModule
from offpolicy.data.names import Target
from offpolicy.data.online import OnlineOptions
from offpolicy.data.replay import Replay
from offpolicy.data.sizes import Sizes
from offpolicy.data.sources.simulated import (
    OF_A_POLICY,
    Mark,
    first_mark,
    mark_return,
    newest_mark,
    open_simulated,
    rule_words,
    run_place,
    simulated_meta,
    simulated_recipe,
)
from offpolicy.data.spaces import bounds_meta
from offpolicy.environments.collecting import Simulator
from offpolicy.errors import DataError, UsageError, check_range
from offpolicy.evaluation.rollout import Evaluator
from offpolicy.files import Table
from offpolicy.registry import find_method
from offpolicy.training.checkpoints import checkpoint_name, newest_checkpoint, read_checkpoint
from offpolicy.training.opening import load
from offpolicy.training.playing import Play, played_rows

POLICY = "policy.ckpt"  # in the folder of a set that a policy played
CHECK_EPISODES = 100


def make_simulated(
    target: Target,
    *,
    steps: int | None = None,
    rows: int | None = None,
    seed: int | None = None,
    jobs: int = 1,
    out: str | Path | None = None,
) -> Replay:
    """Make a set of a policy that is trained here, unless it is there, and open it.

    Args:
        target: of the set.
        steps, rows, seed: as of :func:`offpolicy.data.sources.simulated.simulated_recipe`.
        jobs: processes that play, ≥ 1; any number makes the same set. Training takes one.
        out: the folder of the set; None for its place in the data folder.

    Raises:
        UsageError: numbers out of range, or a simulator that is not installed.
        DataError: another set is there, or the run did not reach what the level asks for.
        KeyboardInterrupt: training was interrupted.
    """
    check_range("jobs", jobs, 1, option="jobs")
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    if processes > 1:
        raise UsageError(
            f"{target.name} is made by one process, and {processes} were launched; expected one. Start it without "
            "torchrun, with --jobs N to play on several."
        )
    recipe = simulated_recipe(target, steps=steps, rows=rows, seed=seed)
    folder = target.location() if out is None else Path(out)
    assert folder is not None  # only texts have none
    there = Target("made", target.name, folder, target.info)
    if folder.exists():
        _check_same(there, folder, recipe)
        return open_simulated(there)
    level, meta = target.info["level"], _meta(target, recipe)
    if level == "random":
        replay = _random(meta, recipe, jobs)
    elif level in OF_A_POLICY:
        replay = _of_policies(level, meta, recipe, jobs)
    else:
        replay = _of_rounds(level, meta, recipe)
    _save(replay, folder)
    return open_simulated(there)


def _check_same(there: Target, folder: Path, recipe: Mapping[str, Any]) -> None:
    """Refuse a folder with anything but a set of this recipe; it may have been made by other versions."""
    found = open_simulated(there).meta if (folder / "meta.json").is_file() else {}
    if found.get("name") != there.name:
        raise UsageError(f"{folder} exists; expected a new folder. Remove it or choose another.")
    before = found["recipe"]
    for name in recipe:
        if name != "versions" and before.get(name) != recipe[name]:
            raise DataError(
                f"{folder} holds this set with `{name}` {before.get(name)!r}, and {recipe[name]!r} is asked for; "
                "expected the same, or no such folder. Remove it, or choose another with --out."
            )


def _meta(target: Target, recipe: Mapping[str, Any]) -> dict[str, Any]:
    meta = simulated_meta(target, recipe)
    simulator = Simulator(meta)
    space = simulator.action_space
    simulator.close()
    return {**meta, **bounds_meta(space.low, space.high, "environment")}


# -- the levels --------------------------------------------------------------------------------------------------------


def _random(meta: dict[str, Any], recipe: Mapping[str, Any], jobs: int) -> Replay:
    found = played_rows(Play(meta, "random", recipe["seed"]), recipe["rows"], jobs=jobs)
    return _told(found, meta, recipe, f"whole episodes of uniform actions, seed {recipe['seed']}", run=False)


def _of_policies(level: str, meta: dict[str, Any], recipe: Mapping[str, Any], jobs: int) -> Replay:
    """Episodes of one policy, or of two, half the rows each."""
    names = level.split("-")
    run = trained(recipe, until_medium=level == "medium")
    parts, facts = [], {}
    for name in names:
        mark = _mark(run, recipe, name)
        checkpoint = run / "checkpoints" / checkpoint_name(mark.updates)
        play = Play(meta, name, recipe["seed"], checkpoint, mark.updates)
        parts.append(played_rows(play, -(-recipe["rows"] // len(names)), jobs=jobs))
        facts[name] = _facts(mark, recipe, name) | {"checkpoint": str(checkpoint)}
    replay = joined(parts, meta=meta)
    how = " and ".join(f"{name}: {facts[name]['rule']}, {facts[name]['reached']}" for name in names)
    return _told(replay, {**meta, "policies": facts}, recipe, f"whole episodes of sampled actions of {how}")


def _of_rounds(level: str, meta: dict[str, Any], recipe: Mapping[str, Any]) -> Replay:
    """What the run collected, up to its medium policy or wholly; a round ends with a cut."""
    medium = level == "medium-replay"
    run = trained(recipe, until_medium=medium)
    facts = {}
    updates = recipe["steps"] - recipe["random_steps"]
    if medium:
        mark = _mark(run, recipe, "medium")
        updates, facts = mark.updates, {"medium": _facts(mark, recipe, "medium")}
    rounds = -(-updates // recipe["round_steps"])
    parts = [Replay.load(run / "replay" / round_name(number), mmap=False) for number in range(rounds + 1)]
    for part in parts:
        part.episodes["updates"] = np.full(part.num_episodes, part.meta.get("updates", 0), np.int64)
    how = f"what SAC collected in {recipe['random_steps'] + updates:,} steps, uniform actions first"
    if medium:
        how += f", up to {facts['medium']['rule']}, {facts['medium']['reached']}"
    return _told(joined(parts, meta=meta), {**meta, "policies": facts}, recipe, how)


def _facts(mark: Mark, recipe: Mapping[str, Any], level: str) -> dict[str, Any]:
    steps = recipe["random_steps"] + mark.updates
    return {
        "rule": rule_words(recipe, level),
        "reached": f"reached {mark.mean:,.1f} after {steps:,} steps",
        "updates": mark.updates,
        "steps": steps,
        "returns": list(mark.returns),
    }


def _told(replay: Replay, meta: dict[str, Any], recipe: Mapping[str, Any], how: str, *, run: bool = True) -> Replay:
    """The replay with its facts, which are said in words too."""
    versions = ", ".join(f"{name} {version}" for name, version in recipe["versions"].items())
    trained_by = [f"a run of {recipe['steps']:,} steps, seed {recipe['seed']}"] if run else []
    returns = replay.returns()
    means = {"return_mean": float(returns.mean()), "return_std": float(returns.std())}
    replay.meta = {**meta, **means, "notes": [how, *trained_by, f"made with {versions}"]}
    return replay


def _save(replay: Replay, folder: Path) -> None:
    """Write the set with the policies that played it; the folder appears when all is there."""
    partial = folder.with_name(f".{folder.name}.partial")
    policies = replay.meta.get("policies", {})
    for name, facts in policies.items():
        if "checkpoint" in facts:
            facts["file"] = POLICY if len(policies) == 1 else f"{name}-{POLICY}"
    replay.save(partial, overwrite=True)
    for facts in policies.values():
        if "file" in facts:
            shutil.copyfile(facts["checkpoint"], partial / facts["file"])
    partial.rename(folder)


# -- the run -----------------------------------------------------------------------------------------------------------


def trained(recipe: Mapping[str, Any], *, until_medium: bool = False) -> Path:
    """The run of a recipe, trained to its end or to its medium policy where it was not; returns its folder."""
    folder = run_place(recipe)
    done, updates = newest_checkpoint(folder), recipe["steps"] - recipe["random_steps"]
    made = 0 if done is None else read_checkpoint(done, weights=False)["global_step"]
    if made >= updates or (until_medium and _medium(folder, recipe)):
        return folder
    env_id, round_steps = recipe["env_id"], recipe["round_steps"]
    goal = " at most: it stops at the medium policy" if until_medium else ""
    begun = f", of which {recipe['random_steps'] + made:,} are made" if made else ""
    print(f"training SAC in {env_id} for {recipe['steps']:,} steps{goal}{begun}; kept in {folder}")
    rate = recipe["updates_per_s"]
    expected = _duration((updates - made) / rate)
    print(f"expected time: about {expected}{' at most' if goal else ''}, at {rate} updates per second on one core")
    online = OnlineOptions(
        env=env_id, env_steps=recipe["steps"], round_steps=round_steps, random_steps=recipe["random_steps"]
    )
    result = fit(
        find_method("SAC")(**recipe["model"]),
        DataModule(env_id, max_episode_steps=recipe["max_episode_steps"], online=online),
        seed=recipe["seed"],
        folder=None if made else folder,
        ckpt_path=folder if made else None,
        eval_every=recipe["eval_every"],
        eval_episodes=recipe["eval_episodes"],
        keep="all",
        threads=1,
        matmul=recipe["matmul"],
        accelerator="cpu",  # so that it can be made again anywhere
        callbacks=[Watch(folder, recipe, until_medium)],
    )
    if result.interrupted:
        raise KeyboardInterrupt(
            f"Interrupted; the run is kept in {folder}. Run the same command again to go on with it."
        )
    return folder


class Watch(Callback):
    """Says once how long a run takes by its first rounds, and stops it where it has the policy that is asked for."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any], until_medium: bool) -> None:
        self.folder, self.recipe, self.until_medium = folder, recipe, until_medium
        self.first, self.began, self.said, self.looked = -1, 0.0, False, 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        updates, recipe = trainer.global_step, self.recipe
        if self.first < 0:
            self.first, self.began = updates, time.perf_counter()
        elif not self.said and updates - self.first >= 2 * recipe["round_steps"]:
            each = (time.perf_counter() - self.began) / (updates - self.first)
            print(f"measured over the first rounds: about {_duration(each * (trainer.max_steps - updates))} more")
            self.said = True
        passed = (updates - 1) // recipe["eval_every"]  # the row of an evaluation is there in the block after it
        if self.until_medium and passed > self.looked:
            self.looked = passed
            trainer.should_stop = _medium(self.folder, recipe) is not None


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _evaluations(run: Path) -> list[tuple[int, float]]:
    """Updates and mean return of each evaluation, in order."""
    rows = Table(run / "evals.csv").rows()
    return [(int(row["step"]), float(row["eval/return_mean"])) for row in rows if "eval/return_mean" in row]


def _medium(run: Path, recipe: Mapping[str, Any]) -> Mark | None:
    evaluations = [one for one in _evaluations(run) if one[0] % recipe["eval_every"] == 0]  # not one at the end
    return first_mark(evaluations, mark_return(recipe, "medium"), recipe["evaluations"])


def _mark(run: Path, recipe: Mapping[str, Any], level: str) -> Mark:
    """The policy of a level.

    Raises:
        DataError: the run did not reach it.
    """
    newest = newest_mark(_evaluations(run), recipe["evaluations"])
    mark = _medium(run, recipe) if level == "medium" else newest
    if level == "expert" and newest.mean < mark_return(recipe, "expert"):
        mark = None
    if mark is None:
        instead = f", or make {recipe['family']}-best-made-v0, the same policy" if level == "expert" else ""
        raise DataError(
            f"the run in {run} ends at a return of {newest.mean:,.1f} (mean of {len(newest.returns)} evaluations), "
            f"and '{level}' takes {mark_return(recipe, level):,.1f}; expected a run that reaches it. Raise --steps"
            f"{instead}."
        )
    return mark


# -- reference returns -------------------------------------------------------------------------------------------------


def returns_again(replay: Replay, episodes: int = CHECK_EPISODES) -> dict[str, np.ndarray]:
    """Returns (episodes,) of uniform actions, and of the policies of a set without noise."""
    width = {name: replay.steps[name].shape[1] for name in ("obs", "action")}
    evaluator = Evaluator(replay.meta, Sizes(width["obs"], width["action"]), episodes=episodes)
    rng = np.random.default_rng(0)
    low, high = (np.asarray(replay.meta[name]) for name in ("action_low", "action_high"))
    agents: dict[str, Any] = {"random": lambda obs: rng.uniform(low, high, (len(obs), len(low)))}
    for name, facts in replay.meta.get("policies", {}).items():
        if "file" in facts:
            agents[name] = load(Path(replay.meta["file"]) / facts["file"]).agent()
    try:
        return {name: evaluator.run(agent).returns for name, agent in agents.items()}
    finally:
        evaluator.close()
