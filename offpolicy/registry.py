"""Names of methods → classes, without importing any method before it is asked for."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from offpolicy.errors import UsageError, described, fold, known_as, nearest
from offpolicy.trust import check_found, check_name

SHORT = {  # what methods are called elsewhere, folded
    "dt": "DecisionTransformer",
    "softactorcritic": "SAC",
    "behaviorcloning": "BC",
    "behaviourcloning": "BC",
    "cloning": "BC",
    "implicitqlearning": "IQL",
    "conservativeqlearning": "CQL",
    "diffuser": "TrajectoryDiffusion",
    "diffusion": "TrajectoryDiffusion",
    "pgd": "TrajectoryDiffusion",
    "mopo": "MBPO",
    "dynamics": "WorldModel",
    "supervisedfinetuning": "SFT",
    "ppo": "GRPO",
    "reinforce": "GRPO",
}
Spec = str | Mapping[str, Any]  # of a component: its name, or {"name": …, **parameters}


@cache
def method_table() -> dict[str, str]:
    """Every known method: name → ``module:Class``, ours and those of other packages."""
    package = importlib.import_module("lightning_modules")
    if not getattr(package, "__offpolicy__", False):
        ours = Path(__file__).parent
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


def class_path(name: str) -> str:
    """The import path ``package.module.Class`` of a method given by name or by import path; imports no method.

    Case, '-', '_' and '+' do not matter in a name.

    Raises:
        UsageError: neither; names the nearest method.
    """
    table = method_table()
    key = known_as(name, table)
    if key is not None:
        return table[key].replace(":", ".")
    module, _, attribute = name.rpartition(".")
    if all(part.isidentifier() for part in (*module.split("."), attribute)):
        return name
    raise UsageError(
        f"no method is called '{name}'; expected one of {', '.join(method_names())}, or an import path "
        f"package.module.Class.{nearest_method(name)}"
    )


def nearest_method(name: str) -> str:
    """A sentence naming the method that an abbreviation or a misspelt name may mean; empty when none is close."""
    table = method_names()
    wanted = SHORT.get(fold(name)) or next((one for one in table if _initials(one) == fold(name)), None)
    return f" Did you mean '{wanted}'?" if wanted in table else nearest(name, table)


def _initials(name: str) -> str:
    """DecisionTransformer → dt."""
    return "".join(letter for letter in name if letter.isupper() or letter.isdigit()).lower()


def find_method(name: str) -> Any:
    """The class of a method in the table, or None."""
    return import_class(class_path(name)) if known_as(name, method_table()) else None


def import_class(path: str) -> Any:
    """The class at an import path ``package.module.Class``.

    Raises:
        UsageError: no such module or no such class in it, or a name in a file that is not trusted
            (:mod:`offpolicy.trust`), or a module that raises an error.
    """
    module, attribute = _imported(path, "model", "package.module.Class")
    if not hasattr(module, attribute):
        classes = [name for name, value in vars(module).items() if isinstance(value, type)]
        raise UsageError(
            f"`model` is '{path}', but {module.__name__} has no '{attribute}'.{nearest(attribute, classes)}"
        )
    found = getattr(module, attribute)
    if not _is_registered(path):
        check_found(path, found, "model", lambda one: isinstance(one, type))
    return found


def import_callable(path: str, option: str, kind: Callable[[Any], bool] | None = None) -> Any:
    """The function or class at an import path ``package.module.callable`` or ``package.module:callable``.

    Args:
        path: the path.
        option: what it was given for, named in errors.
        kind: whether something of this library may stand there by its path; None for anything.

    Raises:
        UsageError: no such module, or nothing in it that can be called, or a name in a file that is not trusted
            (:mod:`offpolicy.trust`), or a module that raises an error.
    """
    module, attribute = _imported(path.replace(":", "."), option, "package.module.function")
    found = getattr(module, attribute, None)
    if found is None:
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UsageError(
            f"`{option}` is '{path}', but {module.__name__} has no '{attribute}'; expected a function."
            f"{nearest(attribute, names)}"
        )
    if not callable(found):
        raise UsageError(f"`{option}` is '{path}', a {type(found).__name__}; expected a function.")
    check_found(path, found, option, kind)
    return found


def _is_registered(path: str) -> bool:
    """Whether the path is that of a method in the table, which installed packages add to."""
    return path in {value.replace(":", ".") for value in method_table().values()}


def _imported(path: str, option: str, expected: str) -> tuple[ModuleType, str]:
    """The module of an import path, and the name in it."""
    if not _is_registered(path):
        check_name(path, option)
    name, _, attribute = path.rpartition(".")
    if path.startswith(".") or "/" in path:
        raise UsageError(
            f"`{option}` is '{path}'; expected {expected}, no path of a file. For ./mine.py pass mine.NAME, from its "
            "folder."
        )
    try:
        return importlib.import_module(name), attribute
    except (Exception, SystemExit) as error:
        if _is_registered(path):
            raise
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent is None or not (name == absent or name.startswith(f"{absent}.")):
            raise UsageError(
                f"`{option}` is '{path}', and {name} cannot be imported: {described(error)}. Correct that module."
            ) from error
        raise UsageError(
            f"`{option}` is '{path}', but there is no module '{absent}' in this folder or on the Python path; "
            f"expected {expected}. Run from the folder that holds it, or install it."
        ) from None


def named_spec(option: str, spec: Any) -> dict[str, Any]:
    """A component as a mapping, ``name`` and parameters, which may be changed.

    Raises:
        UsageError: it is neither a name nor a mapping.
    """
    if isinstance(spec, str):
        return {"name": spec}
    if isinstance(spec, Mapping):
        return dict(spec)
    raise UsageError(
        f"`{option}` is {spec!r}; expected a name, an import path package.module.callable, or a mapping "
        "{name: …, parameter: value}. Change it or leave it out."
    )


def make(option: str, spec: Spec, known: Mapping[str, Callable[..., Any]], *, at_call: Collection[str] = ()) -> Any:
    """A component by name or import path, with its parameters: an object of a class, or a function that knows them.

    Args:
        option: what it is for, named in errors.
        spec: the name, or a mapping with ``name`` and parameters.
        known: name → class or function.
        at_call: keywords that are given to a function when it is called.

    Raises:
        UsageError: it is neither a name nor a mapping, there is none of that name, it does not take a parameter, or
            needs one that is missing.
    """
    given = named_spec(option, spec)
    name = given.pop("name", None)
    if isinstance(name, str) and name in known:
        found = known[name]
    elif isinstance(name, str) and re.fullmatch(r"\w+([.:]\w+)+", name):  # else a mapping that is no YAML
        found = import_callable(name, option, lambda one: one in known.values())
    else:
        raise UsageError(
            f"`{option}` is {name!r}; expected one of {', '.join(known)}, or an import path package.module.callable."
            f"{nearest(str(name), known)}"
        )
    parameters = inspect.signature(found).parameters
    is_class = isinstance(found, type)
    free = [
        n
        for n, p in parameters.items()
        if (is_class and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD))
        or (n not in at_call and p.kind == p.KEYWORD_ONLY)
    ]
    anything = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    for parameter in given:
        if parameter not in free and not anything:
            raise UsageError(
                f"`{option}` is {name!r}, which takes no `{parameter}`; expected {', '.join(free) or 'no parameter'}."
                f"{nearest(str(parameter), free)}"
            )
    for parameter in free:
        if parameters[parameter].default is inspect.Parameter.empty and parameter not in given:
            raise UsageError(f"`{option}` is {name!r} without `{parameter}`; expected a value of it beside the name.")
    return found(**given) if is_class else partial(found, **given) if given else found
