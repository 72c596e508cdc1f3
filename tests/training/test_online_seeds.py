"""Runs of several seeds that collect their data: each seed is as if it had been alone, and all go on bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from counting import collect, online, scratch
from forks import pair_of
from test_joint_runs import close
from toy import Crash, differences, quiet, run_files, toy_replay

import offpolicy as op
from offpolicy.data.module import DataModule
from offpolicy.data.replay import Replay
from offpolicy.data.seed_collections import SeedCollections
from offpolicy.errors import UsageError
from offpolicy.files import Table
from offpolicy.training import joint_folder
from offpolicy.training.checkpoints import newest_checkpoint, read_checkpoint
from offpolicy.training.joint_folder import share_rounds
from offpolicy.training.seed_data import check_alike, check_seeds

SEEDS, ENV = (4, 1), "Drifting-v0"
SHARED = ("perf/collecting_share", "perf/updates_per_s", "perf/peak_memory_mb")


def run(root: Path, data: DataModule | None = None, method: Any = None, **options: Any) -> op.FitResult:
    """In float64, where seeds together round as they do alone but for the last digits."""
    return collect(None, data or scratch(ENV), method, root=root, precision="64-true", **options)


def contents(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for speeds: rounds by their hash."""
    checkpoint = read_checkpoint(newest_checkpoint(folder) or "")
    rows = {name: Table(folder / name).rows() for name in ("metrics.csv", "evals.csv")}
    for row in rows["metrics.csv"]:
        assert all(row.pop(name, 0) >= 0 for name in SHARED)
    rounds = {place.name: Replay.load(place).fingerprint() for place in sorted((folder / "replay").iterdir())}
    switch = folder / "online.json"
    return {"rows": rows, "all": checkpoint, "rounds": rounds, "switch": switch.exists() and switch.read_text()}


def as_if_alone(joint: op.FitResult, alone: op.FitResult, seed: int) -> None:
    ours, theirs = contents(joint.folders[seed]), contents(alone.folder)
    assert ours["rounds"] == theirs["rounds"] and "collected" in ours["rounds"]
    close(ours, theirs, str(seed))
    names = [{p.name for p in run.iterdir()} - {"curves.png"} for run in (joint.folders[seed], alone.folder)]
    assert names[0] == names[1]


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> op.FitResult:
    return run(tmp_path_factory.mktemp("joint"), scratch(ENV, episodes="keep", envs=2), seeds=SEEDS)


def test_every_seed_collects_and_learns_as_if_alone(joint: op.FitResult, tmp_path: Path) -> None:
    """Its own rounds to the last bit, weights, rows and checkpoints, and files that lie where a single run has them."""
    assert joint.updates == 40
    seen = [contents(joint.folders[seed])["rounds"] for seed in SEEDS]
    assert not set(seen[0].values()) & set(seen[1].values())
    for seed in SEEDS:
        as_if_alone(joint, run(tmp_path, scratch(ENV, episodes="keep", envs=2), seed=seed), seed)
    row = Table(joint.folder / "metrics.csv").rows()[-1]
    assert row["env/steps"] == row["env/steps_seed1"] == 60 and "env/episodes_seed_std" in row


def test_seeds_that_were_stopped_go_on_bit_for_bit(joint: op.FitResult, tmp_path: Path) -> None:
    """In the middle of a round; one of them then goes on alone."""
    data: dict[str, Any] = {"episodes": "keep", "envs": 2}
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, scratch(ENV, **data), seeds=SEEDS, callbacks=[Crash(15)], save_every=5)
    (place,) = tmp_path.glob("*/SAC/seeds*")
    shutil.rmtree(place.with_name("seed1-1") / "replay")  # as if it was killed before it had written them there
    again = run(tmp_path, scratch(ENV, **data), ckpt_path=place, save_every=5)
    for folder, whole in ((place, joint.folder), *((again.folders[k], joint.folders[k]) for k in SEEDS)):
        ours, theirs = (run_files(part, 40) for part in (folder, whole))
        assert not differences(ours["state_dict"], theirs["state_dict"]) and ours["metrics"] == theirs["metrics"]
    for seed in SEEDS:
        assert contents(again.folders[seed])["rounds"] == contents(joint.folders[seed])["rounds"]

    shutil.rmtree(place / "replay" / "seed1" / "collected")  # as if it was stopped before its last files
    shutil.rmtree(again.folders[1] / "replay" / "collected")
    run(tmp_path, scratch(ENV, **data), ckpt_path=place, save_every=5)
    assert contents(again.folders[1])["rounds"] == contents(joint.folders[1])["rounds"]
    with pytest.raises(UsageError, match=r"`data.online.envs` is 3, and was 2"):
        run(tmp_path, scratch(ENV, episodes="keep", envs=3, env_steps=80), ckpt_path=place)
    alone = run(tmp_path, scratch(ENV, env_steps=80, **data), ckpt_path=again.folders[4])
    assert alone.folder == again.folders[4] and alone.updates == 60
    assert sorted(p.name for p in (alone.folder / "replay").iterdir())[-1] == "round-000006"


