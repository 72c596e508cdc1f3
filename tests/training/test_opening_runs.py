"""Opening a checkpoint: what the file that does so may know of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from toy import method, toy_replay, weights

import offpolicy as op
from offpolicy import api
from offpolicy.training import opening

ROOT = Path(__file__).parents[2]


def test_opening_imports_no_method() -> None:
    """Methods import it, so it must not import them."""
    code = """
import sys
import offpolicy.training.opening
known = [name for name in sys.modules if name in ("offpolicy.training.module", "lightning_modules.bc")]
assert not known, known
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_way_to_open_a_run_is_the_same(tmp_path: Path) -> None:
    trained = op.fit(method("BC"), toy_replay(), max_steps=4, folder=tmp_path / "run", verbose=False, eval_episodes=0)
    assert op.load is api.load is opening.load
    by_class = op.BC.load_from_checkpoint(next(trained.folder.glob("checkpoints/*.ckpt")))
    for found in (op.load(trained.folder), by_class):
        assert all((value == weights(trained.method)[name]).all() for name, value in weights(found).items())


@pytest.mark.parametrize("cls", [dict, "BC", __import__("lightning.pytorch").pytorch.LightningModule])
def test_other_classes_are_no_methods(cls: object, tmp_path: Path) -> None:
    assert opening.is_method(op.BC) and not opening.is_method(cls)
