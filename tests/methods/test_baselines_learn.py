"""A bandit with uniform actions and reward -(a - s/2)²: cloning stays at 0, the best action is s/2."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from offpolicy.data.replay import Replay
from offpolicy.registry import find_method

SHARED: dict[str, Any] = {"actor_lr": 3e-3, "critic_lr": 3e-3, "batch_size": 64, "normalize_obs": False}
WIDE: dict[str, Any] = {"hidden_dims": (32, 32)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AWAC", WIDE | {"lambda_": 0.02}),
        ("ReBRAC", WIDE | {"actor_beta": 0.1}),
        ("EDAC", WIDE | {"num_critics": 3, "eta": 0.1, "entropy_lr": 1e-2}),
        (
            "CQL",
            {"actor_hidden_dims": (32, 32), "critic_hidden_dims": (32, 32), "alpha": 0.05}
            | {"num_actions": 2, "entropy_weight": 0.1},
        ),
    ],
)
def test_finds_the_best_action(name: str, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    obs, action = rng.uniform(-1, 1, (2, 4000, 1)).astype(np.float32)
    steps = {
        "obs": obs,
        "action": action,
        "reward": -np.square(action - obs / 2)[:, 0],
        "terminated": np.ones(4000, bool),
    }
    replay = Replay(steps, episode_end=np.ones(4000, bool), meta={"action_low": [-1.0], "action_high": [1.0]})
    method = find_method(name)(**(SHARED | options)).prepare(replay)
    for t in range(0, 512, 64):
        method.run_block(t, 64)
    s = torch.linspace(-1, 1, 41)[:, None]
    miss = (method.act(s) - s / 2).square().mean().item()
    assert miss < 0.02  # that of 0 is 0.0875
