"""Runs whose losses or weights are no longer finite: they end with an error, and finite checkpoints stay."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import pair_of
from toy import fit, method, quiet, toy_replay, weights

import offpolicy as op
from offpolicy.cli import entry
from offpolicy.data.module import DataModule
from offpolicy.errors import DivergenceError
from offpolicy.files import Table
from offpolicy.training import divergence
from offpolicy.training.checkpoints import read_checkpoint, resolve_checkpoint


def spoiled(module: Any, at: int, value: float = float("nan")) -> Any:
    """The method with one weight, or the first of a stack, spoiled after an update; its losses are left alone."""
    update = module.update

    def updating(batch: Any, step: int) -> Any:
        metrics = update(batch, step)
        if step == at:
            with torch.no_grad():
                next(p for p in module.parameters() if p.requires_grad).view(-1)[0] = value
        return metrics

    module.update = updating
    return module


def run(module: Any, root: Path, *, max_steps: int = 40, **options: Any) -> op.FitResult:
    options = {"verbose": False, "eval_every": 10, "log_every": 20, "root": root, "block": 5} | options
    return op.fit(module, toy_replay(env_id=None), max_steps=max_steps, **options)


def checkpoints(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*.ckpt*"))


@pytest.mark.parametrize("name", ["TD3BC", "PRDC", "HIQL", "TrajectoryDiffusion", "WorldModel"])
def test_weights_that_are_not_finite_stop_a_run_and_its_checkpoints_stay(name: str, tmp_path: Path) -> None:
    """NaN at update 23: the checkpoint due at 30 is not written, those of 10 and 20 stay, and training goes on."""
    with pytest.raises(DivergenceError, match="training diverged: at update") as caught:
        run(spoiled(method(name), 23), tmp_path, log_every=1000)
    assert checkpoints(tmp_path) == ["step=00000010.ckpt", "step=00000020.ckpt"]
    newest = resolve_checkpoint(next(tmp_path.glob("*/*/*")))
    assert str(newest) in str(caught.value) and "are not finite" in str(caught.value)
    again = run(method(name), tmp_path, ckpt_path="last")
    assert again.updates == 40 and divergence.all_finite(weights(again.method).values())  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_stops_a_run_at_the_next_row(tmp_path: Path) -> None:
    """Rewards of 1e30 make the squared error infinite from the first update on, while weights stay finite."""
    data = toy_replay(env_id=None)
    data.steps["reward"] = data.steps["reward"] * np.float32(1e30)
    with pytest.raises(DivergenceError) as caught:
        op.fit(method("TD3BC"), data, max_steps=100, verbose=False, eval_every=0, log_every=20, root=tmp_path)
    assert str(caught.value).startswith("training diverged: at update 20 train/critic_loss is inf; expected finite")
    assert "No checkpoint was written before it" in str(caught.value) and "`reward_transform`" in str(caught.value)
    assert not checkpoints(tmp_path)
    (row,) = Table(next(tmp_path.rglob("metrics.csv"))).rows()
    assert row["step"] == 20 and row["train/critic_loss"] == float("inf")
    with pytest.raises(DivergenceError, match="at update 15 critic_loss is not finite"):  # before the first checkpoint
        op.fit(method("TD3BC"), data, max_steps=100, verbose=False, eval_every=15, log_every=5000, root=tmp_path)
    assert not checkpoints(tmp_path)


def test_metrics_that_may_be_nan_do_not_stop_a_run(tmp_path: Path) -> None:
    module, nan = method("BC"), torch.tensor(float("nan"))
    update = module.update
    module.update = lambda batch, step: update(batch, step) | {"gap": nan, "loss_of_nobody": nan}  # type: ignore[method-assign]
    assert run(module, tmp_path).updates == 40
    assert divergence.is_loss_name("train/critic_loss") and divergence.is_loss_name("loss")
    assert not divergence.is_loss_name("train/loss/own") and not divergence.is_loss_name("train/closs")


def test_one_diverged_seed_is_named(tmp_path: Path) -> None:
    module = method("BC")
    module.seeds = (3, 7)
    update, bad = module.update, torch.tensor([0.0, float("inf")])
    module.update = lambda batch, step: {"actor_loss": update(batch, step)["actor_loss"] + bad}  # type: ignore[method-assign]
    with pytest.raises(DivergenceError, match="train/actor_loss is inf for seed 7;"):
        run(module, tmp_path, eval_every=0)


def test_an_update_that_fails_by_such_weights_is_named_so(tmp_path: Path) -> None:
    """As a search refuses NaN; another error of healthy weights stays what it is."""
    module = spoiled(method("BC"), 3)
    spoiling = module.update

    def refusing(batch: Any, step: int) -> Any:
        np.asarray_chkfinite(module.policy(batch.obs).detach().numpy())
        return spoiling(batch, step)

    module.update = refusing
    with pytest.raises(DivergenceError, match=r"an update failed \(ValueError\), the weights actor"):
        run(module, tmp_path, log_every=1000, block=20)
    module = method("BC")

    def failing(batch: Any, step: int) -> Any:
        raise ValueError("something else")

    module.update = failing  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="something else") as caught:
        run(module, tmp_path)
    assert not isinstance(caught.value, DivergenceError)


def test_an_interruption_keeps_no_checkpoint_of_nan(tmp_path: Path) -> None:
    module = spoiled(method("BC"), 12)
    stop: Callable[..., Any] = module.update

    def stopping(batch: Any, step: int) -> Any:
        if step == 14:
            module.run_log.received = 2  # as after a Ctrl-C
        return stop(batch, step)

    module.update = stopping
    with pytest.raises(DivergenceError):
        fit(module, toy_replay(env_id=None), 40, tmp_path)
    assert not checkpoints(tmp_path)


def test_a_plain_trainer_and_a_file_of_weights_refuse_them_too(tmp_path: Path) -> None:
    module = spoiled(method("BC"), 30)
    module.run.eval_every = module.run.eval_episodes = 0
    trainer = quiet(40)
    with pytest.raises(DivergenceError, match="at update 40"):
        trainer.fit(module, DataModule.of(toy_replay(env_id=None)))
    with pytest.raises(DivergenceError):
        module.save(tmp_path / "policy.ckpt")
    with pytest.raises(DivergenceError):
        trainer.save_checkpoint(tmp_path / "own.ckpt")
    assert not checkpoints(tmp_path)


def test_the_same_method_is_looked_at_anew_in_its_next_run(tmp_path: Path) -> None:
    module = method("BC")
    run(module, tmp_path, max_steps=10)
    with pytest.raises(DivergenceError, match="at update 10"):
        run(spoiled(module, 10), tmp_path, max_steps=10)


def test_every_kind_of_tensor_is_looked_at() -> None:
    """Large numbers are finite in their own type; integers and empty tensors always are."""
    good = [torch.tensor([1e300], dtype=torch.float64), torch.ones(2), torch.tensor([3e38]), torch.zeros(0)]
    good += [torch.tensor([2]), torch.ones(3, dtype=torch.bfloat16)]
    assert divergence.all_finite(good) and divergence.all_finite([])
    for bad in (float("nan"), float("inf"), float("-inf")):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            assert not divergence.all_finite([*good, torch.tensor([1.0, bad, 2.0], dtype=dtype)])


def test_the_command_ends_with_4(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> int:
        raise DivergenceError("training diverged: so it did.")

    with pytest.raises(SystemExit) as caught:
        entry.run(main)
    assert caught.value.code == 4 and capsys.readouterr().err == "Error: training diverged: so it did.\n"


@pytest.mark.parametrize(("together", "rank", "code"), [(True, "1", 0), (False, "1", 4), (True, "0", 4)])
def test_only_the_first_process_leaves_with_an_error_of_all(
    together: bool, rank: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another code than 0 of a child makes Lightning kill the first process, which has the error to tell."""
    monkeypatch.setenv("LOCAL_RANK", rank)

    def main(argv: list[str]) -> int:
        error = DivergenceError("training diverged.")
        error.together = together
        raise error

    with pytest.raises(SystemExit) as caught:
        entry.run(main)
    assert caught.value.code == code


