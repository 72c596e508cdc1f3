"""D4RL's HDF5 layout: segmentation, the last step before a time limit, faults of files, known tasks, writing."""

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scripts import FIXTURES

from offpolicy.data.names import known_names, resolve
from offpolicy.data.replay import Replay
from offpolicy.data.sources import d4rl, from_arrays, open_source
from offpolicy.errors import DataError, UsageError

FIXTURE = FIXTURES / "d4rl_pendulum_mixed.hdf5"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return Path(shutil.copy(FIXTURE, tmp_path / "pendulum.hdf5"))


def columns(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as source:
        return {k: source[k][()] for k in source if isinstance(source[k], h5py.Dataset)}


def hopper(path: Path, n: int = 40, **changes: Any) -> Path:
    """A file with the sizes of the Hopper task; None leaves a key out."""
    rng = np.random.default_rng(0)
    data: dict[str, Any] = {
        "observations": rng.normal(size=(n, 11)).astype(np.float32),
        "actions": rng.uniform(-0.99, 0.99, (n, 3)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "terminals": np.arange(n) == 12,
        "timeouts": np.arange(n) == 29,
        **changes,
    }
    with h5py.File(path, "w") as target:
        for key, value in data.items():
            if value is not None:
                target[key] = value
    return path


# -- the layout --------------------------------------------------------------------------------------------------------


def test_columns_are_those_of_the_file(file: Path) -> None:
    replay, source = open_source(file), columns(file)
    for ours, theirs in {**d4rl.KEYS, "next_obs": "next_observations"}.items():
        np.testing.assert_array_equal(replay.steps[ours], source[theirs])
    assert replay.num_episodes == 40 and (replay.length == 200).all()


def test_scalar_metadata_and_nan_in_infos_do_no_harm(file: Path) -> None:
    """D4RL's own sequence loader raises IndexError on scalar metadata; NaN is allowed in infos and nowhere else."""
    replay = open_source(file)
    assert replay.meta["metadata"] == {
        "algorithm": "scripted",
        "iteration": 0,
        "policy/output_distribution": "clipped_gaussian",
    }
    assert set(replay.steps) == {"obs", "action", "reward", "terminated", "next_obs"}
    assert "not read: infos/action_log_probs, infos/qpos, infos/qvel" in replay.meta["notes"]


def test_columns_of_infos_are_read_where_named(file: Path) -> None:
    replay = open_source(file, extra_columns=["infos/qvel"])
    with h5py.File(file) as source:
        np.testing.assert_array_equal(replay.steps["infos/qvel"], source["infos/qvel"][()].astype(np.float32))
    assert "not read: infos/action_log_probs, infos/qpos" in replay.meta["notes"]
    with pytest.raises(DataError, match="names `infos/speed`, and the steps of"):
        open_source(file, extra_columns=["infos/speed"])


def test_weights_under_metadata_of_the_same_length_are_not_columns(tmp_path: Path) -> None:
    path = hopper(tmp_path / "a.hdf5")
    with h5py.File(path, "a") as target:
        target["metadata/policy/fc0/weight"] = np.zeros((40, 40))
        target["extra/weight"] = np.arange(40.0)
        target["extra/short"] = np.arange(3.0)
    replay = open_source(path)
    assert set(replay.steps) == {"obs", "action", "reward", "terminated", "extra/weight"}
    assert any("extra/short (3,)" in n for n in replay.meta["notes"])


def test_dropping_time_limit_steps_gives_the_7960_of_d4rls_loader(file: Path) -> None:
    source = columns(file)
    kept = []
    for i in range(8000 - 1):  # what D4RL's qlearning_dataset does, row by row
        if not source["timeouts"][i]:
            kept.append(i)
    assert len(kept) == 7960
    assert open_source(file, timeout_step="drop").usable_rows().tolist() == kept
    assert len(open_source(file).usable_rows()) == 8000  # the file stores next observations, so nothing need be lost


def test_next_observations_never_cross_an_episode(file: Path) -> None:
    source = columns(file)
    del source["next_observations"]
    replay = from_arrays(source)
    rows = replay.usable_rows()
    np.testing.assert_array_equal(replay.next_obs(rows), columns(file)["next_observations"][rows])


@pytest.mark.parametrize("kind", ["float64", "column", "byte"])
def test_other_types_and_shapes_of_the_same_numbers(tmp_path: Path, kind: str) -> None:
    plain = open_source(hopper(tmp_path / "plain.hdf5"))
    source = columns(tmp_path / "plain.hdf5")
    changes: dict[str, Any] = {
        "float64": {k: source[k].astype(np.float64) for k in ("observations", "actions", "rewards")},
        "column": {k: source[k][:, None] for k in ("rewards", "terminals", "timeouts")},
        "byte": {k: source[k].astype(np.uint8) for k in ("terminals", "timeouts")},
    }[kind]
    other = open_source(hopper(tmp_path / "other.hdf5", **changes))
    assert other.fingerprint() == plain.fingerprint()


def test_an_unfinished_tail_is_kept(tmp_path: Path) -> None:
    replay = open_source(hopper(tmp_path / "a.hdf5"))
    assert replay.length.tolist() == [13, 17, 10]
    assert replay.usable_rows().tolist() == [i for i in range(40) if i not in (29, 39)]


# -- known tasks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    return tmp_path


def test_a_task_is_found_in_the_folder_of_d4rl(folder: Path) -> None:
    hopper(folder / "hopper_medium-v2.hdf5", next_observations=np.zeros((40, 11), np.float32))
    replay = open_source("Hopper_Medium_v2")
    meta = replay.meta
    assert (meta["name"], meta["source"], meta["family"]) == ("hopper-medium-v2", "d4rl", "gym-mujoco")
    assert (meta["env_id"], meta["env_kwargs"], meta["max_episode_steps"]) == ("Hopper-v4", {}, 1000)
    assert (meta["ref_min_score"], meta["ref_max_score"]) == (-20.272305, 3234.3)
    assert meta["score_kind"] == "d4rl-normalised" and "approximate" in meta["score_note"]
    assert meta["action_low"] == [-1.0] * 3 and meta["action_bounds"] == "environment"
    assert any("infos/qpos" in n and "100, 105" in n for n in meta["notes"])
    # published numbers leave out the step before a time limit, even where its successor is stored
    assert 29 not in replay.usable_rows() and 12 in replay.usable_rows()
    assert 29 in open_source("hopper-medium-v2", timeout_step="keep").usable_rows()


def test_without_timeouts_episodes_are_cut_at_the_step_limit(folder: Path) -> None:
    n = 450
    rng = np.random.default_rng(0)
    shapes = {
        "observations": rng.normal(size=(n, 45)),
        "actions": rng.uniform(-1, 1, (n, 24)),
        "rewards": rng.normal(size=n),
    }
    hopper(folder / "pen-v0_demos_clipped.hdf5", n, timeouts=None, terminals=np.arange(n) == 120, **shapes)
    replay = open_source("pen-human-v0")
    assert replay.length.tolist() == [100, 21, 100, 100, 100, 29]  # the limit of pen is 100


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("antmaze-large-play-v0", "D4RL issues 77, 128, 146"),
        ("antmaze-umaze-diverse-v2", "D4RL issues 199"),
        ("antmaze-medium-play-v2", "several terminal rewards"),
        ("maze2d-umaze-v1", "D4RL issues 85, 194"),
        ("walker2d-medium-replay-v2", "D4RL issues 162"),
        ("hopper-full-replay-v1", "D4RL issues 162"),
        ("hopper-medium-expert-v0", "D4RL issues 19"),
        ("hopper-expert-v1", "D4RL issues 76"),
        ("pen-cloned-v1", "D4RL issues 137"),
    ],
)
def test_known_defects_are_warned_of_by_name(task: str, words: str) -> None:
    meta, _ = d4rl.task_facts(resolve(task).info)
    assert any(words in w for w in meta["warnings"])


