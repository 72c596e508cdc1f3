"""How the tokens of an iteration get their advantage.

From the rewards of a group, an answer gets one number when it is drawn. All of its tokens share this number, and it
stays with the answer as long as the answer is replayed. From a critic, every token gets a number of its own, anew in
every iteration, as the critic learns. The formulas are in :mod:`offpolicy.losses.advantages`; a step takes what stands
in the store, see :mod:`offpolicy.language.rl.tokens`.
"""

from __future__ import annotations

import numpy as np
import torch

from offpolicy.data.replay import Replay
from offpolicy.data.texts.rollouts import OWN
from offpolicy.losses.policy_gradient import Objective


def from_groups(objective: Objective, fresh: Replay) -> np.ndarray:
    """The advantage of each of the new answers of an iteration, whole groups of all processes, (E,)."""
    facts = fresh.episodes
    rewards, group = torch.from_numpy(facts["reward"]), torch.from_numpy(facts["group"])
    return objective.advantages(rewards, group, torch.from_numpy(facts["source"] == OWN)).numpy()


def from_critic(objective: Objective, store: Replay, rows: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    """The columns ``advantage`` and ``returns`` of the tokens of these answers, stale ones too.

    Args:
        objective: with a critic.
        store: of the answers.
        rows: of the store, ascending, (m,).
        values: of the critic as it is now before each token of these answers, end to end.
    """
    length = torch.from_numpy(store.length[rows])
    mask = torch.arange(int(length.max()), device="cpu") < length[:, None]
    value = torch.zeros(mask.shape, dtype=torch.from_numpy(values).dtype, device="cpu")
    value[mask] = torch.from_numpy(values)
    rewards = torch.from_numpy(store.episodes["reward"][rows]).to(value)
    found = objective.critic_advantages(rewards, value, mask.to(value))
    return {name: part[mask].numpy() for name, part in zip(("advantage", "returns"), found)}
