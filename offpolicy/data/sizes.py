"""What networks are built from: the widths of the data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offpolicy.data.replay import Replay
from offpolicy.errors import DataError, listed


@dataclass(frozen=True)
class Sizes:
    """What networks are built from: never an environment, so a checkpoint needs neither data nor simulator.

    Args:
        obs_dim: O, numbers in an observation.
        action_dim: A, numbers in an action.
        max_steps: longest episode, of the data or by the environment's limit; 0 when unknown.
    """

    obs_dim: int
    action_dim: int
    max_steps: int = 0

    @classmethod
    def of(cls, replay: Replay) -> Sizes:
        """The sizes of a replay.

        Raises:
            DataError: it holds no steps of an environment.
        """
        if not {"obs", "action"} <= replay.steps.keys():
            raise DataError(
                f"{replay.meta.get('name', 'the replay')} holds {listed(replay.steps)} and no `obs` and `action`; "
                "expected steps of an environment. For texts choose a method of language models, such as DPO."
            )
        obs, action = replay.steps["obs"], replay.steps["action"]
        limit = max(replay.meta.get("max_episode_steps") or 0, int(replay.length.max()))
        return cls(int(np.prod(obs.shape[1:])), int(np.prod(action.shape[1:])), int(limit))
