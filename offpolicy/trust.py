"""Whose word names code: names that the user gives are imported, names that stand in files only where they are known.

Importing a module runs it. A checkpoint, a run folder, a configuration or a data file may come from anybody, so what it
names is imported only below the packages of this library, and taken only where it is defined there and of the kind that
is wanted, or below the packages that the user trusts (``trust=`` in Python, ``--trust`` on the command line).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from offpolicy.errors import DataError, UsageError

OWN = ("offpolicy", "lightning_modules")
ALL = "all"
MOST_VALUES = 10_000  # of a configuration
NAME = re.compile(r"[^\W\d]\w*([.:][^\W\d]\w*)+")  # package.module.name or package.module:name
ENVIRONMENT = re.compile(r"[\w.]+:[\w./-]+")  # module:Id
PROGRAM = re.compile(r"[^\0\n]*/[^\0\n]+")  # a path
HUB = re.compile(r"[\w.-]+/[\w.-]+([:@][\w.-]+)*")
FOREIGN = ("GymV21", "GymV26")  # ids of gymnasium that make an environment of another library by a name in `env_kwargs`
REFUSED = "refused_env_id"  # in `meta`: an environment that a file names and nobody trusts
Trust = str | Iterable[str] | bool | None


class Words(NamedTuple):
    """Who speaks, and what the user allows.

    Attributes:
        in_file: names come from a file; else they are the user's own.
        packages: packages and modules below which everything may be imported; "all" for any.
        names: single names that the user gave.
    """

    in_file: bool = False
    packages: tuple[str, ...] = ()
    names: frozenset[str] = frozenset()


_words: ContextVar[Words] = ContextVar("words", default=Words())  # noqa: B039 - a NamedTuple does not change


def words() -> Words:
    """What holds here."""
    return _words.get()


@contextlib.contextmanager
def speaking(words: Words) -> Iterator[None]:
    """Within it, names are those of these words."""
    token = _words.set(words)
    try:
        yield
    finally:
        _words.reset(token)


@contextlib.contextmanager
def trusting(trust: Trust = None, *, names: Iterable[str] = (), in_file: bool | None = None) -> Iterator[None]:
    """Within it, the user trusts more than this library.

    Args:
        trust: packages or modules, as a list or one text with commas; True or "all" for everything.
        names: single names the user gave.
        in_file: whether names within come from a file; None leaves that as it is.
    """
    now = _words.get()
    packages = (*now.packages, *packages_of(trust))
    with speaking(Words(now.in_file if in_file is None else in_file, packages, now.names | frozenset(names))):
        yield


def trust_always(trust: Trust) -> None:
    """Trust these packages for the rest of the process, as a script does that opens runs of methods of its own."""
    now = _words.get()
    _words.set(now._replace(packages=(*now.packages, *packages_of(trust))))


def packages_of(trust: Trust) -> tuple[str, ...]:
    """The packages that ``trust`` names.

    Raises:
        UsageError: it is neither a list of import paths, nor True or "all".
    """
    if trust is None or trust is False:
        return ()
    if trust is True:
        return (ALL,)
    listed = trust.split(",") if isinstance(trust, str) else list(trust)
    found = tuple(str(name).strip().replace(":", ".") for name in listed)
    for name in found:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UsageError(f"`trust` names '{name}'; expected packages or modules such as my_package, or 'all'.")
    return found


def allows(path: str) -> bool:
    """Whether the user has named this import path, or trusts a package above it."""
    names = _words.get().names
    return path in names or path.replace(":", ".") in names or trusts(path)


def trusts(path: str) -> bool:
    """Whether the user trusts this package or one above it."""
    packages = _words.get().packages
    return ALL in packages or any(_below(path.replace(":", "."), package) for package in packages)


def is_own(path: str) -> bool:
    """Whether an import path lies below the packages of this library."""
    return any(_below(path.replace(":", "."), package) for package in OWN)


def names_in(value: Any) -> frozenset[str]:
    """Every text in nested settings that has the form of an import path, an environment, an id of the hub or a path."""
    if isinstance(value, str):
        return frozenset([value] if any(form.fullmatch(value) for form in (NAME, ENVIRONMENT, HUB, PROGRAM)) else ())
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return frozenset().union(*map(names_in, value))
    return frozenset()


def names_of_method(method: Any) -> frozenset[str]:
    """The names that a method at hand consists of: its class, and what its options name."""
    return names_in(dict(method.hparams)) | {f"{type(method).__module__}.{type(method).__qualname__}"}


def packages_to_trust(names: Iterable[str]) -> tuple[str, ...]:
    """The packages of others that names of a run lead to, which its files have to be trusted with to open them again.

    Only what is imported now and has a part of the name counts, so that a file called ``runs.jsonl`` is no package.
    """
    found = set()
    for name in names:
        head, *rest = re.split(r"[.:]", name)
        module = None if head in (*OWN, "lightning", "__main__") else sys.modules.get(head)
        if module is not None and (ENVIRONMENT.fullmatch(name) or (NAME.fullmatch(name) and hasattr(module, rest[0]))):
            found.add(head)
    return tuple(sorted(found))


def check_name(path: str, option: str) -> None:
    """Before something is imported because of a name.

    Raises:
        UsageError: the name stands in a file and is neither of this library nor trusted.
    """
    if _words.get().in_file and not (is_own(path) or allows(path)):
        raise UsageError(refusal(path, option))


def check_program(path: str, option: str, add: str) -> None:
    """Before a program is run because of a path.

    Args:
        path: of the program.
        option: that names it.
        add: what the user may add to the command, to name it too.

    Raises:
        UsageError: the path stands in a file, and the user has neither given it too nor trusts everything.
    """
    now = _words.get()
    if now.in_file and path not in now.names and ALL not in now.packages:
        raise UsageError(
            f"`{option}` is '{path}' in a file, and a file may name no program. If you trust it, name it yourself: add "
            f"{add} to the command, or pass --trust all (in Python trust='all')."
        )


def check_found(path: str, found: Any, option: str, kind: Callable[[Any], bool] | None = None) -> None:
    """After something was imported because of a name in a file: it must be defined where names may come from.

    Args:
        path: the name.
        found: what it stands for.
        option: what it is for, named in the error.
        kind: whether something of this library is of the kind that is wanted; None for any.

    Raises:
        UsageError: it is defined elsewhere (as `os.system` behind a module that imports `os`), or of another kind.
    """
    now = _words.get()
    if not now.in_file or ALL in now.packages or path in now.names or path.replace(":", ".") in now.names:
        return
    home = getattr(found, "__module__", None) or type(found).__module__
    if is_own(home) and not is_own(path):
        return  # a trusted module passes on something of this library
    if is_own(path):
        if is_own(home) and (kind is None or kind(found)):
            return
        raise UsageError(f"`{option}` is '{path}' in a file, which is nothing of that kind. Correct the file.")
    if not (trusts(home) or trusts(f"{home}.{getattr(found, '__qualname__', '')}")):
        raise UsageError(refusal(f"{home}.{getattr(found, '__qualname__', path)}", option))


def refusal(path: str, option: str) -> str:
    """What is said of a name in a file that is not imported."""
    package = path.replace(":", ".").partition(".")[0]
    return (
        f"`{option}` is '{path}' in a file, and a file may only name what belongs to this library, as importing runs "
        f"code. If you trust it, name it yourself, or pass --trust {package} (in Python trust='{package}')."
    )


# -- settings from files -----------------------------------------------------------------------------------------------


def check_settings(settings: Mapping[str, Any], source: str) -> None:
    """What a configuration names, before the parser looks at it.

    The parser imports every ``class_path`` and calls it with ``init_args``, in options of any type. From files only
    parts of the Trainer may be named so: classes of Lightning, of this library, and of packages that are trusted.

    Args:
        settings: dotted option → value, as a file has them.
        source: the file.

    Raises:
        UsageError: a name that is not trusted, a file within the file, or more values than settings have.
    """
    count = 0
    named = {name: settings.get(f"data.{name}") for name in ("env_id", "env_kwargs")}
    check_environment(named, source)
    if REFUSED in named:
        raise UsageError(f"{source} sets `data.env_id`: {environment_refusal(str(named[REFUSED]))}.")
    for key, value in settings.items():
        if key == "model":
            if not isinstance(value, str):
                raise UsageError(f"{source} sets `model` to {value!r}; expected a method. Correct the file.")
            continue
        of_trainer = key.startswith("trainer.")
        for name, text in _texts(value, key):
            count += 1
            if count > MOST_VALUES:
                raise UsageError(f"{source} holds more than {MOST_VALUES:,} values; expected settings. Correct it.")
            if name == "class_path":
                check_class(text, key, of_trainer=of_trainer)
            elif of_trainer and isinstance(text, str):
                if NAME.fullmatch(text) and not text.startswith("lightning.") and _is_importable(text):
                    check_name(text, key)
                if len(text) < 4096 and os.path.isfile(text):
                    raise UsageError(f"{source} sets `{key}` to the file {text}; expected the settings themselves.")


def check_class(path: Any, option: str, *, of_trainer: bool) -> None:
    """A ``class_path`` of a file.

    Raises:
        UsageError: it is none, or not trusted.
    """
    if not isinstance(path, str):
        raise UsageError(f"`{option}` has the class_path {path!r}; expected an import path. Correct the file.")
    if not _words.get().in_file or allows(path):
        return
    if of_trainer and "." not in path:
        return  # the short name of a class that is already there and of the kind that the Trainer wants
    if of_trainer and (is_own(path) or path.startswith("lightning.")):
        module, _, name = path.rpartition(".")
        with contextlib.suppress(ImportError):
            found = getattr(importlib.import_module(module), name, None)
            if isinstance(found, type) and (is_own(found.__module__) or found.__module__.startswith("lightning.")):
                return
    raise UsageError(refusal(path, option))


def _texts(value: Any, name: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every value in nested settings that is no list or mapping, with the key above it; also of YAML within a text."""
    if depth > 50:
        raise UsageError(f"`{name}` is nested more than 50 levels deep; expected settings. Correct the file.")
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts(part, str(key).rpartition(".")[2], depth + 1)
        return
    if isinstance(value, (list, tuple, set)):
        for part in value:
            yield from _texts(part, name, depth + 1)
        return
    yield name.rpartition(".")[2], value
    if isinstance(value, str) and set("[{:") & set(value):
        import yaml

        with contextlib.suppress(yaml.YAMLError):
            inner = yaml.safe_load(value)
            if not isinstance(inner, str):
                yield from _texts(inner, name, depth + 1)


