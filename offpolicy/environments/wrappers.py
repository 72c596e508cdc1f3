"""Wrappers that data were recorded through, as a Minari set lists them: an evaluation plays through them again.

A file names them, so a wrapper is imported only from gymnasium and from packages that the user trusts.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from offpolicy.errors import DataError, UsageError, described
from offpolicy.trust import trusts

OWN = "gymnasium.wrappers"
UNSEEN = {  # they show, record or check, and change nothing that is played
    "RecordVideo", "RecordEpisodeStatistics", "HumanRendering", "RenderCollection", "AddWhiteNoise", "ObstructView",
    "Autoreset", "OrderEnforcing", "PassiveEnvChecker",
}  # fmt: skip
WITH_MEMORY = {"NormalizeObservation", "NormalizeReward"}  # they keep statistics, which no file of data holds


class NoEnvironment(UsageError):
    """There is nothing to evaluate in: no environment is known, or its package is not installed."""


def wrappers_of(spec: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The wrappers in an environment's specification, innermost first: ``entry_point`` and ``kwargs`` of each.

    Raises:
        DataError: they are in no form that gymnasium writes.
    """
    found: list[dict[str, Any]] = []
    listed = spec.get("additional_wrappers") or []
    for one in listed if isinstance(listed, list) else [listed]:
        point = one.get("entry_point") if isinstance(one, Mapping) else None
        kwargs = (one.get("kwargs") or {}) if isinstance(one, Mapping) else None
        if not isinstance(point, str) or not isinstance(kwargs, Mapping):
            raise DataError(
                f"{where}: `additional_wrappers` of the environment holds {str(one)[:100]}; expected entry_point and "
                "kwargs. Correct the metadata."
            )
        if _name(point) not in UNSEEN:
            found.append({"entry_point": point, "kwargs": dict(kwargs)})
    return found


def obstacle(wrappers: Sequence[Mapping[str, Any]]) -> str:
    """Why an environment cannot be played through these wrappers; empty when it can."""
    for one in wrappers:
        point = one["entry_point"]
        package = point.partition(":")[0].partition(".")[0]
        if _is_gymnasiums(point):
            if _name(point) in WITH_MEMORY:
                return f"was recorded through {_name(point)}, whose running statistics the data do not hold"
        elif not trusts(point.replace(":", ".")):
            return (
                f"was recorded through the wrapper {point}, and making it would run the code of {package}; if you "
                f"trust it, pass --trust {package} (in Python trust='{package}')"
            )
    return ""


def wrapped(env: Any, wrappers: Sequence[Mapping[str, Any]], env_id: str) -> Any:
    """The environment in its wrappers, for which there is no :func:`obstacle`.

    Raises:
        NoEnvironment: one of them cannot be made.
    """
    try:
        return _wrapped(env, wrappers)
    except Exception as error:
        raise NoEnvironment(
            f"{env_id} was recorded through {names(wrappers)} and cannot be made so here ({described(error)}): returns "
            "and scores are not measured."
        ) from error


def _wrapped(env: Any, wrappers: Sequence[Mapping[str, Any]]) -> Any:
    import gymnasium

    for one in wrappers:
        module, _, name = one["entry_point"].partition(":")
        cls = getattr(importlib.import_module(module), name)
        own = _is_gymnasiums(one["entry_point"])
        if not (isinstance(cls, type) and issubclass(cls, gymnasium.Wrapper)) or (
            own and not cls.__module__.startswith(OWN)
        ):
            raise ValueError(f"{one['entry_point']} is no wrapper of environments")
        env = cls(env=env, **one["kwargs"])
    return env


def names(wrappers: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(_name(one["entry_point"]) for one in wrappers)


def _name(point: str) -> str:
    return point.rpartition(":")[2]


def _is_gymnasiums(point: str) -> bool:
    module, _, name = point.partition(":")
    return (module == OWN or module.startswith(f"{OWN}.")) and name.isidentifier()
