"""Settings per method and task, shipped as YAML in ``lightning_modules/recipes/<method>/<name>.yaml``.

A recipe says which tasks it is for (shell patterns) and gives every value a source: ``published`` with the place it
was taken from, or ``ours`` with the reason. Keys are written as on the command line::

    tasks: [antmaze-*]
    published:
      source: CORL, arXiv:2210.07105 ...
      settings: {model.expectile: 0.9, trainer.max_steps: 1000000}
    ours:
      reason: ...
      settings: {run.threads: 1}
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

import yaml

from offpolicy.errors import UsageError, fold, known_as, nearest


@dataclass(frozen=True)
class Recipe:
    """Settings of one method for some tasks.

    Attributes:
        name: ``method/file`` without its ending.
        tasks: shell patterns on the name of the data; none for a recipe that is only used when asked for.
        settings: dotted key → value, ``model.…``, ``trainer.…``, ``run.…`` or ``data.…``.
        origin: where values come from: "published (…)" or "ours (…)" → its keys.
    """

    name: str
    tasks: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def group(self, name: str) -> dict[str, Any]:
        """The settings of one group by their short names: ``recipe.group("model")["alpha"]``."""
        return {key.partition(".")[2]: v for key, v in self.settings.items() if key.startswith(f"{name}.")}

    def specificity(self, task: str) -> int:
        """Letters of the longest pattern that matches the task (an exact name has most); −1 when none does.

        A set of a policy trained here, "hopper-medium-made-v0", has the recipe of the D4RL set that it is named after.
        """
        names = {task.lower(), re.sub("-made-v0$", "-v2", task.lower())}
        matching = [pattern for pattern in self.tasks if any(fnmatchcase(name, pattern.lower()) for name in names)]
        return max((len(re.sub("[*?]", "", pattern)) for pattern in matching), default=-1)


def recipe(method: str, task: str) -> Recipe | None:
    """The recipe of a method for a task: the one with the most specific pattern, or None.

    Args:
        method: name of the method, e.g. "TD3BC".
        task: name of the data, e.g. "hopper-medium-v2".
    """
    found = [(one.specificity(task), one.name, one) for one in recipes(method)]
    best = max(found, default=(-1, "", None), key=lambda item: item[:2])
    return best[2] if best[0] >= 0 else None


def named_recipe(method: str, name: str) -> Recipe:
    """The recipe in ``<method>/<name>.yaml``. Raises :class:`UsageError` with the nearest name."""
    known = {one.name.rpartition("/")[2]: one for one in recipes(method)}
    key = known_as(name, known)
    if key is None:
        names = ", ".join(known) or "none"
        raise UsageError(
            f"`recipe` is '{name}'; expected auto, none or one of the recipes of {method} ({names})."
            f"{nearest(name, known)}"
        )
    return known[key]


def recipes(method: str | None = None) -> Iterator[Recipe]:
    """All recipes, of one method or of all."""
    for folder in sorted(_root().iterdir(), key=lambda f: f.name) if _root().is_dir() else ():
        if folder.is_dir() and (method is None or fold(folder.name) == fold(method)):
            for file in sorted(folder.iterdir(), key=lambda f: f.name):
                if file.name.endswith(".yaml"):
                    yield parse_recipe(f"{folder.name}/{file.name.removesuffix('.yaml')}", file.read_text("utf-8"))


def parse_recipe(name: str, text: str) -> Recipe:
    """Read a recipe. Raises :class:`UsageError` when it is not in the form above or gives a key twice."""
    raw = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the one in C is ten times as fast
    settings: dict[str, Any] = {}
    origin: dict[str, tuple[str, ...]] = {}
    for section, note in (("published", "source"), ("ours", "reason")):
        part = raw.get(section)
        if part is None:
            continue
        if set(part) != {note, "settings"} or set(part["settings"]) & set(settings):
            raise UsageError(f"recipe {name}: `{section}` needs `{note}` and `settings`, and no key twice.")
        settings |= part["settings"]
        origin[f"{section} ({part[note]})"] = tuple(part["settings"])
    if set(raw) - {"tasks", "published", "ours"} or not settings:
        raise UsageError(f"recipe {name} has {sorted(raw)}; expected tasks, and published or ours.")
    return Recipe(name, tuple(raw.get("tasks") or ()), settings, origin)


def _root() -> Traversable:
    return files("lightning_modules").joinpath("recipes")
