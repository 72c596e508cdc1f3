"""Offline and off-policy reinforcement learning, and preference optimisation, on one replay layer and one Trainer.

Public names are loaded when first used, so ``import offpolicy`` is instant.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "DataError": "offpolicy.errors",
    "UsageError": "offpolicy.errors",
    "Replay": "offpolicy.data.replay",
    "Ring": "offpolicy.data.replay",
    "Noise": "offpolicy.data.views",
    "Transitions": "offpolicy.data.views",
    "TransitionView": "offpolicy.data.views",
    "Windows": "offpolicy.data.views",
    "WindowView": "offpolicy.data.views",
    "DataModule": "offpolicy.data.module",
    "load_data": "offpolicy.data.module",
    "Draw": "offpolicy.modules",
    "Module": "offpolicy.modules",
    "OfflineModule": "offpolicy.modules",
    "Sizes": "offpolicy.modules",
    "RunOptions": "offpolicy.options",
    "load": "offpolicy.api",
}


def __getattr__(name: str) -> Any:
    if name == "fit":  # both the module behind `python -m offpolicy.fit` and, being callable, the function
        return importlib.import_module("offpolicy.fit")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if not name.startswith("_"):
        from offpolicy.registry import find_method

        method = find_method(name)
        if method is not None:
            return method
    raise AttributeError(f"module 'offpolicy' has no attribute '{name}'")


def __dir__() -> list[str]:
    from offpolicy.registry import method_names

    return sorted([*_NAMES, "fit", *method_names()])
