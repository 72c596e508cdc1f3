"""From a checkpoint to a method: ``load``, and what of a checkpoint is our own.

No class of a method is imported before a checkpoint names it, so methods themselves may import this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from offpolicy.errors import DataError, UsageError
from offpolicy.files import WriteError
from offpolicy.registry import import_class
from offpolicy.training.checkpoints import KEY, check_proportions, read_checkpoint, run_of
from offpolicy.training.choosing import Which, chosen_checkpoint
from offpolicy.trust import NAME, Trust, check_environment, trusting


def load(
    run_or_checkpoint: str | Path, *, method: type[Any] | None = None, trust: Trust = None, which: Which = "last"
) -> Any:
    """A trained method from a run folder or a checkpoint; needs neither data nor simulator.

    A checkpoint may come from anybody: it holds plain values and tensors alone, and of the code it names only what
    belongs to this library is run.

    Args:
        method: the class, when it is one of your own.
        trust: packages or modules of yours or others that the checkpoint may name (its class, rewards, components, its
            environment), as a list or a text with commas; True for all.
        which: checkpoint of a run folder: "last", "best" (by the run's own evaluations), "selected" (by ``run.select``,
            without an environment) or the number of an update.

    Returns:
        The method on the CPU, ready for ``act``; a language model with its ``tokenizer``.

    Raises:
        UsageError: no checkpoint there, its class cannot be imported or is not trusted, or it is damaged.
    """
    path = chosen_checkpoint(run_or_checkpoint, which)
    checkpoint = read_checkpoint(path)
    state = own_state(checkpoint, path)
    with trusting(trust, in_file=True):
        cls = method or class_of(state, path)
        if not is_method(cls):
            raise UsageError(f"{path} is to be opened as {cls!r}, which is no method; expected a class of one.")
        try:
            return made_again(cls, checkpoint, state, path).eval()
        except (UsageError, DataError, WriteError):
            raise
        except Exception as error:  # anything can be wrong with values in a file
            reason = " ".join(str(error).split())[:300]
            raise UsageError(
                f"{path} holds a {cls.__name__} that cannot be made again ({type(error).__name__}: {reason}); expected "
                "a checkpoint of this version of the class. Pass another checkpoint."
            ) from error


def made_again(cls: type[Any], checkpoint: dict[str, Any], state: Mapping[str, Any], path: Path) -> Any:
    """A method of this class with the options and weights of a checkpoint."""
    check_environment(state["data"]["meta"], str(path))
    check_proportions(checkpoint, state, str(path))
    loaded = cls(**checkpoint["hyper_parameters"])
    loaded.on_load_checkpoint(checkpoint)
    loaded.load_state_dict(checkpoint["state_dict"], strict=loaded.strict_loading)
    loaded.take_files(run_of(path))
    return loaded


def is_method(cls: Any) -> bool:
    """Whether it is a class of this library's methods: those take their files back (``Module.take_files``)."""
    return isinstance(cls, type) and issubclass(cls, LightningModule) and hasattr(cls, "take_files")


def class_of(state: Mapping[str, Any], path: Path) -> Any:
    """The class that a checkpoint names."""
    name = state.get("class")
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise UsageError(f"{path} names {name!r} as its class; expected package.module.Class. Pass another checkpoint.")
    try:
        return import_class(name)
    except (UsageError, ImportError) as error:
        raise UsageError(
            f"{path} holds a method of the class {name}, which cannot be imported: {error} "
            "Or pass the class: offpolicy.load(path, method=MyClass)."
        ) from None


def own_state(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What this library has put into a checkpoint.

    Raises:
        UsageError: it was not written by this library, or lacks a part.
    """
    state = checkpoint.get(KEY)
    if not isinstance(state, dict):
        raise UsageError(f"{path} was not written by this library; expected its '{KEY}' entry. Pass another file.")
    parts = {"hyper_parameters": dict, "state_dict": dict, "global_step": int}
    missing = [name for name, kind in parts.items() if not isinstance(checkpoint.get(name), kind)]
    if missing:
        raise UsageError(f"{path} has no usable {', '.join(missing)}; expected a whole checkpoint. Pass another file.")
    return state
