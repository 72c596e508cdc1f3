"""Rows of texts from files of any kind: JSON, Parquet, Arrow, tables of text, and folders or patterns of them.

Whatever goes wrong in a reader becomes a :class:`DataError` here, with the file and, where there is one, the line.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from offpolicy.data.guard import check_parquet, checked_table, gunzipped
from offpolicy.data.names import TABLES, file_type, shards
from offpolicy.data.texts.formats import Source
from offpolicy.data.texts.messages import WrongType, unpack
from offpolicy.data.texts.rendering import lone_surrogate
from offpolicy.errors import DataError, UsageError, nearest

SPLIT = re.compile(
    r"(?:^|[^a-z])(train(?:ing)?|test(?:ing)?|valid(?:ation)?|val|dev|eval(?:uation)?)(?:[^a-z]|$)", re.IGNORECASE
)
SHARD = re.compile(r"[-_.]?(\d+)[-_]of[-_](\d+)")  # of train-00000-of-00003-ab12.parquet
EXAMPLE = '{"prompt": …, "chosen": …, "rejected": …}'


def reading(path: Path | str, do: Callable[[], Any]) -> Any:
    """What a library reads, with its errors as ours."""
    try:
        return do()
    except (DataError, UsageError):
        raise
    except Exception as error:  # each library has its own kinds
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise DataError(f"{path} cannot be read: {reason}. Make or download it again.") from None


def source_of(where: str, rows: int, names: list[str], column: Callable[[str], list[Any]], **others: Any) -> Source:
    """A source whose columns are read once, each with the conversations in it as messages."""
    for name in names:
        if lone_surrogate(name):
            raise DataError(f"{where} has the column {name!r} with half of a surrogate pair; expected text. Rename it.")
    known: dict[str, list[Any]] = {}

    def read(name: str) -> list[Any]:
        if name not in known:
            values = reading(where, lambda: column(name))
            try:
                known[name], words = unpack(values, name)
            except WrongType as error:
                raise DataError(f"{where}: {error}") from None
            if words:
                (source.doubts if known[name] is values else source.notes).append(words)
        return known[name]

    source = Source(where, rows, names, read, **others)
    return source


# -- one file ----------------------------------------------------------------------------------------------------------


def open_file(path: Path) -> Source:
    """The rows of one file.

    Raises:
        DataError: it is damaged, of another encoding, or has no rows.
    """
    source = _open(path)
    source.meta = {"file": str(path), "sha256": _sha256(path)}
    part = SHARD.search(path.name)
    if part and int(part[2]) > 1:
        pattern = path.name[: part.start(1)] + "*-of-" + path.name[part.start(2) :]
        source.doubts.append(f"{path.name} is one of {int(part[2])} files of a set; '{pattern}' reads all of them")
    return _not_empty(source, path)


def _open(path: Path) -> Source:
    kind = file_type(path).removesuffix(".gz")
    if kind in (".parquet", ".arrow"):
        return of_table(path.name, reading(path, lambda: _arrow(path, kind)))
    if kind in TABLES:
        return _of_csv(path, "\t" if kind == ".tsv" else ",")
    rows = _json_rows(path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return source_of(path.name, len(rows), names, lambda name: [row.get(name) for row in rows])


def _not_empty(source: Source, path: Path) -> Source:
    if not source.rows:
        raise DataError(f"{path} holds no rows; expected at least one. Check how the file was made.")
    return source


def _sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _text(path: Path) -> str:
    """The text of a file in UTF-8, unpacked and without a byte order mark."""
    try:
        raw = path.read_bytes()
        raw = gunzipped(raw, path) if path.name.lower().endswith(".gz") else raw
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}. Make or download it again.") from None
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or raw[1:2] == b"\0" or raw[:1] == b"\0":
        raise DataError(
            f"{path} cannot be read as UTF-8, as it is written in UTF-16 or UTF-32; expected UTF-8. Convert it: iconv "
            "-f UTF-16 -t UTF-8."
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line} cannot be read as UTF-8: the byte {raw[error.start]:#04x} is none of its; expected "
            "UTF-8. Convert the file, as with iconv -f LATIN1 -t UTF-8."
        ) from None


# -- JSON --------------------------------------------------------------------------------------------------------------


class _Twice(ValueError):
    """An object with the same key twice, of which every reader keeps another one."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(f"the key '{next(n for n in names if names.count(n) > 1)}' stands twice in one object")
    return found


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """Records of a file of one JSON list, or of one JSON object per line."""
    text = _text(path)
    if text.lstrip()[:1] == "[" and not _is_json(text.lstrip().partition("\n")[0], but=text):
        rows, places = _parse(text, path, 1), "item"
    else:
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        if len(lines) > 1 and lines[0][1].strip()[:1] == "{" and not _is_json(lines[0][1]) and _is_json(text):
            raise DataError(
                f"{path} is a single JSON value over several lines; expected a list of objects, or one object per line "
                f"such as {EXAMPLE}. Write its rows that way."
            )
        rows, places = [_parse(line, path, n) for n, line in lines], "row"
    for row, value in enumerate(rows):
        if not isinstance(value, dict):
            raise DataError(
                f"{path}: {places} {row} is {json.dumps(value)[:60]}; expected an object such as {EXAMPLE}. Write one "
                "object per row."
            )
    return rows


