"""Answers drawn before the iteration that they are for: versions, composition, log-probabilities, resume, records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback
from tiny_rl import fit, method

from offpolicy.data.texts.sequences import spans


class Seen(Callback):
    """The store of answers of every iteration as its last step leaves it."""

    def __init__(self) -> None:
        self.stores: dict[int, Any] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.stores[pl_module.iteration] = trainer.datamodule.rollouts


def test_on_policy_is_decided_answer_by_answer(policy: Path) -> None:
    """Where an engine is one version late, its own log-probabilities are the behaviour's; else the trainer's are."""
    seen = Seen()
    module = method("GRPO", policy, engine="tiny_rl.LateEngine", lr=0.1)
    fit(module, 4, callbacks=[seen], held_out=False)
    store = seen.stores[2]
    version = store.episodes["policy_version"]
    assert (store.episodes["iteration"] == 2).all() and sorted(set(version.tolist())) == [1, 2]
    late, now = (spans(store, np.flatnonzero(version == v)) for v in (1, 2))
    logp, previous, sampler = (np.asarray(store.steps[k]) for k in ("logp", "previous_logp", "sampler_logp"))
    assert (logp[late] == sampler[late]).all() and abs(previous[late] - logp[late]).max() > 1e-3
    assert (logp[now] == previous[now]).all() and abs(logp[now] - sampler[now]).max() < 1e-4
