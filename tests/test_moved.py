"""Import paths of earlier versions lead to where their names are now."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

import offpolicy as op
from offpolicy.moved import MOVED


@pytest.mark.parametrize("old", sorted(MOVED))
def test_every_old_module_opens(old: str) -> None:
    module: Any = importlib.import_module(old)
    for new in MOVED[old]:
        own = importlib.import_module(new)
        for name, value in vars(own).items():
            if not name.startswith("_") and getattr(value, "__module__", None) == new:
                assert getattr(module, name) is value, f"{old}.{name}"


def test_a_module_that_became_several_can_be_looked_into() -> None:
    """As torch does with every module when it is imported after one of these."""
    modules = importlib.import_module("offpolicy.modules")
    assert modules.Sizes is op.Sizes and modules.OfflineModule is op.OfflineModule
    assert (
        not hasattr(modules, "__file__") and not hasattr(modules, "nothing") and inspect.getmodule(modules) is modules
    )