def test_divergence_is_an_error_of_all_processes(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError) as caught:
        run(spoiled(method("BC"), 23), tmp_path)
    assert caught.value.together


def two(root: Path) -> None:
    """One of two processes whose first one has a weight that is not finite."""
    logging.disable()
    module = method("BC")
    update = module.update

    def updating(batch: Any, step: int) -> Any:
        metrics = update(batch, step)
        if step == 23 and module.global_rank == 0:
            with torch.no_grad():
                next(module.parameters()).view(-1)[0] = float("nan")
        return metrics

    module.update, module.step = updating, lambda *_, **__: None  # type: ignore[method-assign]  # nothing is averaged
    module.run.log_every, module.run.eval_every, module.run.eval_episodes = 1000, 10, 0
    try:
        fit(module, toy_replay(env_id=None), 40, root, devices=2, strategy="ddp")
    except DivergenceError as error:
        (root / f"rank{module.global_rank}").write_text(str(error))


@pytest.mark.slow
def test_two_processes_stop_alike(tmp_path: Path) -> None:
    copies = pair_of(lambda: two(tmp_path))
    files = [tmp_path / f"rank{rank}" for rank in (0, 1)]
    assert all(file.exists() for file in files), "\n".join(copy.output for copy in copies)
    told = [file.read_text() for file in files]
    assert "the weights actor" in told[0] and "at update 30 another process has such numbers" in told[1]
    assert checkpoints(tmp_path) == ["step=00000010.ckpt", "step=00000020.ckpt"]
    assert read_checkpoint(tmp_path / "checkpoints" / "step=00000020.ckpt")["global_step"] == 20