@pytest.mark.slow
def test_the_last_round_may_come_for_some_seeds_alone(tmp_path: Path) -> None:
    """Whole episodes bring seed 1 to 53 of the 52 steps in three rounds, and seed 5 to 50, after which it plays a
    fourth, of which two updates are made; a resume after it is exact."""
    seeds, data = (1, 5), {"env_steps": 52, "episodes": "whole"}
    together = run(tmp_path / "whole", scratch(ENV, **data), seeds=seeds)
    assert together.updates == 32
    for seed, count in zip(seeds, (3, 4)):
        assert len(list((together.folders[seed] / "replay").glob("round-*"))) == 1 + count  # and the random steps
    as_if_alone(together, run(tmp_path / "whole", scratch(ENV, **data), seed=5), 5)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "cut", scratch(ENV, **data), seeds=seeds, callbacks=[Crash(31)], save_every=31)
    again = run(tmp_path / "cut", scratch(ENV, **data), seeds=seeds, ckpt_path="last", save_every=31)
    ours, theirs = (run_files(one.folder, 32) for one in (again, together))
    assert not differences(ours["state_dict"], theirs["state_dict"])


def test_rounds_are_whole_in_the_folder_of_a_seed_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far a copy had come when it was stopped."""
    rows, other = toy_replay(), toy_replay((4, 3), seed=3)
    source, target = (tmp_path / place / "round-000001" for place in ("joint/replay/seed4", "seed4/replay"))
    parts, files = {4: tmp_path / "seed4"}, len([p for p in rows.save(source).rglob("*") if p.is_file()])
    left, link = 0, joint_folder._link

    def linking(*places: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        link(*places)

    monkeypatch.setattr(joint_folder, "_link", linking)
    for done in range(files):
        left = done
        with pytest.raises(KeyboardInterrupt):
            share_rounds(tmp_path / "joint", parts)
        assert not target.exists()
    for replay in (rows, other):
        left = files
        replay.save(source, overwrite=True)
        share_rounds(tmp_path / "joint", parts)
        assert Replay.load(target).fingerprint() == replay.fingerprint()
    assert [p.name for p in target.parent.iterdir()] == [target.name]


def test_facts_of_an_earlier_fit_are_forgotten(tmp_path: Path) -> None:
    """A method that collected is trained again on a data set, whose facts its seeds then have."""
    method = op.SAC(hidden_dims=(8, 8), batch_size=16)
    run(tmp_path / "first", scratch(ENV, env_steps=21), method, seeds=SEEDS)
    assert set(method.data_each) == set(SEEDS)
    rows = toy_replay((6,) * 10, obs_dim=2, env_id=None, max_episode_steps=6)
    second = run(tmp_path / "second", DataModule.of(rows), method, seeds=SEEDS, max_steps=1, eval_episodes=0)
    facts = [json.loads((second.folders[seed] / "versions.json").read_text())["data"] for seed in SEEDS]
    assert facts[0]["fingerprint"] == facts[1]["fingerprint"] == rows.fingerprint() and "of_seeds" not in facts[0]


def test_seeds_of_an_offline_run_go_on_online_each_by_itself(joint: op.FitResult, tmp_path: Path) -> None:
    """Half of each batch is offline; the switch is told of the mean and of each seed."""
    source = str(joint.folders[4] / "replay" / "collected")
    small: dict[str, Any] = {"hidden_dims": (8, 8), "batch_size": 10}

    def both(**options: Any) -> op.FitResult:
        first = run(tmp_path, DataModule(source), op.TD3BC(**small), max_steps=20, **options)
        module = DataModule(source, online=online(None, env_steps=20, mix="half"))
        return run(tmp_path, module, op.TD3BC(**small), ckpt_path=first.folder)

    together = both(seeds=SEEDS)
    assert together.method.seeds == SEEDS and (together.folder / "online.json").is_file()
    for seed in SEEDS:
        as_if_alone(together, both(seed=seed), seed)


@pytest.mark.slow
@pytest.mark.xdist_group("pair")
def test_two_processes_equal_one(joint: op.FitResult, tmp_path: Path) -> None:
    """The first collects for all seeds; the run is stopped on the way."""
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "accelerator": "cpu", "save_every": 20}

    def both() -> None:
        data: dict[str, Any] = {"episodes": "keep", "envs": 2}
        with pytest.raises(ZeroDivisionError):
            collect(tmp_path, scratch(ENV, **data), seeds=SEEDS, precision="64-true", callbacks=[Crash(30)], **options)

    copies = pair_of(both)
    assert [copy.returncode for copy in copies] == [0, 0], copies[0].output + copies[1].output
    found = run(tmp_path, scratch(ENV, episodes="keep", envs=2), ckpt_path=tmp_path)
    for seed in SEEDS:
        ours, theirs = (run_files(one.folders[seed], 40) for one in (found, joint))
        close(ours["state_dict"], theirs["state_dict"], str(seed))
        rounds = [contents(one.folders[seed])["rounds"] for one in (found, joint)]
        assert rounds[0] == rounds[1]


@pytest.mark.slow
def test_all_seeds_learn_from_scratch(tmp_path: Path) -> None:
    """Uniform actions lose 2/3 on average, and an action of 0 a third."""
    method = op.SAC(hidden_dims=(32, 32), batch_size=64, actor_lr=3e-3, critic_lr=3e-3, entropy_lr=3e-3)
    data = DataModule("Aim-v0", online=online("Aim-v0", env_steps=1200, round_steps=100, random_steps=200))
    found = collect(tmp_path, data, method, seeds=range(3), eval_every=0, eval_episodes=20, log_every=500)
    assert all(found.scores[f"return_mean_seed{seed}"] > -0.15 for seed in range(3)), found.scores


def test_what_seeds_cannot_collect_is_refused(joint: op.FitResult, tmp_path: Path) -> None:
    data = DataModule(str(joint.folders[4] / "replay" / "collected"), online=online(None))
    small: dict[str, Any] = {"hidden_dims": (8, 8), "batch_size": 10}
    for module, method, said in (
        (data, op.PRDC(**small), r"`seeds` is 4,1, each with data that it collects, and PRDC keeps one index"),
        (
            scratch(ENV),
            op.TD3BC(**small),
            r"`normalize_obs` is true.* Pass --model.normalize_obs false \(and",
        ),
    ):
        with pytest.raises(UsageError, match=said):
            run(tmp_path / "runs", module, method, seeds=SEEDS)
    alone = scratch(ENV)
    alone.load()
    with pytest.raises(UsageError, match="`seeds` is 4,1, and the data module collects for one seed"):
        check_seeds(SEEDS, alone.collection)
    alone.begin_at(0, None, 4, SEEDS)  # rows of 2 + 1 + 2 and of 2·2 + 1 + 2 numbers, 60 of them for each of two seeds
    assert isinstance(alone.collection, SeedCollections) and alone.collection.room() == 4 * 2 * 60 * 12
    check_seeds(SEEDS, alone.collection)
    assert alone.collection.facts()[-1][1].endswith("together about 5.76 kB when they are full")
    with pytest.raises(UsageError, match="`seeds` is one seed, and the data module collects for 4,1"):
        quiet(1).fit(op.SAC(**small), alone)
    several: Any = op.TD3(**small)
    several.seeds = SEEDS
    replays = [toy_replay(lengths, env_id=None, max_episode_steps=None) for lengths in ((3, 3), (3, 4))]
    several.prepare(replays[0])
    check_alike(several, replays[:1] * 2)
    with pytest.raises(UsageError, match="have 3 and other numbers of steps; expected a limit"):
        check_alike(several, replays)
