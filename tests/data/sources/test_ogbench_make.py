"""OGBench sets made here: protocol, repeatability, the file against both readers, and the command."""

import importlib.util
import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offpolicy.data.__main__ import main
from offpolicy.data.sources import fetch, ogbench_make, open_source
from offpolicy.data.sources.ogbench_make import (
    can_be_made,
    cells_at,
    free_cells,
    make,
    read_recipe,
    recipe_of,
    vertex_cells,
)
from offpolicy.errors import DataError, UsageError

ogbench = pytest.mark.skipif(importlib.util.find_spec("ogbench") is None, reason="needs ogbench")
NAVIGATE, STITCH, ENV = "pointmaze-medium-navigate-v0", "pointmaze-medium-stitch-v0", "pointmaze-medium-v0"
GRID = np.array(
    [
        [1, 1, 1, 1, 1, 1],
        [1, 0, 0, 0, 0, 1],
        [1, 0, 1, 1, 0, 1],
        [1, 0, 0, 1, 0, 1],
        [1, 1, 1, 1, 1, 1],
    ]
)


def short(name: str, env_id: str, episodes: int, rows: int, **changes: Any) -> dict[str, Any]:
    return {**recipe_of(name, env_id), "episodes": episodes, "rows": rows, **changes}


# -- mazes as graphs ---------------------------------------------------------------------------------------------------


def test_vertices_are_not_the_middle_of_corridors() -> None:
    """A ring with two dead ends: (1, 2), (1, 3) lie in a level corridor, (2, 1), (2, 4) in an upright one."""
    assert len(free_cells(GRID)) == 9
    assert vertex_cells(GRID) == [(1, 1), (1, 4), (3, 1), (3, 2), (3, 4)]


def test_cells_at_a_distance() -> None:
    assert cells_at(GRID, (1, 1), 0) == [(1, 1)]
    assert sorted(cells_at(GRID, (1, 1), 3)) == [(1, 4), (3, 2)]
    assert cells_at(GRID, (3, 2), 9) == []


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "made"),
    [
        (NAVIGATE, True),
        ("pointmaze-teleport-stitch-v0", True),
        ("cube-quadruple-noisy-v0", True),
        ("scene-play-v0", True),
        ("puzzle-4x6-play-v0", True),
        ("antmaze-medium-navigate-v0", False),
        ("visual-cube-single-play-v0", False),
        ("powderworld-easy-play-v0", False),
    ],
)
def test_what_can_be_made(name: str, made: bool) -> None:
    assert can_be_made(name) is made


@ogbench
def test_recipes_have_the_published_sizes() -> None:
    """Episodes × steps of the published sets, in millions of transitions."""
    sizes = {
        (NAVIGATE, ENV): 1.0, ("pointmaze-giant-navigate-v0", "pointmaze-giant-v0"): 1.0, (STITCH, ENV): 1.0,
        ("cube-triple-play-v0", "cube-triple-v0"): 3.0, ("puzzle-4x4-noisy-v0", "puzzle-4x4-v0"): 1.0,
        ("puzzle-4x6-play-v0", "puzzle-4x6-v0"): 5.0,
    }  # fmt: skip
    for (name, env_id), millions in sizes.items():
        recipe = recipe_of(name, env_id)
        assert recipe["episodes"] * (recipe["rows"] - 1) == millions * 1e6
    assert recipe_of("pointmaze-giant-navigate-v0", "pointmaze-giant-v0")["rows"] == 2001
    assert recipe_of(NAVIGATE, ENV, steps=2001)["episodes"] == 3
    assert recipe_of("puzzle-4x4-noisy-v0", "puzzle-4x4-v0")["behaviour"] == "noisy"
    json.dumps(recipe_of("scene-play-v0", "scene-v0"))


@ogbench
def test_what_cannot_be_made_and_impossible_sizes() -> None:
    with pytest.raises(UsageError, match=r"antmaze-medium-navigate-v0 cannot be made here.*Download it"):
        recipe_of("antmaze-medium-navigate-v0", "antmaze-medium-v0")
    with pytest.raises(UsageError, match="`steps` is 0"):
        recipe_of(NAVIGATE, ENV, steps=0)
    with pytest.raises(UsageError, match="`jobs` is 0"):
        make(recipe_of(NAVIGATE, ENV), Path("unused.npz"), jobs=0)


def test_without_the_package_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ogbench_make.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'offpolicy\[ogbench\]'"):
        recipe_of(NAVIGATE, ENV)


# -- point mazes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three episodes of 120 states, and one for validation."""
    path = tmp_path_factory.mktemp("ogbench") / f"{NAVIGATE}.npz"
    make(short(NAVIGATE, ENV, 3, 120), path)
    return path


