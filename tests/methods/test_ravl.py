"""RAVL and MBPO: published defaults, and what they are on data alone."""

from __future__ import annotations

from typing import Any

import pytest
from plain import made_batch, ready
from toy import fit, toy_replay

from lightning_modules.edac import EDAC
from lightning_modules.ravl import MBPO, RAVL
from lightning_modules.sac import SAC

SMALL: dict[str, Any] = {"hidden_dims": (8, 8)}


def test_published_defaults() -> None:
    h = RAVL().hparams
    found = h.num_critics, h.eta, h.discount, h.tau, tuple(h.hidden_dims), h.batch_size
    assert found == (10, 1.0, 0.99, 0.005, (256, 256, 256), 256)
    assert (h.actor_lr, h.critic_lr, h.entropy_lr) == (3e-4, 3e-4, 3e-4)
    assert (MBPO().hparams.num_critics, MBPO().hparams.eta) == (2, 0.0)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            MBPO(**SMALL),
            SAC(**SMALL, update_order="actor_first", init="edac", log_std_min=-5.0, log_det_eps=1e-6),
        ),
        (RAVL(**SMALL, num_critics=4), EDAC(**SMALL, num_critics=4, eta=1.0)),
    ],
)
def test_updates_on_the_same_batches_are_those_of(ours: Any, theirs: Any) -> None:
    ready(ours), ready(theirs)
    for step in (1, 2, 3):
        batch = made_batch(theirs, seed=step)
        assert ours.update(batch, step) == theirs.update(batch, step)


def test_real_data_alone_are_said() -> None:
    module = MBPO(**SMALL, batch_size=16)
    module.seed, module.run.eval_episodes = 0, 0
    said: list[str] = []
    module.on_fit_end = lambda: said.extend(module.describe().notes)  # type: ignore[method-assign]
    fit(module, toy_replay(), 1)
    assert (
        "MBPO without roll-outs is EDAC with `num_critics` 2 and `eta` 0. Pass --data.source model-rollouts" in said[-1]
    )
