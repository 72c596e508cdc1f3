"""Minari storage: the T + 1 observations, three formats, dict spaces, faults, downloads."""

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scripts import FIXTURES

from offpolicy.data.sources import minari as reader
from offpolicy.data.sources import open_source
from offpolicy.errors import DataError, UsageError

PENDULUM = FIXTURES / "minari" / "pendulum"


@pytest.fixture
def hdf5(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PENDULUM / "mixed-v0", tmp_path / "mixed-v0"))


@pytest.fixture
def arrow(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PENDULUM / "mixed-arrow-v0", tmp_path / "mixed-arrow-v0"))


@pytest.fixture
def parquet(arrow: Path, tmp_path: Path) -> Path:
    """The Arrow set rewritten as Parquet, as Minari lays it out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(shutil.copytree(arrow, tmp_path / "mixed-parquet-v0"))
    for part in folder.glob("data/*/part-0.arrow"):
        pq.write_table(pa.ipc.open_file(part).read_all(), part.with_suffix(".parquet"))
        part.unlink()
    edit(folder, data_format="parquet")
    return folder


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "data" / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def box(width: int, low: float = -1e3, high: float = 1e3) -> dict[str, Any]:
    return {"type": "Box", "dtype": "float64", "shape": [width], "low": [low] * width, "high": [high] * width}


def write(folder: Path, observation: dict[str, Any], lengths: list[int], action: dict[str, Any] | None = None) -> Path:
    """A small HDF5 set with the given space; observation values are episode + t/100 in every place."""
    action = action or box(2, -1.0, 1.0)
    (folder / "data").mkdir(parents=True)
    rng = np.random.default_rng(0)

    def fill(group: h5py.Group, key: str, space: dict[str, Any], value: np.ndarray) -> None:
        if space["type"] == "Dict":
            for name, part in space["subspaces"].items():
                fill(group.require_group(key), name, part, value)
        elif space["type"] == "Text":
            group.create_dataset(key, data=["go"] * len(value), dtype=h5py.string_dtype())
        else:
            shape = space.get("shape", ())
            values = value.reshape(-1, *[1] * len(shape)) + np.zeros(shape)
            group[key] = values.astype(space.get("dtype", "int64"))

    with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
        for k, steps in enumerate(lengths):
            group = file.create_group(f"episode_{k}")
            fill(group, "observations", observation, k + np.arange(steps + 1) / 100)
            if action["type"] == "Discrete":
                group["actions"] = rng.integers(0, action["n"], steps)
            else:
                group["actions"] = rng.uniform(-1, 1, (steps, *action["shape"]))
            group["rewards"] = rng.normal(size=steps)
            group["terminations"] = np.arange(steps) == (steps - 1 if k == 0 else -1)
            group["truncations"] = np.arange(steps) == (steps - 1 if k == 1 else -1)
    record = {"total_episodes": len(lengths), "data_format": "hdf5", "dataset_id": f"test/{folder.name}"}
    spaces = {"observation_space": json.dumps(observation), "action_space": json.dumps(action)}
    (folder / "data" / "metadata.json").write_text(json.dumps({**record, **spaces}))
    return folder


# -- the T + 1 observations --------------------------------------------------------------------------------------------


def test_every_episode_starts_where_the_source_says(hdf5: Path) -> None:
    """Concatenating T + 1 observations beside T actions starts episode k at row 200·k instead of its first one."""
    replay = open_source(hdf5)
    with h5py.File(hdf5 / "data" / "main_data.hdf5") as source:
        for k in range(10):
            group = source[f"episode_{k}"]
            rows = slice(replay.start[k], replay.start[k] + replay.length[k])
            np.testing.assert_array_equal(replay.steps["obs"][replay.start[k]], group["observations"][0])
            np.testing.assert_array_equal(replay.steps["obs"][rows], group["observations"][:-1])
            np.testing.assert_array_equal(replay.tail["obs"][k], group["observations"][-1])
            np.testing.assert_array_equal(replay.next_obs(np.arange(rows.start, rows.stop)), group["observations"][1:])
            np.testing.assert_array_equal(replay.steps["action"][rows], group["actions"])
            np.testing.assert_array_equal(replay.steps["reward"][rows], group["rewards"][()].astype(np.float32))
    assert len(replay.usable_rows()) == 2000


def test_it_agrees_with_the_minari_package(
    hdf5: Path, arrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    for folder in (hdf5, arrow):
        replay = open_source(folder)
        for k, episode in enumerate(package.load_dataset(folder.name).iterate_episodes()):
            rows = np.arange(replay.start[k], replay.start[k] + replay.length[k])
            np.testing.assert_array_equal(replay.steps["obs"][rows], episode.observations[:-1])
            np.testing.assert_array_equal(replay.next_obs(rows), episode.observations[1:])
            np.testing.assert_array_equal(replay.steps["action"][rows], episode.actions)


def test_arrow_and_parquet_padding_is_left_out(hdf5: Path, arrow: Path, parquet: Path) -> None:
    """The Arrow set holds the first four episodes of the HDF5 one; every column there has one row of padding."""
    first = open_source(hdf5).filter(range(4))
    for folder in (arrow, parquet):
        replay = open_source(folder)
        assert replay.num_steps == 800 and (replay.length == 200).all()
        for name in ("obs", "action", "reward", "terminated"):
            np.testing.assert_array_equal(replay.steps[name], first.steps[name][first.rows])
        np.testing.assert_array_equal(replay.tail["obs"], first.tail["obs"])


def test_facts_from_the_metadata(hdf5: Path) -> None:
    meta = open_source(hdf5).meta
    assert (meta["name"], meta["source"]) == ("pendulum/mixed-v0", "minari")
    assert (meta["env_id"], meta["max_episode_steps"]) == ("Pendulum-v1", 200)
    assert (meta["ref_min_score"], meta["ref_max_score"], meta["score_kind"]) == (-1180.0, -148.0, "minari-normalised")
    assert (meta["action_low"], meta["action_bounds"]) == ([-2.0], "environment")


def test_ends_of_episodes_and_episodes_without_steps(tmp_path: Path) -> None:
    replay = open_source(write(tmp_path / "a-v0", box(3), [4, 3, 0, 1, 5]))
    assert replay.length.tolist() == [4, 3, 1, 5]
    assert np.flatnonzero(replay.steps["terminated"]).tolist() == [3]
    assert replay.meta["notes"][0] == "1 episode without a step: skipped"
    assert any("2 unfinished episodes" in n for n in replay.meta["notes"])
    np.testing.assert_allclose(replay.tail["obs"][:, 0], [0.04, 1.03, 3.01, 4.05], rtol=1e-6)


# -- spaces ------------------------------------------------------------------------------------------------------------

MAZE = {
    "type": "Dict",
    "subspaces": {"achieved_goal": box(2), "desired_goal": box(2), "observation": box(4), "mission": {"type": "Text"}},
}


def test_dict_observations_become_columns_and_one_obs(tmp_path: Path) -> None:
    folder = write(tmp_path / "maze-v0", MAZE, [4, 3])
    replay = open_source(folder)
    assert replay.meta["obs_keys"] == ["achieved_goal", "desired_goal", "observation"]
    assert replay.steps["obs"].shape == (7, 8) and replay.tail["obs"].shape == (2, 8)
    assert replay.steps["obs/observation"].shape == (7, 4)
    assert any("`observations/mission` was left out: it is Text" in n for n in replay.meta["notes"])

    chosen = open_source(folder, obs_keys=["observation", "desired_goal"])
    assert chosen.steps["obs"].shape == (7, 6) and chosen.steps["obs/achieved_goal"].shape == (7, 2)
    np.testing.assert_array_equal(chosen.steps["obs"][:, :4], chosen.steps["obs/observation"])
    np.testing.assert_allclose(chosen.next_obs(np.array([3, 4]))[:, 0], [0.04, 1.01], rtol=1e-6)
    with pytest.raises(UsageError, match=r"no observation \['goal'\]; expected some of"):
        open_source(folder, obs_keys=["goal"])


def test_published_sets_have_their_keys_from_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    write(tmp_path / "D4RL" / "pointmaze" / "umaze-v2", MAZE, [4, 3])
    for name in ("d4rl/pointmaze/umaze-v2", tmp_path / "D4RL" / "pointmaze" / "umaze-v2"):
        assert open_source(name).meta["obs_keys"] == ["observation", "desired_goal"]


def test_nested_dicts_images_and_discrete_parts(tmp_path: Path) -> None:
    image = {"type": "Box", "dtype": "uint8", "shape": [7, 7, 3], "low": 0, "high": 255}
    space = {"type": "Dict", "subspaces": {"image": image, "task": {"type": "Dict", "subspaces": {"kettle": box(3)}},
                                           "direction": {"type": "Discrete", "n": 4}}}  # fmt: skip
    folder = write(tmp_path / "grid-v0", space, [4, 3], {"type": "Discrete", "n": 7})
    with pytest.raises(UsageError, match=r"\['image'\] are images and cannot stand beside"):
        open_source(folder)
    seen = open_source(folder, obs_keys=["image"])
    assert seen.steps["obs"].dtype == np.uint8 and seen.steps["obs"].shape == (7, 7, 7, 3)
    assert seen.steps["action"].dtype == np.int64 and seen.meta["action_n"] == 7
    flat = open_source(folder, obs_keys=["task/kettle", "direction"])
    assert flat.steps["obs"].shape == (7, 4)


def test_spaces_that_nothing_here_can_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has Tuple actions"):
        reader.read(write(tmp_path / "a-v0", box(3), [3], {**box(1), "type": "Tuple"}))
    image = {"type": "Box", "dtype": "uint8", "shape": [64, 64, 3], "low": 0, "high": 255}
    folder = write(tmp_path / "b-v0", image, [3])
    edit(folder, jpeg_encoding=True)
    with pytest.raises(DataError, match="stored as JPEG images"):
        open_source(folder)


# -- faults ------------------------------------------------------------------------------------------------------------


def test_an_episode_without_the_last_observation_is_named(hdf5: Path) -> None:
    with h5py.File(hdf5 / "data" / "main_data.hdf5", "a") as file:
        observations = file["episode_7/observations"][:-1]
        del file["episode_7/observations"]
        file["episode_7/observations"] = observations
    with pytest.raises(DataError) as error:
        open_source(hdf5)
    assert "episode 7 has 200 rows of `observations` for 200 steps; expected 201" in str(error.value)


def test_an_arrow_episode_without_the_last_observation_is_named(arrow: Path) -> None:
    (arrow / "data" / "2" / "metadata.json").write_text(json.dumps({"id": 2, "total_steps": 201}))
    with pytest.raises(DataError, match="/2 has 201 rows for 201 steps; expected 202"):
        open_source(arrow)


@pytest.mark.parametrize("kind", ["hdf5", "arrow", "parquet"])
def test_incomplete_and_damaged_sets(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    edit(folder, total_episodes=99)
    with pytest.raises(DataError, match="its metadata say 99; the download is incomplete"):
        open_source(folder)
    edit(folder, total_episodes=10 if kind == "hdf5" else 4)
    part = folder / "data" / ("main_data.hdf5" if kind == "hdf5" else f"1/part-0.{kind}")
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    with pytest.raises(DataError, match="truncated"):
        open_source(folder)
    part.unlink()
    with pytest.raises(DataError, match=r"incomplete|does not exist"):
        open_source(folder)


def test_missing_column_and_wrong_shape(hdf5: Path) -> None:
    with h5py.File(hdf5 / "data" / "main_data.hdf5", "a") as file:
        del file["episode_3/rewards"]
    with pytest.raises(DataError, match="`episode_3` has no `rewards`"):
        open_source(hdf5)
    with h5py.File(hdf5 / "data" / "main_data.hdf5", "a") as file:
        file["episode_3/rewards"] = np.zeros(200)
        del file["episode_3/actions"]
        file["episode_3/actions"] = np.zeros((200, 2))
    with pytest.raises(DataError, match=r"`episode_3/actions` has shape \(200, 2\); expected \(200, 1\)"):
        open_source(hdf5)


def test_damaged_metadata(hdf5: Path) -> None:
    (hdf5 / "data" / "metadata.json").write_text("{")
    with pytest.raises(DataError, match=r"metadata.json is damaged"):
        open_source(hdf5)


def test_content_faults_drop_their_episode(hdf5: Path) -> None:
    with h5py.File(hdf5 / "data" / "main_data.hdf5", "a") as file:
        file["episode_4/observations"][200] = np.nan  # the observation after the last step
    with pytest.raises(DataError, match=r"after the last step in 1 row \(first: row 999, episode 4\)"):
        open_source(hdf5)
    assert open_source(hdf5, on_bad="drop_episode").num_episodes == 9


def test_changed_storage_is_noticed(hdf5: Path) -> None:
    open_source(hdf5)
    assert (hdf5 / "data.lock.json").is_file()
    with h5py.File(hdf5 / "data" / "main_data.hdf5", "a") as file:
        file["episode_4/rewards"][0] = 1.0
    with pytest.raises(DataError, match="has changed since its first load"):
        open_source(hdf5)


# -- downloads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for the package that 'downloads' the fixture into MINARI_DATASETS_PATH."""
    import os

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))
    monkeypatch.setattr(reader, "check_network", lambda *_: None)
    package = types.ModuleType("minari")

    def download(name: str) -> None:
        shutil.copytree(PENDULUM / "mixed-v0", Path(os.environ["MINARI_DATASETS_PATH"]) / name)

    package.download_dataset = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "minari", package)
    return package


