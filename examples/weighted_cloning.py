"""A method with a weight for every step: cloning in which steps with a higher return to go count more.

The weight is a column of the data; ``extra`` of the view brings it into every batch as ``batch.extra.weight``.

As a script: ``python examples/weighted_cloning.py``.  With data of your own that have a column ``weight``:
``python -m offpolicy.fit --model examples.weighted_cloning.WeightedBC --data FILE``.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

import offpolicy
from lightning_modules.bc import BC
from offpolicy.data.views import return_to_go
from offpolicy.training.offline import Metrics


class WeightedBC(BC):
    """Behaviour cloning in which the squared error of a step counts as often as its column ``weight`` says."""

    view = offpolicy.TransitionView(reward=False, extra=("weight",))

    def actor_loss(self, batch: offpolicy.Transitions) -> tuple[Tensor, Metrics]:
        error = (self.actor(batch.obs) - batch.action).square().mean(-1)  # (…, B)
        weight = batch.extra.weight
        loss = (weight * error).sum(-1) / weight.sum(-1)
        return loss, {"actor_loss": loss.detach(), "weight_mean": weight.mean(-1)}


def weighted(replay: offpolicy.Replay, temperature: float = 1.0) -> offpolicy.Replay:
    """The same data with a column ``weight``: exp(z / temperature), z the standardised return to go of the step."""
    to_go = return_to_go(np.asarray(replay.steps["reward"])[replay.rows], replay.length)
    weight = np.zeros(len(replay.steps["reward"]), np.float32)
    weight[replay.rows] = np.exp(np.clip((to_go - to_go.mean()) / to_go.std() / temperature, -5.0, 5.0))
    return replay.derive({**replay.steps, "weight": weight}, replay.tail)


if __name__ == "__main__":
    data = offpolicy.DataModule.of(weighted(offpolicy.load_data("pendulum-stitch-v0").load()))
    offpolicy.fit(WeightedBC(), data, max_steps=2000, eval_every=1000)
