"""Offline and off-policy reinforcement learning, and preference optimisation, on one replay layer and one Trainer.

Public names are loaded when first used, so ``import offpolicy`` is instant.
"""

from __future__ import annotations

import importlib
from typing import Any

from offpolicy import moved, startup
from offpolicy.version import __version__ as __version__

_NAMES = {
    "DataError": "offpolicy.errors",
    "UsageError": "offpolicy.errors",
    "Replay": "offpolicy.data.replay",
    "Ring": "offpolicy.data.ring",
    "Noise": "offpolicy.data.views",
    "Extra": "offpolicy.data.extras",
    "Transitions": "offpolicy.data.views",
    "TransitionView": "offpolicy.data.views",
    "Windows": "offpolicy.data.views",
    "WindowView": "offpolicy.data.views",
    "DataModule": "offpolicy.data.module",
    "load_data": "offpolicy.api",
    "mixed": "offpolicy.data.mixing",
    "Draw": "offpolicy.training.drawing",
    "Module": "offpolicy.training.module",
    "OfflineModule": "offpolicy.training.offline",
    "Sizes": "offpolicy.data.sizes",
    "GoalModule": "offpolicy.training.goals",
    "GoalMix": "offpolicy.data.goals",
    "GoalTransitions": "offpolicy.data.goals",
    "GoalView": "offpolicy.data.goals",
    "RunOptions": "offpolicy.training.options",
    "OnlineOptions": "offpolicy.data.online",
    "SyntheticOptions": "offpolicy.data.renewal",
    "TextData": "offpolicy.data.texts.module",
    "LanguageModule": "offpolicy.language.module",
    "PreferenceModule": "offpolicy.language.preference",
    "RolloutModule": "offpolicy.language.rl.rollouts",
    "PairView": "offpolicy.data.texts.sequences",
    "SingleView": "offpolicy.data.texts.sequences",
    "FitResult": "offpolicy.api",
    "load": "offpolicy.training.opening",
    "recipe": "offpolicy.recipes",
}
moved.install()
startup.install_late_finder()
_COMMANDS = ("fit", "evaluate", "sample")  # modules behind `python -m`, callable as functions


def __getattr__(name: str) -> Any:
    if name == "__all__":  # asked for by `from offpolicy import *`, which therefore loads everything
        return __dir__()
    if name in _COMMANDS:
        return importlib.import_module(f"offpolicy.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name[0].isupper():  # methods; anything else is a submodule that the import system finds
        from offpolicy.registry import find_method

        method = find_method(name)
        if method is not None:
            return method
    raise AttributeError(f"module 'offpolicy' has no attribute '{name}'")


def __dir__() -> list[str]:
    from offpolicy.registry import method_names

    return sorted([*_NAMES, *_COMMANDS, *method_names()])