def test_a_missing_set_is_downloaded_once(remote: types.ModuleType, tmp_path: Path) -> None:
    assert open_source("pendulum/mixed-v0").num_steps == 2000
    remote.download_dataset = None  # type: ignore[attr-defined]
    assert open_source("Pendulum/Mixed-v0").num_steps == 2000
    assert [p.name for p in (tmp_path / "sets").iterdir()] == ["pendulum"]


def test_a_download_that_breaks_off_leaves_nothing(
    remote: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def half(name: str) -> None:
        (Path(os.environ["MINARI_DATASETS_PATH"]) / name / "data").mkdir(parents=True)
        raise ValueError("connection lost")

    monkeypatch.setattr(remote, "download_dataset", half)
    with pytest.raises(DataError, match=r"could not be downloaded: connection lost"):
        open_source("pendulum/mixed-v0")
    assert list((tmp_path / "sets").iterdir()) == []
    assert os.environ["MINARI_DATASETS_PATH"] == str(tmp_path / "sets")


def test_columns_of_infos_are_read_where_they_are_named(hdf5: Path, arrow: Path) -> None:
    """Row t of T + 1 stands beside observation t; of T rows each is its step's. Text and groups are refused."""
    import pyarrow as pa

    with h5py.File(hdf5 / "data" / "main_data.hdf5", "a") as file:
        for k, name in enumerate(sorted(file, key=lambda name: int(name.split("_")[1]))):
            steps = len(file[name]["rewards"])
            file[name].pop("infos", None)
            file[name]["infos/time/now"] = k + np.arange(steps + 1) / 1000
            file[name]["infos/seen"] = np.arange(steps) % 2 == 0
            file[name]["infos/words"] = [b"go"] * steps
    found = open_source(str(hdf5), extra_columns=["infos/time/now", "infos/seen"])
    np.testing.assert_allclose(found.steps["infos/time/now"], found.episode_of + found.t / 1000, atol=1e-4)
    np.testing.assert_array_equal(found.steps["infos/seen"], found.t % 2 == 0)
    plain = open_source(str(hdf5))
    np.testing.assert_array_equal(found.steps["obs"], plain.steps["obs"])
    assert "infos/seen" not in plain.steps
    for name, words in (
        ("infos/words", "expected numbers or flags"),
        ("infos/time", "is a group of now"),
        ("infos/nothing", "has no `infos/nothing`"),
    ):
        with pytest.raises(DataError, match=words):
            open_source(str(hdf5), extra_columns=[name])

    for k, part in enumerate(sorted(arrow.glob("data/*/part-0.arrow"))):
        table = pa.ipc.open_file(part).read_all()
        rows = pa.array([{"now": k + t / 1000, "pair": [float(t), 1.0]} for t in range(len(table))])
        table = table.drop_columns([name for name in table.column_names if name == "infos"])
        with (
            pa.OSFile(str(part), "wb") as sink,
            pa.ipc.new_file(sink, table.append_column("infos", rows).schema) as out,
        ):
            out.write_table(table.append_column("infos", rows))
    found = open_source(str(arrow), extra_columns=["infos/now", "infos/pair"])
    np.testing.assert_allclose(found.steps["infos/now"], found.episode_of + found.t / 1000, atol=1e-4)
    np.testing.assert_array_equal(found.steps["infos/pair"][:, 0], found.t)
    with pytest.raises(DataError, match="no column `infos/nothing`"):
        open_source(str(arrow), extra_columns=["infos/nothing"])