@ogbench
def test_the_files_layout(walk: Path) -> None:
    for path, rows in ((walk, 360), (walk.with_name(f"{NAVIGATE}-val.npz"), 120)):
        arrays = dict(np.load(path))
        kinds = {"observations": "float32", "actions": "float32", "qpos": "float32", "qvel": "float32"}
        assert {k: str(v.dtype) for k, v in arrays.items() if k != "recipe"} == {**kinds, "terminals": "bool"}
        assert {arrays[k].shape for k in kinds} == {(rows, 2)}
        np.testing.assert_array_equal(np.flatnonzero(arrays["terminals"]), np.arange(119, rows, 120))
        np.testing.assert_array_equal(arrays["observations"], arrays["qpos"])
    assert json.loads(str(np.load(walk)["recipe"]))["part"] == "training"
    assert sorted(p.name for p in walk.parent.iterdir() if "lock" not in p.name) == [f"{NAVIGATE}-val.npz", walk.name]


@ogbench
def test_every_step_is_the_environments_own(walk: Path) -> None:
    """Put the environment into the stored state and repeat the stored action (float32 storage: to 1e-6)."""
    from offpolicy.environments.make import close_environment, make_environment

    arrays = dict(np.load(walk))
    env = make_environment({"env_id": ENV})
    env.reset(seed=0)
    for row in np.flatnonzero(~arrays["terminals"])[::7]:
        env.unwrapped.set_xy(arrays["observations"][row].astype(np.float64))
        np.testing.assert_allclose(env.step(arrays["actions"][row])[0], arrays["observations"][row + 1], atol=2e-5)
    close_environment(env)


@ogbench
def test_the_walk_follows_the_oracle(walk: Path) -> None:
    """Noise 0.5 around unit directions, clipped: displacements of 0.2 per step, actions near the bounds, all over."""
    arrays = dict(np.load(walk))
    inside = ~arrays["terminals"][:-1]
    steps = np.linalg.norm(np.diff(arrays["observations"], axis=0), axis=1)[inside]
    assert 0.15 < np.median(steps) < 0.25
    assert 0.2 < (np.abs(arrays["actions"]) == 1.0).mean() < 0.5
    assert np.ptp(arrays["observations"], axis=0).min() > 4.0  # more than one cell


@ogbench
def test_both_readers_agree_in_both_layouts(walk: Path, tmp_path: Path) -> None:
    utils = pytest.importorskip("ogbench.utils")
    replay = open_source(walk)
    rows = replay.usable_rows()
    assert replay.num_steps == len(rows) == 357 and replay.meta["env_id"] == ENV
    assert replay.meta["recipe"]["episodes"] == 3 and any("made here" in note for note in replay.meta["notes"])
    _, train, held_out = utils_make(walk)
    np.testing.assert_array_equal(replay.steps["obs"][rows], train["observations"])
    np.testing.assert_array_equal(replay.next_obs(rows), train["next_observations"])
    np.testing.assert_array_equal(np.isin(rows, replay.end), train["terminals"])
    assert len(held_out["observations"]) == 119
    for compact in (False, True):
        saved = tmp_path / f"saved{compact}.npz"
        np.savez(saved, **utils.load_dataset(str(walk), compact_dataset=compact))
        again = open_source(saved)
        np.testing.assert_array_equal(again.steps["obs"][again.rows], replay.steps["obs"][rows])
        np.testing.assert_array_equal(again.next_obs(again.rows), replay.next_obs(rows))
        np.testing.assert_array_equal(again.length, replay.length)


def utils_make(path: Path) -> Any:
    """The package's own way to open a set."""
    import ogbench as package

    return package.make_env_and_datasets(NAVIGATE, dataset_path=str(path))


@ogbench
def test_stitch_walks_to_one_goal_at_four_cells_and_stays() -> None:
    recipe = short(STITCH, ENV, 4, 201)
    for episode in ogbench_make._episodes(recipe, 4, 1):
        obs = episode["observations"]
        ways = np.abs(np.round((obs[-1] - obs[0]) / 4))  # cells apart, level and upright
        assert ways.sum() <= 4
        assert np.linalg.norm(obs[-40:] - obs[-1], axis=1).max() < 3.0  # about the goal since long


@ogbench
def test_an_episode_depends_on_its_number_and_the_seed_alone() -> None:
    recipe = short(NAVIGATE, ENV, 2, 30)
    state = np.random.get_state()[1].copy()
    first = list(ogbench_make._episodes(recipe, 3, 1))
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    for one, two in zip(ogbench_make._episodes(recipe, 2, 1), first):
        np.testing.assert_array_equal(one["observations"], two["observations"])
    with ogbench_make._player(recipe) as play:
        np.testing.assert_array_equal(play(2)["actions"], first[2]["actions"])
    other = next(ogbench_make._episodes({**recipe, "seed": 1}, 1, 1))
    assert not np.array_equal(other["observations"], first[0]["observations"])


