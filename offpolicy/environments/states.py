"""How environments are put into the state that an observation encodes: one class per family, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class StateSetter:
    """Puts an environment of one family into states.

    Args:
        env: of gymnasium, without wrappers.
        width: numbers in an observation.
    """

    def __init__(self, env: Any, width: int) -> None:
        self.env, self.width = env, width

    @staticmethod
    def fits(env: Any) -> bool:
        """Whether an environment is of the family."""
        raise NotImplementedError

    def put(self, obs: np.ndarray) -> np.ndarray | None:
        """Into the state of an observation (O,); returns the observation there, None if the state is not known."""
        raise NotImplementedError

    def settle(self, options: Mapping[str, Any]) -> bool:
        """Set what the options of a reset say and no observation does; returns whether rewards are then known."""
        return True


class PointMaze(StateSetter):
    """Mazes of gymnasium-robotics, whose observation is place and velocity of the point."""

    @staticmethod
    def fits(env: Any) -> bool:
        return hasattr(env, "point_env")

    def put(self, obs: np.ndarray) -> np.ndarray | None:
        inner = self.env.point_env
        split = inner.model.nq
        inner.set_state(obs[:split], obs[split:])
        return inner._get_obs()[0]

    def settle(self, options: Mapping[str, Any]) -> bool:
        if "goal_cell" not in options:
            return False
        # its centre, as in the data; a reset moves it at random
        self.env.goal = self.env.maze.cell_rowcol_to_xy(np.asarray(options["goal_cell"]))
        return True


class Robot(StateSetter):
    """Walking robots of gymnasium, whose observation leaves out up to two coordinates of their place."""

    @staticmethod
    def fits(env: Any) -> bool:
        return all(hasattr(env, name) for name in ("set_state", "model", "_get_obs"))

    def put(self, obs: np.ndarray) -> np.ndarray | None:
        split, hidden = self.env.model.nq, self.env.model.nq + self.env.model.nv - self.width
        if not 0 <= hidden <= 2:
            return None
        full = np.concatenate([np.zeros(hidden), obs])
        self.env.set_state(full[:split], full[split:])
        return self.env._get_obs()


class Pendulum(StateSetter):
    """Gymnasium's pendulum, whose observation is cosine, sine and velocity of the angle."""

    @staticmethod
    def fits(env: Any) -> bool:
        return type(env).__name__ == "PendulumEnv"

    def put(self, obs: np.ndarray) -> np.ndarray | None:
        self.env.state = np.array([np.arctan2(obs[1], obs[0]), obs[2]])
        return self.env._get_obs()


FAMILIES: tuple[type[StateSetter], ...] = (PointMaze, Robot, Pendulum)


def state_setter(env: Any, width: int) -> StateSetter | None:
    """What puts an environment into states; None for one of no known family."""
    family = next((one for one in FAMILIES if one.fits(env)), None)
    return None if family is None else family(env, width)
