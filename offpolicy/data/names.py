"""What a user means by ``--data TEXT``: a file or folder, or the name of a known data set.

Nothing heavy is imported here, so that a misspelt name is answered at once.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from glob import glob, has_magic
from importlib.resources import files
from pathlib import Path
from typing import Literal

from offpolicy.errors import UsageError, fold, nearest
from offpolicy.given import expanded, place

Kind = Literal["hdf5", "npz", "replay", "made", "d4rl", "minari", "ogbench", "language", "online"]

FILES: dict[str, Kind] = {".hdf5": "hdf5", ".h5": "hdf5", ".npz": "npz"}
TABLES = (".csv", ".tsv")
LANGUAGE = (
    *(".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json", ".json.gz", ".parquet", ".arrow"),
    *TABLES,
    *(f"{table}.gz" for table in TABLES),
)
NO_TEXTS = re.compile(  # JSON and caches that stand beside data, models and runs
    r"[._].*|cache-.*|(dataset_infos?|dataset_dict|state|versions|vocab|package|tokenizer.*|special_tokens_map|"
    r"added_tokens|.*config|.*\.index|.*metadata|.*croissant)\.json|(metrics|evals|margins)\.csv"
)
ROOTS = {
    "d4rl": ("D4RL_DATASET_DIR", "~/.d4rl/datasets"),
    "minari": ("MINARI_DATASETS_PATH", "~/.minari/datasets"),
    "ogbench": ("OGBENCH_DATASET_DIR", "~/.ogbench/data"),
    "made": ("OFFPOLICY_DATA_DIR", "~/.cache/offpolicy/datasets"),
}
PROBLEMS = {"addition": "", "gsm8k": "openai/gsm8k:main"}  # tasks with answers that can be checked → name on the hub
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(:[\w.-]+)?$")  # owner/name, or owner/name:configuration
COPY = re.compile(
    r"( ?\(\d+\)| - copy( ?\(\d+\))?|[ _-]copy\d*)+$", re.IGNORECASE
)  # what copies have at the end of a name
LEVELS = ("random", "medium", "medium-replay", "medium-expert", "expert", "full-replay", "best")  # of trained policies
MINARI_ID = re.compile(r"^([-\w]{2,}/)+[-\w]+-v\d+$")


@dataclass(frozen=True)
class Target:
    """What a name or path was taken for.

    Attributes:
        kind: "hdf5", "npz" and "replay" (our own folder format) are files without a known task; "made", "d4rl",
            "minari" and "ogbench" are sets with one; "language" is text data.
        name: canonical name, or the file's stem.
        path: the file or folder the user gave, else None: a known set is looked up under :func:`root`.
        info: facts from the table of known sets, by column (D4RL: that row of ``d4rl.csv``); of sets made by policies
            that are trained here, their family and level.
    """

    kind: Kind
    name: str
    path: Path | None = None
    info: Mapping[str, str] = field(default_factory=dict, hash=False)

    def location(self) -> Path | None:
        """Where the data are or would be put; None for language data given by name."""
        if self.path is not None or self.kind == "language":
            return self.path
        if self.kind == "d4rl":
            return root("d4rl") / self.info["dataset_url"].rsplit("/", 1)[-1]
        if self.kind == "ogbench":
            return root("ogbench") / f"{self.name}.npz"
        return root(self.kind) / self.name


def root(kind: str) -> Path:
    """Folder in which sets of a kind ("d4rl", "minari", "ogbench", "made") are kept; an environment variable wins."""
    variable, default = ROOTS[kind]
    return Path(expanded(os.environ.get(variable) or default))


def resolve(text: str | os.PathLike[str], *, language: bool = False) -> Target:
    """Find out what is meant by a name or path; with ``language`` also by a name on the Hugging Face hub.

    An existing file or folder comes first, then the made sets, D4RL tasks, Minari ids and OGBench names, then a folder
    of our format under :func:`root` ("made") and local Minari sets. Case, '-', '_' and '+' do not matter in names.

    Raises:
        UsageError: no such file and no such name (with the nearest name), or a file of an unknown type.
    """
    path = place("data", text)
    name = os.fspath(text)
    try:
        found = _of_path(path) if path.exists() else None
    except OSError as error:  # its name is too long, or a folder above it is closed to us
        raise UsageError(f"{name[:80]} cannot be looked for: {error.strerror}. Check the path.") from None
    if found is not None:
        return found
    known = _known().get(fold(name))
    if known is not None:
        return known
    if path.is_dir() and shards(path):
        return Target("language", path.resolve().name, path)
    if path.exists():
        raise UsageError(_unknown_path(path))
    if has_magic(name):
        return _of_pattern(path)
    looks_like_a_path = name.startswith((".", "~", os.sep)) or file_type(path) in {*FILES, *LANGUAGE}
    if not looks_like_a_path:
        if (root("made") / name / "meta.json").is_file():
            return Target("replay", name, root("made") / name)
        if language and HUB_ID.match(name):
            return Target("language", name)
        local = {fold(i): i for i in _local_minari()}.get(fold(name))
        if local is not None or MINARI_ID.match(name):
            return Target("minari", local or name)
        raise UsageError(
            f"no data set is called '{name}' and there is no such file; expected a known name, a file "
            f"({', '.join(FILES)})"
            f" or a folder.{nearest(name, known_names())} `python -m offpolicy.data show` lists the known names."
        )
    if path.is_symlink():
        raise UsageError(f"{path} is a link to {os.readlink(path)}, which does not exist. Correct the link.")
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UsageError(
        f"{path} does not exist; expected a data file or folder.{nearest(path.name, siblings)} Check the path."
    )


def known_names() -> list[str]:
    """All names that need no path: made sets, 155 D4RL tasks, published Minari ids, OGBench sets, problems for language
    models; in this order."""
    return [target.name for target in _known().values()]


def describe(target: Target) -> str:
    """One sentence saying what a name or path was taken for and where the data are."""
    place, made, family = target.location(), target.kind == "made", target.info.get("family")
    what = {
        "hdf5": "a file in the layout of D4RL (HDF5)",
        "npz": "a NumPy archive (.npz) with a row per step",
        "replay": "a folder in the format of this library",
        "made": f"a set made here {'by policies trained in its simulator' if family else 'from a real environment'}",
        "d4rl": f"the D4RL task of the family {family}",
        "minari": "a Minari data set",
        "ogbench": "an OGBench data set",
        "language": "language data",
    }[target.kind]
    if target.path is not None:
        where = f"read from {target.path}"
    elif made and family and place is not None and not place.exists():
        where = f"not made yet: python -m offpolicy.data make {target.name}"
    elif made:
        where = f"kept under {root('made')}"
    elif place is not None and place.exists():
        where = f"found at {place}"
    elif target.kind == "language":
        hub = target.info.get("hub", target.name)
        where = f"looked up on the Hugging Face hub as {hub}" if hub else "made here"
    else:
        where = f"not on disk, to be downloaded to {place}"
    return f"{target.name}: detected format: {what}, {where}."


@lru_cache(maxsize=1)
def _known() -> dict[str, Target]:
    """Folded name → target."""
    targets: list[Target] = []
    made = sorted(f.name for f in files("datasets_cfg").joinpath("made").iterdir() if f.name.endswith(".yaml"))
    targets += [Target("made", name.removesuffix(".yaml")) for name in made]
    for family in _families():
        info = [{"family": family, "level": level} for level in LEVELS]
        targets += [Target("made", f"{family}-{one['level']}-made-v0", None, one) for one in info]
    targets += [Target("d4rl", row["task"], None, row) for row in _table("d4rl.csv")]
    targets += [Target("minari", row["dataset_id"], None, row) for row in _table("minari.csv")]
    for row in _table("ogbench.csv"):
        stem = row["env_id"].removesuffix("-v0")
        targets += [Target("ogbench", f"{stem}-{kind}-v0", None, row) for kind in row["kinds"].split()]
    targets += [Target("language", name, None, {"hub": hub}) for name, hub in PROBLEMS.items()]
    return {fold(target.name): target for target in targets}


def _families() -> list[str]:
    """Simulators in which policies are trained to make data."""
    found = files("datasets_cfg").joinpath("simulated").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in found if f.name.endswith(".yaml"))


def _table(name: str) -> Iterator[dict[str, str]]:
    yield from csv.DictReader(files("datasets_cfg").joinpath(name).read_text().splitlines())


def _of_path(path: Path) -> Target | None:
    """What an existing path is; None when it is nothing we read."""
    if path.is_dir():
        if (path / "meta.json").is_file() and (path / "index.npz").is_file():
            return Target("replay", path.name, path)
        for folder in (path, path.parent):
            if (folder / "data" / "metadata.json").is_file():
                return Target("minari", _minari_name(folder), folder, _minari_info(_minari_name(folder)))
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # of datasets.save_to_disk
            return Target("language", path.name, path)
        return None
    suffix = file_type(path)
    if suffix in (*LANGUAGE, *FILES) and not path.is_file():  # it might never give anything
        raise UsageError(f"{path} is a pipe, socket or device; expected a file or folder. Write the data to a file.")
    if suffix in LANGUAGE:
        return Target("language", path.name[: -len(suffix)], path)
    if suffix not in FILES:
        return None
    if path.name == "main_data.hdf5" and (path.parent / "metadata.json").is_file():
        return _of_path(path.resolve().parent)
    known = _by_file_name(path, "ogbench" if suffix == ".npz" else "d4rl")
    if known is not None:  # a known set kept somewhere else
        return Target(known.kind, known.name, path, known.info)
    return Target(FILES[suffix], path.stem, path)


def _by_file_name(path: Path, kind: Kind) -> Target | None:
    """The known set that a file has the name of: its source's file name first, then the set's own name, in any
    spelling; copies such as "hopper-medium-v2 (1).hdf5" too."""
    stem = COPY.sub("", path.stem)
    places = [(known, known.location()) for known in _known().values() if known.kind == kind]
    by_file = next((known for known, place in places if place is not None and place.name == path.name), None)
    by_name = _known().get(fold(stem))
    if by_file is None and (by_name is None or by_name.kind != kind):
        by_name = next((known for known, place in places if place is not None and fold(place.stem) == fold(stem)), None)
    return by_file or by_name


def _minari_name(folder: Path) -> str:
    try:
        return folder.resolve().relative_to(root("minari").resolve()).as_posix()
    except ValueError:
        parts = folder.resolve().parts[-3:]
        return next(
            (t.name for n in (3, 2) if (t := _known().get(fold("/".join(parts[-n:])))) and t.kind == "minari"),
            folder.resolve().name,
        )


def _minari_info(name: str) -> Mapping[str, str]:
    known = _known().get(fold(name))
    return known.info if known is not None and known.kind == "minari" else {}


def _local_minari() -> Iterator[str]:
    """Ids of the sets in the Minari folder; a set has ``data/metadata.json``."""
    top = root("minari")
    for folder, children, _ in os.walk(top):
        if os.path.isfile(os.path.join(folder, "data", "metadata.json")):
            children.clear()
            yield Path(folder).relative_to(top).as_posix()


def file_type(path: Path) -> str:
    """The end of a file's name that says what is in it, in small letters."""
    lower = path.name.lower()
    return next((s for s in sorted(LANGUAGE, key=len, reverse=True) if lower.endswith(s)), path.suffix.lower())


