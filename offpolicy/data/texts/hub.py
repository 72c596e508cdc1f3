"""Rows of texts wherever they lie: files, folders of ``datasets``, and the Hugging Face hub."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from typing import Any

from offpolicy.data.guard import checked_table, inside, read_json
from offpolicy.data.names import HUB_ID, Target
from offpolicy.data.texts.files import of_table, open_file, open_shards, reading, source_of, split_note
from offpolicy.data.texts.formats import Source
from offpolicy.data.texts.sums import addition
from offpolicy.errors import DataError, UsageError, nearest

PATIENCE = 5.0  # seconds for a first answer of the hub


def read(target: Target, split: str | None = None, *, download: bool = True) -> Source:
    """The rows of a file, a folder or pattern of files, a folder of ``datasets.save_to_disk``, or a set of the hub.

    Raises:
        DataError: a damaged file, an unknown split, or a hub that cannot be reached.
    """
    path = target.path
    if path is None:
        hub = target.info.get("hub", target.name)
        if not hub:
            return addition(split)
        return _from_hub(hub, split, download)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        with _quiet():
            found = reading(path, lambda: _saved(path))
        return _of_dataset(found, str(path), split)
    if not path.is_file():
        return open_shards(path, split)
    if split is not None:
        raise UsageError(f"`split` is '{split}', but {path} is a single file without parts. Leave it out.")
    return open_file(path)


def _saved(path: Any) -> Any:
    """What ``datasets.save_to_disk`` has written, once its files lie in its folder and their tables are whole."""
    import datasets

    splits = (
        (read_json(path / "dataset_dict.json").get("splits") or []) if (path / "dataset_dict.json").is_file() else None
    )
    for folder in [path] if splits is None else [inside(path, split) for split in splits]:
        for file in read_json(folder / "state.json").get("_data_files") or []:
            inside(folder, file["filename"])
    found = datasets.load_from_disk(str(path))
    for one in [found] if splits is None else found.values():
        checked_table(one.data.table)
    return found


def _of_dataset(found: Any, where: str, split: str | None) -> Source:
    """A ``datasets.Dataset``, or the split of a dictionary of them."""
    chosen, others = None, []
    if hasattr(found, "keys"):
        names = list(found.keys())
        chosen = split or ("train" if "train" in names else names[0] if len(names) == 1 else None)
        if chosen not in names:
            asked = f"has no split '{split}'" if split else "has several splits and none is called 'train'"
            close = nearest(split, names) if split else ""
            raise DataError(f"{where} {asked}; it has {', '.join(names)}.{close} Pass `--data.split NAME`.")
        found, where = found[chosen], f"{where} ({chosen})"
        others = [name for name in names if name != chosen]
    elif split is not None:
        raise DataError(f"{where} is one table without splits; found `split` '{split}'. Leave it out.")
    if not found.num_rows:
        raise DataError(f"{where} holds no rows; expected at least one. Check how it was made.")

    def column(name: str) -> list[Any]:
        part = of_table(where, found.select_columns([name]).with_format("arrow")[:])
        return part.column(name)

    source = source_of(where, found.num_rows, list(found.column_names), column, meta={"file": where}, others=others)
    source.notes += [split_note(str(chosen), others)] if others else []
    return source


# -- the hub -----------------------------------------------------------------------------------------------------------


def _from_hub(name: str, split: str | None, download: bool) -> Source:
    """A set of the hub, from the cache of ``datasets`` when downloading is off or nothing answers."""
    import datasets

    if not HUB_ID.match(name):
        raise UsageError(f"'{name}' is neither a file nor a name on the hub (org/name). Check the spelling.")
    reachable = download and hub_answers()
    repository, _, configuration = name.partition(":")
    with _quiet(), hub_mode(offline=not reachable):
        try:
            found = datasets.load_dataset(repository, configuration or None)
        except Exception as error:  # the library raises almost anything here
            reason = " ".join(str(error).split())[:300]
            why = (
                f"downloading is off (`download` is false) and it is not in {datasets.config.HF_DATASETS_CACHE}"
                if not download
                else reason
                if reachable
                else f"the hub does not answer and it is not in {datasets.config.HF_DATASETS_CACHE}"
            )
            raise DataError(
                f"'{name}' is no file or folder here, so it was taken for a data set of the Hugging Face hub, and "
                f"could not be opened: {why}. Check the name and the network, or pass a local file."
            ) from None
    return _of_dataset(found, f"hub:{name}", split)


def hub_answers() -> bool:
    """Whether the hub can be reached at all, known within seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    from huggingface_hub import constants

    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        return True  # an answer, if an unfriendly one
    except (OSError, ValueError) as error:
        return "CERTIFICATE" in str(error).upper()  # the client may know certificates that Python does not
    return True


class hub_mode:
    """Within it, the client libraries do not use the network if ``offline``."""

    def __init__(self, offline: bool) -> None:
        self.offline = offline

    def __enter__(self) -> None:
        import datasets.config
        import huggingface_hub.constants

        self.holders: list[Any] = [datasets.config, huggingface_hub.constants]
        self.before = [holder.HF_HUB_OFFLINE for holder in self.holders]
        if self.offline:
            for holder in self.holders:
                holder.HF_HUB_OFFLINE = True

    def __exit__(self, *_: object) -> None:
        for holder, value in zip(self.holders, self.before):
            holder.HF_HUB_OFFLINE = value


class _quiet:
    """Within it, ``datasets`` draws no bars."""

    def __enter__(self) -> None:
        import datasets

        self.shown = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        import datasets

        if self.shown:
            datasets.enable_progress_bars()
