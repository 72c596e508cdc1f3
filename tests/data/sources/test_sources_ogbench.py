"""OGBench's layouts against a slow loop over its documented ones."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from scripts import FIXTURES

from offpolicy.data.replay import Replay
from offpolicy.data.sources import open_source
from offpolicy.errors import DataError

FIXTURE = FIXTURES / "ogbench_pointmaze_small-v0.npz"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return Path(shutil.copy(FIXTURE, tmp_path / FIXTURE.name))


def transitions(arrays: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, bool]]:
    """(state, action, next state, last of its trajectory) of the raw file, row by row: a marked row is only a state."""
    result = []
    for i in range(len(arrays["terminals"]) - 1):
        if not arrays["terminals"][i]:
            last = bool(arrays["terminals"][i + 1])
            result.append((arrays["observations"][i], arrays["actions"][i], arrays["observations"][i + 1], last))
    return result


def regular(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The documented regular layout: one row per transition, the last one of a trajectory marked."""
    keys = ("observations", "actions", "next_observations", "terminals")
    return {key: np.array(column) for key, column in zip(keys, zip(*transitions(arrays)))}


def compact(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The documented compact layout: all rows, the last two of a trajectory marked, the last not valid."""
    n = len(arrays["terminals"])
    ends = [bool(arrays["terminals"][i] or i == n - 1 or arrays["terminals"][i + 1]) for i in range(n)]
    return {
        "observations": arrays["observations"],
        "actions": arrays["actions"],
        "terminals": np.array(ends, dtype=np.float32),
        "valids": 1.0 - arrays["terminals"].astype(np.float32),
    }


def check(replay: Replay, arrays: dict[str, np.ndarray]) -> None:
    expected = regular(arrays)
    rows = replay.usable_rows()
    assert len(rows) == len(expected["actions"]) == replay.num_steps
    np.testing.assert_array_equal(replay.steps["obs"][rows], expected["observations"])
    np.testing.assert_array_equal(replay.steps["action"][rows], expected["actions"])
    np.testing.assert_array_equal(replay.next_obs(rows), expected["next_observations"])
    np.testing.assert_array_equal(np.isin(rows, replay.end), expected["terminals"])
    assert not replay.steps["terminated"].any()  # a trajectory's end is a time limit


def test_5050_rows_give_5000_steps(file: Path) -> None:
    replay = open_source(file)
    assert (len(replay.steps["obs"]), replay.num_steps, replay.num_episodes) == (5050, 5000, 50)
    assert (replay.length == 100).all()
    check(replay, dict(np.load(file)))


@pytest.mark.parametrize("layout", [regular, compact])
def test_saved_layouts_of_its_loader(file: Path, tmp_path: Path, layout: object) -> None:
    arrays = dict(np.load(file))
    np.savez(tmp_path / "saved.npz", **layout(arrays))  # type: ignore[operator]
    check(open_source(tmp_path / "saved.npz"), arrays)


@pytest.mark.parametrize("kind", ["regular", "compact"])
def test_agreement_with_the_ogbench_package(file: Path, kind: str) -> None:
    loaded = pytest.importorskip("ogbench.utils").load_dataset(str(file), compact_dataset=kind == "compact")
    expected = {"regular": regular, "compact": compact}[kind](dict(np.load(file)))
    assert loaded.keys() == expected.keys()
    for key, column in expected.items():
        np.testing.assert_array_equal(loaded[key], column)


def test_trajectories_of_mixed_length(tmp_path: Path) -> None:
    """Lengths 4, 1 (a single state: no step), 2 and an unmarked rest of 3."""
    ends = np.array([0, 0, 0, 1, 1, 0, 1, 0, 0, 0], dtype=bool)
    observations = np.arange(10, dtype=np.float32)[:, None]
    np.savez(tmp_path / "a.npz", observations=observations, actions=np.zeros((10, 1), np.float32), terminals=ends)
    replay = open_source(tmp_path / "a.npz")
    assert replay.start.tolist() == [0, 5, 7] and replay.length.tolist() == [3, 1, 2]
    assert replay.tail["obs"][:, 0].tolist() == [3, 6, 9]
    assert any("single state" in n for n in replay.meta["notes"])
    assert any("no end mark" in n for n in replay.meta["notes"])


def test_the_action_of_a_last_state_is_not_looked_at(file: Path, tmp_path: Path) -> None:
    arrays = dict(np.load(file))
    arrays["actions"][np.flatnonzero(arrays["terminals"])] = np.nan
    np.savez(tmp_path / "a.npz", **arrays)
    assert open_source(tmp_path / "a.npz").num_steps == 5000
    arrays["actions"][3] = np.nan
    np.savez(tmp_path / "b.npz", **arrays)
    with pytest.raises(DataError, match=r"`actions` has NaN or infinite values in 1 row \(first: row 3, episode 0\)"):
        open_source(tmp_path / "b.npz")


def test_a_known_set_knows_its_environment(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    shutil.copy(file, tmp_path / "pointmaze-medium-navigate-v0.npz")
    meta = open_source("PointMaze_Medium_Navigate-v0").meta
    assert (meta["name"], meta["source"], meta["family"]) == ("pointmaze-medium-navigate-v0", "ogbench", "ogbench")
    assert (meta["env_id"], meta["max_episode_steps"]) == ("pointmaze-medium-v0", 1000)
    assert meta["action_low"] == [-1.0, -1.0] and meta["action_bounds"] == "environment"
    assert "ref_min_score" not in meta


def test_there_are_no_rewards_and_simulator_state_is_left(file: Path) -> None:
    assert set(open_source(file).steps) == {"obs", "action", "terminated"}


def test_discrete_actions_and_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "powder.npz", observations=rng.integers(0, 255, (20, 8, 8, 3), dtype=np.uint8),
             actions=rng.integers(0, 5, 20, dtype=np.int32), terminals=np.arange(20) % 10 == 9)  # fmt: skip
    replay = open_source(tmp_path / "powder.npz")
    assert replay.steps["obs"].dtype == np.uint8 and replay.steps["action"].dtype == np.int64
    assert replay.tail["obs"].shape == (2, 8, 8, 3)


def test_missing_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", observations=np.zeros((3, 1)), terminals=np.zeros(3, bool))
    with pytest.raises(DataError, match=r"has no `actions`; it has observations \(3, 1\)"):
        open_source(tmp_path / "a.npz")
