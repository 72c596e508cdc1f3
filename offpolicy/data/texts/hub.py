"""Texts from files and from the Hugging Face hub: rows → records → tokens → :class:`Replay`."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from typing import Any

import numpy as np

from offpolicy.data.guard import checked_table, inside, read_json
from offpolicy.data.names import HUB_ID, Target, resolve
from offpolicy.data.replay import Replay
from offpolicy.data.texts.files import of_table, open_file, open_shards, reading, source_of, split_note
from offpolicy.data.texts.formats import Faults, Record, Source, detect, records
from offpolicy.data.texts.stops import turn_end
from offpolicy.data.texts.tokens import CALLS, Encoded, Limits, Row, Text, encode, fingerprint, written
from offpolicy.errors import DataError, UsageError, nearest

PATIENCE = 5.0  # seconds for a first answer of the hub


def open_texts(
    name_or_target: str | os.PathLike[str] | Target,
    *,
    tokenizer: Any,
    download: bool = True,
    on_bad: str = "error",
    columns: Mapping[str, str | None] | None = None,
    split: str | None = None,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    truncation: str = "prompt_first",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    pair_strategy: str = "best_vs_worst",
    min_score_gap: float = 0.0,
    max_bad: float = 0.1,
    separator: str = "",
) -> Replay:
    """Open, check and tokenise texts.

    Args:
        name_or_target: a file, a folder or a hub name, or what :func:`offpolicy.data.names.resolve` made of it.
        tokenizer: of ``transformers``, or its folder or name.
        others: as of :class:`offpolicy.data.texts.module.TextData`.

    Returns:
        The replay with the table ``pairs`` or ``singles`` (:mod:`offpolicy.data.texts.sequences`); ``meta`` says what
        was found: ``format``, ``columns``, ``lengths``, ``dropped``, ``notes``, ``warnings``, ``tokenizer``.

    Raises:
        UsageError: an unknown name or an impossible option.
        DataError: texts that are absent, damaged or cannot be trained on.
    """
    from offpolicy.data.texts.tokens import load_tokenizer

    target = name_or_target if isinstance(name_or_target, Target) else resolve(name_or_target, language=True)
    limits = Limits(max_length, max_prompt_length, truncation)
    if target.kind == "replay":
        replay = Replay.load(target.path, mmap=True)  # type: ignore[arg-type]
        if not {"pairs", "singles"} & replay.tables.keys():
            raise DataError(_not_texts(target))
        replay.meta = {**replay.meta, "file": str(target.path)}
        return replay
    if target.kind != "language":
        raise DataError(_not_texts(target))
    source = read(target, split, download=download)
    form = detect(source, columns)
    faults, counts = Faults(source.where, source.rows, on_bad, max_bad), Counter[str]()
    faults.unread = form.unused
    made = list(
        records(
            source,
            form,
            faults,
            counts,
            pair_strategy=pair_strategy,
            min_score_gap=min_score_gap,
            separator=separator.replace("\\n", "\n").replace("\\t", "\t"),  # as shells pass them
        )
    )
    faults.check()
    if not made:
        raise DataError(f"{source.where} gives nothing to train on: {'; '.join(_notes(counts)) or 'no row'}. Check it.")
    build = _Builder(load_tokenizer(tokenizer), limits, dict(chat_template_kwargs or {}), faults, counts)
    replay = build(made, "singles" if len(made[0].answers) == 1 else "pairs")
    faults.check()
    if not replay.tables:
        raise DataError(f"{source.where}: no row is left; {faults.table()}; {'; '.join(_notes(counts))}. Check it.")
    kind = _table(replay)
    replay.meta |= {
        "name": target.name,
        "source": "text",
        **source.meta,
        "rows": source.rows,
        kind: len(replay.tables[kind]),
        "format": str(form),
        "columns": form.columns,
        "dropped": faults.counts(),
        "notes": [*source.notes, *_notes(counts)],
    }
    replay.meta["warnings"] = [*source.doubts, *replay.meta.pop("doubts")]
    if faults.bad:
        replay.meta["warnings"].insert(0, f"{faults.bad} of {source.rows} rows were dropped: {faults.table()}")
    return replay


def sketch(
    target: Target,
    *,
    columns: Mapping[str, str | None] | None = None,
    split: str | None = None,
    download: bool = True,
    on_bad: str = "error",
    n: int = 2,
) -> str:
    """What can be said about texts without a tokenizer: format, counts, faults and the first ``n`` rows."""
    source = read(target, split, download=download)
    form = detect(source, columns)
    faults, counts = Faults(source.where, source.rows, on_bad, max_bad=1.0), Counter[str]()
    made = list(records(source, form, faults, counts))
    faults.check()
    lines = [f"{target.name}: {source.rows:,} rows give {len(made):,}: {form}"]
    lines += [f"  note      {text}" for text in [*source.notes, *_notes(counts)]]
    lines += [f"  warning   {text}" for text in source.doubts]
    lines += [f"  warning   {faults.bad} rows would be dropped: {faults.table()}"] if faults.bad else []
    for record in made[:n]:
        lines += [f"row {record.row}", *(f"  {record.prompt!r} ▶ {answer!r}" for answer in record.answers)]
    return "\n".join(lines)


def warn_of_overlap(held_out: Replay, training: Replay) -> None:
    """Note in the held-out part how many of its rows have a prompt of the training part."""
    known, asked = (replay.tables[f"{_table(replay)}/prompt_hash"] for replay in (training, held_out))
    seen = int(np.isin(asked, known).sum())
    if seen:
        held_out.meta["warnings"] = [
            *held_out.meta["warnings"],
            f"held-out rows with a prompt that is in the training data too: {seen:,} of {len(asked):,}",
        ]


def _table(replay: Replay) -> str:
    return "pairs" if "pairs" in replay.tables else "singles"


def split_by_prompt(replay: Replay, fraction: float) -> tuple[Replay, Replay | None]:
    """Hold out the rows of some prompts.

    The prompts with the lowest hashes of their text go, so that a row stays on its side when others are added, and a
    prompt is never on both. Prompts that pairs tie together (two-prompt pairs) stay together.

    Args:
        replay: language data with ``<table>/prompt_hash``.
        fraction: share of the prompts, in (0, 1); at least one goes where there are two.

    Returns:
        The training part, and the held-out part or None when there is but one prompt. Tokens are shared.
    """
    table = _table(replay)
    key = replay.tables[f"{table}/prompt_hash"]
    if table == "pairs":
        key = _joined(replay.tables["pairs"][:, [0, 2]], key)
    distinct = np.unique(key)  # ascending
    if len(distinct) < 2:
        return replay, None
    count = min(len(distinct) - 1, max(1, round(fraction * len(distinct))))
    held = key <= distinct[count - 1]
    return select(replay, ~held), select(replay, held)


def select(replay: Replay, keep: np.ndarray) -> Replay:
    """The rows of the index table that a mask (P,) keeps, with the texts they need; tokens are shared."""
    table = _table(replay)
    index = replay.tables[table][keep]
    used, renumbered = np.unique(index, return_inverse=True)
    tables = {k: v[keep] for k, v in replay.tables.items() if k.startswith(f"{table}/")}
    return Replay(
        replay.steps,
        start=replay.start[used],
        length=replay.length[used],
        episodes={k: v[used] for k, v in replay.episodes.items()},
        tables={table: renumbered.reshape(index.shape).astype(np.int64), **tables},
        meta={**replay.meta, table: len(index), "lengths": lengths(index, replay.length)},
    )


def lengths(index: np.ndarray, length: np.ndarray) -> dict[str, list[int]]:
    """Median, 95 % quantile and largest number of tokens by role, from an index table and the lengths of the texts."""
    roles = {"prompt": 0, "chosen": 1, "rejected": 3} if index.shape[1] == 4 else {"prompt": 0, "answer": 1}
    levels = [0.5, 0.95, 1.0]
    return {
        role: [int(q) for q in np.quantile(length[index[:, column]], levels, method="higher")]
        for role, column in roles.items()
    }


def _joined(index: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The smallest key among rows that are tied together by prompts in common."""
    if (index[:, 0] == index[:, 1]).all():
        return key
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    size = int(index.max()) + 1
    edges = coo_matrix((np.ones(len(index)), (index[:, 0], index[:, 1])), shape=(size, size))
    group = connected_components(edges, directed=False)[1][index[:, 0]]
    smallest = np.full(group.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(smallest, group, key)
    return smallest[group]


# -- tokens ------------------------------------------------------------------------------------------------------------


class _Builder:
    """Puts encoded rows into the columns and tables of a replay; equal texts are stored once."""

    def __init__(self, tokenizer: Any, limits: Limits, template: dict, faults: Faults, counts: Counter[str]) -> None:
        self.tokenizer, self.limits, self.template = tokenizer, limits, template
        self.faults, self.counts = faults, counts
        self.texts: dict[bytes, int] = {}
        self.parts: list[np.ndarray] = []
        self.moved_tail = ""
        self.dtype = _smallest(len(tokenizer))

    def __call__(self, made: list[Record], table: str) -> Replay:
        index: list[list[int]] = []
        kept: list[Record] = []
        for record, encoded in zip(made, self._encode(made)):
            fault = next((one for one in encoded if one.fault), None)
            if fault is not None:
                self.faults.add(record.row, fault.where, fault.fault, fault.found)
                continue
            if len(encoded) == 2:  # a prompt for each side
                sides = [(encoded[0].prompt, encoded[0].answers[0]), (encoded[1].prompt, encoded[1].answers[0])]
            else:
                sides = [(encoded[0].prompt, answer) for answer in encoded[0].answers]
            index.append([self._store(ids) for side in sides for ids in side])
            kept.append(record)
            self._count(encoded, isinstance(record.prompt, list))
        if not kept:
            return Replay({"token": np.zeros(1, self.dtype)}, meta={"doubts": []})  # the faults will speak
        pairs = np.asarray(index, dtype=np.int64)
        length = np.asarray([len(part) for part in self.parts], dtype=np.int64)
        meta = {
            "tokenizer": _facts(self.tokenizer),
            "lengths": lengths(pairs, length),
            "limits": vars(self.limits) | {},
            "doubts": self._doubts(kept, pairs),
        }
        return Replay(
            {"token": np.concatenate(self.parts)},
            start=np.cumsum(length) - length,
            length=length,
            tables={table: pairs, **_columns(kept, table)},
            meta=meta,
        )

    def _encode(self, made: list[Record]) -> Iterator[list[Encoded]]:
        """The encoded rows of each record: one, or two where its sides have different prompts."""

        def rows() -> Iterable[Row]:
            for record in made:
                template = self.template | record.template
                if record.rejected_prompt is None:
                    yield Row(record.prompt, record.answers, template)
                else:
                    yield Row(record.prompt, record.answers[:1], template)
                    yield Row(record.rejected_prompt, record.answers[1:], template)

        encoded = encode(rows(), self.tokenizer, self.limits)
        for record in made:
            yield [next(encoded) for _ in range(1 if record.rejected_prompt is None else 2)]

    def _store(self, ids: np.ndarray) -> int:
        small: np.ndarray = ids.astype(self.dtype)
        number = self.texts.setdefault(small.tobytes(), len(self.texts))
        if number == len(self.parts):
            self.parts.append(small)
        return number

    def _count(self, encoded: list[Encoded], chat: bool) -> None:
        self.counts["prompts were cut"] += any(one.cut_prompt for one in encoded)
        self.counts["answers were cut, so they have no end"] += any(one.cut_answer for one in encoded)
        moved = [one for one in encoded if one.moved]
        if moved and chat:
            self.counts["rows were rendered differently as prompt alone and with the answer"] += 1
            self.moved_tail = self.moved_tail or moved[0].tail
        elif moved:
            self.counts["rows have a token that spans prompt and answer; it counts to the answer"] += 1

    def _doubts(self, kept: list[Record], index: np.ndarray) -> list[str]:
        """What deserves a warning once the tokens are known."""
        doubts = []
        if self.moved_tail:
            doubts.append(
                f"the chat template ends prompts with {self.moved_tail!r}, which is missing where an answer follows; "
                "it was left out of the prompts. Templates of reasoning models do so; "
                "--data.chat_template_kwargs may help"
            )
        if len(np.unique(index, axis=0)) < len(index):
            doubts.append(f"rows that repeat another row: {len(index) - len(np.unique(index, axis=0)):,}")
        if index.shape[1] == 4:
            both = {tuple(row) for row in index.tolist()}
            turned = sum((c, d, a, b) in both for a, b, c, d in both)
            if turned:
                doubts.append(f"pairs that are there in both orders, so their labels contradict each other: {turned:,}")
        doubts += self._special(kept, index)
        return doubts + self._unwritten(kept)

    def _unwritten(self, kept: list[Record]) -> list[str]:
        """What the rows hold and the chat template leaves out."""
        turns = [turn for one in kept for text in (one.prompt, *one.answers) if isinstance(text, list) for turn in text]
        present = {k for turn in turns for k in CALLS if turn.get(k)} | {k for one in kept for k in one.template}
        left_out = sorted(present & {*CALLS, "tools"} - written(self.tokenizer, present))
        if not left_out:
            return []
        return [
            f"the chat template does not write {', '.join(left_out)}, which some rows have; the model will not see it"
        ]

    def _special(self, kept: list[Record], index: np.ndarray) -> list[str]:
        """Special tokens written in the texts, and answers that nothing ends."""
        marks = [t for t in self.tokenizer.all_special_tokens if t]
        prompts = sum(any(m in _flat(record.prompt) for m in marks) for record in kept)
        answers = sum(
            any(m in _body(text, self.tokenizer) for text in record.answers for m in marks) for record in kept
        )
        doubts = []
        if prompts:
            doubts.append(f"prompts that hold the text of a special token, which becomes that token: {prompts:,}")
        if answers:
            doubts.append(f"rows with the text of a special token in an answer, such as an early end: {answers:,}")
        if isinstance(kept[0].prompt, str):
            if self.tokenizer.chat_template:
                self.counts["rows are plain text, for which the tokenizer's chat template is not used"] += len(kept)
            if self.tokenizer.eos_token_id is None:
                doubts.append("the tokenizer has no EOS token, so the model does not learn where answers end")
        elif doubt := turn_end(self.tokenizer).doubt:
            doubts.append(doubt)
        elif not any(self._ends(self.parts[number]) for number in index[:64, 1]):
            doubts.append("the chat template writes no special token after answers, so the model does not learn to end")
        return doubts

    def _ends(self, ids: np.ndarray) -> bool:
        special = {*self.tokenizer.all_special_ids, *getattr(self.tokenizer, "added_tokens_decoder", {})}
        return bool(special & {int(i) for i in ids[-3:]})


def _flat(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(m["content"] for m in text)


def _body(text: Text, tokenizer: Any) -> str:
    """An answer without the end that may be written at its end."""
    return _flat(text).removesuffix(tokenizer.eos_token or "")


def _columns(kept: list[Record], table: str) -> dict[str, np.ndarray]:
    """Facts of the rows as columns of the table."""
    columns: dict[str, np.ndarray] = {f"{table}/row": np.asarray([r.row for r in kept], dtype=np.int64)}
    columns[f"{table}/prompt_hash"] = np.asarray([_hash(r.prompt) for r in kept], dtype=np.int64)
    types = {"label": bool, "group": np.int64}
    for name in kept[0].facts:
        values = [r.facts[name] for r in kept]
        columns[f"{table}/{name}"] = np.asarray(values, dtype=types.get(name, np.float32))
    return columns


def _hash(prompt: Text) -> int:
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)
    return int.from_bytes(sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def _smallest(vocabulary: int) -> type:
    for kind in (np.uint8, np.uint16):
        if vocabulary - 1 <= np.iinfo(kind).max:
            return kind
    return np.int32


def _facts(tokenizer: Any) -> dict[str, Any]:
    return {
        "name": str(tokenizer.name_or_path),
        "fingerprint": fingerprint(tokenizer),
        "vocabulary": len(tokenizer),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
    }


def _notes(counts: Counter[str]) -> list[str]:
    return [f"{what}: {count:,}" for what, count in counts.items() if count]


def _not_texts(target: Target) -> str:
    return (
        f"{target.name} holds {'steps' if target.kind == 'replay' else 'control data'} without pairs or answers; "
        "expected texts: .jsonl, .json, .parquet, .arrow, .csv, a folder or pattern of them, a folder written by "
        "`datasets`, or a name on the hub."
    )


# -- rows --------------------------------------------------------------------------------------------------------------


def read(target: Target, split: str | None = None, *, download: bool = True) -> Source:
    """The rows of a file, a folder or pattern of files, a folder of ``datasets.save_to_disk``, or a set of the hub.

    Raises:
        DataError: a damaged file, an unknown split, or a hub that cannot be reached.
    """
    path = target.path
    if path is None:
        hub = target.info.get("hub", target.name)
        if not hub:
            from offpolicy.data.texts.problems import addition

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

    source = source_of(where, found.num_rows, list(found.column_names), column, meta={"file": where})
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
