"""Opening a folder of our format: it may come from anybody, so it is checked like any other data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offpolicy.data.guard import faults, inside, open_npy, read_json, read_npz
from offpolicy.errors import DataError

if TYPE_CHECKING:
    from offpolicy.data.replay import Replay

FORMAT = 1
READ_THROUGH = 2 << 30  # bytes of columns: of larger sets the fingerprint is believed and the content sampled
INDEXED = {"pairs": False, "singles": False, "problems": True}  # tables of episode numbers; whether -1 is none
NUMBERS, ANY = "biuf", "biufUS"


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
        small = read_npz(inside(path, "index.npz"))
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


def check_content(replay: Replay, path: Path, fingerprint: str) -> None:
    """Compare the fingerprint and look for numbers that nothing can be learned from.

    Sets above :data:`READ_THROUGH` are mapped, and reading them through would take minutes: they are looked at in
    samples, and their fingerprint is believed.

    Raises:
        DataError: the content is not what it was when it was written, or nothing to train on.
    """
    with faults(path):
        _check_tables(replay, path)
        if replay.nbytes > READ_THROUGH:
            return
        found = replay.fingerprint()
        if found != fingerprint:
            raise DataError(
                f"{path} has the fingerprint {found}, and {fingerprint} when it was written; it is damaged or was "
                "changed. Make or convert it again."
            )


def _check_tables(replay: Replay, path: Path) -> None:
    for name, none in INDEXED.items():
        if name not in replay.tables:
            continue
        index = replay.tables[name]
        if index.dtype.kind not in "iu" or index.ndim != 2 or not index.shape[1]:
            raise DataError(f"{path}: the table `{name}` has shape {index.shape}; expected numbers of texts (P, k).")
        if index.size and not (-int(none) <= index.min() and index.max() < replay.num_episodes):
            raise DataError(f"{path}: the table `{name}` names texts that are not there; it is damaged. Make it again.")
        for key, column in replay.tables.items():
            if key.startswith(f"{name}/") and len(column) != len(index):
                raise DataError(f"{path}: `{key}` has {len(column)} rows; expected {len(index)}, one per row.")
    if "token" in replay.steps:
        token: Any = replay.steps["token"]
        vocabulary = (replay.meta.get("tokenizer") or {}).get("vocabulary")
        if token.dtype.kind not in "iu" or token.ndim != 1:
            raise DataError(f"{path}: `token` is {token.dtype} of shape {token.shape}; expected whole numbers (N,).")
        if (
            replay.nbytes <= READ_THROUGH
            and isinstance(vocabulary, int)
            and len(token)
            and int(token.max()) >= vocabulary
        ):
            raise DataError(f"{path}: `token` has {int(token.max())}, and the tokenizer {vocabulary} tokens.")
