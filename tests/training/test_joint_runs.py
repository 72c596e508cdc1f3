"""Runs of several seeds: their folders, and that each seed is as if trained alone."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import pair_of, run_copy
from toy import METHODS, Crash, differences, method, run_files, toy_replay, weights

import offpolicy as op
from offpolicy.data.module import DataModule
from offpolicy.data.sizes import Sizes
from offpolicy.errors import DivergenceError, UsageError
from offpolicy.files import Table
from offpolicy.registry import find_method
from offpolicy.training import joint_folder, seed_room
from offpolicy.training.checkpoints import newest_checkpoint, read_checkpoint
from offpolicy.training.joint_folder import joint_label

SEEDS = (4, 1)
HALF, LAST = 20, 40  # updates: checkpoints and evaluations at both; rows of metrics at every 15
HAVE_AXIS = [name for name, (kind, _) in METHODS.items() if find_method(kind).seed_axis and "dropout" not in name]


def train(root: Path, name: str = "TD3BC", steps: int = LAST, **options: Any) -> Any:
    settings = {"log_every": 15, "eval_every": HALF, "eval_episodes": 1, "precision": "64-true", "verbose": False}
    data = options.pop("data", None) or toy_replay()
    return op.fit(options.pop("method", None) or method(name), data, max_steps=steps, root=root, **settings | options)


def contents(folder: Path) -> dict[str, Any]:
    """All that a run's tables, settings and newest checkpoint say, but for speeds."""
    checkpoint = read_checkpoint(newest_checkpoint(folder) or "")
    return {**run_files(folder, LAST), "all": checkpoint, "config": (folder / "config.yaml").read_text()}