def test_facts_of_every_task_are_complete() -> None:
    kinds = [resolve(name) for name in known_names()]
    for target in (t for t in kinds if t.kind == "d4rl"):
        meta, facts = d4rl.task_facts(target.info)
        json.dumps(meta)
        assert meta["max_episode_steps"] > 0
        assert ("ref_min_score" in meta) == bool(target.info["ref_min_score"])
        if meta.get("env_id"):
            assert {"obs_dim", "action_dim"} <= facts.keys() and meta["action_range"] == [-1.0, 1.0]
    ant, _ = d4rl.task_facts(resolve("ant-medium-v2").info)
    assert ant["env_kwargs"] == {"use_contact_forces": True}
    pen, _ = d4rl.task_facts(resolve("pen-human-v1").info)
    assert (pen["env_id"], pen["max_episode_steps"]) == ("AdroitHandPen-v1", 100)
    for task in ("kitchen-mixed-v0", "maze2d-umaze-v1", "antmaze-umaze-v2", "flow-ring-random-v0"):
        assert "env_id" not in d4rl.task_facts(resolve(task).info)[0]


def test_sizes_are_checked_against_the_environment(folder: Path) -> None:
    hopper(folder / "hopper_medium-v2.hdf5", observations=np.zeros((40, 17), np.float32))
    with pytest.raises(DataError, match="`observations` is 17 wide; the environment has 11"):
        open_source("hopper-medium-v2")


def test_lost_terminals_are_doubted(folder: Path) -> None:
    hopper(folder / "hopper_medium-v2.hdf5", terminals=np.zeros(40, bool))
    assert any("no step is terminal although" in w for w in open_source("hopper-medium-v2").meta["warnings"])
    rng = np.random.default_rng(0)
    hopper(folder / "halfcheetah_medium-v2.hdf5", terminals=np.zeros(40, bool), observations=rng.random((40, 17)),
           actions=rng.random((40, 6)))  # fmt: skip
    assert not any("terminal" in w for w in open_source("halfcheetah-medium-v2").meta["warnings"])


def test_a_renamed_folder_works_by_the_file_name(tmp_path: Path) -> None:
    hopper(tmp_path / "hopper_medium-v2.hdf5")
    assert open_source(tmp_path / "hopper_medium-v2.hdf5").meta["name"] == "hopper-medium-v2"


