"""Checkpoints of plain types in whole files, and how to find the one to continue from.

Nothing here needs Lightning; the plugin that makes Lightning write this way is in `checkpoint_io.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import logging
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offpolicy.compute.torch_private import set_state_notes, state_notes
from offpolicy.errors import UsageError
from offpolicy.files import is_stray, method_folder
from offpolicy.given import expanded, place
from offpolicy.training import sharded
from offpolicy.training.archives import check_archive, load_plain, save_plain

KEY = "offpolicy"  # our part of a checkpoint
PLAIN = (type(None), bool, torch.Tensor, torch.dtype, torch.device, torch.layout)
_told: set[Path] = set()  # damaged checkpoints that were spoken of
log = logging.getLogger(__name__)


def to_plain(value: Any, where: str = "value", *, freeze_lists: bool = False) -> Any:
    """Turn `value` into what ``torch.load(weights_only=True)`` accepts, all the way down.

    Paths become text, NumPy scalars numbers, arrays tensors, enums their values, NamedTuples tuples, dataclasses and
    namespaces dicts, frozen sets sets. `OrderedDict` stays one (with the version notes of a `state_dict`); tensors are
    passed on without a copy.

    Args:
        where: the name to use in the error message.
        freeze_lists: lists become tuples, so that settings from a file equal settings from Python.

    Raises:
        UsageError: something else, such as a function or an object; the message names the key.
    """
    if isinstance(value, enum.Enum):
        return to_plain(value.value, where, freeze_lists=freeze_lists)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, PLAIN):
        return value
    for kind in (int, float, complex, str, bytes):  # also subclasses, which would not load
        if isinstance(value, kind):
            return kind(value)  # type: ignore[arg-type]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufc":
            _refuse(value, where)
        return torch.from_numpy(np.array(value))  # a copy: the array may be read-only or change later
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}

    def inner(item: Any, key: object) -> Any:
        return to_plain(item, f"{where}.{key}", freeze_lists=freeze_lists)

    if isinstance(value, Mapping):
        plain: dict[Any, Any] = OrderedDict() if isinstance(value, OrderedDict) else {}
        for key, item in value.items():
            plain[to_plain(key, f"key {key!r} of {where}", freeze_lists=True)] = inner(item, key)
        if isinstance(value, OrderedDict) and (notes := state_notes(value)) is not None:
            set_state_notes(plain, to_plain(notes, f"{where}._metadata"))
        return plain
    if isinstance(value, (list, tuple)):
        items = [inner(item, i) for i, item in enumerate(value)]
        return tuple(items) if freeze_lists or isinstance(value, tuple) else items
    if isinstance(value, (set, frozenset)):
        return {inner(item, "item") for item in value}
    return _refuse(value, where)


def plain_hparams(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters in the one form that goes into a checkpoint, however the run was started.

    Lists become tuples, and the notes that the command line leaves (`_class_path`, `_instantiator`) are dropped.
    """
    kept = {key: value for key, value in hparams.items() if key not in ("_class_path", "_instantiator")}
    return to_plain(kept, "hparams", freeze_lists=True)


def write_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write `checkpoint`, made plain, atomically and to the disk.

    Raises:
        UsageError: something in it is not plain (nothing is written).
        WriteError: full disk, read-only folder; no temporary stays, earlier files are untouched.
    """
    save_plain(to_plain(checkpoint, "checkpoint"), path)


def is_checkpoint(path: Path) -> bool:
    """Whether it can be a checkpoint: a file, or the folder of a sharded one."""
    return path.is_file() or sharded.is_sharded(path)


def size_of(path: Path) -> int:
    """Bytes of a checkpoint."""
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def read_checkpoint(path: str | os.PathLike[str], *, weights: bool = True) -> dict[str, Any]:
    """Read a whole checkpoint to the CPU with ``weights_only=True``; a sharded one as if it were a file.

    Args:
        path: of the checkpoint.
        weights: whether tensors are wanted; without them what is large is left on the disk.

    Raises:
        UsageError: no such file, a file cut short or damaged (the checksums of its parts are compared), or one that
            holds more than plain types.
    """
    path = Path(path)
    if not is_checkpoint(path):
        raise UsageError(f"Found no checkpoint {path}; expected a file. Check the path or pass the run folder.")
    try:
        check_parts(path)
        if sharded.is_sharded(path):
            return sharded.read_sharded(path) if weights else {"state_dict": {}} | sharded.read_rest(path)
        return load_plain(path, mmap=not weights and zipfile.is_zipfile(path))
    except Exception as error:  # what a damaged pickle raises can be anything
        reason = str(error).split("\n", 1)[0][:200] or type(error).__name__
        raise UsageError(
            f"{path} ({size_of(path):,} bytes) is not a whole checkpoint of plain types: {reason} "
            "Pass an earlier one, or the run folder to take the newest that opens."
        ) from error


def opens(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a whole checkpoint: the checksums of its parts are right, and it holds plain types."""
    try:
        check_parts(Path(path))
        if not sharded.is_sharded(Path(path)):
            load_plain(Path(path), mmap=zipfile.is_zipfile(path))
    except Exception:  # what a damaged pickle raises can be anything
        return False
    return True