def _is_importable(path: str) -> bool:
    with contextlib.suppress(ImportError, ValueError):
        return importlib.util.find_spec(path.replace(":", ".").partition(".")[0]) is not None
    return False


# -- environments ------------------------------------------------------------------------------------------------------


def check_environment(meta: MutableMapping[str, Any], where: str) -> None:
    """What a file says of its environment, in place: one that runs code of others is set aside, with a warning.

    A gymnasium id ``module:Id`` imports the module. Ids of environments that installed packages have registered stay.

    Args:
        meta: facts about data, from a file; ``env_id`` and ``env_kwargs`` are looked at.
        where: the file, for messages.

    Raises:
        DataError: ``env_id`` is no text, or ``env_kwargs`` no mapping.
    """
    env_id = meta.pop(REFUSED, None) or meta.get("env_id")
    kwargs = meta.get("env_kwargs")
    if env_id is not None and not isinstance(env_id, str):
        raise DataError(f"{where}: `env_id` is {env_id!r}; expected the id of an environment. Correct the file.")
    if kwargs is not None and not (isinstance(kwargs, dict) and all(isinstance(key, str) for key in kwargs)):
        raise DataError(f"{where}: `env_kwargs` is {kwargs!r}; expected names and values. Correct the file.")
    if not env_id:
        return
    module = env_id.rpartition(":")[0] or ("gym" if env_id.rpartition("/")[2].startswith(FOREIGN) else "")
    if not module or allows(env_id) or trusts(module):
        if meta.get("warnings"):
            meta["warnings"] = [text for text in meta["warnings"] if text != environment_refusal(env_id)]
        meta["env_id"] = env_id
        return
    meta.pop("env_id", None)
    meta[REFUSED] = env_id
    found, said = meta.get("warnings"), environment_refusal(env_id)
    meta["warnings"] = [*(text for text in found or [] if text != said), said] if isinstance(found, list) else [said]


def take_environment(meta: MutableMapping[str, Any]) -> None:
    """Forget, in place, what a file said of its environment, as the user has named one."""
    refused = meta.pop(REFUSED, None)
    if refused:
        meta["warnings"] = [text for text in meta["warnings"] if text != environment_refusal(refused)]


def environment_refusal(env_id: str) -> str:
    """Why an environment that a file names is not made."""
    module = env_id.rpartition(":")[0] or "gym"
    return (
        f"the environment {env_id} is named in a file, and making it would run the code of {module}, so nothing is "
        f"played in it; if you trust it, pass --trust {module} (in Python trust='{module}')"
    )


def _below(path: str, package: str) -> bool:
    return path == package or path.startswith(f"{package}.")
