"""The published settings per task of CQL, AWAC, ReBRAC, EDAC, SAC-N and Decision Transformer."""

from __future__ import annotations

from typing import Any

import pytest

from offpolicy.recipes import recipe, recipes

ANTMAZE_CQL = {
    "alpha": 5.0,
    "lagrange_gap": 0.8,
    "penalty_min": -200.0,
    "max_backup": True,
    "critic_hidden_dims": [256] * 5,
    "second_critic_hidden_dims": [256] * 3,
    "actor_lr": 1e-4,
    "normalize_obs": False,
    "reward_transform": "10r-5",
}
ENSEMBLES = {  # task: critics of SAC-N, critics of EDAC, η of EDAC
    "halfcheetah-medium-v2": (10, 10, 1.0),
    "halfcheetah-medium-replay-v2": (10, 10, 1.0),
    "halfcheetah-medium-expert-v2": (10, 10, 5.0),
    "hopper-medium-v2": (500, 50, 1.0),
    "hopper-medium-replay-v2": (200, 50, 1.0),
    "hopper-medium-expert-v2": (200, 50, 1.0),
    "walker2d-medium-v2": (20, 10, 1.0),
    "walker2d-medium-replay-v2": (20, 10, 1.0),
    "walker2d-medium-expert-v2": (20, 10, 5.0),
    "antmaze-large-play-v2": (25, 10, 1.0),
    "maze2d-umaze-v1": (25, 10, 0.1),
    "pen-human-v1": (100, 20, 1000.0),
    "pen-cloned-v1": (100, 20, 10.0),
    "pen-expert-v1": (100, 20, 10.0),
    "door-cloned-v1": (100, 50, 200.0),
    "hammer-human-v1": (100, 50, 200.0),
    "relocate-expert-v1": (100, 50, 200.0),
}


@pytest.mark.parametrize(
    ("method", "task", "settings"),
    [
        ("CQL", "hopper-medium-replay-v2", {"alpha": 10.0, "actor_lr": 3e-5, "reward_transform": "r"}),
        ("CQL", "hopper-medium-v2", {"alpha": 10.0, "actor_lr": 3e-5, "reward_transform": "return_range"}),
        ("CQL", "maze2d-large-v1", {"alpha": 10.0, "lagrange_gap": 5.0, "max_backup": False, "normalize_obs": True}),
        ("CQL", "antmaze-umaze-v2", ANTMAZE_CQL),
        ("CQL", "door-human-v1", {"alpha": 1.0, "actor_lr": 1e-4, "critic_lr": 3e-4, "max_backup": False}),
        ("AWAC", "walker2d-medium-v2", {"lambda_": 1 / 3, "reward_transform": "r", "normalize_obs": True}),
        ("AWAC", "antmaze-umaze-v2", {"lambda_": 0.1, "reward_transform": "r-1"}),
        ("AWAC", "pen-human-v1", {"lambda_": 0.1, "hidden_dims": [256] * 3}),
        ("ReBRAC", "hopper-medium-replay-v2", {"actor_beta": 0.05, "critic_beta": 0.5, "batch_size": 1024}),
        ("ReBRAC", "walker2d-random-v2", {"actor_beta": 0.01, "critic_beta": 0.0, "actor_lr": 1e-3, "critic_lr": 1e-3}),
        (
            "ReBRAC",
            "antmaze-medium-play-v2",
            {"actor_beta": 0.001, "critic_beta": 0.0005, "discount": 0.999, "actor_lr": 3e-4, "critic_lr": 5e-5}
            | {"reward_transform": "100r", "batch_size": 256, "normalize_obs": False},
        ),
        ("ReBRAC", "relocate-human-v1", {"actor_beta": 0.1, "critic_beta": 0.01, "critic_lr": 3e-4, "discount": 0.99}),
        ("DecisionTransformer", "hopper-medium-v2", {"target_return": 3600.0, "reward_scale": 1e-3, "lr": 8e-4}),
        ("DecisionTransformer", "hammer-human-v1", {"target_return": 12800.0, "reward_scale": 1.0, "batch_size": 4096}),
        ("DecisionTransformer", "antmaze-umaze-v2", {"target_return": 1.0, "batch_size": 64, "lr": 1e-4}),
    ],
)
def test_published_values(method: str, task: str, settings: dict[str, Any]) -> None:
    found = recipe(method, task)
    assert found is not None
    assert {key: found.group("model")[key] for key in settings} == settings
    episodes = 100 if "maze" in task or method == "DecisionTransformer" else 10
    every = 1000 if method == "AWAC" else 50_000 if "antmaze" in task and method in ("CQL", "ReBRAC") else 5000
    updates = 100_000 if method == "DecisionTransformer" else 1_000_000
    run = {"trainer.max_steps": updates, "run.eval_every": every, "run.eval_episodes": episodes}
    assert {key: found.settings[key] for key in run} == run


@pytest.mark.parametrize("task", ENSEMBLES)
def test_ensembles(task: str) -> None:
    many, few, eta = ENSEMBLES[task]
    for method, count, weight in (("SACN", many, 0.0), ("EDAC", few, eta)):
        found = recipe(method, task)
        assert found is not None
        assert (found.settings["model.num_critics"], found.settings["model.eta"]) == (count, weight)
        assert (found.settings["trainer.max_steps"], found.settings["run.eval_episodes"]) == (3_000_000, 10)


def test_rebrac_has_every_task_of_its_table() -> None:
    tasks = [f"{e}-{k}-v2" for e in ("halfcheetah", "hopper", "walker2d") for k in ("random", "medium", "expert")]
    tasks += [f"{e}-{k}-v2" for e in ("halfcheetah", "hopper", "walker2d") for k in ("medium-replay", "full-replay")]
    tasks += [f"{e}-medium-expert-v2" for e in ("halfcheetah", "hopper", "walker2d")]
    tasks += [f"antmaze-{k}-v2" for k in ("umaze", "umaze-diverse")]
    tasks += [f"antmaze-{size}-{k}-v2" for size in ("medium", "large") for k in ("play", "diverse")]
    tasks += [f"maze2d-{k}-v1" for k in ("umaze", "medium", "large")]
    tasks += [f"{e}-{k}-v1" for e in ("pen", "door", "hammer", "relocate") for k in ("human", "cloned", "expert")]
    found = [task for one in recipes("ReBRAC") if "ours" not in " ".join(one.origin) for task in one.tasks]
    assert len(tasks) == 39 and sorted(tasks) == sorted(found)