def check_parts(path: Path) -> None:
    """Compare the parts of a checkpoint with their checksums (CRC-32), once per file and process.

    Raises:
        ValueError: a part differs, is packed or missing.  OSError: a file cannot be read.
    """
    stamp = path.stat()
    _check_parts(path, (stamp.st_dev, stamp.st_ino, stamp.st_size, stamp.st_mtime_ns, stamp.st_ctime_ns))


@lru_cache(maxsize=64)
def _check_parts(path: Path, stamp: tuple[int, ...]) -> None:
    if sharded.is_sharded(path):
        sharded.check_sharded(path, sharded.read_rest(path))
        return
    with open(path, "rb") as file:
        check_archive(file)


WIDTHS = ("num_critics", "members", "num_layers", "num_blocks", "num_features")  # and what ends with _dim or _dims


def check_proportions(checkpoint: Mapping[str, Any], state: Mapping[str, Any], where: str) -> None:
    """Refuse networks that are larger than their weights, before any room is made for them.

    Args:
        checkpoint: its ``hyper_parameters`` and ``state_dict``.
        state: our part of it: ``sizes`` of control, ``policy_config`` of a language model, where they are there.
        where: the file, for the message.

    Raises:
        UsageError: an option or size says more than all weights together have.
    """
    weights = checkpoint["state_dict"]
    total = sum(value.numel() for value in weights.values() if isinstance(value, torch.Tensor))
    most = max(total, 1 << 24)  # an option may be of no use to a method; so much room does no harm

    def check(name: str, value: Any, most: int) -> None:
        listed = list(value) if isinstance(value, (list, tuple)) else [value]
        numbers = [number for number in listed if isinstance(number, int)]
        products = [a * b for a, b in pairwise(numbers)] if name.endswith("_dims") else []
        if any(not 0 <= number <= most for number in (*numbers, *products)):
            raise UsageError(
                f"{where} has `{name}` {value}, which is below 0 or more than the {total:,} numbers of its weights "
                "can make; expected a checkpoint whose weights fit its options. Pass another."
            )

    def look(settings: Any) -> None:
        for name, value in settings.items() if isinstance(settings, Mapping) else ():
            if isinstance(name, str) and (name.endswith(("_dim", "_dims")) or name in WIDTHS):
                check(name, value, most)
            look(value)

    look(checkpoint["hyper_parameters"])
    sizes = state.get("sizes")
    for name, value in sizes.items() if isinstance(sizes, Mapping) else ():
        check(name, value, most)
    config = state.get("policy_config")
    if isinstance(config, str) and state.get("adapter") is None:
        found = json.loads(config)
        check("num_hidden_layers", found.get("num_hidden_layers", 0), len(weights))
        for name in ("vocab_size", "hidden_size", "intermediate_size"):
            check(name, found.get(name, 0), most)


