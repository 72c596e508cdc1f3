"""Recipes of goal-conditioned methods: the published values of OGBench's agents, task by task."""

from __future__ import annotations

import pytest

from offpolicy.data.names import known_names
from offpolicy.recipes import recipe, recipes

# task → γ, α of HIQL, k, probability of random goals of the actor, α of GCIQL
PUBLISHED = {
    "pointmaze-medium-navigate-v0": (0.99, 3.0, 25, 0.0, 0.003),
    "pointmaze-teleport-navigate-v0": (0.99, 3.0, 25, 0.0, 0.003),
    "pointmaze-giant-navigate-v0": (0.995, 3.0, 25, 0.0, 0.003),
    "pointmaze-large-stitch-v0": (0.99, 3.0, 25, 0.5, 0.003),
    "pointmaze-giant-stitch-v0": (0.995, 3.0, 25, 0.5, 0.003),
    "antmaze-large-navigate-v0": (0.99, 3.0, 25, 0.0, 0.3),
    "antmaze-giant-navigate-v0": (0.995, 3.0, 25, 0.0, 0.3),
    "antmaze-teleport-stitch-v0": (0.99, 3.0, 25, 0.5, 0.3),
    "antmaze-giant-stitch-v0": (0.995, 3.0, 25, 0.5, 0.3),
    "antmaze-medium-explore-v0": (0.99, 10.0, 25, 1.0, 0.01),
    "humanoidmaze-giant-navigate-v0": (0.995, 3.0, 100, 0.0, 0.1),
    "humanoidmaze-medium-stitch-v0": (0.995, 3.0, 100, 0.5, 0.1),
    "antsoccer-arena-navigate-v0": (0.99, 3.0, 25, 0.0, 0.1),
    "antsoccer-medium-stitch-v0": (0.99, 3.0, 25, 0.5, 0.1),
    "cube-quadruple-play-v0": (0.99, 3.0, 10, 0.0, 1.0),
    "scene-play-v0": (0.99, 3.0, 10, 0.0, 1.0),
    "puzzle-4x6-play-v0": (0.99, 3.0, 10, 0.0, 1.0),
    "cube-single-noisy-v0": (0.99, 3.0, 10, 0.0, 0.03),
    "scene-noisy-v0": (0.99, 3.0, 10, 0.0, 0.03),
    "puzzle-3x3-noisy-v0": (0.99, 3.0, 10, 0.0, 0.03),
}
METHODS = ("OTA", "HIQL", "GCIVL", "GCIQL", "GCBC")


def model(method: str, task: str) -> dict[str, object]:
    found = recipe(method, task)
    assert found is not None, (method, task)
    return found.group("model")


@pytest.mark.parametrize("task", PUBLISHED)
def test_published_values(task: str) -> None:
    discount, alpha, k, p_random, q_alpha = PUBLISHED[task]
    for method in ("HIQL", "OTA"):
        found = model(method, task)
        assert (found["discount"], found["high_alpha"], found["low_alpha"]) == (discount, alpha, alpha)
        assert (found["subgoal_steps"], found["actor_p_random"], found["expectile"]) == (k, p_random, 0.7)
    assert model("OTA", task)["abstraction_factor"] == k // 5
    for method, own in (("GCIVL", 10.0), ("GCIQL", q_alpha)):
        found = model(method, task)
        assert (found["discount"], found["alpha"], found["expectile"]) == (discount, own, 0.9)
        assert (found["actor_p_trajectory"], found["actor_p_random"]) == (1.0 - p_random, p_random)
    assert model("GCBC", task)["actor_p_trajectory"] == 1.0


def test_every_state_based_set_of_ogbench_has_a_recipe_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    every = {method: list(recipes(method)) for method in METHODS}  # read once, not once for each data set
    monkeypatch.setattr("offpolicy.recipes.recipes", every.__getitem__)
    kinds = ("navigate", "stitch", "explore", "play", "noisy")
    families = ("pointmaze", "antmaze", "humanoidmaze", "antsoccer", "cube", "scene", "puzzle")
    for task in known_names():
        parts = task.split("-")
        expected = parts[0] in families and parts[-2] in kinds and not (parts[0] == "antmaze" and parts[-2] == "play")
        assert [recipe(method, task) is not None for method in METHODS] == [expected] * len(METHODS), task


def test_the_only_published_abstraction_factor_says_so() -> None:
    found = recipe("OTA", "antmaze-large-navigate-v0")
    assert found is not None
    assert [origin[:4] for origin, keys in found.origin.items() if "model.abstraction_factor" in keys] == ["publ"]
    other = recipe("OTA", "pointmaze-medium-navigate-v0")
    assert other is not None
    assert [origin[:4] for origin, keys in other.origin.items() if "model.abstraction_factor" in keys] == ["ours"]