def shards(path: Path) -> list[Path]:
    """The files of texts in a folder and up to two below it, or that a pattern matches, in the order of their names.

    Numbers in names count by value. Hidden files and those that tell of data, models and runs are left out.
    """
    if path.is_dir():
        found = [file for depth in ("*", "*/*", "*/*/*") for file in path.glob(depth)]
        found = [file for file in found if not any(p.startswith(".") for p in file.relative_to(path).parts)]
        found = [file for file in found if not NO_TEXTS.fullmatch(file.name)]
    else:
        found = [Path(file) for file in glob(str(path), recursive=True)]
    found = [file for file in found if file_type(file) in LANGUAGE and file.is_file()]
    return sorted(found, key=lambda file: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", str(file))])


def _of_pattern(path: Path) -> Target:
    """The files of texts that a pattern such as ``data/train-*.parquet`` matches, under the name they share."""
    if shards(path):
        name = re.sub(r"[^\w.-]+|-of-.*", "", path.name[: -len(file_type(path))] or path.name).strip("-_.")
        plain = next(parent for parent in path.absolute().parents if not has_magic(parent.name))
        return Target("language", name or plain.name, path)
    other = sorted({file_type(Path(file)) for file in glob(str(path), recursive=True)})
    raise UsageError(
        f"the pattern {path} matches {'files of the type ' + ', '.join(other) if other else 'no file'}; expected texts "
        f"({', '.join(LANGUAGE)}). Check the path."
    )


def _unknown_path(path: Path) -> str:
    if path.is_dir():
        return (
            f"the folder {path} holds no data set: there is neither meta.json with index.npz (our format), nor "
            "data/metadata.json (Minari), nor state.json (texts written by `datasets`), nor a file of texts. Pass the "
            "folder of one data set, or a file."
        )
    suffix = file_type(path)
    remedy = next((words for types, words in REMEDIES.items() if suffix in types), "Convert it to one of these.")
    return f"{path} has the type '{suffix}'; expected {', '.join((*FILES, *LANGUAGE))} or a folder. {remedy}"


REMEDIES = {
    (".zst", ".bz2", ".xz", ".zip", ".tar", ".tgz", ".7z", ".gz"): "Unpack it first.",
    (".xlsx", ".xls", ".ods"): "Save the sheet as CSV.",
    (".txt", ".md", ".yaml", ".yml", ".xml"): "Write texts as JSON lines, one object per row.",
    (".npy", ".mat"): "Save the arrays with numpy.savez.",
    (".pkl", ".pickle", ".pt", ".pth"): (
        "Pickled files are never read, as opening one runs its code; save the arrays with numpy.savez instead."
    ),
}
