"""Spaces of observations and actions: what an environment's say about the data, which bounds count, and which data a
method can train on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from offpolicy.data.columns import is_float
from offpolicy.data.replay import Replay
from offpolicy.errors import DataError, UsageError

UNBOUNDED = 1e18  # bounds from here on are stand-ins for none, as the largest float is: float32 cannot square them


def known_bounds(low: Any, high: Any, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Bounds as float64 (A,), with infinity where there is none.

    Args:
        low, high: numbers or (A,); infinite and very large ones stand for no bound.
        width: A, where numbers are allowed.

    Raises:
        UsageError: they do not fit, are NaN, or cross.
    """
    try:
        low, high = (np.asarray(b, dtype=np.float64).reshape(-1) for b in (low, high))
        if width is not None:
            low, high = (np.broadcast_to(b, (width,)) for b in (low, high))
    except (TypeError, ValueError):
        raise UsageError(
            f"the action bounds are {_short(low)} and {_short(high)}; expected "
            + ("numbers." if width is None else f"one number, or {width} (the width of the actions), for each.")
        ) from None
    if low.shape != high.shape or np.isnan(low).any() or np.isnan(high).any() or (low > high).any():
        raise UsageError(
            f"the action bounds are {_short(low)} and {_short(high)}; expected as many lowest as highest values, none "
            "of them NaN, and no lowest one above the highest."
        )
    return np.where(low <= -UNBOUNDED, -np.inf, low), np.where(high >= UNBOUNDED, np.inf, high)


def bounds_meta(low: Any, high: Any, whose: str, width: int | None = None) -> dict[str, Any]:
    """What ``meta`` records of bounds: ``action_low`` and ``action_high`` (A,), infinite where there is none, and
    ``action_bounds``: whose they are. Nothing when there is no bound at all."""
    low, high = known_bounds(low, high, width)
    if not np.isfinite(np.concatenate([low, high])).any():
        return {}
    return {"action_low": low.tolist(), "action_high": high.tolist(), "action_bounds": whose}


def environment_facts(env_id: str, env: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the spaces of an environment demand of the data, and what ``meta`` records of them.

    Raises:
        UsageError: actions that are neither a Box nor Discrete.
    """
    action, obs = env.action_space, env.observation_space
    kind = type(action).__name__
    facts: dict[str, Any] = {}
    meta: dict[str, Any] = {}
    if kind == "Discrete" or (hasattr(action, "n") and hasattr(action, "start")):
        facts |= {"action_n": int(action.n), "action_start": int(action.start)}
    elif hasattr(action, "low") and hasattr(action, "high") and getattr(action, "shape", None) is not None:
        facts["action_dim"] = int(np.prod(action.shape))
        meta |= bounds_meta(action.low, action.high, "environment")
    else:
        raise UsageError(
            f"{env_id} has {kind} actions; expected a Box (numbers) or Discrete ones, as no method here trains on "
            "others. Choose another environment, or wrap it so that its actions are a Box."
        )
    if len(getattr(obs, "shape", None) or ()) == 1:
        facts["obs_dim"] = int(obs.shape[0])
    return facts, meta


def check_suits(replay: Replay, method: str, *, discrete: bool = False, images: bool = False) -> None:
    """Check that a method can train on the kinds of observations and actions in a replay.

    Args:
        replay: steps of an environment.
        method: its name, for the message.
        discrete: it declares that it takes discrete actions.
        images: it declares that it takes observations of any shape and type.

    Raises:
        DataError: it cannot; says why.
    """
    if not {"obs", "action"} <= replay.steps.keys():
        return  # answered where the sizes are read
    obs, action, name = replay.steps["obs"], replay.steps["action"], replay.meta.get("name", "the replay")
    shape = tuple(obs.shape[1:])
    check_some_numbers(str(name), obs, action)
    if not discrete and ("action_n" in replay.meta or not is_float(action)):
        count = replay.meta.get("action_n")
        what = f"{count} discrete actions" if count else f"discrete actions ({action.dtype} {tuple(action.shape)})"
        raise DataError(
            f"{name} has {what}, which {method} would take for real numbers; expected float actions of shape (N, A). "
            "Choose data with continuous actions; if these are numbers, store them as floats or pass their "
            "environment (`env_id`) or their bounds (`action_low`, `action_high`)."
        )
    if action.ndim != 2:
        raise DataError(f"{name} has actions of shape {tuple(action.shape)}; expected (N, A). Flatten them per step.")
    if images:
        return
    if obs.ndim != 2:
        kind = "images" if len(shape) >= 2 and str(obs.dtype).endswith("uint8") else "stacked or structured"
        raise DataError(
            f"{name} has observations of shape {shape} a step ({kind}), and {method} takes vectors; expected (N, O). "
            "Choose state-based data, or flatten or encode the observations first: "
            "`obs.reshape(len(obs), -1).astype('float32')`."
        )
    if not is_float(obs):
        raise DataError(
            f"{name} has observations of type {obs.dtype}, which are not standardised; expected float32. Cast them."
        )


def check_some_numbers(where: str, obs: Any, action: Any) -> None:
    """Refuse observations or actions without a number in them."""
    for name, column in (("observations", obs), ("actions", action)):
        if 0 in tuple(column.shape[1:]):
            remedy = "Pass a constant column where there is no state." if name == "observations" else "Pass them."
            raise DataError(
                f"{where}: the {name} have shape {tuple(column.shape)}, so there is no number in them; expected at "
                f"least one a step. {remedy}"
            )


def scale_bounds(meta: Mapping[str, Any], action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bounds that actions are scaled by, float64 (A,) each: those of ``meta``, and where they are the data's or
    there is none, the smallest and largest of ``action`` (n, A)."""
    low, high = meta.get("action_low"), meta.get("action_high")
    smallest, largest = action.min(0).astype(np.float64), action.max(0).astype(np.float64)
    if low is None or high is None or meta.get("action_bounds") == "data":
        return smallest, largest
    low, high = known_bounds(low, high)
    below, above = np.where(np.isfinite(low), low, smallest), np.where(np.isfinite(high), high, largest)
    return np.minimum(below, above), above


def _short(values: Any) -> str:
    text = str(values.tolist() if hasattr(values, "tolist") else values)
    return text if len(text) <= 80 else f"{text[:77]}…"
