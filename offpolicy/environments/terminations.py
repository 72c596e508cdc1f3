"""When episodes of known environments end, as functions of what is observed: models of the dynamics do not know."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Termination = Callable[[Tensor, Tensor, Tensor], Tensor]  # (obs, action, next_obs) of n steps → bool (n,)


def hopper_falls(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    """Unless it stands higher than 0.7, leans by less than 0.2 and every other number is below 100, (n,) bool."""
    height, angle, rest = next_obs[:, 0], next_obs[:, 1], next_obs[:, 1:]
    stands = (height > 0.7) & (angle.abs() < 0.2) & (rest.abs() < 100.0).all(1) & next_obs.isfinite().all(1)
    return ~stands


def walker_falls(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    """Unless its height is between 0.8 and 2 and it leans by less than 1, (n,) bool."""
    height, angle = next_obs[:, 0], next_obs[:, 1]
    return ~((height > 0.8) & (height < 2.0) & (angle.abs() < 1.0))


RULES: dict[str, tuple[int, Termination]] = {  # name of the environment: width of its observation, and the rule
    "hopper": (11, hopper_falls),
    "walker2d": (17, walker_falls),
}
NEVER = ("halfcheetah", "pendulum", "swimmer", "reacher")  # environments that only a time limit ends


def termination_of(meta: Mapping[str, Any], obs_dim: int) -> tuple[Termination | None, str]:
    """The rule by which episodes of an environment end, None for never, and a sentence's end that says so.

    Args:
        meta: of the data: the environment, or else the name of the data, tells which it is.
        obs_dim: O of the data. Observations of another width than the rule knows are another environment's.
    """
    name = str(meta.get("env_id") or meta.get("name") or "the environment")
    heads = [re.split(r"[-_ ]", part)[0] for part in reversed(name.lower().split("/"))]
    family = next((head for head in heads if head in RULES or head in NEVER), heads[0])
    if family != heads[0]:  # "mujoco/hopper/medium-v0"
        name = f"{family}, which the name {name} says"
    changed = [key for key in meta.get("env_kwargs") or {} if "healthy" in key]
    if family in NEVER:
        return None, f"end by no rule, as those of {name} do not"
    width, rule = RULES.get(family, (0, None))
    if rule is None or changed or width != obs_dim:
        why = f"it is made with `{changed[0]}`" if rule and changed else ""
        why = why or (f"its observations have {obs_dim} numbers and not {width}" if rule else "")
        return None, f"never end: no rule is known for {name}" + (f", as {why}" if why else "")
    return rule, f"end by the rule of {name}"
