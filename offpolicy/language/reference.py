"""What the policy is compared with: log-probabilities under the reference, computed once and kept on disk.

A cache entry is named by a hash of everything the numbers depend on: weights and configuration of the model, the tokens
of all texts and their table, precision and attention. Runs that agree in these share it, whatever they train. A
reference can also run beside the policy, as a frozen copy or as the policy with its adapter off; it gives the same
numbers for about a third more time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offpolicy.compute import processes
from offpolicy.data.columns import to_numpy
from offpolicy.data.texts.sequences import SCORED, BoundTexts
from offpolicy.errors import DataError, UsageError
from offpolicy.files import atomic_write
from offpolicy.language import policy as policies
from offpolicy.language.generation import positions
from offpolicy.language.layout import Layout
from offpolicy.moved import names_of

log = logging.getLogger(__name__)
Columns = dict[str, np.ndarray]
REFERENCES = ("auto", "precomputed", "live", "adapter_off")  # anything else is another model
TOGETHER = 512  # rows of one process between two exchanges
PATIENCE = 30.0  # seconds between two writes, so that an interruption loses little


@dataclass
class ReferenceTable:
    """Rows of texts, and what the reference thinks of them.

    Attributes:
        texts: the rows.
        needed: those that will be asked for, (m,).
        columns: summed log-probabilities under the reference, (n,) each with NaN where nothing is known; empty where
            the reference runs beside the policy.
    """

    texts: BoundTexts
    needed: np.ndarray
    columns: Columns = field(default_factory=dict)


class Reference:
    """The reference of a method in training.

    Attributes:
        words: what it is, for the first screen.
    """

    def __init__(self, method: Any) -> None:
        self.method = method
        self.words = "none, the method needs no reference"
        self._live: Any = None  # a frozen copy

    def prepare(self, tables: list[ReferenceTable], start: str) -> None:
        """Get ready while the policy still has its first weights: fill the tables, or copy the policy.

        Args:
            tables: all that will be asked for.
            start: hash of the first weights.
        """
        method, h = self.method, self.method.hparams
        for table in tables:
            table.columns = {}
        if h.reference == "adapter_off":
            self.words = "the policy with its adapter off"
            return
        if h.reference == "live":
            self.words, self._live = "a frozen copy", self._frozen_copy()
            return
        model, digest, name = method.model, start, "the policy at its start"
        if h.reference not in REFERENCES:
            model, name = self._open(h.reference), str(h.reference)
            self._check_other(model, name, tables)
            digest = policies.weights_digest(model)
        began, folder = time.perf_counter(), cache_folder(h.ref_cache)
        rank, world = method.process_rank, method.world_size
        computed = 0
        for table in tables:
            cache = Cache(folder, self._parts(model, digest, table.texts))
            compute = partial(self.compute, model, table.texts)
            table.columns, now = columns_of(table.texts, table.needed, cache, compute, rank=rank, world=world)
            computed += now
        how = f"computed in {time.perf_counter() - began:.1f} s and kept" if computed else "found"
        self.words = f"{name}, {sum(len(table.needed) for table in tables):,} rows {how} in {folder}"

    def close(self) -> None:
        self._live = None

    def _open(self, name: str, adapter: str | None = None) -> Any:
        h, trainer = self.method.hparams, self.method.trainer
        settings = {"dtype": h.dtype, "attn_implementation": h.attn_implementation}
        model = policies.open_model(name, option="reference", **settings)
        model = policies.open_adapter(model, adapter) if adapter else model
        return trainer.precision_plugin.convert_module(model).to(trainer.strategy.root_device).eval()

    def _check_other(self, model: Any, name: str, tables: list[ReferenceTable]) -> None:
        """Another model must read the policy's tokens as the policy does.

        Raises:
            UsageError: its vocabulary or its positions are others.
        """
        here, there = (policies.vocabulary_of(m) for m in (self.method.model, model))
        used = np.unique(np.concatenate([np.unique(np.asarray(t.texts.replay.steps["token"])) for t in tables]))
        ours, theirs = self.method.tokenizer, _tokenizer_of(name)
        if ours is not None and theirs is not None:
            for token in used.tolist():
                pair = [one.convert_ids_to_tokens(token) if token < len(one) else None for one in (ours, theirs)]
                if pair[0] != pair[1]:
                    raise UsageError(
                        f"`reference` is '{name}', whose token {token} is {pair[1]!r}, the policy's is {pair[0]!r}; "
                        "expected the same vocabulary, as it scores the policy's tokens. Pass a model of the same base."
                    )
        if used[-1] >= there or (here != there and (ours is None or theirs is None)):
            raise UsageError(
                f"`reference` is '{name}', which knows {there:,} tokens, and the policy {here:,} (the texts go up to "
                f"the id {used[-1]:,}); expected the same vocabulary. Pass a model of the same base."
            )
        longest = max(int(t.texts.lengths.reshape(len(t.texts), -1, 2).sum(-1).max()) for t in tables)
        if longest > positions(model):
            raise UsageError(
                f"`reference` is '{name}', which has {positions(model):,} positions, and the longest text has "
                f"{longest:,} tokens; expected shorter texts. Pass --data.max_length {positions(model)}."
            )

    def _frozen_copy(self) -> Any:
        if self.method.device_mesh is not None:
            raise UsageError("`reference` is 'live', which sharding does not do; expected 'auto' or 'precomputed'.")
        return self._open(self.method.hparams.policy, self.method.hparams.adapter)

    def _parts(self, model: Any, digest: str, texts: BoundTexts) -> dict[str, Any]:
        """What the numbers depend on."""
        import transformers

        base = policies.base_of(model)
        return {
            "weights": digest,
            "config": base.config.to_dict() | {"_name_or_path": "", "use_cache": False},
            "attention": base.config._attn_implementation,
            "precision": str(self.method.trainer.precision),
            "dtype": str(next(base.parameters()).dtype),
            "texts": texts_digest(texts),
            "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        }

    def compute(self, model: Any, texts: BoundTexts, rows: np.ndarray) -> Columns:
        """Summed log-probabilities of these rows, in forward passes of ``rows_per_forward``."""
        method, names, parts = self.method, column_names(texts), []
        with evaluating(model), method.precision_context():
            for start in range(0, len(rows), method.micro.rows):
                some = rows[start : start + method.micro.rows]
                found = method.answers(model, method.layout(texts.gather(some))).sum_logps
                parts.append(found[: len(names) * len(some)].view(len(names), -1).cpu())
        return {name: torch.cat([part[i] for part in parts]).numpy() for i, name in enumerate(names)}

    def logps(self, table: ReferenceTable, rows: np.ndarray, layout: Layout, like: Tensor) -> list[Tensor]:
        """Summed log-probabilities under the reference, (B,) for each answer of a row, no gradient.

        Args:
            layout: of these rows, for a reference that runs now.
            like: a tensor of the type and on the device that is wanted.
        """
        names, size = column_names(table.texts), len(rows)
        if table.columns:
            if np.isnan(table.columns[names[0]][rows]).any():
                seed = self.method.seed
                raise UsageError(f"the run has the seed {seed}; expected the same. Pass --seed_everything {seed}.")
            return [torch.from_numpy(table.columns[name][rows]).to(like) for name in names]
        model = self.method.model if self._live is None else self._live
        with evaluating(model), nullcontext() if self._live is not None else model.disable_adapter():
            found = self.method.answers(model, layout).sum_logps
        return [found[i * size : (i + 1) * size] for i in range(len(names))]

    def check_start(self, scores: Any) -> None:
        """At its start the policy is its own reference, so their log-probabilities agree.

        Raises:
            UsageError: they do not.
        """
        method, h = self.method, self.method.hparams
        if h.reference not in REFERENCES or method.has_dropout:
            return
        low = next(policies.base_of(method.model).parameters()).dtype == torch.bfloat16
        tolerance = 2e-2 if low or "bf16" in str(method.trainer.precision) else 1e-3
        for part in (scores.answer,) if hasattr(scores, "answer") else (scores.chosen, scores.rejected):
            apart = part.log_ratio.detach().abs()
            if not (apart <= tolerance * (10.0 + part.sum_logps.detach().abs())).all():
                raise UsageError(
                    "at the first step the policy is its own reference, but their log-probabilities differ by "
                    f"{apart.max().item():.3g} nats. Remove {cache_folder(h.ref_cache)} (or set --model.ref_cache) to "
                    "compute the reference again."
                )


def _tokenizer_of(name: str) -> Any:
    """The tokenizer of a model by folder or hub id; None where there is none."""
    from offpolicy.data.texts.tokens import load_tokenizer

    try:
        with policies.found(name, "reference"):
            return load_tokenizer(name)
    except (DataError, UsageError):
        return None


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without gradients and dropout."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class Cache:
    """The columns of one reference over one table.

    Args:
        folder: of all entries; None keeps nothing.
        parts: what the numbers depend on, JSON-able; becomes the entry's ``manifest.json``.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, parts: Mapping[str, Any]) -> None:
        self.parts = dict(parts)
        self.key = hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()[:24]
        self.path = Path(folder) / self.key if folder is not None else None

    def load(self, names: Iterable[str], rows: int) -> Columns:
        """The columns, (rows,) each; NaN where nothing was computed yet."""
        columns = {name: np.full(rows, np.nan, dtype=np.float32) for name in names}
        file = self.path / "columns.npz" if self.path is not None else None
        if file is not None and file.is_file():
            try:
                with np.load(file, allow_pickle=False) as kept:
                    found = {name: kept[name] for name in columns}
            except Exception:  # not whole, in one of many ways: compute again
                return columns
            if all(column.shape == (rows,) and column.dtype.kind == "f" for column in found.values()):
                return found
        return columns

    def save(self, columns: Columns) -> None:
        if self.path is None:
            return
        file = io.BytesIO()
        np.savez(file, **columns)  # type: ignore[arg-type]
        atomic_write(self.path / "columns.npz", file.getvalue())
        atomic_write(self.path / "manifest.json", json.dumps(self.parts, indent=2, sort_keys=True) + "\n")


