"""Import paths of earlier versions lead to where their names are now."""

from __future__ import annotations

import importlib
import inspect
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts import FIXTURES
from toy import differences, run_files

import offpolicy as op
from offpolicy import evaluate, fit
from offpolicy.moved import MOVED, RENAMED
from offpolicy.training.checkpoints import read_checkpoint, write_checkpoint


@pytest.mark.parametrize("old", sorted(MOVED))
def test_every_old_module_opens(old: str) -> None:
    module: Any = importlib.import_module(old)
    for new in MOVED[old]:
        own = importlib.import_module(new)
        for name, value in vars(own).items():
            if not name.startswith("_") and getattr(value, "__module__", None) == new:
                assert getattr(module, name) is value, f"{old}.{name}"


def test_a_module_that_became_several_can_be_looked_into() -> None:
    """As torch does with every module when it is imported after one of these."""
    modules = importlib.import_module("offpolicy.modules")
    assert modules.Sizes is op.Sizes and modules.OfflineModule is op.OfflineModule
    assert (
        not hasattr(modules, "__file__") and not hasattr(modules, "nothing") and inspect.getmodule(modules) is modules
    )


# What version 0.1 wrote and what was written for it

OLD = FIXTURES / "version_0_1"
NAMES = [line.split(": ") for line in (OLD / "names.txt").read_text().splitlines() if not line.startswith("#")]
GONE = {  # helpers of single modules that other ones replaced
    "offpolicy.arguments": {"whole_number"},  # offpolicy.given.whole
    "offpolicy.data.problems": {"without_annotations"},  # offpolicy.data.texts.answers
    "offpolicy.data.sources.fetch": {"open_npz"},  # the guard reads all archives
    "offpolicy.language.engines": {"padded"},  # offpolicy.language.layout
    "offpolicy.language.policy": {"adapter_settings", "import_peft"},  # offpolicy.language.adapters
    "offpolicy.registry": {"resolve_method"},  # offpolicy.registry.find_method
    "offpolicy.sample": {"processes", "progress_bar"},  # offpolicy.compute.processes and progress
    "offpolicy.language.rewards": {"to_decimal", "read_last_number"},  # offpolicy.data.texts.numbers
}


@pytest.mark.parametrize(("old", "names"), NAMES)
def test_every_name_of_version_0_1_is_the_object_of_its_new_place(old: str, names: str) -> None:
    module = importlib.import_module(old)
    for name in set(names.split()) - GONE.get(old, set()):
        value, now = getattr(module, name), RENAMED.get(f"{old}.{name}", name).rpartition(".")[2]
        assert getattr(sys.modules[value.__module__], now) is value, f"{old}.{name}"
    assert not [name for name in GONE.get(old, ()) if hasattr(module, name)]


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a run of 20 updates that version 0.1 wrote, beside its data."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def go_on(folder: Path, updates: int, *more: str) -> None:
    settings = ["--config", str(folder / "config.yaml"), "--ckpt_path", str(folder), *more]
    assert fit.main([*settings, "--trainer.max_steps", str(updates)]) == 0


def test_a_run_of_version_0_1_acts_and_is_evaluated(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = op.load(old_run)
    assert type(policy) is op.TD3BC
    action = policy.act(np.zeros((2, 3), np.float32))
    assert action.shape == (2, 1) and np.isfinite(action).all() and (np.abs(action) <= 2).all()
    assert evaluate.main([str(old_run), "--episodes", "1"]) == 0
    assert "return" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_of_version_0_1_goes_on_bit_for_bit(old_run: Path) -> None:
    """20 → 40 from its own checkpoint, and over 30 with a checkpoint of this version: the same bits, and those of 0.1.

    The last bits of the weights depend on the processor, so those that version 0.1 had elsewhere are compared to 1e-5.
    """
    twice = Path(shutil.copytree(old_run, old_run.with_name("twice")))
    go_on(old_run, 40)
    go_on(twice, 30)
    go_on(twice, 40)
    files = [run_files(folder, 40) for folder in (old_run, twice)]
    for found in files:
        del found["metrics"]  # averages over the updates since the row before, and every end of a fit writes a row
    assert not differences(*files)
    weights = read_checkpoint(old_run / "checkpoints" / "step=00000040.ckpt")["state_dict"]
    expected = torch.load(OLD / "expected.pt", weights_only=True)
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-5)


def test_a_class_written_for_version_0_1_goes_on(old_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file imports by the old paths, and its run folder names it by the path that it had."""
    (old_run.parent / "written_for_0_1.py").write_text("""
from lightning_modules.td3bc import TD3BC
from offpolicy.callbacks import RunFolder
from offpolicy.modules import OfflineModule, Sizes

class Own(TD3BC):
    def on_fit_start(self):
        assert isinstance(self, OfflineModule) and isinstance(self.sizes, Sizes)
        assert any(isinstance(callback, RunFolder) for callback in self.trainer.callbacks)
        super().on_fit_start()
""")
    monkeypatch.syspath_prepend(old_run.parent)
    config = old_run / "config.yaml"
    config.write_text(config.read_text().replace("lightning_modules.td3bc.TD3BC", "written_for_0_1.Own"))
    path = old_run / "checkpoints" / "step=00000020.ckpt"
    checkpoint = read_checkpoint(path)
    checkpoint["offpolicy"]["class"] = "written_for_0_1.Own"
    write_checkpoint(checkpoint, path)
    go_on(old_run, 30, "--trust", "written_for_0_1")
    assert type(op.load(old_run, trust=["written_for_0_1"])).__name__ == "Own"
