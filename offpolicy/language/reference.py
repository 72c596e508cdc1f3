"""What the policy is compared with: log-probabilities under the reference.

They are computed once and kept on disk (:mod:`offpolicy.language.reference_cache`). A reference can also run beside the
policy, as a frozen copy or as the policy with its adapter off; it gives the same numbers for about a third more time.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offpolicy.compute import processes
from offpolicy.compute.devices import send
from offpolicy.data.texts.sequences import BoundTexts
from offpolicy.errors import DataError, UsageError
from offpolicy.language import policy as policies
from offpolicy.language.generation import positions
from offpolicy.language.layout import Layout
from offpolicy.language.reference_cache import Cache, Columns, column_names, columns_of, references_folder, texts_digest
from offpolicy.language.room import base_dtype
from offpolicy.moved import names_of

log = logging.getLogger(__name__)
REFERENCES = ("auto", "precomputed", "live", "adapter_off")  # anything else is another model


@dataclass
class ReferenceTable:
    """Rows of texts, and what the reference thinks of them.

    Attributes:
        texts: the rows.
        needed: the rows that will be asked for, (m,).
        columns: summed log-probabilities under each reference, (n,) each with NaN where nothing is known; none of a
            reference that runs beside the policy.
    """

    texts: BoundTexts
    needed: np.ndarray
    columns: Columns = field(default_factory=dict)


@dataclass(frozen=True)
class Passes:
    """How texts go through a model outside of a step of training.

    Attributes:
        layout: a batch of texts → the rows of a forward pass.
        answers: model, rows → the scores of its answers.
        rows: of the table in a forward pass, at most.
        precision: of the Trainer, by its name.
        context: the precision as a context.
        placed: a model → the same where the policy is, in its precision.
    """

    layout: Callable[[Any], Layout]
    answers: Callable[[Any, Layout], Any]
    rows: int
    precision: str
    context: Callable[[], AbstractContextManager[Any]]
    placed: Callable[[Any], Any]


class Reference:
    """The reference of a run.

    Args:
        options: arguments of the method: the policy and how it is opened, ``reference`` and ``ref_cache``.
        policy: the model in training.
        tokenizer: of the policy; None where nobody knows it.
        passes: through a model.
        name: of the reference among those of the run; begins the names of its columns.
        kind: what it is, as ``reference`` says it; None takes that option.

    Attributes:
        words: what the reference is, for the first screen.
    """

    def __init__(
        self, options: Any, policy: Any, tokenizer: Any, passes: Passes, name: str = "ref", kind: str | None = None
    ) -> None:
        self.options, self.policy, self.tokenizer, self.passes = options, policy, tokenizer, passes
        self.name, self.kind = name, options.reference if kind is None else kind
        self.words = ""
        self._live: Any = None  # a frozen copy

    def prepare(self, tables: list[ReferenceTable], start: str, *, kept: bool = True, moved: bool = False) -> None:
        """Fill the tables, or copy the policy.

        Args:
            tables: all that will be asked for.
            start: hash of the first weights.
            kept: whether the numbers are kept on disk, for other runs.
            moved: whether the policy has left its first weights, so that these are opened again.
        """
        h = self.options
        for table in tables:
            table.columns = {k: v for k, v in table.columns.items() if not k.startswith(f"{self.name}_")}
        if self.kind == "adapter_off":
            self.words = "the policy with its adapter off"
            return
        if self.kind == "live":
            self.words, self._live = "a frozen copy", self._open(h.policy, h.adapter)
            return
        model, digest, name = self.policy, start, "the policy at its start"
        without_adapter = moved and h.lora_rank  # which changed nothing at the start
        if self.kind not in REFERENCES:
            model, name = self._open(self.kind), str(self.kind)
            self._check_other(model, name, tables)
            digest = policies.weights_digest(model)
        elif moved and not without_adapter:
            model = self._open(h.policy, h.adapter)
        began, folder = time.perf_counter(), references_folder(h.ref_cache) if kept else None
        rank, world = processes.rank(), processes.world_size()
        computed = 0
        for table in tables:
            cache = Cache(folder, self._parts(model, digest, table.texts))
            compute = partial(self.compute, model, table.texts)
            with model.disable_adapter() if model is self.policy and without_adapter else nullcontext():
                found, now = columns_of(table.texts, table.needed, cache, compute, rank=rank, world=world)
            table.columns |= {self._own(name): column for name, column in found.items()}
            computed += now
        how = f"computed in {time.perf_counter() - began:.1f} s" if computed else "found"
        where = f"{' and kept' if computed else ''} in {folder}" if kept else ""
        self.words = f"{name}, {sum(len(table.needed) for table in tables):,} rows {how}{where}"

    def _own(self, column: str) -> str:
        """The name of a column among those of all references."""
        return self.name + column.removeprefix("ref")

    def close(self) -> None:
        """Let go of the frozen copy, which takes the memory of a model."""
        self._live = None

    def _open(self, name: str, adapter: str | None = None) -> Any:
        h = self.options
        settings = {
            "dtype": base_dtype(h, next(self.policy.parameters()).device),
            "attn_implementation": h.attn_implementation,
        }
        model = policies.open_model(name, option="reference", **settings)
        model = policies.open_adapter(model, adapter) if adapter else model
        return self.passes.placed(model).eval()

    def _check_other(self, model: Any, name: str, tables: list[ReferenceTable]) -> None:
        """Another model must read the policy's tokens as the policy does.

        Raises:
            UsageError: its vocabulary or its positions are others.
        """
        here, there = (policies.vocabulary_of(m) for m in (self.policy, model))
        used = np.unique(np.concatenate([np.unique(np.asarray(t.texts.replay.steps["token"])) for t in tables]))
        ours, theirs = self.tokenizer, _tokenizer_of(name)
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

    def _parts(self, model: Any, digest: str, texts: BoundTexts) -> dict[str, Any]:
        """What the numbers depend on."""
        import transformers

        base = policies.base_of(model)
        return {
            "weights": digest,
            "config": base.config.to_dict() | {"_name_or_path": "", "use_cache": False},
            "attention": base.config._attn_implementation.removesuffix("_packed"),  # packed rows change no number
            "precision": self.passes.precision,
            "dtype": str(next(base.parameters()).dtype),
            "texts": texts_digest(texts),
            **({"kernels": self.options.kernels} if self.options.get("kernels") else {}),
            "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        }

    def compute(self, model: Any, texts: BoundTexts, rows: np.ndarray) -> Columns:
        """Summed log-probabilities of these rows, in forward passes of ``passes.rows``."""
        passes, names, parts = self.passes, column_names(texts), []
        with evaluating(model), passes.context():
            for start in range(0, len(rows), passes.rows):
                some = rows[start : start + passes.rows]
                found = passes.answers(model, passes.layout(texts.gather(some))).sum_logps
                parts.append(torch.stack(texts.per_answer(found, some)).cpu())
        return {name: torch.cat([part[i] for part in parts]).numpy() for i, name in enumerate(names)}

    def logps(self, table: ReferenceTable, rows: np.ndarray, layout: Layout, like: Tensor) -> list[Tensor]:
        """Summed log-probabilities under the reference, (B,) for each answer of a row, no gradient.

        Args:
            layout: of these rows, for a reference that runs now.
            like: a tensor of the type and on the device that is wanted.

        Raises:
            LookupError: one of these rows is not ``needed``.
        """
        names = [self._own(name) for name in column_names(table.texts)]
        if names[0] in table.columns:
            if np.isnan(table.columns[names[0]][rows]).any():
                raise LookupError("rows that nobody announced")
            known = (torch.from_numpy(table.columns[name][rows]).to(like.dtype) for name in names)
            return [send(column, like.device) for column in known]
        model = self.policy if self._live is None else self._live
        with evaluating(model), nullcontext() if self._live is not None else model.disable_adapter():
            found = self.passes.answers(model, layout).sum_logps
        return table.texts.per_answer(found, rows)

    def check_start(self, scores: Any) -> None:
        """At its start the policy is its own reference, so their log-probabilities agree.

        Raises:
            UsageError: they do not.
        """
        h = self.options
        if self.kind not in REFERENCES:
            return
        low = next(policies.base_of(self.policy).parameters()).dtype == torch.bfloat16
        tolerance = 2e-2 if low or "bf16" in self.passes.precision else 1e-3
        sides = [part for part in ("answer", "chosen", "rejected") if hasattr(scores, part)]
        for part in [getattr(scores, side) for side in sides] or [scores]:
            apart = (part.sum_logps.detach() - getattr(part, f"{self.name}_logps")).abs()
            if not (apart <= tolerance * (10.0 + part.sum_logps.detach().abs())).all():
                raise UsageError(
                    "at the first step the policy is its own reference, but their log-probabilities differ by "
                    f"{apart.max().item():.3g} nats. Remove {references_folder(h.ref_cache)} (or set --model.ref_cache)"
                    " to compute the reference again."
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


__getattr__ = names_of("offpolicy.language.reference")  # the names that stood here in version 0.1