def _is_json(text: str, but: str | None = None) -> bool:
    """Whether a text is JSON, and not the whole of another one."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return but is None or text.strip() != but.strip()


def _parse(text: str, path: Path, line: int) -> Any:
    """The value of a JSON text that begins in this line of a file."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except _Twice as error:
        raise DataError(f"{path}, line {line}: {error}; expected different keys. Remove one of them.") from None
    except RecursionError:
        raise DataError(f"{path}, line {line} is nested too deeply; expected rows of texts. Correct it.") from None
    except ValueError as error:
        at, words = 0, str(error).partition(";")[0]
        if isinstance(error, json.JSONDecodeError):
            at, words = error.pos, f"{error.msg.removesuffix(' at')} at column {error.colno}"
        around = text[max(0, at - 20) : at + 20].strip()
        line += text.count("\n", 0, at)
        raise DataError(f"{path}, line {line} is no JSON ({words}); found {around!r}. Correct the file.") from None


# -- tables of text ----------------------------------------------------------------------------------------------------


def _of_csv(path: Path, delimiter: str) -> Source:
    """A table with the names of its columns in the first line; all its values are text."""
    text = _text(path)
    first = text.partition("\n")[0]
    if delimiter not in first:
        delimiter = next((d for d in ("\t", ";", ",") if d in first), delimiter)  # as Excel writes in some countries
    rows, lines = [], []
    before = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if row:
                rows.append(row)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is no row of a table ({error}). Correct the file.") from None
    finally:
        csv.field_size_limit(before)
    if not rows:
        return source_of(path.name, 0, [], lambda name: [])
    names = [name.strip() for name in rows[0]]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path} has the column '{twice}' twice; expected different names. Rename one of them.")
    for line, row in zip(lines, rows):
        if len(row) != len(names):
            raise DataError(
                f"{path}, line {line} has {len(row)} values for {len(names)} columns; expected one for each. Put texts "
                'with commas or line breaks in quotes ("…").'
            )
    table = {name: [row[i] for row in rows[1:]] for i, name in enumerate(names)}
    return source_of(path.name, len(rows) - 1, names, table.__getitem__, text_only=True)


# -- Arrow -------------------------------------------------------------------------------------------------------------