@ogbench
def test_processes_make_the_same_set(walk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("fork")  # spawned ones import everything again, which takes seconds
    monkeypatch.setattr(ogbench_make, "get_context", lambda kind: context)
    make(short(NAVIGATE, ENV, 3, 120), tmp_path / walk.name, jobs=2)
    one, two = dict(np.load(walk)), dict(np.load(tmp_path / walk.name))
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


@ogbench
def test_a_set_is_made_once_and_never_replaced(walk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = short(NAVIGATE, ENV, 3, 120)
    assert read_recipe(walk) == recipe
    monkeypatch.setattr(ogbench_make, "_episodes", lambda *_: pytest.fail("made again"))
    make(recipe, walk)
    with pytest.raises(DataError, match=r"was not made by this recipe.*--out"):
        make({**recipe, "seed": 3}, walk)


@ogbench
def test_an_interrupted_set_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ogbench_make.np, "savez_compressed", stop)
    with pytest.raises(KeyboardInterrupt):
        make(short(NAVIGATE, ENV, 1, 20), tmp_path / "a.npz")
    assert list(tmp_path.iterdir()) == []


# -- arms --------------------------------------------------------------------------------------------------------------


@ogbench
@pytest.mark.parametrize(
    ("name", "env_id", "widths"),
    [
        ("cube-single-play-v0", "cube-single-v0", (28, 21, 20, None)),
        ("scene-noisy-v0", "scene-v0", (40, 25, 24, 2)),
        ("puzzle-3x3-play-v0", "puzzle-3x3-v0", (55, 23, 23, 9)),
    ],
)
def test_arms(name: str, env_id: str, widths: tuple[int | None, ...]) -> None:
    recipe = short(name, env_id, 1, 12)
    with ogbench_make.isolated_rng(0), ogbench_make._player(recipe) as play:
        episode, other, again = play(0), play(1), play(0)
    columns = ("observations", "qpos", "qvel", "button_states")
    assert tuple(episode[k].shape[1] if k in episode else None for k in columns) == widths
    assert episode["actions"].shape == (12, 5) and np.abs(episode["actions"]).max() <= 1.0
    for key, column in episode.items():
        np.testing.assert_array_equal(column, again[key])
    assert not np.array_equal(episode["observations"], other["observations"])
    if "button_states" in episode:
        assert episode["button_states"].dtype == np.int64


def test_a_fallen_cube_is_noticed() -> None:
    assert ogbench_make._fell(np.array([0.4, 0.3, 0.02]))
    assert ogbench_make._fell(np.array([0.4, -0.31, 0.02])) and not ogbench_make._fell(np.array([0.4, -0.31, 0.07]))
    assert not ogbench_make._fell(np.array([0.4, 0.0, 0.02]))


# -- the command, and data that are not there --------------------------------------------------------------------------


@ogbench
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    assert main(["make", STITCH, "--steps", "201", "--seed", "4"]) == 0
    printed = capsys.readouterr().out
    assert "400 in 2 episodes" in printed and "made here with ogbench" in printed and "seed 4" in printed
    replay = open_source(STITCH, download=False)
    assert replay.num_steps == 400 and replay.meta["recipe"]["seed"] == 4
    assert main(["make", STITCH, "--steps", "201"]) == 3
    assert "was not made by this recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["make", "pendulum-stitch-v0", "--steps", "5"], "--steps was given, but the recipe of pendulum-stitch-v0"),
        (["make", NAVIGATE, "--check"], "has no reference scores"),
        (["make", "hopper-medium-v2"], "; and OGBench's mazes and arms"),
        pytest.param(["make", NAVIGATE, "--jobs", "0"], "Change `--jobs` or leave it out", marks=ogbench),
    ],
)
def test_mistakes_in_the_command(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    assert message in capsys.readouterr().err


def refuse(url: str, path: Path) -> None:
    raise DataError(f"{url} could not be downloaded: no network.")


@ogbench
def test_without_a_network_mazes_are_made_and_arms_name_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    monkeypatch.setattr(fetch, "fetch", refuse)
    full = ogbench_make.recipe_of
    monkeypatch.setattr(ogbench_make, "recipe_of", lambda name, env_id: {**full(name, env_id), "episodes": 1})
    assert open_source(STITCH).num_steps == 200
    assert "could not be downloaded: making a set like it" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"no network.*python -m offpolicy.data make scene-play-v0"):
        open_source("scene-play-v0")
    with pytest.raises(DataError, match=r"no network\.$"):
        open_source("antmaze-medium-navigate-v0")
