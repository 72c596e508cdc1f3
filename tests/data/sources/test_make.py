"""Sets made from real environments: the transitions are real, the recipe decides everything, folders are whole."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from offpolicy.data.replay import Replay
from offpolicy.data.sources import make, open_source
from offpolicy.data.sources.make import cache_folder, describe_made, generate, open_made
from offpolicy.errors import DataError, UsageError

NAME = "pendulum-stitch-v0"
MAZE = "pointmaze-medium-hidden-goal-v0"
robotics = pytest.mark.skipif(importlib.util.find_spec("gymnasium_robotics") is None, reason="needs gymnasium-robotics")


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replay]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFPOLICY_DATA_DIR", str(tmp_path_factory.mktemp("made")))
        yield open_source(NAME)


def test_size_and_shape(pendulum: Replay) -> None:
    assert (pendulum.num_steps, pendulum.num_episodes) == (40_000, 200)
    assert (pendulum.length == 200).all() and len(pendulum.usable_rows()) == 40_000
    assert pendulum.steps["obs"].shape == (40_000, 3) and pendulum.steps["action"].shape == (40_000, 1)
    assert np.abs(pendulum.steps["action"]).max() <= 2.0


def test_every_transition_is_gymnasiums(pendulum: Replay) -> None:
    """Put the environment into the stored state and repeat the stored action.

    The state is stored as float32 (cos, sin, speed), so the repeated step agrees to float32 rounding, not bit by bit.
    """
    env = gymnasium.make("Pendulum-v1").unwrapped
    env.reset(seed=0)
    rows = np.random.default_rng(0).choice(40_000, 1000, replace=False)
    rows[:5] = pendulum.end[:5]  # the last steps of episodes too: their successor is in the tail
    following = pendulum.next_obs(rows).numpy()
    states, rewards = np.asarray(pendulum.steps["obs"], np.float64), np.asarray(pendulum.steps["reward"])
    for row, successor in zip(rows, following):
        cos, sin, speed = states[row]
        env.state = np.array([np.arctan2(sin, cos), speed])  # type: ignore[attr-defined]
        obs, reward, terminated, _, _ = env.step(pendulum.steps["action"][row])
        np.testing.assert_allclose(obs, successor, atol=2e-5)
        assert float(reward) == pytest.approx(rewards[row], abs=2e-4)
        assert not terminated


def test_episodes_are_bit_equal_to_a_rollout_of_the_stored_actions(pendulum: Replay) -> None:
    env = gymnasium.make("Pendulum-v1")
    seed = pendulum.meta["recipe"]["seed"]
    for episode in (0, 1, 199):
        obs, _ = env.reset(seed=1000 * seed + episode)
        start = pendulum.start[episode]
        for t in range(200):
            np.testing.assert_array_equal(obs, pendulum.steps["obs"][start + t])
            obs, reward, *_ = env.step(pendulum.steps["action"][start + t])
            assert np.float32(reward) == pendulum.steps["reward"][start + t]
        np.testing.assert_array_equal(obs, pendulum.tail["obs"][episode])


def test_neither_half_solves_the_task(pendulum: Replay) -> None:
    """Normalised returns: the data as a whole near 30; of the episodes that start below the horizontal none is good."""
    low, high = pendulum.meta["ref_min_score"], pendulum.meta["ref_max_score"]
    score = 100 * (pendulum.returns() - low) / (high - low)
    below = pendulum.steps["obs"][pendulum.start, 0] < 0
    assert 25 < score.mean() < 40
    assert 45 < score[::2].mean() < 60 and score[1::2].mean() < 20
    assert score[below].max() < 70 and score[below].mean() < 20


def test_reference_scores(pendulum: Replay) -> None:
    """The means over the 50 evaluation starts, which the table of facts states."""
    returns = make.reference_returns(NAME)
    assert returns["random"].mean() == pytest.approx(pendulum.meta["ref_min_score"], abs=1.0)
    assert returns["competent"].mean() == pytest.approx(pendulum.meta["ref_max_score"], abs=1.0)


def test_the_recipe_is_stored_and_decides_the_content(pendulum: Replay) -> None:
    recipe = pendulum.meta["recipe"]
    assert recipe["versions"] == {"gymnasium": gymnasium.__version__}
    assert {"generator", "version", "env_id", "seed", "uniform", "sigma", "hold_gains"} <= recipe.keys()
    json.dumps(pendulum.meta)
    short = {**describe_made(NAME)}
    short["recipe"] = {**recipe, "episodes": 4}
    one, two = generate(NAME, short), generate(NAME, short)
    assert one.fingerprint() == two.fingerprint()
    np.testing.assert_array_equal(one.steps["obs"], pendulum.steps["obs"][:800])
    short["recipe"] = {**recipe, "episodes": 4, "seed": 7}
    assert generate(NAME, short).fingerprint() != one.fingerprint()


def test_the_folder_is_named_by_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFPOLICY_DATA_DIR", str(tmp_path))
    recipe = describe_made(NAME)["recipe"]
    folder = cache_folder(NAME, recipe)
    assert folder.parent == tmp_path and folder.name.startswith(NAME + "-")
    assert cache_folder(NAME, dict(reversed(recipe.items()))) == folder
    assert cache_folder(NAME, {**recipe, "sigma": 0.4}) != folder


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The set with four episodes, in a folder of its own."""
    monkeypatch.setenv("OFFPOLICY_DATA_DIR", str(tmp_path))
    full = make.facts
    monkeypatch.setattr(make, "facts", lambda name: {**full(name), "recipe": {**full(name)["recipe"], "episodes": 4}})
    return tmp_path