def close(ours: Any, theirs: Any, where: str) -> None:
    """The same trees of numbers, up to rounding."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key in ours:
            close(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, (one, other) in enumerate(zip(ours, theirs)):
            close(one, other, f"{where}/{i}")
    elif isinstance(ours, torch.Tensor):
        tolerance = (1e-9, 1e-11) if ours.dtype == torch.float64 else (1e-5, 1e-7)  # meters are float32
        torch.testing.assert_close(ours, theirs, rtol=tolerance[0], atol=tolerance[1], msg=where)
    else:
        assert ours == (pytest.approx(theirs, rel=1e-5, abs=1e-7) if isinstance(ours, float) else theirs), where


@pytest.mark.parametrize(
    "name", [name if name == "PRDC" else pytest.param(name, marks=pytest.mark.slow) for name in HAVE_AXIS]
)
def test_every_seed_is_as_if_trained_alone(name: str, tmp_path: Path) -> None:
    """Weights, moments, meters, what callbacks remember, rows, evaluations and settings."""
    joint = train(tmp_path, name, seeds=SEEDS)
    assert joint.folder.name == "seeds4+1-1" and [f.name for f in joint.folders.values()] == ["seed4-1", "seed1-1"]
    for seed in SEEDS:
        alone = train(tmp_path, name, seed=seed)
        assert {p.name for p in joint.folders[seed].iterdir()} == {p.name for p in alone.folder.iterdir()}
        close(contents(joint.folders[seed]), contents(alone.folder), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["IQL", "EDAC"])
def test_in_float32_seeds_stay_close_for_200_updates(name: str) -> None:
    """Within 5e-4 of the largest weight of each layer; all methods but EDAC, whose loss has second derivatives, within
    1e-5."""
    data, together = toy_replay(), method(name)
    together.seeds = SEEDS
    together.prepare(data, max_steps=200).run_block(0, 200)
    for seed in SEEDS:
        alone = method(name).prepare(data, seed=seed, max_steps=200)
        alone.run_block(0, 200)
        for key, value in weights(alone).items():
            apart = (weights(together.take_seed(seed))[key] - value).abs().max()
            assert apart <= (5e-4 if name == "EDAC" else 1e-5) * max(float(value.abs().max()), 1e-3), key


def test_a_joint_run_has_means_and_spreads(tmp_path: Path) -> None:
    joint = train(tmp_path, seeds="0..2")
    for table, name in (("metrics.csv", "train/critic_loss"), ("evals.csv", "eval/return_mean")):
        for row in Table(joint.folder / table).rows():
            own = torch.tensor([row[f"{name}_seed{k}"] for k in range(3)], dtype=torch.float64)
            assert row[name] == pytest.approx(float(own.mean())) and row[f"{name}_seed_std"] == pytest.approx(own.std())
    assert joint.folder.name == "seeds0-2-1" and joint.scores["return_mean_seed2"] == row["eval/return_mean_seed2"]
    assert op.load(joint.folder).seeds == (0, 1, 2) and op.load(joint.folders[2]).seed == 2
    found = op.evaluate(joint.folders[2], episodes=1)
    assert found["return_mean"] == pytest.approx(row["eval/return_mean_seed2"])


def test_a_seed_goes_on_alone_and_its_joint_run_beside_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    joint = train(tmp_path, "IQL", HALF, seeds=SEEDS)
    alone = train(tmp_path, "IQL", HALF, seed=4)
    longer = [train(tmp_path, "IQL", ckpt_path=place) for place in (joint.folders[4], alone.folder)]
    assert [run.folder for run in longer] == [joint.folders[4], alone.folder]
    close(contents(longer[0].folder), contents(longer[1].folder), "IQL")

    before = {p: p.read_bytes() for p in joint.folders[4].rglob("*") if p.is_file()}
    again = train(tmp_path, "IQL", seeds=SEEDS, ckpt_path="last")
    assert again.folder == joint.folder and again.folders[1] == joint.folders[1]
    assert again.folders[4].name == "seed4-3" and {p: p.read_bytes() for p in before} == before
    close(contents(again.folders[4])["evals"], contents(alone.folder)["evals"], "IQL")
    assert train(tmp_path, "IQL", LAST + 5, ckpt_path=joint.folder).folders == again.folders


def test_a_named_folder_holds_those_of_its_seeds(tmp_path: Path) -> None:
    joint = train(tmp_path, steps=HALF, seeds=SEEDS, folder=tmp_path / "mine")
    assert joint.folder == tmp_path / "mine" and joint.folders == {k: tmp_path / "mine" / f"seed{k}" for k in SEEDS}
    assert all(map(newest_checkpoint, joint.folders.values()))
    again = train(tmp_path, ckpt_path=joint.folder)
    assert again.folders == joint.folders and again.method.seeds == SEEDS and not (tmp_path / "toy").exists()
    with pytest.raises(UsageError, match=r"`folder` is .*mine, which holds a run; expected a new one"):
        train(tmp_path, seeds=SEEDS, folder=tmp_path / "mine")
    with pytest.raises(UsageError, match=r"where seed1 holds a run; expected a new one"):
        (tmp_path / "other").mkdir()
        joint.folders[1].rename(tmp_path / "other" / "seed1")
        train(tmp_path, seeds=SEEDS, folder=tmp_path / "other")


def test_one_seed_alone_is_the_ordinary_run(tmp_path: Path) -> None:
    runs = [train(tmp_path, steps=HALF, seeds=range(3, 4)), train(tmp_path, steps=HALF, seed=3)]
    assert [run.folder.name for run in runs] == ["seed3-1", "seed3-2"] and runs[0].folders == {}
    assert not differences(*(read_checkpoint(newest_checkpoint(run.folder) or "") for run in runs))


class Changing(DataModule):
    """Data that change with the policy."""

    change_every = 5


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"seed": 0, "seeds": (0, 1)}, "`seed` is 0 and `seeds` is 0,1; expected one of the two"),
        ({"seed": range(2)}, r"`seed` is range\(0, 2\); expected one whole number. Did you mean `seeds`"),
        ({"seeds": "5..2"}, "the range 5..2 is empty; expected the smaller number first, as in 2..5"),
        ({"seeds": "0,0"}, "which has 0 twice"),
        ({"seeds": "a"}, "`seeds` is 'a'; expected whole numbers ≥ 0, each once, such as 0..7"),
        ({"seeds": ()}, "expected whole numbers ≥ 0"),
        ({"seeds": (0, 1), "name": "WorldModel"}, "WorldModel trains one seed per process; expected `seeds` empty"),
        ({"seeds": (0, 1), "method": op.DPO()}, "DPO trains one seed per process; expected `seeds` empty"),
        (
            {"seeds": (0, 1), "data": Changing.of(toy_replay())},
            "the data change in training",
        ),
        ({"seeds": (0, 1), "ckpt_path": "last"}, r"searched .*seeds0\+1-\*"),
    ],
)
def test_what_cannot_work_leaves_nothing(options: dict[str, Any], found: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=found):
        train(tmp_path / "runs", **options)
    assert not (tmp_path / "runs").exists()


def test_more_seeds_than_fit_are_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seed_room, "free_memory", lambda device: 1_000_000)
    with pytest.raises(UsageError, match=r"50 seeds need about .* MB \(\d+ kB each\), and cpu has 1 MB free; expected"):
        train(tmp_path / "runs", seeds=range(50))
    assert not (tmp_path / "runs").exists()
    train(tmp_path / "runs", steps=1, seeds=range(2))


def test_actions_that_a_critic_is_asked_about_count() -> None:
    """Each of 3·(20 − 2) more rows keeps two float32 numbers for each of the 8 + 8 + 1 and 8 + 1 outputs."""
    needs = []
    for count in (2, 20):
        one = method("CQL", num_actions=count)
        one.initialize(Sizes(3, 2), 0)
        needs.append(seed_room.needed(one))
    assert needs[1] - needs[0] == 4 * 2 * one.common.batch_size * 3 * 18 * (8 + 8 + 1 + 8 + 1)


def test_a_seed_that_diverges_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    bad = method("TD3BC")
    update = bad.update

    def updating(batch: Any, step: int) -> Any:
        if step == HALF + 5:
            next(bad.parameters()).data[1].fill_(float("nan"))
        return update(batch, step)

    bad.update = updating  # type: ignore[method-assign]
    with pytest.raises(DivergenceError) as caught:
        train(tmp_path, seeds=SEEDS, method=bad)
    other = tmp_path / "toy" / "TD3BC" / "seed4-1"
    assert f"It is seed 1. The others go on without, each by itself: `ckpt_path` {other}." in str(caught.value)
    assert train(tmp_path, ckpt_path=other).updates == LAST


def test_labels_of_folders_stay_short() -> None:
    assert [joint_label(seeds) for seeds in (tuple(range(8)), (0, 3, 5), (0, 1, 2, 9))] == [
        "seeds0-7", "seeds0+3+5", "seeds0-2+9",
    ]  # fmt: skip
    long, other = (joint_label(tuple(range(start, 900, 7))) for start in (0, 1))
    assert len(long) < 40 and long != other


def test_places_outside_of_a_run_are_not_taken(tmp_path: Path) -> None:
    joint = train(tmp_path, steps=HALF, seeds=SEEDS)
    (joint.folder / joint_folder.PLACES).write_text(json.dumps({"4": "../../seed4-1", "1": "/tmp/seed1"}))
    again = train(tmp_path, ckpt_path=joint.folder)
    assert [place.name for place in again.folders.values()] == ["seed4-2", "seed1-2"]
    assert all(place.parent == joint.folder.parent for place in again.folders.values())


# -- in processes of their own -----------------------------------------------------------------------------------------


def kill_in_training() -> Any:
    """kill -9 after the row of update 30, before the checkpoint of update 40."""
    module = method("TD3BC")
    update = module.update

    def updating(batch: Any, step: int) -> Any:
        if step == LAST - 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(batch, step)

    module.update = updating  # type: ignore[method-assign]
    return module


def kill_between_writes() -> Any:
    """kill -9 after the first joint checkpoint and that of the first seed, before that of the second."""
    write = joint_folder.write_checkpoint

    def writing(checkpoint: Any, path: Any) -> None:
        if checkpoint["global_step"] == HALF and checkpoint["offpolicy"]["seed"] == SEEDS[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        write(checkpoint, path)

    joint_folder.write_checkpoint = writing  # in a copy of this process
    return method("TD3BC")


@pytest.mark.slow
def test_a_joint_run_that_was_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    train(tmp_path / "whole", seeds=SEEDS)
    for scene in (kill_in_training, kill_between_writes):
        place = tmp_path / scene.__name__
        killed = run_copy(lambda: train(place, seeds=SEEDS, method=scene()))  # noqa: B023
        assert killed.returncode == -signal.SIGKILL, killed.output
        again = train(place, seeds=SEEDS, ckpt_path="last")
        for name in ("seeds4+1-1", "seed4-1", "seed1-1"):
            whole, mended = (folder / "toy" / "TD3BC" / name for folder in (tmp_path / "whole", place))
            found = [one[:300] for one in differences(contents(whole), contents(mended))]
            assert not [one for one in found if not one.startswith("/config")], name  # which has the threads of a run
            assert not list(mended.glob("checkpoints/*.replaced"))
        assert again.updates == LAST and [f.name for f in again.folders.values()] == ["seed4-1", "seed1-1"]


@pytest.mark.slow
@pytest.mark.xdist_group("pair")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    def both() -> None:
        two: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
        half = train(tmp_path, steps=HALF, seeds=SEEDS, folder=tmp_path / "two", **two)
        train(tmp_path, ckpt_path=half.folder, **two)

    copies = pair_of(both)
    assert [copy.returncode for copy in copies] == [0, 0], copies[0].output + copies[1].output
    half = train(tmp_path, steps=HALF, seeds=SEEDS, folder=tmp_path / "one")
    one = train(tmp_path, ckpt_path=half.folder)
    for name in ("", "seed4", "seed1"):
        ours, theirs = (run_files(run / name, LAST) for run in (tmp_path / "two", one.folder))
        for part in ("state_dict", "metrics", "evals"):
            close(ours[part], theirs[part], f"{name}/{part}")


def test_a_joint_run_that_goes_back_takes_its_seeds_along(tmp_path: Path) -> None:
    """The newest joint checkpoint is damaged: rows after the one before are cut, checkpoints of seeds set aside."""
    joint = train(tmp_path, seeds=SEEDS)
    whole = [contents(folder) for folder in joint.folders.values()]
    path = newest_checkpoint(joint.folder)
    assert path is not None
    path.write_bytes(path.read_bytes()[:1000])
    train(tmp_path, steps=HALF + 5, ckpt_path="last", seeds=SEEDS)
    for folder in joint.folders.values():
        assert {p.name for p in folder.glob("checkpoints/*.replaced")} == {f"step={LAST:08d}.ckpt.replaced"}
        assert [row["step"] for row in Table(folder / "metrics.csv").rows()] == [15, HALF + 5]
    train(tmp_path, ckpt_path="last", seeds=SEEDS)
    for folder, before in zip(joint.folders.values(), whole):
        assert not differences(contents(folder)["state_dict"], before["state_dict"])


def test_an_interrupted_joint_run_leaves_everything_whole(tmp_path: Path) -> None:
    interrupted = method("TD3BC")
    update = interrupted.update

    def updating(batch: Any, step: int) -> Any:
        if step == HALF + 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(batch, step)

    interrupted.update = updating  # type: ignore[method-assign]
    found = train(tmp_path, seeds=SEEDS, method=interrupted)
    assert found.interrupted == signal.SIGTERM and found.updates == 30
    for folder in (found.folder, *found.folders.values()):
        path = newest_checkpoint(folder)
        assert path is not None and path.name == "step=00000030.ckpt"
    ends = [train(tmp_path, ckpt_path=place).updates for place in (found.folder, found.folders[1])]
    assert ends == [LAST, LAST]


def test_a_crash_leaves_rows_that_are_cut_and_written_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, seeds=SEEDS, callbacks=[Crash(30)])
    place = tmp_path / "toy" / "TD3BC" / "seed1-1"
    assert [row["step"] for row in Table(place / "metrics.csv").rows()] == [15, 30]
    (place / "evals.csv").unlink()
    for path in place.glob("checkpoints/*"):
        path.unlink()
    train(tmp_path, seeds=SEEDS, ckpt_path="last")
    assert [row["step"] for row in Table(place / "metrics.csv").rows()] == [15, 30, LAST]
    assert [row["step"] for row in Table(place / "evals.csv").rows()] == [HALF, LAST]
    assert sorted(p.name for p in place.glob("checkpoints/step=*")) == [f"step={n:08d}.ckpt" for n in (HALF, LAST)]
    whole = contents(place)
    (place / "checkpoints" / f"step={LAST:08d}.ckpt").unlink()  # as if killed at the very end
    Table(place / "evals.csv").cut(HALF)
    assert train(tmp_path, seeds=SEEDS, ckpt_path="last").folders[1] == place
    assert not differences(contents(place), whole)
