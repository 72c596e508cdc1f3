"""Names of methods → classes, without importing any method before it is asked for."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from offpolicy.errors import UsageError, fold, nearest


def method_table() -> dict[str, str]:
    """Every known method: name → ``module:Class``, ours and those of other packages."""
    package = importlib.import_module("lightning_modules")
    if not getattr(package, "__offpolicy__", False):
        ours = importlib.import_module("offpolicy").__path__[0]
        raise ImportError(
            f"`lightning_modules` was imported from {getattr(package, '__path__', ['?'])[0]}, which is not the package "
            f"that belongs to offpolicy ({ours}). Remove the other distribution or put this one first on the path."
        )
    table = {name: f"lightning_modules.{module}:{name}" for name, module in package.METHODS.items()}
    for point in entry_points(group="offpolicy.methods"):
        table.setdefault(point.name, point.value)
    return table


def method_names() -> list[str]:
    return sorted(method_table())


def method_key(name: str) -> str | None:
    """The table's spelling of a name, whatever its case, '-', '_' and '+'; None when there is none."""
    return next((known for known in method_table() if fold(known) == fold(name)), None)


def find_method(name: str) -> Any:
    """The class of a method in the table, or None."""
    key = method_key(name)
    if key is None:
        return None
    module, _, attribute = method_table()[key].partition(":")
    return getattr(importlib.import_module(module), attribute)


def resolve_method(name: str) -> Any:
    """The class of a method, by name or by import path ``package.module.Class``.

    Raises:
        UsageError: there is none; names the nearest one.
    """
    found = find_method(name)
    if found is not None:
        return found
    module, _, attribute = name.rpartition(".")
    if module:
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"`model` is {name!r}: {error}. Pass the import path package.module.Class.") from None
    raise UsageError(
        f"no method is called '{name}'; expected one of {', '.join(method_names())}, or an import path "
        f"package.module.Class.{nearest(name, method_names())}"
    )
