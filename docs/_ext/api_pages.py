"""The API reference: every public name of :mod:`offpolicy`, from its docstring."""

from __future__ import annotations

import inspect

import rst

import offpolicy
from offpolicy.registry import method_names

CALLS = {"fit": "offpolicy.api.fit", "evaluate": "offpolicy.api.evaluate", "sample": "offpolicy.api.sample"}
GROUPS = {
    "training": ("Train, load, evaluate", "fit load_data load evaluate sample recipe mixed FitResult RunOptions"),
    "data": (
        "Data",
        "Replay Ring DataModule TextData OnlineOptions SyntheticOptions Sizes",
    ),
    "batches": (
        "Batches and views",
        "TransitionView Transitions WindowView Windows GoalView GoalTransitions GoalMix Extra Noise Draw PairView"
        " SingleView",
    ),
    "modules": ("Bases of methods", "Module OfflineModule GoalModule LanguageModule PreferenceModule RolloutModule"),
    "errors": ("Errors", "DataError UsageError"),
}
MODULES = {
    "losses": (
        "Losses",
        "Pure functions of tensors, without a Trainer. Parts of the policy-gradient objective have "
        ":doc:`pages of their own </objectives/index>`.",
        ("td", "goal", "dice", "preference", "diffusion", "policy_gradient", "tokens", "answers"),
    ),
}


def directive(name: str) -> str:
    """How one name is documented."""
    if name in CALLS:
        thing = CALLS[name]
        return f".. py:currentmodule:: offpolicy\n\n.. autofunction:: {thing}\n"
    thing = getattr(offpolicy, name)
    where = f"{thing.__module__}.{thing.__qualname__}" if hasattr(thing, "__qualname__") else f"offpolicy.{name}"
    if not inspect.isclass(thing):
        return f".. autofunction:: {where}\n"
    return f".. autoclass:: {where}\n   :members:\n"


def group(title: str, names: list[str]) -> str:
    parts = [rst.heading(title, "=")]
    for name in names:
        parts += [rst.heading(f"offpolicy.{name}", "-"), directive(name)]
    return "\n".join(parts)


def losses(title: str, words: str, modules: tuple[str, ...]) -> str:
    parts = [rst.heading(title, "="), words, ""]
    for name in modules:
        parts += [
            rst.heading(f"offpolicy.losses.{name}", "-"),
            f".. automodule:: offpolicy.losses.{name}\n   :members:\n",
        ]
    return "\n".join(parts)


def groups() -> dict[str, tuple[str, list[str]]]:
    """File → title and names. A public name that no group has yet is on a page of its own kind."""
    found = {file: (title, names.split()) for file, (title, names) in GROUPS.items()}
    shown = {name for _, names in found.values() for name in names}
    public = set(dir(offpolicy)) - set(method_names())
    if gone := sorted(shown - public):
        raise ValueError(f"GROUPS in docs/_ext/api_pages.py has {gone}, which are no public names of offpolicy")
    return found | ({"others": ("Other names", sorted(public - shown))} if public - shown else {})


def pages() -> dict[str, str]:
    """File name → page."""
    grouped = groups()
    made = {file: group(title, names) for file, (title, names) in grouped.items()}
    made |= {file: losses(*what) for file, what in MODULES.items()}
    rows = [
        [f":doc:`{title} <{file}>`", ", ".join(f"``{name}``" for name in names)]
        for file, (title, names) in grouped.items()
    ]
    rows += [
        [f":doc:`{title} <{file}>`", ", ".join(f"``offpolicy.losses.{name}``" for name in modules)]
        for file, (title, _, modules) in MODULES.items()
    ]
    rows.append([":doc:`Methods </methods/index>`", "one class each, such as ``offpolicy.IQL``"])
    index = [
        rst.heading("API reference", "="),
        "Public names are attributes of ``offpolicy``, loaded when first used. Tensors have the shapes that are given "
        "in brackets; axes are counted from the right: batch −1, ensemble −2, seeds in front.\n",
        rst.table(["page", "names"], rows),
        ".. toctree::\n   :hidden:\n\n" + "".join(f"   {file}\n" for file in made),
    ]
    return made | {"index": "\n".join(index)}