def test_an_environment_of_ones_own_for_a_bare_file(file: Path) -> None:
    replay = open_source(file, env_id="Pendulum-v1")
    assert replay.meta["env_id"] == "Pendulum-v1" and replay.meta["action_low"] == [-2.0]
    with pytest.raises(DataError, match="`observations` is 3 wide; the environment has 2"):
        open_source(file, env_id="MountainCarContinuous-v0")
    with pytest.raises(UsageError, match="has an environment of its own"):
        open_source("hopper-medium-v2", env_id="Hopper-v5")


# -- faults of files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_truncated_file(file: Path, share: float) -> None:
    size = file.stat().st_size
    keep = max(int(size * share), 100)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DataError) as error:
        open_source(file)
    assert f"is truncated: {keep:,} bytes of the {size:,} expected. Delete it" in str(error.value)


def test_web_page_instead_of_the_file(file: Path) -> None:
    file.write_text("\n<!DOCTYPE html>\n<html><body>403 Forbidden</body></html>")
    with pytest.raises(DataError, match="is not HDF5: it looks like a web page, so the download failed"):
        open_source(file)


def test_something_else_instead_of_the_file(file: Path) -> None:
    file.write_bytes(b"0123456789" * 100)
    with pytest.raises(DataError, match=r"is not a readable HDF5 file .*file signature not found"):
        open_source(file)
    file.write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        open_source(file)


def test_corrupt_chunk_names_the_key(file: Path) -> None:
    with h5py.File(file) as source:
        chunk = source["rewards"].id.get_chunk_info(1)
    content = bytearray(file.read_bytes())
    middle = chunk.byte_offset + chunk.size // 2
    content[middle : middle + 32] = bytes(32)
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"`rewards` cannot be read .* the file is damaged"):
        open_source(file)


def test_missing_keys_and_lengths(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no `rewards`; it has actions \(40, 3\)"):
        open_source(hopper(tmp_path / "a.hdf5", rewards=None))
    with pytest.raises(DataError, match=r"unequal lengths: .*rewards \(39,\)"):
        open_source(hopper(tmp_path / "b.hdf5", rewards=np.zeros(39)))
    with pytest.raises(DataError, match="holds no steps"):
        open_source(hopper(tmp_path / "c.hdf5", 0))
    with h5py.File(tmp_path / "d.hdf5", "w"):
        pass
    with pytest.raises(DataError, match="it has nothing"):
        open_source(tmp_path / "d.hdf5")


# -- writing -----------------------------------------------------------------------------------------------------------


def same(one: Replay, other: Replay) -> None:
    """Equal steps, episodes and successors, bit by bit, up to where the rows lie."""
    np.testing.assert_array_equal(one.length, other.length)
    for name in one.steps.keys() - {"next_obs"}:
        np.testing.assert_array_equal(one.steps[name][one.rows], other.steps[name][other.rows])
    usable = np.isin(one.rows, one.usable_rows())
    np.testing.assert_array_equal(usable, np.isin(other.rows, other.usable_rows()))
    np.testing.assert_array_equal(one.next_obs(one.rows[usable]), other.next_obs(other.rows[usable]))


def test_round_trip_through_d4rls_layout(file: Path, tmp_path: Path) -> None:
    replay = open_source(file, timeout_step="drop", env_id="Pendulum-v1")
    d4rl.write(replay, tmp_path / "copy.hdf5")
    copy = open_source(tmp_path / "copy.hdf5")
    same(replay, copy)
    for key in ("name", "env_id", "action_low", "max_episode_steps", "source"):
        assert copy.meta[key] == replay.meta[key]


@pytest.mark.parametrize("keep", [[3, 1], list(range(4))])
def test_round_trip_with_tails_terminals_and_a_filter(tmp_path: Path, keep: list[int]) -> None:
    rng = np.random.default_rng(0)
    terminated = np.zeros(20, bool)
    terminated[[4, 19]] = True
    replay = Replay(
        {"obs": rng.normal(size=(20, 2)).astype(np.float32), "action": rng.uniform(-1, 1, (20, 1)).astype(np.float32),
         "reward": rng.normal(size=20).astype(np.float32), "terminated": terminated, "mark": np.arange(20)},
        start=np.arange(0, 20, 5), length=np.full(4, 5), tail={"obs": rng.normal(size=(4, 2)).astype(np.float32)},
        meta={"name": "mine", "action_low": [-1.0], "action_high": [1.0]},
    ).filter(keep)  # fmt: skip
    d4rl.write(replay, tmp_path / "a.hdf5")
    copy = open_source(tmp_path / "a.hdf5")
    same(replay, copy)
    assert copy.meta["name"] == "mine" and copy.steps["mark"].dtype == np.int64


def test_written_files_are_whole_or_absent(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = open_source(file)
    with pytest.raises(FileExistsError):
        d4rl.write(replay, file)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(d4rl, "_write_column", full)
    with pytest.raises(OSError, match="No space"):
        d4rl.write(replay, tmp_path / "out" / "a.hdf5")
    assert list((tmp_path / "out").iterdir()) == []
