"""Data that change during training, and what a checkpoint knows of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from toy import Crash, differences, fit, method, run_files, toy_replay, weights

from offpolicy.api import load_data
from offpolicy.data.module import DataModule, Ticks
from offpolicy.data.replay import Replay
from offpolicy.data.ring import Ring
from offpolicy.errors import DataError, UsageError
from offpolicy.training.checkpoints import newest_checkpoint


class Growing(DataModule):
    """Every 30 updates the current policy adds two episodes of made-up steps to a ring that is soon full."""

    change_every = 30

    def __init__(self) -> None:
        super().__init__("growing")
        self.replay = Ring(toy_replay([10] * 4), capacity=75)
        self.calls: list[int] = []

    def on_block_start(self, policy: Any) -> None:
        self.calls.append(policy.global_step)
        fresh = toy_replay([9, 6], seed=100 + policy.global_step)
        fresh.steps["action"] = policy.act(fresh.steps["obs"])  # on-policy actions, in environment units
        assert isinstance(self.replay, Ring)
        self.replay.append(fresh)


class Swapping(DataModule):
    """Every 40 updates another replay takes the place of the old one, under its own version."""

    change_every = 40

    def __init__(self) -> None:
        super().__init__("swapping")
        self.replay = toy_replay()

    def on_block_start(self, policy: Any) -> None:
        if policy.global_step:
            version = policy.global_step // self.change_every
            self.replay = toy_replay(seed=version)
            self.replay.version = version


def run(data: DataModule, folder: Path | None = None, name: str = "TD3BC", **options: Any) -> Any:
    module = method(name)
    return fit(module, data, 90, folder, **options)


def test_changes_happen_between_blocks_on_their_updates() -> None:
    data = Growing()
    module = run(data)
    assert data.calls == [0, 30, 60] and data.replay.version == 3
    # 40 + 3·15 rows do not fit into 75: the last two episodes took the places of the first two
    assert data.replay.num_episodes == 8 and data.replay.num_steps == 65
    assert np.abs(data.replay.steps["action"]).max() <= 2.0
    assert module.metric_row["step"] == 90


def test_new_episodes_are_trained_on() -> None:
    """Rows beyond the first 40 are drawn only after they were appended."""
    data, drawn = Growing(), []
    module = method("TD3BC")
    update = module.update

    def watch(batch: Any, step: int) -> Any:
        drawn.append(int(batch.row.max()))
        return update(batch, step)

    module.update = watch
    data.on_block_start = lambda policy: Growing.on_block_start(data, policy) if policy.global_step else None  # type: ignore
    fit(module, data, 60)
    assert max(drawn[:30]) < 40 <= max(drawn[30:])


@pytest.mark.parametrize("block", [1, 7])
def test_block_length_never_matters(block: int) -> None:
    modules = []
    for length in (block, 64):
        module = method("TD3BC")
        module.run.block = length
        modules.append(fit(module, Growing(), 90))
    assert not differences(*map(weights, modules))


@pytest.mark.parametrize("make", [Growing, Swapping])
def test_resume_of_a_changed_replay(make: Any, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    data = make()
    run(data, one)
    with pytest.raises(ZeroDivisionError):
        run(make(), two, callbacks=[Crash(75)])
    path = newest_checkpoint(two)
    again = make()
    run(again, two, ckpt_path=path)
    assert not differences(run_files(one, 90), run_files(two, 90))
    assert again.replay.fingerprint() == data.replay.fingerprint() and again.replay.version == data.replay.version
    assert sorted(p.name for p in (one / "replay").iterdir()) == sorted(p.name for p in (two / "replay").iterdir())


def test_a_missing_version_is_named(tmp_path: Path) -> None:
    run(Growing(), tmp_path)
    (tmp_path / "replay").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"trained on version 3 of a changing replay, expected in .*replay/v3-"):
        fit(method("TD3BC"), Growing(), 120, tmp_path, ckpt_path=newest_checkpoint(tmp_path))


def test_data_that_do_not_change_write_nothing(tmp_path: Path) -> None:
    run(DataModule.of(toy_replay()), tmp_path)
    assert not (tmp_path / "replay").exists()


def test_load_data_takes_what_is_at_hand() -> None:
    replay = toy_replay()
    module = load_data(replay)
    assert module.replay is replay and load_data(module) is module and module.load() is replay
    arrays = {k: np.asarray(v) for k, v in replay.steps.items()}
    made = load_data({**arrays, "next_obs": arrays["obs"], "episode_end": replay.t == 9})
    assert made.replay is not None and made.replay.num_episodes == 30
    with pytest.raises(UsageError):
        load_data("no-such-data-set-v0")


def test_the_loader_yields_ticks_without_end() -> None:
    ticks = iter(DataModule.of(toy_replay()).train_dataloader())
    assert [int(next(ticks)) for _ in range(3)] == [0, 0, 0]
    assert isinstance(DataModule.of(toy_replay()).train_dataloader().dataset, Ticks)


def test_a_plain_trainer_fits(tmp_path: Path) -> None:
    """As in a notebook: nothing of ours but method and data."""
    module = method("BC")
    trainer = Trainer(
        max_steps=50, accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False, logger=False
    )
    trainer.fit(module, load_data(toy_replay()))
    assert trainer.global_step == 50
    saved = list(tmp_path.rglob("*.ckpt"))
    assert [p.name for p in saved] == ["epoch=0-step=50.ckpt"]
    again = method("BC")
    longer = Trainer(
        max_steps=60, accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False, logger=False
    )
    longer.fit(again, load_data(toy_replay()), ckpt_path=saved[0])
    whole = fit(method("BC"), toy_replay(), 60)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_a_replay_of_one_step_trains() -> None:
    assert fit(method("TD3BC"), Replay.filter(toy_replay([1, 1]), [0]), 5).metric_row["step"] == 5
