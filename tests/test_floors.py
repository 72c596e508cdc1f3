"""The floors of the house: an import goes down only, whether lazy or for types, and no imports make a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from scripts import ROOT

# The rooms from the ground up. A room is a module or a package; one that is named inside another has its own floor.
FLOORS: list[set[str]] = [
    {
        "datasets_cfg",
        "lightning_modules.__init__",  # the table of names, which imports no method
        "offpolicy.__init__",  # finds its names when they are asked for
        "offpolicy.errors",
        "offpolicy.files",
        "offpolicy.given",
        "offpolicy.startup",
        "offpolicy.moved",
        "offpolicy.recipes",
        "offpolicy.registry",
        "offpolicy.trust",
        "offpolicy.version",
    },
    {"offpolicy.compute"},
    {"offpolicy.environments"},
    {"offpolicy.data"},
    {"offpolicy.data.texts"},
    {"offpolicy.losses", "offpolicy.nn"},
    {"offpolicy.evaluation"},
    {"offpolicy.training"},
    {"offpolicy.diffusion", "offpolicy.language", "offpolicy.report"},
    {"offpolicy.language.rl"},
    {"lightning_modules"},
    {"offpolicy.api"},
    {"offpolicy.cli"},
    {"offpolicy.sweep"},
    {
        "offpolicy.data.__main__",
        "offpolicy.report.__main__",
        "offpolicy.compare",
        "offpolicy.evaluate",
        "offpolicy.ope",
        "offpolicy.export",
        "offpolicy.fit",
        "offpolicy.generate",
        "offpolicy.sample",
        "offpolicy.sweep.__main__",
    },
]
PACKAGES = ("offpolicy", "lightning_modules", "datasets_cfg")


def modules() -> dict[str, Path]:
    """Every module by its dotted name; that of a package ends in ``__init__``."""
    files = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


def resolve(name: str, known: Iterable[str]) -> str | None:
    """The module that a dotted name stands for: itself, a package, or the one that holds the name."""
    while name:
        for module in (name, f"{name}.__init__"):
            if module in known:
                return module
        name = name.rpartition(".")[0]
    return None


def imported(source: str) -> set[str]:
    """Dotted names that a file imports anywhere: in functions, for types, or by `import_module` of a constant."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return found


def graph(files: dict[str, Path]) -> dict[str, set[str]]:
    """Module → the modules of these packages that it imports."""
    edges = {
        name: {resolve(target, files) for target in imported(path.read_text("utf-8"))} for name, path in files.items()
    }
    return {name: {target for target in targets if target and target != name} for name, targets in edges.items()}


GRAPH = graph(modules())


def room(module: str) -> str:
    """The innermost room of a module that has a floor."""
    name = module
    while not any(name in floor for floor in FLOORS):
        assert "." in name, f"{module} has no floor; give its package one in FLOORS"
        name = name.rpartition(".")[0]
    return name


def floor(module: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if room(module) in rooms)


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The nodes of one circle, or nothing."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_room_is_there() -> None:
    rooms = {room(module) for module in GRAPH}
    assert rooms == set.union(*FLOORS)


@pytest.mark.parametrize("module", GRAPH)
def test_an_import_goes_down_only(module: str) -> None:
    up = sorted(target for target in GRAPH[module] if floor(target) > floor(module))
    assert not up, f"{module} (floor {floor(module)}) imports {[(target, floor(target)) for target in up]}"


def test_no_circle_between_files() -> None:
    assert not circle(GRAPH)


def test_no_circle_between_rooms() -> None:
    rooms: dict[str, set[str]] = {}
    for module, targets in GRAPH.items():
        rooms.setdefault(room(module), set()).update(room(target) for target in targets if room(target) != room(module))
    assert not circle(rooms)


def test_imports_of_every_kind_are_seen() -> None:
    source = """
import offpolicy.a
from offpolicy import b as c
from offpolicy.d import e
if TYPE_CHECKING:
    from offpolicy import f
def late():
    from offpolicy.g import h
    importlib.import_module("offpolicy.i")
    import_module(f"offpolicy.{j}")
"""
    names = {"a", "b", "d.e", "f", "g.h", "i"}
    assert imported(source) == {f"offpolicy.{name}" for name in names}
    assert resolve("offpolicy.d.e", {"offpolicy.d"}) == "offpolicy.d"
    assert resolve("offpolicy.d.e", {"offpolicy.d.__init__", "offpolicy.d.e"}) == "offpolicy.d.e"
    assert resolve("numpy.ndarray", {"offpolicy.d"}) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) and not circle({"a": {"b", "c"}, "b": {"c"}})
