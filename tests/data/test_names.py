"""What a name or path is taken for."""

import csv
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from scripts import FIXTURES

from offpolicy.data import names
from offpolicy.data.names import describe, known_names, resolve, root
from offpolicy.errors import UsageError, fold

TASKS = [row["task"] for row in csv.DictReader(files("datasets_cfg").joinpath("d4rl.csv").read_text().splitlines())]


def test_all_d4rl_tasks_resolve_in_any_spelling() -> None:
    assert len(TASKS) == 155
    for task in TASKS:
        for spelling in (task, task.upper(), task.replace("-", "_"), task.replace("-", ""), task.replace("-", "+")):
            target = resolve(spelling)
            assert (target.kind, target.name) == ("d4rl", task)
            assert target.info["dataset_url"].startswith("http://rail.eecs.berkeley.edu/datasets/offline_rl/")


def test_d4rl_files_lie_flat_under_distinct_names() -> None:
    assert len({resolve(task).location() for task in TASKS}) == 155


def test_the_table_agrees_with_the_d4rl_package_where_it_is_installed() -> None:
    infos = pytest.importorskip("d4rl.infos")
    for task in TASKS:
        row = resolve(task).info
        assert row["dataset_url"] == infos.DATASET_URLS[task]
        if row["ref_min_score"]:
            assert float(row["ref_min_score"]) == infos.REF_MIN_SCORE[task]
            assert float(row["ref_max_score"]) == infos.REF_MAX_SCORE[task]


def test_known_names_are_distinct_when_folded_and_in_order() -> None:
    everything = known_names()
    assert len({fold(name) for name in everything}) == len(everything)
    assert everything[0] == "pendulum-stitch-v0"
    assert sum(resolve(n).kind == "ogbench" for n in everything) == 85  # as OGBench counts its data sets
    assert {resolve(n).kind for n in everything} == {"made", "d4rl", "minari", "ogbench", "language"}


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("Pendulum_Stitch-V0", "made", "pendulum-stitch-v0"),
        ("d4rl/DOOR/human_v2", "minari", "D4RL/door/human-v2"),
        ("some/where/new-v3", "minari", "some/where/new-v3"),
        ("cube_single_play_v0", "ogbench", "cube-single-play-v0"),
        ("visual-antmaze-teleport-explore-v0", "ogbench", "visual-antmaze-teleport-explore-v0"),
    ],
)
def test_other_names(text: str, kind: str, name: str) -> None:
    target = resolve(text)
    assert (target.kind, target.name, target.path) == (kind, name, None)


@pytest.mark.parametrize(
    ("path", "kind", "name"),
    [
        (FIXTURES / "d4rl_pendulum_mixed.hdf5", "hdf5", "d4rl_pendulum_mixed"),
        (FIXTURES / "ogbench_pointmaze_small-v0.npz", "npz", "ogbench_pointmaze_small-v0"),
        (FIXTURES / "minari/pendulum/mixed-v0", "minari", "mixed-v0"),
        (FIXTURES / "minari/pendulum/mixed-v0/data", "minari", "mixed-v0"),
        (FIXTURES / "minari/pendulum/mixed-v0/data/main_data.hdf5", "minari", "mixed-v0"),
    ],
)
def test_paths(path: Path, kind: str, name: str) -> None:
    target = resolve(path)
    assert (target.kind, target.name) == (kind, name)
    assert target.path is not None and target.path.exists()


