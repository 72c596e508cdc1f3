"""Recipes: every file parses, fits its method, names its sources; the most specific one wins."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields

import gymnasium
import pytest
from lightning.pytorch import Trainer

from offpolicy.data.names import known_names
from offpolicy.data.online import OnlineOptions
from offpolicy.data.renewal import SyntheticOptions
from offpolicy.data.texts.module import TextData
from offpolicy.errors import UsageError
from offpolicy.language.module import LanguageModule
from offpolicy.recipes import Recipe, named_recipe, parse_recipe, recipe, recipes
from offpolicy.registry import find_method
from offpolicy.training.options import RunOptions

ALL = list(recipes())


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_every_recipe_fits_its_method(one: Recipe) -> None:
    cls = find_method(one.name.partition("/")[0])
    method = cls(**one.group("model"))
    for key, value in one.group("model").items():
        found = method.hparams[key]
        assert tuple(found) == tuple(value) if isinstance(value, list) else found == value
    RunOptions(**one.group("run"))
    assert set(one.group("trainer")) <= set(inspect.signature(Trainer).parameters)
    language = issubclass(cls, LanguageModule)
    data = one.group("data") if not language else {}
    synthetic = {key.removeprefix("synthetic."): value for key, value in data.items() if key.startswith("synthetic.")}
    online = {key.removeprefix("online."): value for key, value in data.items() if key.startswith("online.")}
    assert {key.partition(".")[0] for key in one.settings} <= {
        "model",
        "trainer",
        "run",
        *(["data"] if language or data else []),
    }
    OnlineOptions(**online)
    SyntheticOptions(**synthetic).of_source(data.get("source", "real"))
    assert len(synthetic) + len(online) + ("source" in data) == len(data)
    if language:
        assert set(one.group("data")) <= set(inspect.signature(TextData).parameters)
    lengths = ("model.epochs", "model.iterations") if language else ("trainer.max_steps",)
    assert any(one.settings.get(name, 0) > 0 for name in (("data.online.env_steps",) if online else lengths))
    assert all(
        isinstance(v, (bool, int, float, str, list)) for v in one.settings.values()
    )  # 1e-3 is a text in YAML 1.1


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_every_value_says_where_it_is_from(one: Recipe) -> None:
    assert sorted(key for keys in one.origin.values() for key in keys) == sorted(one.settings)
    for origin in one.origin:
        assert origin.startswith(("published (", "ours ("))
        if origin.startswith("published"):
            assert re.search(r"arXiv:\d{4}\.\d{4,5}|code", origin)  # a paper, or whose code at which commit


def test_every_pattern_means_known_tasks_and_no_two_recipes_compete() -> None:
    for one in ALL:
        for pattern in one.tasks:
            names = gymnasium.registry if "data.online.env_steps" in one.settings else known_names()
            assert any(Recipe("", (pattern,)).specificity(name) >= 0 for name in names), (one.name, pattern)
    for method in {one.name.partition("/")[0] for one in ALL}:
        own = [one for one in ALL if one.name.startswith(f"{method}/")]
        for task in [*known_names(), *gymnasium.registry]:
            ranks = sorted(one.specificity(task) for one in own)
            assert len(ranks) < 2 or ranks[-1] == -1 or ranks[-1] > ranks[-2], (method, task)


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("walker2d-medium-v2", {"expectile": 0.7, "beta": 3.0, "tau": 0.005, "reward_transform": "r"}),
        ("hopper-medium-v2", {"deterministic": True, "tau": 0.001, "reward_transform": "return_range"}),
        ("hopper-medium-replay-v2", {"deterministic": True, "tau": 0.001, "reward_transform": "return_range"}),
        ("hopper-medium-expert-v2", {"expectile": 0.5, "beta": 6.0, "deterministic": False, "tau": 0.005}),
        ("antmaze-large-play-v2", {"expectile": 0.9, "beta": 10.0, "reward_transform": "r-1"}),
        ("pen-human-v1", {"expectile": 0.8, "beta": 3.0, "actor_dropout": 0.1}),
        ("maze2d-umaze-v1", {"expectile": 0.7, "beta": 3.0}),
    ],
)
def test_iql_has_the_published_values(task: str, settings: dict[str, object]) -> None:
    found = recipe("IQL", task)
    assert found is not None
    assert {key: found.group("model")[key] for key in settings} == settings
    assert found.group("run")["eval_episodes"] == (100 if "maze" in task else 10)


def test_choice_by_task_and_by_name() -> None:
    assert recipe("td3bc", "antmaze-umaze-v2").settings["model.reward_transform"] == "r-1"  # type: ignore[union-attr]
    assert recipe("TD3BC", "no-such-task") is None
    assert recipe("BC", "hopper-medium-v2").settings["model.top"] == 1.0  # type: ignore[union-attr]
    assert named_recipe("BC", "Best_Tenth").settings["model.top"] == 0.1
    with pytest.raises(UsageError, match="Did you mean 'best-tenth'"):
        named_recipe("BC", "best-tent")


@pytest.mark.parametrize(
    "text",
    [
        "tasks: [a]",
        "tasks: [a]\nours: {settings: {model.alpha: 1}}",
        "tasks: [a]\nours: {reason: b, settings: {model.alpha: 1}}\nextra: 1",
        "tasks: [a]\nours: {reason: b, settings: {x: 1}}\npublished: {source: c, settings: {x: 2}}",
    ],
)
def test_a_malformed_recipe_is_named(text: str) -> None:
    with pytest.raises(UsageError, match="recipe m/n"):
        parse_recipe("m/n", text)


def test_run_options_cover_what_recipes_use() -> None:
    names = {field.name for field in fields(RunOptions)}
    assert {key for one in ALL for key in one.group("run")} <= names


def test_preference_recipes_have_the_published_values() -> None:
    """SimPO's γ/β and rate, the DPO it was compared with, and RPO's η; none is taken by itself."""
    simpo, dpo = named_recipe("SimPO", "llama3-instruct").settings, named_recipe("DPO", "llama3-instruct").settings
    assert (simpo["model.beta"], simpo["model.gamma_beta_ratio"], simpo["model.lr"]) == (2.5, 0.55, 1e-6)
    assert (dpo["model.beta"], dpo["model.lr"], dpo["data.max_prompt_length"]) == (0.01, 7e-7, 1800)
    rpo = named_recipe("RPO", "zephyr-gemma").settings
    assert (rpo["model.beta"], rpo["model.eta"], rpo["model.epochs"]) == (0.05, 0.005, 2.0)
    assert not any(one.tasks for method in ("SimPO", "DPO", "RPO") for one in recipes(method))
