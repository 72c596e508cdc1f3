"""From returns to scores, and what a score was measured in."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import ndtri, stdtrit

from offpolicy.errors import UsageError

if TYPE_CHECKING:  # it imports environments, and pictures of runs want scores alone
    from offpolicy.evaluation.rollout import EvalResult

FEWEST = 3  # seeds for an interval of their mean


def normalized_score(returns: np.ndarray | float, ref_min: float, ref_max: float) -> np.ndarray:
    """100 · (R - min) / (max - min) of undiscounted, untransformed returns (D4RL, arXiv:2004.07219).

    The factor 100 is the papers'; the `d4rl` package itself leaves it out.

    Raises:
        UsageError: not ref_min < ref_max.
    """
    if not ref_min < ref_max:
        raise UsageError(
            f"The reference scores are {ref_min} and {ref_max}; expected the smaller first. "
            "Correct `ref_min_score` and `ref_max_score` of the data."
        )
    return 100.0 * (np.asarray(returns, np.float64) - ref_min) / (ref_max - ref_min)


def summarize(result: EvalResult, meta: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one evaluation.

    Returns:
        `return_mean`, `return_std`, `length_mean`; `score` and `score_std` (0-100 scale) when `meta` has
        `ref_min_score` and `ref_max_score`, never a guess; `success_rate` in [0, 1] when the environment reports it.
        "std" is the standard deviation over episodes (divisor n), not the uncertainty of the mean: that is
        :func:`interval`. With tasks instead `success_mean` and `success_task1` … in [0, 1], `success_interval` (half
        of :func:`wilson`'s 95 % interval of the mean) and `score`, the mean in per cent.
    """
    numbers = {
        "return_mean": float(result.returns.mean()),
        "return_std": float(result.returns.std()),
        "length_mean": float(result.lengths.mean()),
    }
    if has_score(meta):
        scores = normalized_score(result.returns, meta["ref_min_score"], meta["ref_max_score"])
        numbers |= {"score": float(scores.mean()), "score_std": float(scores.std())}
    if result.task is not None and result.success is not None:
        mean = float(result.success.mean())
        each = {f"success_task{k}": float(result.success[result.task == k].mean()) for k in np.unique(result.task)}
        half = wilson(int(result.success.sum()), len(result.success))
        numbers |= {"success_mean": mean, **each, "success_interval": half, "score": 100.0 * mean}
    elif result.success is not None:
        numbers["success_rate"] = float(result.success.mean())
    return numbers


def wilson(successes: int, episodes: int, level: float = 0.95) -> float:
    """Half the width of Wilson's interval of a success rate (95 % unless told), for independent episodes.

    Never 0, not even for 0 or all of n; over tasks of unequal difficulty it is a little too wide.
    """
    z, rate = float(ndtri(0.5 + level / 2)), successes / episodes
    return z / (1 + z * z / episodes) * float(np.sqrt(rate * (1 - rate) / episodes + (z / (2 * episodes)) ** 2))


def interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> float:
    """Half the width of Student's t interval of the mean (95 % unless told), for independent episodes or seeds.

    NaN for fewer than two values. Returns far from normal (mostly 0, sometimes 1) need more episodes than ten.
    """
    values = np.asarray(values, np.float64)
    n = values.size
    if n < 2:
        return float("nan")
    return float(stdtrit(n - 1, 0.5 + level / 2) * values.std(ddof=1) / np.sqrt(n))


def has_score(meta: Mapping[str, Any]) -> bool:
    """Whether the data come with reference scores."""
    return meta.get("ref_min_score") is not None and meta.get("ref_max_score") is not None


def score_kind(meta: Mapping[str, Any]) -> str:
    """What a score of these data is, with the simulator: 'd4rl-normalised, Hopper-v4 on mujoco 3.11.0'.

    Without reference scores there is none, and it starts with 'return'; of tasks it is 'ogbench-success', in per cent.
    """
    kind = str(meta.get("score_kind") or "normalised") if has_score(meta) else "return"
    kind = "ogbench-success" if meta.get("tasks") else kind
    return f"{kind}, {simulator_version(meta['env_id'])}" if meta.get("env_id") else kind


def simulator_note(meta: Mapping[str, Any]) -> str | None:
    """The sentence to show once before training when the simulator is not the one the data come from, else None."""
    if meta.get("source") != "d4rl" or not meta.get("env_id"):
        return None
    simulator = simulator_version(meta["env_id"])
    return (
        f"Scores are approximate: the data were recorded in another simulator than {simulator}, "
        "so compare them with published D4RL numbers with care."
    )


def simulator_version(env_id: str) -> str:
    """The environment and the versions that decide its physics: 'Pendulum-v1 on gymnasium 1.4.0'."""
    import gymnasium

    try:
        entry = gymnasium.spec(env_id.rpartition(":")[2]).entry_point  # the module in front registers it
    except Exception:  # not registered here
        return f"{env_id} (not installed)"
    module = entry.partition(":")[0] if isinstance(entry, str) else getattr(entry, "__module__", "")
    package = module.partition(".")[0]
    if package in ("", "__main__"):
        return env_id  # defined in a script, which has no version
    parts = [package]
    if package == "gymnasium" and ".mujoco" in module:
        parts = ["mujoco"]  # gymnasium's part is fixed by the environment's own version
    elif package in ("gymnasium_robotics", "ogbench"):
        parts = [package, "mujoco"]
    return f"{env_id} on {', '.join(map(_version, parts))}"


def _version(package: str) -> str:
    name = package.replace("_", "-")
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:  # a module of the user's own
        version = getattr(sys.modules.get(package), "__version__", None)
        return f"{package} {version}" if isinstance(version, str) else package