@pytest.mark.parametrize("file", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "A.JSONL"])
def test_language_files_are_recognised(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("{}")
    target = resolve(tmp_path / file)
    assert target.kind == "language" and target.name.lower() == "a"
    assert "language data" in describe(target)


def test_a_known_file_kept_elsewhere_keeps_its_task(tmp_path: Path) -> None:
    for file in ("hopper_medium-v2.hdf5", "cube-single-play-v0.npz"):
        (tmp_path / file).write_bytes(b"")
    hopper, cube = resolve(tmp_path / "hopper_medium-v2.hdf5"), resolve(tmp_path / "cube-single-play-v0.npz")
    assert (hopper.kind, hopper.name, hopper.path) == ("d4rl", "hopper-medium-v2", tmp_path / "hopper_medium-v2.hdf5")
    assert (cube.kind, cube.name) == ("ogbench", "cube-single-play-v0")


def test_a_folder_that_happens_to_have_a_known_name_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pendulum-stitch-v0").mkdir()
    assert resolve("pendulum-stitch-v0").kind == "made"


def test_own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFPOLICY_DATA_DIR", str(tmp_path))
    folder = tmp_path / "mine"
    folder.mkdir()
    for file in ("meta.json", "index.npz"):
        (folder / file).write_text("")
    assert resolve(folder).kind == "replay"
    assert resolve("mine").path == folder  # converted sets in the data folder go by their name


def test_local_minari_sets_resolve_whatever_the_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(FIXTURES / "minari"))
    assert resolve("Pendulum/Mixed_v0").name == "pendulum/mixed-v0"
    assert resolve("pendulum/mixed-v0").location() == FIXTURES / "minari/pendulum/mixed-v0"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hoper-medium-v2", ["no data set is called 'hoper-medium-v2'", "Did you mean 'hopper-medium-v2'?"]),
        ("pendulum-stich", ["Did you mean 'pendulum-stitch-v0'?"]),
        ("qqqq", ["expected a known name, a file (.hdf5, .h5, .npz)", "show` lists the known names"]),
        ("./nothing.hdf5", ["nothing.hdf5 does not exist"]),
        ("nothing.npz", ["nothing.npz does not exist"]),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        resolve(text)
    for word in words:
        assert word in str(error.value)


def test_a_misspelt_file_is_answered_with_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "walks.hdf5").write_bytes(b"")
    with pytest.raises(UsageError, match=r"Did you mean 'walks.hdf5'\?"):
        resolve(tmp_path / "walk.hdf5")


def test_folders_and_files_of_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no data set"):
        resolve(tmp_path)
    (tmp_path / "a.pkl").write_bytes(b"")
    with pytest.raises(UsageError, match="Pickled files are never read"):
        resolve(tmp_path / "a.pkl")


def test_roots_follow_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, (variable, default) in names.ROOTS.items():
        monkeypatch.delenv(variable, raising=False)
        assert root(kind) == Path(default).expanduser()
        monkeypatch.setenv(variable, str(tmp_path))
        assert root(kind) == tmp_path


def test_descriptions_are_one_sentence_with_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    assert describe(resolve("hopper-medium-v2")) == (
        "hopper-medium-v2: detected format: the D4RL task of the family gym-mujoco, not on disk, to be downloaded to "
        f"{tmp_path}/hopper_medium-v2.hdf5."
    )
    (tmp_path / "hopper_medium-v2.hdf5").write_bytes(b"")
    assert "found at" in describe(resolve("hopper-medium-v2"))
    assert "made here" in describe(resolve("pendulum-stitch-v0"))
    assert "read from" in describe(resolve(FIXTURES / "d4rl_pendulum_mixed.hdf5"))


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from offpolicy.data.names import resolve, describe; describe(resolve('hopper-medium-v2')); "
        "print([m for m in ('numpy', 'torch', 'h5py', 'yaml', 'gymnasium', 'minari', 'lightning') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_places_where_no_data_can_be(tmp_path: Path) -> None:
    """A pipe would be waited for without an end."""
    os.mkfifo(tmp_path / "a.hdf5")
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "b.hdf5").symlink_to("gone.hdf5")
    for name, said in (
        ("a.hdf5", "is a pipe, socket or device"),
        ("a.jsonl", "is a pipe, socket or device"),
        ("b.hdf5", "is a link to gone.hdf5, which does not exist"),
        ("c" * 5000 + ".hdf5", "cannot be looked for: File name too long"),
    ):
        with pytest.raises(UsageError, match=said):
            resolve(tmp_path / name, language=True)
