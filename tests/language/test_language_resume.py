"""Interrupted runs of language models end where uninterrupted ones do, bit by bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny import fit, method
from toy import differences, run_files

import offpolicy as op
from offpolicy.errors import DataError
from offpolicy.files import Table
from offpolicy.report.records import read_margins
from offpolicy.training import measurement
from offpolicy.training.checkpoints import newest_checkpoint

HALF, LAST = 3, 7


class Once(Callback):
    """Does something before the first micro-batch of a step, or before a later one of it."""

    def __init__(self, step: int, micro: int, act: Any) -> None:
        self.step, self.micro, self.act = step, micro, act

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if (trainer.global_step, pl_module.micro.current) == (self.step, self.micro):
            self.act()


def crash() -> None:
    raise ZeroDivisionError("crash")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DPO", "INPO", "SimPO", "RPO", "KTO", "ORPO", "SFT", "CoPG", "MAPL", "SRPO", "DPA"])
def test_crash_and_resume_equals_an_uninterrupted_run(name: str, policy: Path, tmp_path: Path) -> None:
    one, two, options = tmp_path / "one", tmp_path / "two", {"micro_batch_size": 2}
    fit(method(name, policy, **options), max_steps=LAST, folder=one)
    with pytest.raises(ZeroDivisionError):
        fit(method(name, policy, **options), max_steps=LAST, folder=two, callbacks=[Once(5, 1, crash)])
    assert [row["step"] for row in Table(two / "metrics.csv").rows()] == [2, 4]
    path = newest_checkpoint(two)
    assert path is not None and path.name == f"step={HALF:08d}.ckpt"
    loaded = torch.load(path, weights_only=True)
    assert loaded["global_step"] == loaded["offpolicy"]["updates"] == HALF
    resumed = method(name, policy, **options)
    torch.manual_seed(99)
    fit(resumed, max_steps=LAST, folder=two, ckpt_path=path)
    assert not differences(run_files(one, LAST), run_files(two, LAST))
    evaluations = Table(two / "evals.csv").rows()
    assert [row["step"] for row in evaluations] == [3, 6, 7]
    margins = read_margins(two)  # of the last evaluation; methods on single answers have none
    pairs = name not in ("KTO", "SFT", "CoPG", "DPA")
    assert margins.tolist() == read_margins(one).tolist() and len(margins) == (5 if pairs else 0)
    if len(margins):
        assert margins.mean() == pytest.approx(evaluations[-1]["eval/rewards/margins"], abs=1e-5)


@pytest.mark.slow
def test_an_interruption_waits_for_the_end_of_the_step(policy: Path, tmp_path: Path) -> None:
    interrupt = Once(4, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    module = fit(method("DPO", policy, micro_batch_size=1), max_steps=LAST, folder=tmp_path, callbacks=[interrupt])
    assert module.interrupted_by == signal.SIGINT and module.trainer.global_step == 5
    path = newest_checkpoint(tmp_path)
    assert path is not None and path.name == "step=00000005.ckpt"
    fit(method("DPO", policy, micro_batch_size=1), max_steps=LAST, folder=tmp_path, ckpt_path=path)
    whole = tmp_path / "whole"
    fit(method("DPO", policy, micro_batch_size=1), max_steps=LAST, folder=whole)
    assert not differences(run_files(whole, LAST), run_files(tmp_path, LAST))


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, 3])
def test_a_run_goes_on_with_other_micro_batches(size: int | None, policy: Path, tmp_path: Path) -> None:
    whole, cut = (
        fit(method("DPO", policy, micro_batch_size=1), max_steps=LAST, folder=tmp_path / str(i), precision="64-true")
        for i in range(2)
    )
    path = tmp_path / "1" / "checkpoints" / "step=00000006.ckpt"
    cut = fit(method("DPO", policy, micro_batch_size=size), max_steps=LAST, folder=tmp_path / "1", ckpt_path=path,
              precision="64-true")  # fmt: skip
    assert cut.trainer.global_step == LAST
    for ours, theirs in zip(whole.state_dict().values(), cut.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_longer_run_stretches_the_rates(policy: Path, tmp_path: Path) -> None:
    fit(method("DPO", policy), max_steps=3, folder=tmp_path)
    longer = fit(method("DPO", policy), max_steps=6, folder=tmp_path, ckpt_path=newest_checkpoint(tmp_path))
    assert longer._horizon == 6 and Table(tmp_path / "metrics.csv").rows()[-1]["train/learning_rate"] > 0
    shorter = fit(method("DPO", policy), max_steps=5, ckpt_path=tmp_path / "checkpoints" / "step=00000003.ckpt")
    assert shorter._horizon == 5


def test_other_texts_are_refused(policy: Path, tmp_path: Path) -> None:
    from tiny import toy_pairs

    fit(method("DPO", policy), max_steps=3, folder=tmp_path)
    with pytest.raises(DataError, match="trained on other data"):
        fit(method("DPO", policy), toy_pairs(seed=9), max_steps=6, ckpt_path=newest_checkpoint(tmp_path))


def test_the_newest_run_goes_on_in_its_folder(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny import toy_pairs

    options: dict[str, Any] = {"root": tmp_path, "verbose": False, "matmul": "mkl", "eval_every": 2}
    first = op.fit(method("DPO", policy), toy_pairs(), max_steps=2, **options)
    again = op.fit(method("DPO", policy), toy_pairs(), max_steps=3, ckpt_path="last", seed=0, **options)
    assert again.folder == first.folder and again.updates == 3
    elsewhere = op.fit(method("DPO", policy), toy_pairs(), max_steps=4, ckpt_path=first.folder, seed=8, **options)
    assert elsewhere.method.seed == 0  # the order of the rows goes on


def test_an_evaluation_that_fails_costs_no_training(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the evaluation of step 6, the run makes up for it; the row of step 3 is not measured again."""
    one, two, skipping = (tmp_path / name for name in ("one", "two", "skipping"))
    whole = fit(method("DPO", policy), max_steps=LAST, folder=one)
    usual, calls = type(whole).held_out, [0]

    def held_out(self: Any) -> dict[str, float]:
        calls[0] += 1
        if calls[0] == 2:
            raise RuntimeError("out of memory")
        return usual(self)

    monkeypatch.setattr(type(whole), "held_out", held_out)
    with pytest.raises(measurement.EvaluationFailed, match="update 6 failed: RuntimeError: out of memory"):
        fit(method("DPO", policy), max_steps=LAST, folder=two)
    path = newest_checkpoint(two)
    assert path is not None and path.name == "step=00000006.ckpt"
    fit(method("DPO", policy), max_steps=LAST, folder=two, ckpt_path=path)
    assert calls[0] == 4  # 3, the failing one, 6 and 7
    assert not differences(run_files(one, LAST), run_files(two, LAST))

    calls[0] = 0
    module = method("DPO", policy)
    module.run.eval_errors = "skip"
    fit(module, max_steps=LAST, folder=skipping)
    rows = Table(skipping / "evals.csv").rows()
    assert [row["step"] for row in rows] == [3, 6, 7] and "out of memory" in str(rows[1]["error"])
    assert not [name for name in rows[1] if name.startswith("eval/")]
    expected = Table(one / "evals.csv").rows()
    assert rows[2]["eval/loss"] == expected[2]["eval/loss"]


def test_a_row_that_is_there_counts_for_the_best(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint was written before it, so the run that goes on reads it from the table."""
    numbers = iter([0.25, 0.75, 0.5, 0.625])
    monkeypatch.setattr(type(method("DPO", policy)), "held_out", lambda self: {"rewards/accuracies": next(numbers)})
    fit(method("DPO", policy), max_steps=6, folder=tmp_path)
    fit(method("DPO", policy), max_steps=12, folder=tmp_path, ckpt_path=newest_checkpoint(tmp_path))
    rows = Table(tmp_path / "evals.csv").rows()
    assert [row["eval/rewards/accuracies_best"] for row in rows] == [0.25, 0.75, 0.75, 0.75]
    kept = sorted(path.name for path in tmp_path.glob("checkpoints/*.ckpt"))
    assert kept == ["step=00000006.ckpt", "step=00000009.ckpt", "step=00000012.ckpt"]
