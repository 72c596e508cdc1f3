"""A quicker start: the package torchmetrics is loaded when somebody uses it, and not because Lightning names it.

Lightning imports two of its classes, ``Metric`` and ``MetricCollection``. Their package loads all of its metrics first,
and with them transformers, scipy.signal and more: a third of the time to the first update. Here ``import torchmetrics``
gives the two classes alone. The first use of any other name loads the package as it always was.
"""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import version
from types import ModuleType
from typing import Any

NAME = "torchmetrics"
# what Lightning takes at its start → the modules that hold it, in the order in which they can be imported
FOUND_IN = {
    "Metric": (f"{NAME}.utilities", f"{NAME}.metric"),
    "MetricCollection": (f"{NAME}.utilities", f"{NAME}.collections"),
}
LOCK = threading.RLock()


class LatePackage(ModuleType):
    """The package before anybody has used more of it than Lightning does."""

    def __getattr__(self, name: str) -> Any:
        if name in FOUND_IN:
            return getattr([importlib.import_module(module) for module in FOUND_IN[name]][-1], name)
        if name.startswith("__") and name != "__all__":  # asked for by the import system itself
            raise AttributeError(f"module '{NAME}' has no attribute '{name}'")
        with LOCK:
            if type(self) is LatePackage and not vars(self).get("_loading"):
                self._loading = True
                try:
                    self.__spec__.loader.real.exec_module(self)  # type: ignore[union-attr]
                    self.__class__ = ModuleType  # type: ignore[assignment]
                finally:
                    del self._loading
        if name in vars(self):
            return vars(self)[name]
        raise AttributeError(f"module '{NAME}' has no attribute '{name}'")


class LateLoader(Loader):
    """Puts off what a package does when it is imported.

    Args:
        real: the loader that does it.
    """

    def __init__(self, real: Any) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)  # the source, resources and whatever else others ask a loader for

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["_logger"] = logging.getLogger(NAME)  # which its parts import
        module.__dict__["__version__"] = version(NAME)
        module.__class__ = LatePackage


class LateFinder(MetaPathFinder):
    """Finds torchmetrics where Python does, with the loader above."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != NAME:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = LateLoader(spec.loader)
        return spec


def install_late_finder() -> None:
    """Put off the loading of torchmetrics, unless it is loaded already."""
    if NAME not in sys.modules and not any(isinstance(finder, LateFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, LateFinder())