def cache_folder(option: str | None) -> Path:
    """Where references are kept: the option, else ``$OFFPOLICY_REF_CACHE``, else below the user's caches."""
    return Path(option or os.environ.get("OFFPOLICY_REF_CACHE") or "~/.cache/offpolicy/references").expanduser()


def columns_of(
    bound: BoundTexts,
    rows: np.ndarray,
    cache: Cache,
    compute: Callable[[np.ndarray], Columns],
    *,
    rank: int = 0,
    world: int = 1,
) -> tuple[Columns, int]:
    """The reference's columns over a table, with at least these rows filled in.

    Every process computes its share of the rows that the cache lacks, the same number on each; the first one writes.

    Args:
        bound: the table.
        rows: needed ones, (m,).
        cache: where they may lie already.
        compute: rows → columns of summed log-probabilities for them.

    Returns:
        The columns, (n,) each with NaN elsewhere, and how many rows were computed now.
    """
    names = column_names(bound)
    columns = cache.load(names, len(bound))
    if world > 1:  # what the first process sees counts for all
        shared = [columns]
        torch.distributed.broadcast_object_list(shared)
        columns = shared[0]
    missing = rows[np.isnan(columns[names[0]][rows])]
    began = saved = time.perf_counter()
    missing = missing[np.argsort(-bound.lengths[missing].sum(1), kind="stable")]
    for start in range(0, len(missing), TOGETHER * world):
        part = missing[start : start + TOGETHER * world]
        padded = np.concatenate([part, np.repeat(part[-1:], -len(part) % world)])
        mine = padded[rank::world]
        for theirs, values in processes.gathered((mine, compute(mine))):
            for name in names:
                columns[name] = columns[name].astype(values[name].dtype, copy=False)
                columns[name][theirs] = values[name]
        done, now = start + len(part), time.perf_counter()
        if rank == 0 and (done == len(missing) or now - saved > PATIENCE):
            cache.save(columns)
            if now - saved > PATIENCE:
                log.warning("Reference: %s of %s rows after %.0f s.", f"{done:,}", f"{len(missing):,}", now - began)
            saved = now
    return columns, len(missing)


def column_names(bound: BoundTexts) -> list[str]:
    return ["ref_chosen_logps", "ref_rejected_logps"] if bound.index.shape[1] == 4 else ["ref_logps"]


def texts_digest(bound: BoundTexts) -> str:
    """A hash of the tokens of every row of a table."""
    digest = hashlib.blake2b(digest_size=16)
    replay = bound.replay
    token = np.ascontiguousarray(to_numpy(replay.steps["token"]))
    digest.update(str(token.dtype).encode())
    scored = [to_numpy(replay.steps[SCORED])] if SCORED in replay.steps else []
    for array in (token, replay.start, replay.length, bound.index, *scored):
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


__getattr__ = names_of("offpolicy.language.reference")  # the names that stood here in version 0.1
