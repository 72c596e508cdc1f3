"""Environments of gymnasium as data name them: made without a display, asked for their spaces, and closed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offpolicy.environments.wrappers import NoEnvironment, obstacle, wrapped, wrappers_of
from offpolicy.errors import UsageError, described
from offpolicy.trust import REFUSED, environment_refusal

log = logging.getLogger(__name__)

EVAL_SEED = 10_000  # of the first episode that is played, unless another is asked for

# Environment ids that a package of ours-to-install registers when it is imported: pattern, module, extra.
PACKAGES = (
    (r"(PointMaze|AntMaze|Adroit|FrankaKitchen|Fetch|Hand)", "gymnasium_robotics", "robotics"),
    (r"(pointmaze|antmaze|humanoidmaze|antsoccer|cube|scene|puzzle|powderworld)", "ogbench", "ogbench"),
)


def make_environment(meta: Mapping[str, Any]) -> Any:
    """The environment that `meta` names, without a display.

    Raises:
        NoEnvironment: it cannot be had here; the message names the extra to install where one is missing.
        UsageError: it refuses `env_kwargs`.
    """
    import gymnasium

    env_id = meta.get("env_id")
    if meta.get(REFUSED):
        text = environment_refusal(meta[REFUSED])
        raise NoEnvironment(f"{text[0].upper()}{text[1:]}.")
    if not env_id:
        raise NoEnvironment(
            "The data name no environment, and no --data.env_id (`module:Id` of your own) does: returns and scores are "
            "not measured."
        )
    if not isinstance(env_id, str):
        raise UsageError(
            f"`env_id` is an object ({type(env_id).__name__}); expected the id of an environment, which runs can keep. "
            'Register the class, gymnasium.register("Mine-v0", Mine), and pass the id: "Mine-v0", or "module:Mine-v0".'
        )
    wrappers = wrappers_of({"additional_wrappers": meta.get("env_wrappers")}, env_id)
    hindered = obstacle(wrappers)
    if hindered:
        raise NoEnvironment(f"{env_id} {hindered}: returns and scores are not measured.")
    kwargs = {k: v for k, v in (meta.get("env_kwargs") or {}).items() if k != "render_mode"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "v4 is out of date": the version is chosen to match the data
        package = next(((m, extra) for p, m, extra in PACKAGES if re.match(p, env_id)), None)
        if package and env_id not in gymnasium.registry:
            if importlib.util.find_spec(package[0]) is None:
                raise _missing(env_id, package[0], package[1])
            with contextlib.suppress(ImportError):  # then gymnasium's own message says what is wrong
                importlib.import_module(package[0])
        try:
            steps = meta.get("max_episode_steps")
            env = gymnasium.make(env_id, max_episode_steps=steps, disable_env_checker=True, **kwargs)
            return wrapped(_repeatable(env), wrappers, env_id)
        except NoEnvironment:
            raise
        except TypeError as error:
            raise UsageError(f"{env_id} refuses `env_kwargs` {kwargs}: {error}. Correct the data's meta.") from error
        except (Exception, SystemExit) as error:
            if "mujoco" in str(error).lower() and importlib.util.find_spec("mujoco") is None:
                raise _missing(env_id, "mujoco", package[1] if package else "mujoco") from error
            reason = str(error.args[0] if error.args else "").strip().split("\n", 1)[0] or type(error).__name__
            if ":" not in env_id and env_id not in gymnasium.registry:
                reason = f"{reason.rstrip('.')}; one of your own is named module:Id, after the module that registers it"
            raise NoEnvironment(
                f"{env_id} cannot be made here ({reason.rstrip('.')}): returns and scores are not measured."
            ) from error


def _repeatable(env: Any) -> Any:
    """The environment with one action space, where it makes a new one (unseeded) whenever it is asked for it."""
    inner = env.unwrapped
    if inner.action_space is not inner.action_space:
        inner.__class__ = type(type(inner).__name__, (type(inner),), {"action_space": inner.action_space})
    return env


def _missing(env_id: str, module: str, extra: str) -> NoEnvironment:
    return NoEnvironment(
        f"{env_id} needs {module}, which is not installed: returns and scores are not measured. "
        f"Install it with: pip install 'offpolicy[{extra}]'."
    )


def spaces_of(env: Any, env_id: str) -> tuple[Any, Any]:
    """Its action space, a Box or Discrete, and its observation space.

    Raises:
        UsageError: it has none, or actions of another kind.
    """
    from gymnasium import spaces

    try:
        action, observation = env.action_space, env.observation_space
    except AttributeError as error:
        raise UsageError(
            f"{env_id} does not say its spaces: {error}. Set `action_space` and `observation_space`."
        ) from error
    for name, space, kinds in (
        ("action", action, (spaces.Box, spaces.Discrete)),
        ("observation", observation, (spaces.Space,)),
    ):
        if not isinstance(space, kinds):
            raise UsageError(
                f"{env_id} has the {name} space {space}; expected a Box, as in the data. Correct `env_id` of the data, "
                "or leave it out to train without evaluation."
            )
    return action, observation


def close_environment(env: Any) -> None:
    """Close an environment and remove the description of it that mazes leave in the temporary folder."""
    inner = env.unwrapped
    left = getattr(inner, "fullpath", None) or getattr(inner, "tmp_xml_file_path", None)
    try:
        env.close()
    except (Exception, SystemExit) as error:  # what was measured counts all the same
        log.warning("%s could not be closed: %s", getattr(env.spec, "id", "the environment"), described(error))
    if left and Path(left).parent == Path(tempfile.gettempdir()):
        Path(left).unlink(missing_ok=True)