def newest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The checkpoint with the largest update number in its name (`step=00005000.ckpt`) that opens, or None.

    `folder` is a folder of checkpoints or a run folder with `checkpoints/` in it.
    """
    for path in _by_update(Path(folder)):
        if opens(path):
            return path
        if path not in _told:
            _told.add(path)
            log.warning("%s is damaged or cut short and was passed over; an earlier checkpoint is looked for.", path)
    return None


def place_in(folder: Path) -> dict[str, Path]:
    """Where ``fit`` begins in this folder, as its argument: the run that lies there goes on, else a new one begins."""
    return {"folder" if newest_checkpoint(folder) is None else "ckpt_path": folder}


def newest_run(
    root: str | os.PathLike[str],
    data: str,
    method: str,
    seed: int | None = None,
    fingerprint: Callable[[], str] | None = None,
    label: str | None = None,
) -> Path | None:
    """The run folder under `<root>/<data>/<method>/` that wrote a checkpoint last, or None.

    Args:
        seed: only runs of this seed (`seed<seed>-<n>`); any seed when None.
        fingerprint: gives that of the data at hand. Files of one name share a folder of runs (a/x.npz and b/x.npz), so
            a run on the same data is preferred; asked only where there are runs on several.
        label: of a run of several seeds: the name of its folder without the number.
    """
    runs, form = [], r"seed-?\d+" if seed is None else f"seed{seed}"
    for folder in method_folder(root, data, method).glob("seed*-*"):
        match = re.fullmatch(rf"{re.escape(label) if label else form}-(\d+)", folder.name)
        files = _by_update(folder)
        if match and files:
            runs.append((max(file.stat().st_mtime_ns for file in files), int(match[1]), folder))
    folders = [folder for *_, folder in sorted(runs, reverse=True)]
    if fingerprint is not None and len({fingerprint_of_run(folder) for folder in folders}) > 1:
        wanted = fingerprint()
        folders.sort(key=lambda folder: fingerprint_of_run(folder) not in (wanted, None))  # stable: newest first
    return next((folder for folder in folders if newest_checkpoint(folder)), None)


def fingerprint_of_run(folder: Path) -> str | None:
    """The fingerprint of the data that a run was started with, None where its folder does not tell."""
    try:
        found = json.loads((folder / "versions.json").read_text())["data"]["fingerprint"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) else None


def resolve_checkpoint(
    ckpt: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] = "runs",
    data: str | None = None,
    method: str | None = None,
    seed: int | None = None,
    fingerprint: Callable[[], str] | None = None,
    label: str | None = None,
) -> Path:
    """The checkpoint file that the user means.

    Args:
        ckpt: `"last"` (the newest run of `method` on `data` under `root`), a checkpoint file, or a run folder.
        fingerprint, label: as of :func:`newest_run`.

    Raises:
        UsageError: nothing there that opens; the message names the places searched.
    """
    if os.fspath(ckpt) == "last":
        if data is None or method is None:
            raise UsageError("`ckpt_path` is 'last'; expected the data and the method too. Pass both or a path.")
        root = expanded(os.fspath(root))
        run = newest_run(root, data, method, seed, fingerprint, label)
        found = run and newest_checkpoint(run)
        if found:
            return found
        searched = method_folder(root, data, method).resolve()
        pattern = f"{label or ('seed*' if seed is None else f'seed{seed}')}-*"
        raise UsageError(
            f"`ckpt_path` is 'last', but no whole checkpoint was found; searched {searched / pattern / 'checkpoints'}. "
            "Leave `ckpt_path` out to start a new run, or pass a checkpoint file or run folder."
        )
    path = place("ckpt_path", ckpt)
    if path.is_dir() and not sharded.is_sharded(path):
        found = newest_checkpoint(path)
        if found:
            return found
        raise UsageError(
            f"No whole checkpoint in {path}; searched {path / '*.ckpt'} and {path / 'checkpoints' / '*.ckpt'}. "
            "Pass a checkpoint file or the folder of another run."
        )
    if not path.exists():
        raise UsageError(f"Found no {path} (searched {path.resolve()}); expected 'last', a checkpoint or a run folder.")
    if not opens(path):
        other = newest_checkpoint(path.parent)
        hint = f" Continue from {other}." if other else " No other checkpoint lies beside it."
        raise UsageError(f"{path} ({size_of(path):,} bytes) does not open; expected a whole checkpoint.{hint}")
    return path


def checkpoint_name(updates: int) -> str:
    """The file of a run's checkpoint of this update; its digits let names sort by update."""
    return f"step={updates:08d}.ckpt"


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint belongs to."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def own_folder(checkpoint: Path) -> Path | None:
    """The run folder in which a checkpoint continues: that of the run whose newest it is, else None."""
    folder = run_of(checkpoint)
    newest = newest_checkpoint(folder)
    return folder if newest is not None and newest.samefile(checkpoint) else None


def _by_update(folder: Path) -> list[Path]:
    """Checkpoint files in `folder` and its `checkpoints/`, largest update number first, newest first among equals."""
    found = []
    for path in [*folder.glob("*.ckpt"), *folder.glob("checkpoints/*.ckpt")]:
        match = re.search(r"step=(\d+)", path.name)
        if match and is_checkpoint(path) and not is_stray(path):
            found.append((int(match[1]), path.stat().st_mtime_ns, path))
    return [path for *_, path in sorted(found, reverse=True)]


def _refuse(value: Any, where: str) -> Any:
    kind = f"{type(value).__name__} of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
    raise UsageError(
        f"`{where}` is {str(value)[:80]!r} ({kind}), which a checkpoint cannot hold; expected numbers, text, tensors, "
        "paths, enums, or tuples, lists and dicts of them. Pass a name or a number instead and build the object inside."
    )
