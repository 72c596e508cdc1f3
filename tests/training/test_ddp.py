"""Two processes against one with the same global batch; `main` is what the two do."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import Counting, scratch
from forks import run_pair
from toy import METHODS, differences, fit, method, run_files, toy_replay, weights
from toy_generator import pool, toy_model, versions

import offpolicy
from offpolicy.data.replay import Replay
from offpolicy.diffusion.drawing import sample
from offpolicy.errors import UsageError
from offpolicy.evaluation.rollout import Evaluator
from offpolicy.files import Table
from offpolicy.training.checkpoints import newest_checkpoint, read_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pair")]  # all of them need the two processes, which run once

PLAYLESS = ("TrajectoryDiffusion", "WorldModel", "FQE")  # no policies: evaluated by the loss of held-out data
RESUMED = ("TD3BC", "IQL-dropout", "PRDC-cached", "DecisionTransformer", "HIQL", "TrajectoryDiffusion", "WorldModel")
HALF, LAST = 8, 16  # updates: checkpoints and evaluations at both; rows of metrics at every 6


def train(name: str, folder: Path, module: Any = None, **options: Any) -> Any:
    module = module or method(name)
    module.run.log_every, module.run.eval_every = 6, HALF
    return fit(module, toy_replay(), LAST, folder, precision="64-true", **options)


def main(root: Path) -> None:
    torch.set_num_threads(1)
    logging.disable()
    calls = 0
    run = Evaluator.run

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return run(*args)

    Evaluator.run = counted  # type: ignore[method-assign]
    found = {}
    two = {"devices": 2, "strategy": "ddp"}
    for name in METHODS:
        module = train(name, root / name / "whole", **two)
        own = {k: v.tolist() for k, v in weights(module).items()}
        found[name] = {"weights": own, "evaluations": calls}
        calls = 0
        if name in RESUMED:
            resumed = root / name / "resumed"
            if module.global_rank == 0:
                shutil.copytree(root / name / "whole", resumed)
            torch.distributed.barrier()
            train(name, resumed, ckpt_path=resumed / "checkpoints" / f"step={HALF:08d}.ckpt", **two)
            calls = 0
    rank = module.global_rank

    interrupted = method("TD3BC")  # Ctrl-C in one process only: both stop together
    update = interrupted.update

    def updating(batch: Any, step: int) -> Any:
        if step == 9 and rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return update(batch, step)

    interrupted.update = updating
    train("TD3BC", root / "interrupted", interrupted, **two)
    found["interrupted"] = {"by": interrupted.interrupted_by, "at": interrupted.trainer.global_step}

    data, module = pool(root / "generator"), method("TD3BC")  # the first process says where; pieces are shared
    fit(module, data, 90, root / ("pool" if rank == 0 else "elsewhere"), precision="64-true", **two)
    generator: Any = offpolicy.load(root / "generator")
    drawn = sample(generator, root / "drawn", trajectories=20, batch_size=8)
    assert data.renewal is not None
    own = {k: v.tolist() for k, v in weights(module).items()}
    drew = data.renewal.model.calls, generator.calls
    found["pool"] = {"weights": own, "calls": drew, "drawn": drawn.fingerprint()}
    module = method("SAC")  # the first process collects
    fit(module, scratch(episodes="keep", envs=3), 40, root / "collected", precision="64-true", **two)
    found["collected"] = {"weights": {k: v.tolist() for k, v in weights(module).items()}}
    (root / f"rank{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder in which both processes trained, and what each of them found."""
    root = tmp_path_factory.mktemp("pair")
    toy_model(root / "generator")
    return root, run_pair(main, root)


@pytest.mark.parametrize("name", METHODS)
def test_two_processes(name: str, pair: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    root, (first, second) = pair
    assert first[name]["weights"] == second[name]["weights"]  # bit by bit: text keeps every digit
    files = run_files(root / name / "whole", LAST)
    judged = "eval/return_mean" if name not in PLAYLESS else "eval/loss"
    plays = 2 * (judged == "eval/return_mean")
    assert (first[name]["evaluations"], second[name]["evaluations"]) == (plays, 0)
    if name in RESUMED:
        assert not differences(files, run_files(root / name / "resumed", LAST))
    assert {p.name for p in (root / name / "whole").iterdir()} == {"checkpoints", "evals.csv", "metrics.csv"}
    if "dropout" in name:
        return  # masks are drawn by each process for its rows, so one process draws others
    module = train(name, tmp_path)
    alone = run_files(tmp_path, LAST)
    for key, value in weights(module).items():
        torch.testing.assert_close(files["state_dict"][key], value, rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(files["metrics"], alone["metrics"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for ours, theirs in zip(files["evals"], alone["evals"], strict=True):
        assert ours[judged] == pytest.approx(theirs[judged], rel=1e-5)


def test_an_interruption_of_one_process_stops_both_together(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    root, found = pair
    assert [f["interrupted"] for f in found] == [{"by": signal.SIGINT, "at": 12}] * 2
    path = newest_checkpoint(root / "interrupted")
    assert path is not None and read_checkpoint(path)["global_step"] == 12
    assert [row["step"] for row in Table(root / "interrupted" / "metrics.csv").rows()] == [6, 12]


def test_a_run_of_two_processes_goes_on_in_one(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    root, _ = pair
    path = newest_checkpoint(root / "interrupted")
    module = train("TD3BC", root / "interrupted", ckpt_path=path)
    whole = read_checkpoint(root / "TD3BC" / "whole" / "checkpoints" / f"step={LAST:08d}.ckpt")["state_dict"]
    for key, value in weights(module).items():
        torch.testing.assert_close(value, whole[key], rtol=1e-11, atol=1e-12)


def test_trajectories_are_drawn_by_both(pair: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    root, (first, second) = pair[0], [found["pool"] for found in pair[1]]
    assert first["weights"] == second["weights"]
    pieces = [[20 * version + at, n] for version in range(3) for at, n in ((0, 8), (8, 8), (16, 4))]
    assert first["calls"] == [[p for p in pieces if p[0] % 20 != 8], [[0, 8], [16, 4]]]
    assert second["calls"] == [[p for p in pieces if p[0] % 20 == 8], [[8, 8]]]
    assert versions(root / "pool") == ["v2", "v3"] and not (root / "elsewhere").exists()

    alone = sample(root / "generator", tmp_path / "drawn", trajectories=20, batch_size=8)
    assert first["drawn"] == second["drawn"] == alone.fingerprint()
    module = fit(method("TD3BC"), pool(root / "generator"), 90, tmp_path / "one", precision="64-true")
    for name, value in weights(module).items():  # generated numbers are float32
        torch.testing.assert_close(torch.tensor(first["weights"][name], dtype=value.dtype), value, rtol=1e-6, atol=1e-6)


def test_what_is_collected_is_the_same(
    pair: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (found["collected"]["weights"] for found in pair[1])
    assert first == second
    monkeypatch.setattr(Counting, "starts", {})
    module = fit(method("SAC"), scratch(episodes="keep", envs=3), 40, tmp_path, precision="64-true")
    for key, value in weights(module).items():  # what is collected is float32
        torch.testing.assert_close(torch.tensor(first[key], dtype=value.dtype), value, rtol=1e-6, atol=1e-6)


def test_the_global_batch_must_split_evenly(replay: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offpolicy.training.module.Module.world_size", 3)
    with pytest.raises(UsageError, match="`batch_size` is 16; expected a multiple of the 3 processes"):
        fit(method("BC"), replay, 10)
