"""What a method inherits that tunes a language model on given texts: pairs of answers, or single ones.

A method says which view of the data it needs and whether it has a reference, and writes one loss per row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from offpolicy.compute.devices import send
from offpolicy.compute.processes import sum_over_processes
from offpolicy.data.module import DataModule
from offpolicy.data.replay import Replay
from offpolicy.data.texts.module import TextData
from offpolicy.data.texts.preview import report, samples
from offpolicy.data.texts.sequences import BoundTexts, Pairs, PairView, TextGroups, row_weights
from offpolicy.errors import DataError, UsageError
from offpolicy.language import policy as policies
from offpolicy.language.answer_scores import Answers, score
from offpolicy.language.checks import check_tokens
from offpolicy.language.evaluation import eval_sample, evaluate, idealised, ranges_of_grid
from offpolicy.language.generation import positions
from offpolicy.language.layout import Layout, pair_layout, single_layout
from offpolicy.language.meters import RowMeter
from offpolicy.language.module import LanguageModule
from offpolicy.language.pair_margins import keep_pair_margins
from offpolicy.language.plan import RowPlan, previous_of_other_prompt
from offpolicy.language.reference import Passes, Reference, ReferenceTable, evaluating
from offpolicy.language.room import base_dtype
from offpolicy.losses.scores import GroupScores, PairScores, Scores, SingleScores
from offpolicy.training import divergence
from offpolicy.training.description import Description
from offpolicy.training.lightning_private import trainer_of
from offpolicy.training.meter import Metrics

HELD_OUT = -1  # in place of an epoch


class StepMeans(NamedTuple):
    """Facts about all rows of one optimiser step, over its micro-batches and processes.

    Attributes:
        weight: sum of the weights of its rows, by which all means are weighted.
        length: mean number of scored tokens of the chosen answers (of the answers, for singles).
        sequence_length: mean number of scored tokens of prompt and answer.
        mismatched_ratio: mean log-ratio of answers under other prompts; None unless ``uses_mismatched``.
    """

    weight: float
    length: float
    sequence_length: float
    mismatched_ratio: Tensor | None = None


class PreferenceModule(LanguageModule):
    """Base of methods that learn from given texts.

    A method declares ``view`` (:class:`PairView`, :class:`SingleView` or one of groups) and the attributes below, and
    defines ``loss``. The attributes may be properties that depend on the options.

    Attributes:
        view: what a row of the data is.
        uses_reference: whether ``ref_logps`` are needed.
        scores_prompt: whether ``prompt_logps`` of the chosen answers (of the answers, for singles) are needed.
        uses_mismatched: whether singles also need each answer scored under another prompt.
        uses_previous: whether ``previous_logps`` are needed, of the policy that training starts from.
    """

    view: ClassVar[Any] = PairView()
    uses_reference: bool = True
    scores_prompt: bool = False
    uses_mismatched: bool = False
    uses_previous: bool = False
    first_step: int = 0  # of those that the plan of rows is for

    def prepare_state(self) -> None:
        self.meter = RowMeter()
        self.eval_table: ReferenceTable | None = None
        self._table: ReferenceTable | None = None
        self._mismatched: dict[int, ReferenceTable] = {}  # epoch → answers under other prompts
        self._reference: Reference | None = None
        self._previous: Reference | None = None
        self._plan: RowPlan | None = None
        self._means: StepMeans | None = None  # of the current step

    # -- to be written by a method -------------------------------------------------------------------------------------

    def loss(self, scores: Any) -> tuple[Tensor, Metrics]:
        """Loss per row, (B,), and metrics of (B,) each, detached.

        Args:
            scores: :class:`PairScores`, :class:`SingleScores` or :class:`GroupScores` of
                :mod:`offpolicy.losses.scores`.
        """
        raise UsageError(f"{type(self).__name__} must define loss(scores).")

    def texts_of(self, replay: Replay) -> BoundTexts:
        """The rows that the method learns from, in a replay.

        Raises:
            DataError: they lack what it needs.
        """
        return self.view.bind(replay)

    # -- construction --------------------------------------------------------------------------------------------------

    @classmethod
    def data_class(cls) -> type[DataModule]:
        return TextData

    def planned_steps(self, data: DataModule) -> int | None:
        rows = len(self.texts_of(data.load()) if self._table is None else self._table.texts)
        return max(1, math.ceil(self.hparams.epochs * math.ceil(rows / self.hparams.batch_size)))

    def take_data(self, data: Any) -> None:
        """Bind the view to the data, and choose the held-out rows."""
        texts = self.texts_of(data.replay)
        self._table = ReferenceTable(texts, np.arange(len(texts)))
        self._check_prompts(texts, "the data")
        held_out = getattr(data, "eval_replay", None)
        wanted = held_out is not None and self.run.eval_episodes > 0
        self.eval_table = None
        if wanted:
            texts = self.texts_of(cast(Replay, held_out))
            self._check_prompts(texts, "the held-out data")
            self.eval_table = ReferenceTable(texts, eval_sample(len(texts), self.hparams.eval_rows))

    def _check_prompts(self, texts: BoundTexts, what: str) -> None:
        if self.uses_mismatched and len(np.unique(texts.index[:, 0])) < 2:
            raise DataError(
                f"{what} have one prompt; expected two or more, since {type(self).__name__} compares with answers to "
                "other prompts. Pass more rows, or leave the held-out ones out with --data.eval_fraction 0."
            )

    def longest_row(self) -> int:
        """Tokens of the longest row of a forward pass."""
        assert self._table is not None
        return int(self._table.texts.lengths.sum(1).max())

    def workload(self) -> dict[str, Any]:
        h, shares = self.hparams, self.hparams.shared_prompt is not False
        pairs = isinstance(self.view, PairView)
        beside = self.uses_reference and h.reference not in ("auto", "precomputed", "adapter_off", "round")
        kind = "bfloat16" if base_dtype(h, self._training_device) == "bfloat16" else "float32"
        return {"own_mask": pairs and shares, "reference": kind if beside else None}

    def plan_steps(self) -> None:
        assert self._table is not None
        self._plan = RowPlan(
            self._table.texts.lengths.sum(1),
            batch_size=self.hparams.batch_size,
            slots=self.micro.number * self.world_size,
            seed=self.seed or 0,
            by_length=self.hparams.group_by_length,
        )

    def check_texts(self, replay: Any) -> None:
        """Every token and every position must be one that the model knows.

        Raises:
            DataError: one is not.
        """
        check_tokens(replay, self.model, self.hparams.policy, "texts")
        room = positions(policies.base_of(self.model))
        for table in filter(None, (self._table, self.eval_table)):
            sizes = table.texts.lengths.reshape(len(table.texts), -1, 2)  # rows, sides, prompt and answer
            longest = int(sizes.max((0, 1)).sum() if self.uses_mismatched else sizes.sum(-1).max())
            if longest > room:
                given = table.texts.replay  # methods make longer texts of it
                index = np.asarray(given.tables["pairs" if "pairs" in given.tables else "singles"])
                own = int(given.length[index].reshape(-1, 2).sum(1).max())
                made = f"the longest text that {type(self).__name__} makes of the data has"
                together = made if longest > own else "the longest text has"
                together = "a prompt with another's answer has" if self.uses_mismatched else together
                limit = room // 2 if self.uses_mismatched else max(1, room - max(0, longest - own))
                raise DataError(
                    f"{together} up to {longest} tokens, but {self.hparams.policy} has {room} positions; expected "
                    f"shorter texts. Pass --data.max_length {limit}."
                )

    def configure_model(self) -> None:
        """Shard the model where the strategy asks for it; make the reference while the policy still is at its start."""
        if trainer_of(self) is None or not self.trainer.training or self._table is None:
            return
        if self.device_mesh is not None:
            from offpolicy.language.sharding import shard

            shard(self.model, self.device_mesh["data_parallel"])
        self.model.to(self.trainer.strategy.root_device)
        if self.device_mesh is not None and self.uses_reference and self.hparams.reference == "live":
            raise UsageError("`reference` is 'live', which sharding does not do; expected 'auto' or 'precomputed'.")
        self.apply_settings()
        try:
            self._make_reference()
        finally:
            self.restore_settings()

    # -- the reference -------------------------------------------------------------------------------------------------

    def _make_reference(self) -> None:
        """Say which rows will be asked for, and get what the reference thinks of them."""
        table, held_out, plan = self._table, self.eval_table, self._plan
        assert table is not None and plan is not None
        table.needed = plan.rows_until(self.trainer.max_steps)
        self._mismatched = {}
        if self.uses_mismatched:
            for epoch in range(plan.place(self.trainer.max_steps - 1)[0] + 1):
                previous = plan.before(epoch, table.texts.index[:, 0])
                self._mismatched[epoch] = ReferenceTable(other_prompts(table.texts, previous), table.needed)
            if held_out is not None:
                in_order, prompts = np.arange(len(held_out.texts)), held_out.texts.index[:, 0]
                previous = previous_of_other_prompt(in_order, prompts)
                self._mismatched[HELD_OUT] = ReferenceTable(other_prompts(held_out.texts, previous), held_out.needed)
        given, tables = (self.hparams, self.model, self.tokenizer, self._passes()), [table, held_out]
        if self.uses_reference:
            self._reference = Reference(*given)
            every = [one for one in (*tables, *self._mismatched.values()) if one is not None]
            self._reference.prepare(every, self._start_digest)
        if self.uses_previous:
            self._previous = Reference(*given, name="previous", kind="precomputed")
            self._previous.prepare([one for one in tables if one is not None], self._start_digest)

    def _passes(self) -> Passes:
        precision = str(self.trainer.precision)
        return Passes(self.layout, self.answers, self.micro.rows, precision, self.precision_context, self._placed)

    def _placed(self, model: Any) -> Any:
        """Another model where the policy is, in its precision."""
        trainer = self.trainer
        return trainer.precision_plugin.convert_module(model).to(trainer.strategy.root_device)

    def ref_logps(self, table: ReferenceTable, rows: np.ndarray, layout: Layout, like: Tensor) -> list[Tensor]:
        """Summed log-probabilities of rows under the reference, (B,) for each answer of a row; see `Reference.logps`.

        Raises:
            UsageError: the reference was made for the rows of another seed.
        """
        assert self._reference is not None
        return self._logps_under(self._reference, table, rows, layout, like)

    def _logps_under(
        self, reference: Reference, table: ReferenceTable, rows: np.ndarray, layout: Layout, like: Tensor
    ) -> list[Tensor]:
        try:
            return reference.logps(table, rows, layout, like)
        except LookupError:
            message = f"the run has the seed {self.seed}; expected the same. Pass --seed_everything {self.seed}."
            raise UsageError(message) from None

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state(state)
        if self._plan is not None and self._plan.seed != self.seed:
            if self._mismatched:
                raise UsageError(f"the run has the seed {self.seed}; expected the same: --seed_everything {self.seed}.")
            self.plan_steps()

    # -- what the first screen says ------------------------------------------------------------------------------------

    def describe(self) -> Description:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        plan, shown = self._plan_of(), data.options.get("show", 0)
        rows = (
            []
            if "format" not in data.replay.meta
            else [(line[2:12].strip(), line[12:]) for line in report(data.replay).splitlines()[1:]]
        )
        rows = [row for row in rows if row[0] not in ("note", "warning")] or [("rows", f"{len(plan.lengths):,}")]
        words = "none, the method needs no reference" if self._reference is None else self._reference.words
        references = [("reference", words), *([("previous", self._previous.words)] if self._previous else [])]
        split = f", {self.micro.number} micro-batches each" if self.micro.number > 1 else ""
        epochs = self.trainer.max_steps / plan.steps_per_epoch
        return Description(
            facts=[*rows, self.policy_fact(), *references, self.padding_fact(), *self.memory_facts()],
            batch=f"{self.hparams.batch_size} rows{split}, {epochs:.3g} epochs",
            evaluates="" if self.eval_table is None else f"{len(self.eval_table.needed):,} held-out rows",
            notes=[*self._table_of().texts.notes, *self.precision_notes()],
            samples=samples(data.replay, self.tokenizer, shown) if shown and self.tokenizer is not None else "",
            look="python -m offpolicy.generate {folder}, or offpolicy.export {folder} OUT [--merge]",
        )

    # -- scores --------------------------------------------------------------------------------------------------------

    def layout(self, batch: Any) -> Layout:
        """The rows of one forward pass over a batch of texts, on the device."""
        how: dict[str, Any] = {"prompt_too": self.scores_prompt, "padding_free": self.padding_free}
        if isinstance(batch, Pairs):
            layout = pair_layout(batch, self.pad_id, shared_prompt=self.shared_prompt, **how)
        elif isinstance(batch, TextGroups):
            layout = single_layout(batch.singles(), self.pad_id, **how)
        else:
            layout = single_layout(batch, self.pad_id, **how)
        return layout.to(self.device if trainer_of(self) is None else self.trainer.strategy.root_device)

    def answers(self, model: Any, layout: Layout, *, stats: bool = False) -> Answers:
        """The scores of the rows of one forward pass."""
        return score(model, layout, chunk=self.hparams.chunk, stats=stats)

    def scores(self, table: ReferenceTable, rows: np.ndarray, means: StepMeans, *, stats: bool = False) -> Any:
        """What :meth:`loss` takes, for rows of a table."""
        batch = table.texts.gather(rows)
        layout = self.layout(batch)
        if torch.is_grad_enabled():
            self.pace.add_pass(layout.real_tokens, layout.input_ids.numel())
        answers = self.answers(self.model, layout, stats=stats)
        reference = self.ref_logps(table, rows, layout, answers.sum_logps) if self.uses_reference else None
        start = self._previous
        previous = None if start is None else self._logps_under(start, table, rows, layout, answers.sum_logps)
        facts = {name: send(value, answers.length.device) for name, value in batch.facts.items()}
        size = len(rows)
        if isinstance(batch, TextGroups):
            columns = {"": answers.sum_logps, "length": answers.length, **answers.stats}
            found = {k: torch.stack(table.texts.per_answer(v, rows), 1) for k, v in columns.items()}
            under = None if reference is None else torch.stack(reference, 1)
            return GroupScores(found.pop(""), found.pop("length"), under, facts, found)

        def part(i: int, prompt: int | None) -> Scores:
            own = slice(i * size, (i + 1) * size)
            other = None if prompt is None else slice(prompt * size, (prompt + 1) * size)
            return Scores(
                answers.sum_logps[own],
                answers.length[own],
                None if reference is None else reference[i],
                None if other is None else answers.sum_logps[other],
                None if other is None else answers.length[other],
                {name: value[own] for name, value in answers.stats.items()},
                None if previous is None else previous[i],
                None if answers.sum_values is None else answers.sum_values[own],
            )

        if isinstance(self.view, PairView):
            chosen, rejected = part(0, 2 if self.scores_prompt else None), part(1, None)
            return PairScores(chosen, rejected, facts, means.length, means.sequence_length)
        answer = part(0, 1 if self.scores_prompt else None)
        return SingleScores(answer, facts, means.length, mismatched_ratio=means.mismatched_ratio)

    def step_means(self, table: ReferenceTable, rows: np.ndarray) -> StepMeans:
        """What losses need to know of all rows of a step."""
        weight, answer = row_weights(table.texts, rows), table.texts.scored[rows, 1]
        total = weight.sum() or 1.0  # of a step whose rows all have the weight 0, which learns nothing
        sequence = answer + np.maximum(table.texts.lengths[rows, 0] - 1, 0)  # nothing predicts the first token
        ratio = self._mismatched_ratio(table, rows, weight / total) if self.uses_mismatched else None
        return StepMeans(total, weight @ answer / total or 1.0, weight @ sequence / total or 1.0, ratio)

    def _mismatched_ratio(self, table: ReferenceTable, rows: np.ndarray, share: np.ndarray) -> Tensor:
        """Mean log-ratio of answers under other prompts over the rows (B,) of a step, which have these shares, 0-d."""
        epoch = HELD_OUT if table is self.eval_table else self._plan_of().place(self.global_step)[0]
        other = self._mismatched[epoch]
        world, rank = self.world_size, self.process_rank
        padded = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % world)])
        shares = torch.from_numpy(np.pad(share, (0, len(padded) - len(rows)))[rank::world])
        mine, total = padded[rank::world], torch.zeros((), dtype=torch.float64, device=self.device)
        with evaluating(self.model):
            for start in range(0, len(mine), self.micro.rows):
                part = slice(start, start + self.micro.rows)
                layout = self.layout(other.texts.gather(mine[part]))
                found = self.answers(self.model, layout).sum_logps
                ratio = found[: len(mine[part])] - self.ref_logps(other, mine[part], layout, found)[0]
                total += (ratio.double() * send(shares[part], ratio.device)).sum()
        return sum_over_processes(total).float()

    # -- Lightning: the loop -------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        self._means = None

    @divergence.named
    def training_step(self, tick: Any, batch_idx: int) -> Tensor:
        step, j, table, plan = self.global_step, self.micro.current, self._table, self._plan_of()
        t = step - self.first_step
        assert table is not None
        if j == 0:
            self.begin_step()
            self._means = self.step_means(table, plan.rows(t))
        means = self._means
        assert means is not None
        world, rank = self.world_size, self.process_rank
        rows = plan.slot(t, j * world + rank)
        real = len(rows) > 0
        rows = rows if real else plan.rows(t)[-1:]  # every process runs the same number of forward passes
        self.seed_dropout(rank)
        scores = self.scores(table, rows, means, stats=self.writes_row(step + 1))
        loss, metrics = self.loss(scores)
        if step == 0 and j == 0 and not self.has_dropout:
            for reference in filter(None, (self._reference, self._previous)):
                reference.check_start(scores)
        weight = send(torch.from_numpy(row_weights(table.texts, rows) * real).to(loss.dtype), loss.device)
        self.meter.add_step(loss, metrics, weight=weight, real=torch.full_like(weight, float(real)))
        self.pace.tokens += int(table.texts.lengths[rows].sum()) if real else 0
        self.end_micro_batch()
        # Lightning takes the mean over micro-batches and processes
        return (loss * weight).sum() * (self.micro.number * world / means.weight)

    def _table_of(self) -> ReferenceTable:
        assert self._table is not None
        return self._table

    def _plan_of(self) -> RowPlan:
        assert self._plan is not None
        return self._plan

    def progress(self, updates: int) -> dict[str, float]:
        """How far training has come, beside the count of updates."""
        return {"train/epoch": updates / self._plan_of().steps_per_epoch}

    def held_out(self) -> dict[str, float]:
        table = self.eval_table
        if table is None:
            return {}
        rows = table.needed[np.argsort(-table.texts.lengths[table.needed].sum(1), kind="stable")]
        beta = self.hparams.get("beta") if self.uses_reference else None
        weight = self.hparams.get("reference_weight", 1.0)
        margins: list[tuple[np.ndarray, Tensor, Tensor | None]] = []

        def judge(some: np.ndarray) -> tuple[Tensor, Metrics]:
            scores = self.scores(table, some, means, stats=True)
            loss, metrics = self.loss(scores)
            ideal = idealised(scores, beta, weight)
            if "rewards/margins" in metrics:
                margins.append((some, metrics["rewards/margins"], ideal.get("loss_to_rank")))
            return loss, metrics | ideal

        with evaluating(self.model), self.precision_context():
            means = self.step_means(table, rows)
            numbers = ranges_of_grid(evaluate(table.texts, rows, judge, self.micro.rows, self.device))
        if margins and self.run_log.files is not None:
            keep_pair_margins(self.run_log.files.folder, self.global_step, margins)
        return numbers

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        if self._reference is not None:
            self._reference.close()


def other_prompts(bound: BoundTexts, previous: np.ndarray) -> BoundTexts:
    """Every prompt of a table of singles with the answer of another row."""
    index = np.stack([bound.index[:, 0], bound.index[previous, 1]], axis=1)
    return BoundTexts(bound.replay, index, {}, bound.kind)
