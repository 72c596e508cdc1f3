"""Opening runs: every way gives the same, and only methods are opened."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy import method, toy_replay, weights

import offpolicy as op
from offpolicy import api
from offpolicy.training import opening


def test_every_way_to_open_a_run_is_the_same(tmp_path: Path) -> None:
    trained = op.fit(method("BC"), toy_replay(), max_steps=4, folder=tmp_path / "run", verbose=False, eval_episodes=0)
    assert op.load is api.load is opening.load
    by_class = op.BC.load_from_checkpoint(next(trained.folder.glob("checkpoints/*.ckpt")))
    for found in (op.load(trained.folder), by_class):
        assert all((value == weights(trained.method)[name]).all() for name, value in weights(found).items())


@pytest.mark.parametrize("cls", [dict, "BC", __import__("lightning.pytorch").pytorch.LightningModule])
def test_other_classes_are_no_methods(cls: object, tmp_path: Path) -> None:
    assert opening.is_method(op.BC) and not opening.is_method(cls)