def test_it_is_made_once(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_made(NAME)
    monkeypatch.setattr(make, "generate", lambda *_: pytest.fail("made again"))
    again = open_made(NAME)
    assert again.fingerprint() == first.fingerprint() and again.meta["file"].startswith(str(short))
    assert len(list(short.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_no_obstacle(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Replay, "save", refuse)
    replay = open_made(NAME)
    assert replay.num_steps == 800 and any("No space left" in n for n in replay.meta["notes"])
    assert list(short.iterdir()) == []
    with pytest.raises(OSError, match="No space left"):  # which `offpolicy.data make` answers with an exit code
        open_made(NAME, must_keep=True)


def test_options_that_do_not_fit_are_refused(short: Path) -> None:
    with pytest.raises(UsageError, match="knows the observation after every step"):
        open_source(NAME, timeout_step="drop")
    fingerprint = open_source(NAME).fingerprint()
    assert open_source(NAME, sha256=fingerprint, timeout_step="keep").num_steps == 800
    with pytest.raises(DataError, match=f"has the fingerprint {fingerprint}; expected 00"):
        open_source(NAME, sha256="00")


def test_another_process_that_was_faster_wins(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Replay.save

    def twice(self: Replay, folder: Path) -> None:
        save(self, folder)
        save(self, folder)  # FileExistsError, as when the other process has just renamed its folder

    monkeypatch.setattr(Replay, "save", twice)
    assert open_made(NAME).num_steps == 800
    assert len(list(short.iterdir())) == 1


# -- point maze ------------------------------------------------------------------------------------------------------


def test_without_the_simulator_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'offpolicy\[robotics\]'"):
        open_source(MAZE)


@pytest.fixture(scope="module")
def walk() -> tuple[Replay, dict]:
    meta = describe_made(MAZE)
    meta["recipe"] = {**meta["recipe"], "rows": 2000}
    return generate(MAZE, meta), meta


@robotics
def test_the_walk_is_the_environments_own(walk: tuple[Replay, dict]) -> None:
    from offpolicy.environments.make import make_environment

    replay, meta = walk
    env = make_environment(meta).unwrapped
    obs = env.reset(seed=meta["recipe"]["seed"])[0]["observation"]
    for row in range(800):  # across the first cut at row 600
        np.testing.assert_array_equal(obs.astype(np.float32), replay.steps["obs"][row])
        obs = env.step(replay.steps["action"][row])[0]["observation"]
    env.close()


@robotics
def test_the_walk_loses_nothing_at_its_cuts_and_is_rewarded_for_the_hidden_goal(walk: tuple[Replay, dict]) -> None:
    replay, _ = walk
    assert replay.length.tolist() == [600, 600, 600, 200] and len(replay.usable_rows()) == 2000
    following = replay.next_obs(replay.rows).numpy()
    np.testing.assert_array_equal(following[:-1], replay.steps["obs"][1:])
    distance = np.linalg.norm(following[:, :2] - np.array([2.5, -2.5]), axis=1)  # cell (6, 6) of the 8 × 8 maze
    np.testing.assert_allclose(replay.steps["reward"], np.exp(-distance), rtol=1e-5)
    assert replay.meta["reset_options"] == {"goal_cell": [6, 6]} and replay.meta["obs_keys"] == ["observation"]
    assert (replay.meta["env_id"], replay.meta["max_episode_steps"]) == ("PointMaze_MediumDense-v3", 600)
    assert set(replay.meta["recipe"]["versions"]) == {"gymnasium-robotics", "mujoco"}


@robotics
def test_its_reference_scores_are_of_the_right_size() -> None:
    returns = make.reference_returns(MAZE, episodes=4)
    assert returns["competent"].min() > 250 and returns["random"].mean() < returns["competent"].mean() - 100
