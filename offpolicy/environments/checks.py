"""What an environment is asked in an evaluation, and a check of what it answers.

Environments are the user's own as often as not: what they raise or return amiss becomes one sentence that names them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from offpolicy.errors import UsageError, described
from offpolicy.given import LARGEST

RESET = "reset(seed=…, options=…) to return (observation, info), as in gymnasium"
STEP = "step(action) to return (observation, reward, terminated, truncated, info), as in gymnasium"
REMEDY = "Correct the environment, or train without evaluation: --run.eval_episodes=0."


class EnvironmentFailed(UsageError):
    """An environment raised an error, or returned what it must not."""


class Episode:
    """One episode in an environment, with checked answers.

    Args:
        env: of gymnasium.
        env_id: its name in messages.
        number: of the episode, from 0.
        seed: of its reset.
        keys: paths to the parts of a dict observation that count, in order; none for an observation of one part.
        width: numbers in an observation.

    All methods raise :class:`EnvironmentFailed` when the environment raises an error or answers in another form.

    Attributes:
        terminated: whether the newest step ended the episode by itself, not by a time limit alone.
    """

    remedy = REMEDY
    terminated = False

    def __init__(
        self, env: Any, env_id: str, number: int, seed: int, keys: Sequence[Sequence[str]], width: int
    ) -> None:
        self.env, self.env_id, self.number, self.seed = env, env_id, number, seed
        self.keys, self.width = keys, width
        self.step_number = 0

    def reset(self, options: Mapping[str, Any] | None, out: np.ndarray) -> Mapping[str, Any]:
        """Begin: the observation goes into ``out`` (width,) float32; returns the info."""
        try:
            self.env.action_space.seed(self.seed)  # some resets try a few random actions
            found = self.env.reset(seed=self.seed, options=dict(options) if options else None)
        except (Exception, SystemExit) as error:
            raise self.failed(error, RESET) from error
        if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], (Mapping, type(None))):
            raise self.refuse(f"returned {_form(found)}", RESET)
        self.put(found[0], out)
        return found[1] or {}

    def step(self, action: np.ndarray, out: np.ndarray) -> tuple[float, bool, Mapping[str, Any]]:
        """Reward, whether the episode is over, and info; the observation goes into ``out`` (width,) float32."""
        self.step_number += 1
        try:
            found = self.env.step(action.copy())  # what is stored is what was chosen, whatever it does with its own
        except (Exception, SystemExit) as error:
            raise self.failed(error, STEP) from error
        if not isinstance(found, tuple) or len(found) != 5 or not isinstance(found[4], (Mapping, type(None))):
            raise self.refuse(f"returned {_form(found)}", STEP)
        observation, reward, terminated, truncated, info = found
        value = self.one_number("reward", reward)
        if not abs(value) <= LARGEST:  # NaN too
            raise self.refuse(f"gave the reward {str(value)[:60]}", "a finite number of float32")
        self.put(observation, out)
        self.terminated = self.flag("terminated", terminated)
        over = self.terminated or self.flag("truncated", truncated)
        return value, over, info or {}

    def success(self, info: Mapping[str, Any]) -> bool | None:
        """Whether the environment reports a success, None when it reports nothing."""
        reached = info.get("success", info.get("is_success"))
        if reached is None:
            return None
        value = self.one_number("success", reached)
        if math.isnan(value):
            raise self.refuse("reported the success nan", "true or false")
        return bool(value)

    def flag(self, name: str, value: Any) -> bool:
        """Whether an episode is over by what was returned as ``name``."""
        found = self.one_number(name, value)
        if found not in (0, 1):
            raise self.refuse(f"gave a `{name}` of {found}", "true or false")
        return bool(found)

    def put(self, observation: Any, out: np.ndarray) -> None:
        """Write an observation, its parts side by side, into a row (width,) float32."""
        if type(observation) is np.ndarray and observation.dtype.kind == "f" and observation.size == self.width:
            out[:] = observation.reshape(-1)  # the usual case, without the questions below
        else:
            out[:] = self._numbers(self._parts(observation))

    def check_finite(self, row: np.ndarray) -> None:
        """Refuse an observation (width,) with NaN or an infinite number; apart from :meth:`put`, as it is asked of many
        rows at once."""
        at = np.flatnonzero(~np.isfinite(row))
        if len(at):
            raise self.refuse(f"gave an observation with {row[at[0]]} at place {at[0]}", "finite numbers")

    def _parts(self, observation: Any) -> list[Any]:
        if not self.keys or not isinstance(observation, Mapping):
            return [observation]
        try:
            return [reach(observation, key) for key in self.keys]
        except (KeyError, TypeError, IndexError) as error:
            raise self.refuse(f"gave an observation without {error}", "all parts of its space") from None

    def _numbers(self, parts: list[Any]) -> np.ndarray:
        try:
            arrays = [np.ravel(np.ma.filled(part, np.nan)) for part in parts]  # masked numbers are missing ones
        except Exception as error:  # ragged lists, tensors on another device
            raise self.failed(error, "an observation of numbers") from error
        for array in arrays:
            if array.dtype.kind not in "biuf":
                kind = type(array[0]).__name__ if array.size == 1 else f"array of {array.dtype}"
                raise self.refuse(f"gave an observation of another kind ({kind})", "numbers")
        flat = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        if flat.size != self.width:
            raise self.refuse(f"gave an observation of {flat.size} numbers", f"{self.width}, as its space says")
        return flat

    def one_number(self, name: str, value: Any) -> float:
        """A number or truth value, also in an array or tensor of one element."""
        if isinstance(value, (float, int)):
            return value
        try:
            array = np.asarray(value)
        except Exception as error:  # such as a tensor on another device
            raise self.failed(error, f"one number as `{name}`") from error
        if array.size != 1 or array.dtype.kind not in "biuf":
            shape = f" of shape {array.shape}" if array.ndim else ""
            raise self.refuse(f"gave a `{name}`{shape}: {str(value)[:60]} ({type(value).__name__})", "one number")
        return array.item()

    # -- messages ------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        where = f"step {self.step_number} of" if self.step_number else "the reset of"
        return f"{where} episode {self.number + 1} (seed {self.seed})"

    def refuse(self, found: str, expected: str) -> EnvironmentFailed:
        return EnvironmentFailed(f"{self.env_id} {found} in {self}; expected {expected}. {self.remedy}")

    def failed(self, error: BaseException, expected: str) -> EnvironmentFailed:
        """The error of an environment with its place; ``expected`` is told when the call itself did not fit."""
        misfit = "to unpack" in str(error) or (isinstance(error, TypeError) and "argument" in str(error))
        hint = f"; expected {expected}" if misfit else ""
        return EnvironmentFailed(f"{self.env_id} failed in {self}: {described(error)}{hint}. {self.remedy}")


def reach(tree: Any, key: Sequence[str]) -> Any:
    """The part of a nested dict, or dict space, at a path."""
    for name in key:
        tree = tree[name]
    return tree


def _form(found: Any) -> str:
    """What was returned, in a few words."""
    if isinstance(found, tuple):
        return f"{len(found)} values ({', '.join(type(part).__name__ for part in found)})"
    return f"one value ({type(found).__name__})"
