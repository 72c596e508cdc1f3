"""Language models whose weights are no longer finite: the run ends with an error, and finite checkpoints stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_rl
import torch
from lightning.pytorch import Callback

import offpolicy as op
from offpolicy.errors import DivergenceError


class Spoil(Callback):
    """Makes a number NaN in the optimiser step after this one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                next(p for p in pl_module.parameters() if p.requires_grad).view(-1)[0] = float("nan")


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.ckpt"))


@pytest.mark.parametrize("name", ["DPO", "SFT"])
def test_a_preference_run_stops_and_keeps_what_is_finite(name: str, policy: Path, tmp_path: Path) -> None:
    """NaN after step 4: its row is due at once, so that the checkpoint of step 6 is never written."""
    with pytest.raises(DivergenceError, match=r"at update [4-6] .* not finite.*Lower --model.lr"):
        tiny.fit(tiny.method(name, policy), max_steps=9, folder=tmp_path, callbacks=[Spoil(4)])
    assert checkpoints(tmp_path) == ["step=00000003.ckpt"]


def test_a_loss_that_is_nan_stands_in_the_row(policy: Path, tmp_path: Path) -> None:
    module = tiny.method("DPO", policy)
    loss = module.loss
    module.loss = lambda scores: (loss(scores)[0] * float("nan"), {})
    with pytest.raises(DivergenceError, match="at update 2 train/loss is nan, the weights"):
        tiny.fit(module, max_steps=9, folder=tmp_path)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1].startswith("2,nan") and not checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("step", "found"), [(1, "update 2 the weights"), (2, r"update 3 an update failed \(IndexError\)")]
)
def test_answers_are_not_drawn_from_weights_that_are_not_finite(
    step: int, found: str, policy: Path, tmp_path: Path
) -> None:
    """An iteration has two steps: after the second answers would be drawn, after the first a table refuses NaN."""
    module = tiny_rl.method("GRPO", policy)
    module.run.log_every = module.run.eval_every = 1000
    with pytest.raises(DivergenceError, match=found):
        tiny_rl.fit(module, max_steps=6, folder=tmp_path, callbacks=[Spoil(step)])


def test_no_model_is_exported(policy: Path, tmp_path: Path) -> None:
    pairs = tiny.write_pairs(tmp_path / "pairs.jsonl")
    method = op.DPO(policy=str(policy), lr=1e30, lr_schedule="constant", warmup_ratio=0.0, batch_size=4)
    with pytest.raises(DivergenceError):
        op.fit(method, str(pairs), max_steps=4, verbose=False, log_every=2, folder=tmp_path / "run")
    assert not (tmp_path / "run" / "hf").exists() and not checkpoints(tmp_path)
