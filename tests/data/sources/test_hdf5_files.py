"""HDF5 files as people have them: links, filters, a group per episode, dict observations, names of tasks."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from offpolicy.data.names import resolve
from offpolicy.data.sources import open_source
from offpolicy.errors import DataError

N = 40


def walks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "observations": rng.normal(size=(N, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (N, 2)).astype(np.float32),
        "rewards": rng.normal(size=N).astype(np.float32),
        "terminals": np.zeros(N, bool),
        "timeouts": np.arange(N) % 10 == 9,
    }


def write(path: Path, **columns: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            file[name] = column
    return path


def test_what_was_never_written_is_told(tmp_path: Path) -> None:
    columns = walks()
    obs = columns.pop("observations")
    path = write(tmp_path / "x.hdf5", **columns)
    with h5py.File(path, "a") as file:
        file.create_dataset("observations", obs.shape, "f4", chunks=(10, 3))[:10] = obs[:10]
        file.create_dataset("next_observations", obs.shape, "f4")
        file["infos/nothing"] = h5py.Empty("f4")
    told = [text for text in open_source(path).meta["warnings"] if "never written" in text]
    assert [text.split(" was")[0] for text in told] == ["100% of `next_observations`", "75% of `observations`"]
    assert not any(
        "never written" in text for text in open_source(write(tmp_path / "y.hdf5", **walks())).meta["warnings"]
    )


# -- links and filters -------------------------------------------------------------------------------------------------


def test_links_inside_the_file_are_followed(tmp_path: Path) -> None:
    data = walks()
    plain = open_source(write(tmp_path / "plain.hdf5", **data))
    obs, rewards = data.pop("observations"), data.pop("rewards")
    path = write(tmp_path / "a.hdf5", **data, **{"raw/o": obs, "raw/r": rewards})
    with h5py.File(path, "a") as file:
        file["observations"], file["rewards"] = h5py.SoftLink("/raw/o"), file["raw/r"]
        file["raw/up"] = h5py.SoftLink("/")  # a circle
    replay = open_source(path)
    for name in ("obs", "reward", "action", "terminated"):
        np.testing.assert_array_equal(replay.steps[name], plain.steps[name])


def test_links_that_lead_nowhere_or_out_of_the_file(tmp_path: Path) -> None:
    data = walks()
    del data["observations"]
    for link, text in (
        (h5py.SoftLink("/raw/o"), "`observations` is a link to /raw/o that leads nowhere"),
        (h5py.ExternalLink("other.hdf5", "/o"), r"`observations` is a link to another file \(other.hdf5\)"),
    ):
        path = write(tmp_path / f"{type(link).__name__}.hdf5", **data, observations=link)
        with pytest.raises(DataError, match=text):
            open_source(path)


def test_an_absent_filter_is_no_damage(tmp_path: Path) -> None:
    data = walks()
    obs = data.pop("observations")
    path = write(tmp_path / "a.hdf5", **data)
    with h5py.File(path, "a") as file:
        how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        how.set_chunk(obs.shape)
        how.set_filter(32768 - 5, h5py.h5z.FLAG_OPTIONAL, (1,))  # a number that no filter has
        space = h5py.h5s.create_simple(obs.shape)
        column = h5py.h5d.create(file.id, b"observations", h5py.h5t.IEEE_F32LE, space, how)
        h5py.Dataset(column).id.write_direct_chunk((0, 0), obs.tobytes(), 0)
    with pytest.raises(DataError, match="compressed with a filter that this HDF5 library does not have") as error:
        open_source(path)
    assert "damaged" not in str(error.value) and "pip install hdf5plugin" in str(error.value)


# -- a group for each episode, dict observations -----------------------------------------------------------------------


def test_the_recipe_for_a_group_per_episode_works(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {}
    for k in range(300):
        for key, width in (("obs/arm", 3), ("obs/hand", 1), ("next_obs/arm", 3), ("next_obs/hand", 1), ("actions", 2)):
            columns[f"data/demo_{k}/{key}"] = rng.uniform(-1, 1, (5, width))
        columns[f"data/demo_{k}/rewards"] = rng.normal(size=5)
        columns[f"data/demo_{k}/dones"] = np.arange(5) == 4
    path = write(tmp_path / "demo.hdf5", **columns)
    with pytest.raises(
        DataError, match="holds a group for each episode \\(300 of them: demo_0, demo_1, demo_2 and"
    ) as e:
        open_source(path)
    text = str(e.value)
    assert len(text) < 2000
    scope: dict[str, Any] = {}
    exec("import h5py, offpolicy\n" + textwrap.dedent(text.split("episodes:\n", 1)[1]), scope)
    replay = scope["data"].replay
    assert replay.num_episodes == 300 and replay.steps["obs"].shape == (1500, 4)
    np.testing.assert_array_equal(
        replay.steps["next_obs"][5:10, :3], columns["data/demo_1/next_obs/arm"].astype(np.float32)
    )


def test_dict_observations_in_a_file(tmp_path: Path) -> None:
    data = walks()
    obs = data.pop("observations")
    parts = {"observations/camera1/pose": obs[:, :2], "observations/camera2/pose": obs[:, 2:]}
    path = write(tmp_path / "a.hdf5", **data, **parts)
    with pytest.raises(DataError, match=r"`observations` is a dict of camera1/pose, camera2/pose; .* `obs_keys="):
        open_source(path)
    replay = open_source(path, obs_keys=["camera2/pose", "camera1/pose"])
    np.testing.assert_array_equal(replay.steps["obs"], obs[:, [2, 0, 1]])


def test_parts_beside_whole_observations_are_columns(tmp_path: Path) -> None:
    data = walks()
    path = write(tmp_path / "a.hdf5", **data, **{"obs/goal": data["observations"][:, :1]})
    replay = open_source(path)
    assert replay.steps["obs"].shape == (N, 3) and replay.steps["obs/goal"].shape == (N, 1)


def test_messages_about_many_columns_stay_short(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5", **{f"{'a' * 100}{i}": np.zeros(3) for i in range(400)})
    with pytest.raises(DataError) as error:
        open_source(path)
    assert len(str(error.value)) < 2000
    many = {f"extra{i}/x": np.zeros((2, 2)) for i in range(400)}
    notes = open_source(write(tmp_path / "b.hdf5", **walks(), **many)).meta["notes"]
    assert all(len(note) < 2000 for note in notes) and "and 390 more" in notes[0]


# -- names and formats -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "task"),
    [
        ("hopper-medium-v2.hdf5", "hopper-medium-v2"),
        ("hopper_medium-v2.hdf5", "hopper-medium-v2"),
        ("Hopper_Medium_V2.h5", "hopper-medium-v2"),
        ("hopper-medium-v2 (1).hdf5", "hopper-medium-v2"),
        ("hopper-medium-v2 - Copy.hdf5", "hopper-medium-v2"),
        ("hopper_medium-v2_copy2.hdf5", "hopper-medium-v2"),
        ("antmaze-umaze-v2.hdf5", "antmaze-umaze-v2"),
        ("pen-human-v1(2).hdf5", "pen-human-v1"),
    ],
)
def test_files_with_the_name_of_a_task(file: str, task: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"")
    target = resolve(tmp_path / file)
    assert (target.kind, target.name, target.path) == ("d4rl", task, tmp_path / file)


@pytest.mark.parametrize(
    "file", ["my-hopper-medium-v2.hdf5", "hopper-medium-v2-filtered.hdf5", "cube-single-play-v0.h5"]
)
def test_other_names_are_files_of_ones_own(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"")
    assert resolve(tmp_path / file).kind == "hdf5"


def test_a_task_found_by_name_is_mentioned(tmp_path: Path) -> None:
    data = walks()
    rng = np.random.default_rng(0)
    data["observations"], data["actions"] = rng.normal(size=(N, 11)), rng.uniform(-0.9, 0.9, (N, 3))
    for name, said in (("hopper-medium-v2 (1).hdf5", True), ("hopper_medium-v2.hdf5", False)):
        meta = open_source(write(tmp_path / name, **data)).meta
        assert meta["env_id"] == "Hopper-v4"
        assert any("was taken for the D4RL task hopper-medium-v2 by its name" in n for n in meta["notes"]) == said


def test_archives_without_rewards_are_never_taken_for_another_format_silently(tmp_path: Path) -> None:
    data = walks()
    del data["rewards"], data["timeouts"]
    data["terminals"] = np.arange(N) % 10 == 9
    np.savez(tmp_path / "a.npz", **data)
    assert any("detected format: OGBench's" in w for w in open_source(tmp_path / "a.npz").meta["warnings"])
    for more in ({"timeouts": np.zeros(N, bool)}, {"infos": np.zeros(N)}, {"obs": np.zeros((N, 1))}):
        np.savez(tmp_path / "b.npz", **data, **more)
        with pytest.raises(DataError, match=r"has no `rewards`|both `obs` and `observations`"):
            open_source(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", **data, qpos=np.zeros((N, 2)))
    assert not open_source(tmp_path / "c.npz").meta["warnings"]


def test_single_task_sets_of_ogbench_are_not_misread() -> None:
    """`terminals` marks every end there, and `masks` where the task was solved."""
    from offpolicy.data.sources import from_arrays

    data = walks()
    del data["timeouts"]
    end = np.arange(N) % 10 == 9
    with pytest.raises(DataError, match="as in OGBench's single-task sets, pass it as `episode_end`"):
        from_arrays({**data, "terminals": end, "masks": np.ones(N)})
    del data["terminals"]
    assert from_arrays({**data, "episode_end": end, "masks": np.ones(N)}).length.tolist() == [10] * 4