def _arrow(path: Path, kind: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    if kind == ".parquet":
        check_parquet(path)
        return checked_table(pyarrow.parquet.read_table(path))
    with pyarrow.memory_map(str(path)) as file:
        magic = file.read(6)
        file.seek(0)
        reader = pyarrow.ipc.open_file if magic == b"ARROW1" else pyarrow.ipc.open_stream
        return checked_table(reader(file).read_all())


def of_table(where: str, table: Any, **others: Any) -> Source:
    """The rows of a ``pyarrow.Table``, without the nulls that pad its nested fields (:func:`unpadded`)."""

    def column(name: str) -> list[Any]:
        found = table.column(name)
        read, values = unpadded(found.type), found.to_pylist()
        return values if read is None else [None if value is None else read(value) for value in values]

    return source_of(where, table.num_rows, list(table.column_names), column, **others)


def unpadded(kind: Any) -> Callable[[Any], Any] | None:
    """What makes a value of an Arrow type the JSON that it came from, None where nothing is to do.

    All objects of a nested column have the same fields in Arrow, so that a field of one is a null in the others: a
    null is the same as no field there. Maps are objects, and Arrow's JSON type is read.
    """
    import pyarrow.types as types

    if types.is_struct(kind):
        fields = [(field.name, unpadded(field.type)) for field in kind]

        def of_struct(value: dict[str, Any]) -> dict[str, Any]:
            return {
                name: value[name] if read is None else read(value[name])
                for name, read in fields
                if value[name] is not None
            }

        return of_struct
    if types.is_map(kind):
        item = unpadded(kind.item_type)
        return lambda value: _object([(k, v if item is None or v is None else item(v)) for k, v in value])
    if types.is_nested(kind) and hasattr(kind, "value_type"):
        one = unpadded(kind.value_type)
        return None if one is None else lambda value: [None if v is None else one(v) for v in value]
    if str(kind).startswith("extension<arrow.json>"):
        return lambda value: json.loads(value) if isinstance(value, str) else value
    return None


# -- folders and patterns ----------------------------------------------------------------------------------------------


def open_shards(path: Path, split: str | None) -> Source:
    """The rows of all files of a folder, or that a pattern matches, in the order of their names (numbers by value).

    Files whose names say "train", "test" and the like are parts: ``split`` chooses one, "train" is taken else.

    Raises:
        DataError: several kinds of files, several sets, or an unknown part.
    """
    chosen, part, others = _part(path, shards(path), split)
    kinds = sorted({file_type(file).removesuffix(".gz") for file in chosen})
    if len(kinds) > 1:
        raise DataError(
            f"{path} holds files of several kinds ({', '.join(kinds)}: {_some(chosen)}); expected one kind. Pass a "
            f"pattern, such as '{path if path.is_dir() else path.parent}/*{kinds[0]}'."
        )
    parts = [_open(file) for file in chosen]
    where = f"{path} ({part})" if part else str(path)
    names = list(dict.fromkeys(name for one in parts for name in one.names))

    def column(name: str) -> list[Any]:
        return [value for one in parts for value in (one.column(name) if name in one.names else [None] * one.rows)]

    digest = sha256("".join(_sha256(file) for file in chosen).encode()).hexdigest()
    meta = {"file": where, "sha256": digest, "files": len(chosen)}
    text_only = all(one.text_only for one in parts)
    rows = sum(one.rows for one in parts)
    source = Source(where, rows, names, column, meta, text_only=text_only, others=others)
    for one in parts:  # the same lists, as their columns are read later
        one.notes, one.doubts = source.notes, source.doubts
    if others:
        source.notes.append(split_note(part, others))
    if len(chosen) > 1:
        source.notes.append(f"files read in the order of their names, {_some(chosen)}: {len(chosen):,}")
    source.doubts += _absent(chosen)
    return _not_empty(source, path)


def split_note(part: str, others: list[str]) -> str:
    """Which part of several was read."""
    return f"the split '{part}' was read; there are also {', '.join(others)} (--data.split NAME)"


def _part(path: Path, files: list[Path], split: str | None) -> tuple[list[Path], str, list[str]]:
    """The files of one part, its name if there are parts, and the names of the others."""
    root = path if path.is_dir() else None
    named: dict[str, list[Path]] = {}
    for file in files:
        named.setdefault(_part_name(file, root), []).append(file)
    if not any(SPLIT.search(name) for name in named):
        if split is not None:
            raise UsageError(f"`split` is '{split}', but no file of {path} says which part it is. Leave it out.")
        chosen, part, others = files, "", []
    else:
        part = _named(path, list(named), split)
        chosen, others = named[part], [name for name in named if name != part]
    folders = sorted({file.parent.name for file in chosen if not _split_folder(file.parent.name)})
    if root is not None and len({file.parent for file in chosen}) > 1 and len(folders) > 1:
        raise DataError(
            f"{path} holds files in several folders ({', '.join(folders[:10])}); expected the files of one set. Pass "
            f"one of the folders, or a pattern for all of them: '{path}/*/*{file_type(chosen[0])}'."
        )
    return chosen, part, others


def _named(path: Path, names: list[str], split: str | None) -> str:
    """The part that is meant."""
    wanted = split or "train"
    near = [name for name in names if wanted.lower() in re.split(r"[^a-z0-9]+", name.lower())]
    found = [wanted] if wanted in names else near
    if split is None and not found and len(names) == 1:
        found = names
    if len(found) == 1:
        return found[0]
    asked = f"has no part '{split}'" if split and not found else f"has several parts, and '{wanted}' is not one of them"
    asked = f"has several parts called '{wanted}'" if found else asked
    close = nearest(split, names) if split and not found else ""
    raise DataError(f"{path} {asked}; it has {', '.join(names[:20])}.{close} Pass `--data.split NAME`.")


def _part_name(file: Path, root: Path | None) -> str:
    """What a file is a part of: a folder called train or the like, else its name without type and number."""
    folders = file.relative_to(root).parts[:-1] if root is not None else file.parts[-2:-1]
    if folder := next((name for name in folders if _split_folder(name)), None):
        return folder
    stem = file.name[: -len(file_type(file))]
    shard = SHARD.search(stem)
    return stem[: shard.start()] if shard else re.sub(r"[-_.]?(?<![vV])\d+$", "", stem)


def _split_folder(name: str) -> bool:
    return bool(SPLIT.fullmatch(name))


def _absent(files: list[Path]) -> list[str]:
    """A doubt where the names of files say that there are more of them."""
    numbers = [match for file in files if (match := SHARD.search(file.name))]
    expected = {int(match[2]) for match in numbers}
    if len(numbers) == len(files) and len(expected) == 1 and len(files) < min(expected):
        return [f"files that are absent, by the names of the others ({_some(files)}): {min(expected) - len(files)}"]
    return []


def _some(files: list[Path]) -> str:
    names = [file.name for file in files]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]}, … {names[-1]}"
