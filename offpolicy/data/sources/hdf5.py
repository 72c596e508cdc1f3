"""What an HDF5 file holds: its data sets through groups and links, and files with a group for each episode."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offpolicy.errors import DataError, listed

if TYPE_CHECKING:
    import h5py


def datasets(path: Path, file: h5py.File) -> dict[str, h5py.Dataset]:
    """All data sets by their path in the file; links inside the file are followed.

    Raises:
        DataError: a link out of the file, one that leads nowhere, or a damaged group.
    """
    found: dict[str, Any] = {}
    _walk(path, file, "", found, ())
    return found


def _walk(path: Path, group: h5py.Group, prefix: str, found: dict[str, Any], above: tuple[int, ...]) -> None:
    import h5py

    here = h5py.h5o.get_info(group.id).addr
    if here in above:  # a link to a group that it is in
        return
    for name in group:
        key, link = f"{prefix}{name}", group.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise DataError(
                f"{path}: `{key}` is a link to another file ({link.filename}), which is not followed; expected the "
                "data in this one. Copy the column into it (`h5repack` or h5py's `copy` with `expand_external=True`)."
            )
        try:
            item = group[name]
        except KeyError:
            target = f" to {link.path}" if isinstance(link, h5py.SoftLink) else ""
            raise DataError(
                f"{path}: `{key}` is a link{target} that leads nowhere; expected a data set. Remove the link or write "
                "the column."
            ) from None
        if isinstance(item, h5py.Dataset):
            if item.shape is not None:  # else it holds nothing, not even a shape
                found[key] = item
        elif isinstance(item, h5py.Group):
            _walk(path, item, f"{key}/", found, (*above, here))


def group_per_episode(found: Mapping[str, Any]) -> tuple[str, list[str], list[str]] | None:
    """Where a file has a group for each episode: the group above them, their names, and the columns of the first."""
    parents: Counter[str] = Counter()
    episodes: dict[str, dict[str, list[str]]] = {}
    for key in found:
        parts = key.split("/")
        for depth, part in enumerate(parts[:-1]):
            if re.search(r"\d+$", part):
                above = "/".join(parts[:depth])
                columns = episodes.setdefault(above, {}).setdefault(part, [])
                columns.append("/".join(parts[depth + 1 :]))
                parents[above] += 1
                break
    if not parents or parents.most_common(1)[0][1] < len(found) / 2:
        return None
    above = parents.most_common(1)[0][0]
    names = sorted(episodes[above], key=lambda n: int(re.search(r"\d+$", n)[0]))  # type: ignore[index]
    if not {"action", "actions"} & set(episodes[above][names[0]]):
        return None
    return above, names, episodes[above][names[0]]


def per_episode_recipe(path: Path, where: tuple[str, list[str], list[str]]) -> str:
    """The message for such a file, with lines that read it."""
    above, names, columns = where
    obs = [c for c in columns if "/" in c and c.split("/")[0] in ("obs", "observations")]
    keys = f", obs_keys={[c.split('/', 1)[1] for c in obs][:10]!r}" if obs else ""
    unclear = any(c in ("dones", "done") for c in columns)
    return (
        f"{path} holds a group for each episode ({len(names)} of them: {listed(names, 3)}; each with "
        f"{listed(columns)}); expected one array per column with all episodes end to end. Read it as a list of "
        "episodes:\n"
        "    def arrays(g):\n"
        "        return {k: arrays(v) if hasattr(v, 'keys') else v[()] for k, v in g.items()}\n"
        f"    with h5py.File({str(path)!r}) as f:\n"
        f"        episodes = [arrays(g) for g in {'f[' + repr(above) + ']' if above else 'f'}.values()]\n"
        + (
            "    for e in episodes:  # `dones` does not say whether the environment ended the episode: say it\n"
            "        e['terminated'] = e.pop('dones') > 0  # or zeros, where only a time limit did\n"
            if unclear
            else ""
        )
        + f"    data = offpolicy.load_data(episodes{keys})"
    )
