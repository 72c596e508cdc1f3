"""Folders of our format: written whole or not at all, and checked when opened, as they may come from anybody.

The parts of a store go by kind: ``index`` (start, length), ``steps``, ``tail``, ``episodes`` and ``tables``, each by
name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from offpolicy.data.columns import to_numpy
from offpolicy.data.guard import faults, inside, open_npy, read_archive, read_json
from offpolicy.errors import DataError
from offpolicy.files import safe_name

FORMAT = 1
READ_THROUGH = 2 << 30  # bytes of columns: of larger sets the fingerprint is believed and the content sampled
INDEXED = {"pairs": False, "singles": False, "problems": True}  # tables of episode numbers; whether -1 is none
NUMBERS, ANY = "biuf", "biufUS"


Parts = Mapping[str, Mapping[str, Any]]  # kind → name → column


def digest(parts: Parts) -> str:
    """SHA-256 over names, types, shapes and content of all parts."""
    found = hashlib.sha256()
    named = {
        name if kind in ("index", "steps") else f"{kind}/{name}": column
        for kind, columns in parts.items()
        for name, column in columns.items()
    }
    for name, column in sorted(named.items()):
        array = to_numpy(column)
        found.update(f"{name}{array.dtype.str}{array.shape}".encode())
        for chunk in np.array_split(array, max(1, array.nbytes >> 26)):
            found.update(np.ascontiguousarray(chunk).data)
    return found.hexdigest()


def write_folder(target: Path, parts: Parts, meta: Mapping[str, Any], fingerprint: str, overwrite: bool) -> Path:
    """Write a folder; arguments and errors as of :meth:`offpolicy.data.replay.Replay.save`."""
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; expected a new folder. Remove it or pass overwrite=True.")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        os.chmod(temporary, 0o777 & ~_umask())  # as any folder; temporary ones are private
        (temporary / "steps").mkdir()
        names = {}
        for i, (name, column) in enumerate(parts["steps"].items()):
            names[name] = f"{i:02d}-{safe_name(name.replace('/', '.'))}.npy"
            np.save(temporary / "steps" / names[name], to_numpy(column), allow_pickle=False)
        small = {
            f"{kind}/{name}": to_numpy(column)
            for kind in ("tail", "episodes", "tables")
            for name, column in parts[kind].items()
        }
        np.savez(temporary / "index.npz", **{**parts["index"], **small})
        record = {"format": FORMAT, "columns": names, "fingerprint": fingerprint, "meta": meta}
        (temporary / "meta.json").write_text(json.dumps(record, indent=1))
        _put(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _put(temporary: Path, target: Path) -> None:
    """Rename a complete folder; one of that name is set aside first and then removed."""
    if not target.exists():
        os.rename(temporary, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent)) / "replaced"
    os.rename(target, aside)
    os.rename(temporary, target)
    shutil.rmtree(aside.parent, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_parts(path: Path, mmap: bool) -> tuple[dict[str, Any], str]:
    """The arguments of :class:`Replay` that a folder holds, and the fingerprint it says it has.

    Raises:
        DataError: of another format, damaged, incomplete, or with names that lead out of the folder.
    """
    with faults(path):
        record = read_json(inside(path, "meta.json"))
        if record.get("format") != FORMAT:
            raise DataError(f"{path} has format {record.get('format')}; this version reads {FORMAT}. Convert it anew.")
        names, meta, fingerprint = record.get("columns"), record.get("meta"), record.get("fingerprint")
        if not (isinstance(names, dict) and names and isinstance(meta, dict)):
            raise DataError(
                f"{path / 'meta.json'} is damaged; expected `columns` and `meta`. Make or convert it again."
            )
        if not (isinstance(fingerprint, str) and re.fullmatch("[0-9a-f]{64}", fingerprint)):
            raise DataError(f"{path / 'meta.json'} has no fingerprint; expected a SHA-256. Make or convert it again.")
        folder = inside(path, "steps")
        steps = {name: open_npy(inside(folder, file), mapped=mmap) for name, file in names.items()}
        small = read_archive(inside(path, "index.npz"))
        if not {"start", "length"} <= small.keys():
            raise DataError(f"{path / 'index.npz'} has no `start` and `length`; it is damaged. Make it again.")
        parts: dict[str, Any] = {
            "steps": steps,
            "start": small.pop("start"),
            "length": small.pop("length"),
            "meta": meta,
        }
        for kind in ("tail", "episodes", "tables"):
            parts[kind] = {k.partition("/")[2]: v for k, v in small.items() if k.startswith(f"{kind}/")}
        _check_types(path, parts)
        return parts, fingerprint


def _check_types(path: Path, parts: Mapping[str, Any]) -> None:
    for name in ("start", "length"):
        if parts[name].dtype.kind not in "iu" or parts[name].ndim != 1:
            raise DataError(f"{path}: `{name}` of the index is {parts[name].dtype}; expected whole numbers (E,).")
        if len(parts[name]) and not (parts[name].min() >= 0 and parts[name].max() < 1 << 48):
            raise DataError(f"{path}: `{name}` of the index has {parts[name].max()}; it is damaged. Make it again.")
    for kind, kinds in (("steps", NUMBERS), ("tail", NUMBERS), ("episodes", ANY), ("tables", ANY)):
        for name, column in parts[kind].items():
            if column.dtype.kind not in kinds or not column.ndim:
                raise DataError(
                    f"{path}: `{name}` has type {column.dtype} and shape {column.shape}; expected rows of numbers."
                )


def check_content(
    parts: Parts, meta: Mapping[str, Any], path: Path, fingerprint: str, measured: Callable[[], str]
) -> None:
    """Compare the fingerprint and look for numbers that nothing can be learned from.

    Sets above :data:`READ_THROUGH` are mapped, and reading them through would take minutes: they are looked at in
    samples, and their fingerprint is believed.

    Args:
        parts, meta: as they were read from the folder at ``path``.
        fingerprint: that the folder says it has.
        measured: gives that of the content.

    Raises:
        DataError: the content is not what it was when it was written, or nothing to train on.
    """
    with faults(path):
        whole = sum(int(column.nbytes) for column in parts["steps"].values()) <= READ_THROUGH
        _check_tables(parts["tables"], len(parts["index"]["start"]), path)
        _check_tokens(parts["steps"].get("token"), meta, path, whole)
        if whole and (found := measured()) != fingerprint:
            raise DataError(
                f"{path} has the fingerprint {found}, and {fingerprint} when it was written; it is damaged or was "
                "changed. Make or convert it again."
            )


def _check_tables(tables: Mapping[str, Any], episodes: int, path: Path) -> None:
    for name, none in INDEXED.items():
        if name not in tables:
            continue
        index = tables[name]
        if index.dtype.kind not in "iu" or index.ndim != 2 or not index.shape[1]:
            raise DataError(f"{path}: the table `{name}` has shape {index.shape}; expected numbers of texts (P, k).")
        if index.size and not (-int(none) <= index.min() and index.max() < episodes):
            raise DataError(f"{path}: the table `{name}` names texts that are not there; it is damaged. Make it again.")
        for key, column in tables.items():
            if key.startswith(f"{name}/") and len(column) != len(index):
                raise DataError(f"{path}: `{key}` has {len(column)} rows; expected {len(index)}, one per row.")


def _check_tokens(token: Any, meta: Mapping[str, Any], path: Path, whole: bool) -> None:
    """Tokens are numbers of the vocabulary that the facts name; the largest is looked for where all is read."""
    if token is None:
        return
    vocabulary = (meta.get("tokenizer") or {}).get("vocabulary")
    if token.dtype.kind not in "iu" or token.ndim != 1:
        raise DataError(f"{path}: `token` is {token.dtype} of shape {token.shape}; expected whole numbers (N,).")
    if whole and isinstance(vocabulary, int) and len(token) and int(token.max()) >= vocabulary:
        raise DataError(f"{path}: `token` has {int(token.max())}, and the tokenizer {vocabulary} tokens.")
