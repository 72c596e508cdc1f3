"""What a method for language models inherits: a policy that is a causal language model, tuned on texts.

``LanguageModule`` uses Lightning's automatic optimisation: a micro-batch per ``training_step``, gradients summed over
the micro-batches and processes of a step, one optimiser. A method says which view of the data it needs, whether it has
a reference, and writes one loss per row.
"""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.optim import Optimizer

from offpolicy.compute.devices import finish_work
from offpolicy.data import sampling
from offpolicy.data.module import DataModule
from offpolicy.data.texts.sequences import BoundTexts, PairView, row_weights
from offpolicy.errors import DataError, UsageError, check_range
from offpolicy.given import refuse_half
from offpolicy.language import policy as policies
from offpolicy.language.adapters import adapter_names, adapter_settings, drops_out, same_settings
from offpolicy.language.evaluation import eval_sample, evaluate
from offpolicy.language.export import export_model
from offpolicy.language.generation import positions
from offpolicy.language.layout import (
    Answers,
    Layout,
    check_head,
    pair_layout,
    score,
    shared_fault,
    shares_prompt,
    single_layout,
)
from offpolicy.language.meters import RowMeter
from offpolicy.language.noise import without_noise
from offpolicy.language.plan import Plan, previous_of_other_prompt
from offpolicy.language.reference import Reference, Table, evaluating
from offpolicy.losses.scores import PairScores, Scores, SingleScores
from offpolicy.training import divergence
from offpolicy.training.callbacks import Interruption, RestoreSettings
from offpolicy.training.module import Metrics, Module, num_trained
from offpolicy.trust import names_of, trusting

SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("float32", "bfloat16", "auto")
EXPORTS = ("auto", "merged", "none")
FORWARD_TOKENS = 8192  # of one forward pass where the user does not say
HELD_OUT = -1  # in place of an epoch


class StepMeans(NamedTuple):
    """Facts about all rows of one optimiser step, over its micro-batches and processes.

    Attributes:
        weight: sum of the weights of its rows, by which all means are weighted.
        length: mean number of scored tokens of the chosen answers (of the answers, for singles).
        sequence_length: the same with the prompt's scored tokens.
        mismatched_ratio: mean log-ratio of answers under other prompts; None unless ``uses_mismatched``.
    """

    weight: float
    length: float
    sequence_length: float
    mismatched_ratio: Tensor | None = None


class LanguageModule(Module):
    """Base of methods for causal language models.

    A method declares ``view`` (:class:`PairView` or :class:`SingleView`) and the attributes below, and defines
    ``loss``. They may be properties that depend on the options.

    Attributes:
        view: what a row of the data is.
        uses_reference: whether ``ref_logps`` are needed.
        scores_prompt: whether ``prompt_logps`` of the chosen answers (of the answers, for singles) are needed.
        uses_mismatched: whether singles also need each answer scored under another prompt.

    Args:
        policy: Hugging Face id or folder of the causal language model that is tuned.
        lr: peak learning rate of AdamW.
        batch_size: rows per optimiser step over all processes, ≥ 1; the last step of an epoch has those that remain.
        micro_batch_size: rows per forward pass on one process; None for as many as fit into 8,192 tokens. Does not
            change the result.
        epochs: passes over the data, > 0; used when no ``max_steps`` are given.
        warmup_ratio: part of the steps in which the rate rises from 0, in [0, 1].
        lr_schedule: "cosine" or "linear" decay to 0 after that, or "constant".
        weight_decay: AdamW's, ≥ 0; not applied to biases and norms.
        adam_betas: AdamW's.
        lora_rank: rank of LoRA adapters, 0 to train all weights; needs the extra ``lora``.
        lora_alpha: their scale; None for twice the rank.
        lora_dropout: dropout in front of them, in [0, 1).
        lora_targets: names of layers that get one; None for all linear layers but the head.
        adapter: folder of a trained adapter to go on from; its starting point is the reference.
        gradient_checkpointing: recompute layers in the backward pass instead of keeping their activations.
        reference: "auto", "precomputed", "live" (a frozen copy), "adapter_off", or another model's id or folder.
        ref_cache: folder of reference log-probabilities shared by runs; None for a folder beside the user's caches.
        shared_prompt: compute a prompt that both answers share once; None where that is exact for the model.
        chunk: tokens whose logits exist at once.
        dtype: of the weights: "float32", "bfloat16" or "auto" (as stored).
        attn_implementation: of transformers, such as "sdpa" or "eager"; None for its default.
        group_by_length: put rows of similar length into one micro-batch. Does not change the result.
        export: what a finished run leaves in its folder ``hf/`` for transformers: "auto" (the model, or its adapters
            alone), "merged" (adapters added to the weights) or "none".
        eval_rows: held-out rows looked at per evaluation, a fixed sample, ≥ 0; 0 for all.
    """

    trains_on_texts = True
    divergence_advice = "Lower --model.lr, or give it a longer rise by --model.warmup_ratio"
    run_defaults: ClassVar[dict[str, Any]] = {"eval_every": 100, "log_every": 10}
    saved_again = False  # an evaluation changes nothing here, and weights take long to write
    look_command = "python -m offpolicy.generate {folder}, or offpolicy.export {folder} OUT [--merge]"

    view: ClassVar[Any] = PairView()
    uses_reference: bool = True
    scores_prompt: bool = False
    uses_mismatched: bool = False

    def __init__(
        self,
        *,
        policy: str = "",
        lr: float = 1e-6,
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        epochs: float = 1.0,
        warmup_ratio: float = 0.1,
        lr_schedule: str = "cosine",
        weight_decay: float = 0.0,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        lora_targets: list[str] | None = None,
        adapter: str | None = None,
        gradient_checkpointing: bool = False,
        reference: str = "auto",
        ref_cache: str | None = None,
        shared_prompt: bool | None = None,
        chunk: int = 256,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        group_by_length: bool = True,
        export: str = "auto",
        eval_rows: int = 512,
    ) -> None:
        super().__init__()
        check_range("lr", lr, 0.0)
        check_range("batch_size", batch_size, 1)
        if micro_batch_size is not None:
            check_range("micro_batch_size", micro_batch_size, 1)
        check_range("epochs", epochs, 0.0, lower_open=True)
        check_range("warmup_ratio", warmup_ratio, 0.0, 1.0)
        check_range("weight_decay", weight_decay, 0.0)
        check_range("lora_rank", lora_rank, 0)
        check_range("lora_dropout", lora_dropout, 0.0, 1.0, upper_open=True)
        check_range("chunk", chunk, 1)
        check_range("eval_rows", eval_rows, 0)
        for name, value, known in (
            ("lr_schedule", lr_schedule, SCHEDULES),
            ("dtype", dtype, DTYPES),
            ("export", export, EXPORTS),
        ):
            if value not in known:
                raise UsageError(f"`{name}` is '{value}'; expected one of {', '.join(known)}.")
        if adapter and lora_rank:
            raise UsageError(
                "`adapter` and `lora_rank` were both given; expected one: go on with an adapter, or begin."
            )
        if reference == "adapter_off" and (adapter or not lora_rank):
            raise UsageError(
                "`reference` is 'adapter_off', the untouched base model; expected a new adapter (`lora_rank`). Use "
                "'auto', which takes the policy as it is at the start."
            )
        self.meter = RowMeter()
        self.model: Any = None  # the causal language model, wrapped by peft where there are adapters
        self.tokenizer: Any = None
        self.strict_loading = not (lora_rank or adapter)  # checkpoints of adapters hold nothing else
        self.save_hyperparameters()
        self.eval_table: Table | None = None
        self._table: Table | None = None
        self._mismatched: dict[int, Table] = {}  # epoch → answers under other prompts
        self._reference = Reference(self)
        self._plan: Plan | None = None
        self._horizon = 0  # steps over which the rate falls
        self._micro = 0  # micro-batches of the current step that are done
        self._micro_batches = 1  # of one step on one process
        self._means: tuple[int, StepMeans] | None = None
        self._start_digest = ""  # of the weights that training started from
        self._seconds, self._tokens, self._steps_timed, self._began = 0.0, 0, 0, 0.0
        self._real, self._places = 0, 0  # tokens in rows of forward passes, and places for them

    # -- to be written by a method -------------------------------------------------------------------------------------

    def loss(self, scores: Any) -> tuple[Tensor, Metrics]:
        """Loss per row, (B,), and metrics of (B,) each, detached.

        Args:
            scores: :class:`PairScores` or :class:`SingleScores` of :mod:`offpolicy.losses.scores`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss(scores).")

    # -- construction --------------------------------------------------------------------------------------------------

    @classmethod
    def data_class(cls) -> type[DataModule]:
        from offpolicy.data.texts.module import TextData

        return TextData

    def bind_data(self, data: DataModule) -> None:
        if not self.hparams.policy:
            raise UsageError(
                f"{type(self).__name__} was given no policy; expected a model to tune. Pass --model.policy with a "
                "folder or a hub id."
            )
        if not hasattr(data, "bind_tokenizer"):
            raise UsageError(
                f"{type(self).__name__} trains on texts and was given a {type(data).__name__} ({data.name}); expected "
                "TextData, such as --data pairs.jsonl."
            )
        data.bind_tokenizer(policies.open_tokenizer(self.hparams.policy))

    def planned_steps(self, data: DataModule) -> int | None:
        rows = len(self.view.bind(data.load()))
        return max(1, math.ceil(self.hparams.epochs * math.ceil(rows / self.hparams.batch_size)))

    def initialize(self, seed: int | None = None) -> LanguageModule:
        """Open the policy and add its adapters, reproducibly from the seed, without data or trainer. Returns self."""
        if self.model is not None:
            return self
        h = self.hparams
        known = self.seed if seed is None else seed
        self.seed = (torch.initial_seed() if known is None else known) % (1 << 63)
        model = policies.open_model(h.policy, dtype=h.dtype, attn_implementation=h.attn_implementation)
        if h.adapter:
            model = policies.open_adapter(model, h.adapter)
        elif h.lora_rank:
            model = self._adapted(
                model,
                {
                    "r": h.lora_rank,
                    "lora_alpha": 2 * h.lora_rank if h.lora_alpha is None else h.lora_alpha,
                    "lora_dropout": h.lora_dropout,
                    "target_modules": list(h.lora_targets) if h.lora_targets else "all-linear",
                },
            )
        self._take_model(model)
        return self

    def _adapted(self, model: Any, settings: Mapping[str, Any], add: Callable[..., Any] = policies.add_adapter) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed or 0)
            return add(model, settings)

    def _take_model(self, model: Any) -> None:
        self.model = model
        policies.base_of(model).config.use_cache = False
        if self.hparams.gradient_checkpointing:
            with policies.silent():  # newer versions have another name for it too
                model.gradient_checkpointing_enable({"use_reentrant": False})
                if not self.strict_loading:
                    model.enable_input_require_grads()

    @property
    def pad_id(self) -> int:
        return policies.pad_id(self.model, self.tokenizer)

    @property
    def shared_prompt(self) -> bool:
        """Whether prompts that two answers share are computed once."""
        wanted = self.hparams.shared_prompt
        exact = wanted is not False and shares_prompt(policies.base_of(self.model).config)
        if exact and not wanted:
            exact = not shared_fault(self.model)
        if wanted and not exact:
            raise UsageError(
                "`shared_prompt` is true, but with this model or attention it would change the numbers; expected null, "
                "or attn_implementation 'sdpa' or 'eager' and a model that attends to its whole past."
            )
        return exact if wanted is None else wanted

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def network_state(self) -> dict[str, Any]:
        base = policies.base_of(self.model)
        return {
            "policy_config": policies.describe_model(self.model),
            "policy_folder": os.path.abspath(self.hparams.policy) if os.path.isdir(self.hparams.policy) else None,
            "dtype": str(next(base.parameters()).dtype).removeprefix("torch."),
            "adapter": adapter_settings(self.model),
            "start_digest": self._start_digest,
            "eos": getattr(getattr(base, "generation_config", None), "eos_token_id", None),
        }

    def restore_networks(self, state: Mapping[str, Any]) -> None:
        if self.model is not None:
            self._check_same_start(state)
            return
        h = self.hparams
        if state["adapter"] is None:
            dtype = policies.dtype_of(state["dtype"])
            model = policies.build_model(state["policy_config"], dtype=dtype, attn_implementation=h.attn_implementation)
        else:
            folder = state.get("policy_folder")  # where the run was started from another one than now
            name = folder if folder and os.path.isdir(folder) else h.policy
            model = policies.open_model(name, dtype=state["dtype"], attn_implementation=h.attn_implementation)
            model = self._adapted(model, state["adapter"], policies.same_adapter)
        settings = getattr(policies.base_of(model), "generation_config", None)
        if settings is not None and state.get("eos") is not None:  # the policy's folder may name more than its config
            settings.eos_token_id = state["eos"]
        self._take_model(model)

    def _check_same_start(self, state: Mapping[str, Any]) -> None:
        if not same_settings(adapter_settings(self.model), state["adapter"]):
            raise UsageError("the checkpoint has other adapters than the method now. Pass the settings of its run.")
        if self._start_digest and state["start_digest"] and self._start_digest != state["start_digest"]:
            raise UsageError(
                f"`policy` is {self.hparams.policy}, whose weights are not those that the run started from; expected "
                "the same, as they are its reference. Pass the model the run was started with."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if not self.strict_loading:
            kept = self._trained_names() | {f"model.{name}" for name in adapter_names(self.model)}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}

    def _trained_names(self) -> set[str]:
        return {name for name, p in self.named_parameters() if p.requires_grad}

    def extra_state(self) -> dict[str, Any]:
        return {"horizon": self._horizon}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self._horizon = state["horizon"]
        if self._plan is not None and self._plan.seed != self.seed:
            if self._mismatched:
                raise UsageError(f"the run has the seed {self.seed}; expected the same: --seed_everything {self.seed}.")
            self._plan = self._make_plan()

    def keep_files(self, folder: Path) -> None:
        if self.tokenizer is not None:
            policies.save_tokenizer(self.tokenizer, folder / "tokenizer")

    def take_files(self, folder: Path) -> None:
        from offpolicy.data.texts.tokens import load_tokenizer

        if (folder / "tokenizer").is_dir():
            self.tokenizer = load_tokenizer(str(folder / "tokenizer"))

    def finish_files(self, folder: Path) -> None:
        how = self.hparams.export
        if how == "none":
            return
        with trusting(names=names_of(self)):
            # a sharded model is whole in its checkpoint alone
            tuned = self if self._device_mesh is None else type(self).load_from_checkpoint(folder)
            export_model(
                tuned.model,
                tuned.tokenizer,
                folder / "hf",
                merge=how == "merged",
                policy=self.hparams.policy,
                keep=tuned is self,
                replace=True,
            )

    # -- what the first screen says ------------------------------------------------------------------------------------

    def facts(self) -> list[tuple[str, str]]:
        from offpolicy.data.texts.preview import report

        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        rows = (
            []
            if "format" not in data.replay.meta
            else [(line[2:12].strip(), line[12:]) for line in report(data.replay).splitlines()[1:]]
        )
        rows = [row for row in rows if row[0] not in ("note", "warning")] or [
            ("rows", f"{len(self._plan_of().lengths):,}")
        ]
        return [*rows, self.policy_fact(), ("reference", self._reference.words)]

    def policy_fact(self) -> tuple[str, str]:
        """The line on the policy."""
        numbers, trained = sum(p.numel() for p in self.model.parameters()), num_trained(self.model)
        kind = policies.base_of(self.model).config.model_type
        return "policy", f"{self.hparams.policy} ({kind}), {numbers:,} parameters, {trained:,} trained"

    def batch_words(self) -> str:
        split = f", {self._micro_batches} micro-batches each" if self._micro_batches > 1 else ""
        assert self._plan is not None
        epochs = self.trainer.max_steps / self._plan.steps_per_epoch
        return f"{self.hparams.batch_size} rows{split}, {epochs:.3g} epochs"

    def evaluates(self) -> str:
        return "" if self.eval_table is None else f"{len(self.eval_table.needed):,} held-out rows"

    def notes(self) -> list[str]:
        dtype = next(policies.base_of(self.model).parameters()).dtype
        if dtype != torch.bfloat16 or not self.strict_loading:
            return []
        return [
            f"All weights are bfloat16, whose steps are 1/256 of a value: a rate of {self.hparams.lr:g} may move few "
            "of them. Small ones are kept by --model.dtype float32 with --trainer.precision bf16-mixed, or by adapters."
        ]

    def samples(self) -> str:
        from offpolicy.data.texts.preview import samples

        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        shown = data.options.get("show", 0)
        return samples(data.replay, self.tokenizer, shown) if shown and self.tokenizer is not None else ""

    # -- Lightning: construction ---------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        trainer = self.trainer
        if self.run.compile:
            raise UsageError("`run.compile` is true, which is for control methods; expected false. Leave it out.")
        if trainer.accumulate_grad_batches not in (None, 1):
            raise UsageError(
                f"the Trainer has accumulate_grad_batches={trainer.accumulate_grad_batches}; expected none, as it "
                "follows from `batch_size` and `micro_batch_size` of the method."
            )
        if getattr(trainer, "datamodule", None) is not None:
            self.bind_data(trainer.datamodule)  # type: ignore[attr-defined]
        return [RestoreSettings(), divergence.Divergence(), self.measurement(), Interruption()]

    def held_out(self) -> dict[str, float]:
        return {} if self.eval_table is None else evaluate(self)

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        trainer, h = self.trainer, self.hparams
        data: Any = getattr(trainer, "datamodule", None)
        if getattr(data, "replay", None) is None:
            raise UsageError("fit was given no texts; expected a data module, such as TextData('pairs.jsonl').")
        refuse_half(trainer.precision)
        if getattr(data, "change_every", 0):
            raise UsageError("`change_every` is set, but texts cannot change during training yet; expected 0.")
        if self.seed is None:
            self.seed = int(trainer.strategy.broadcast(torch.initial_seed())) % (1 << 63)
        self._take_data(data)
        self.data_meta, self.data_fingerprint = dict(data.replay.meta), data.replay.fingerprint()
        if self.tokenizer is None and "tokenizer" in data.replay.meta:
            self.tokenizer = data.tokenizer
        self.initialize()
        self._refuse_half_weights()
        self._check_texts(data.replay)
        critic = getattr(getattr(self, "critic", None), "decoder", None)
        without_noise(self.model, *([] if critic is None else [critic]))
        check_head(self.model)  # here, as it runs the model once
        _ = self.shared_prompt  # likewise: a sharded model would not take the trial's plain tensors
        trainer.precision_plugin.convert_module(self)  # before a checkpoint is loaded, so that it loses no digit
        self._start_digest = policies.weights_digest(
            self.model, with_adapters=bool(h.adapter)
        )  # new ones begin as nothing
        share, longest = math.ceil(h.batch_size / self.world_size), self._longest()
        self.rows_per_forward = min(share, h.micro_batch_size or max(1, FORWARD_TOKENS // longest))
        self._micro_batches = math.ceil(h.batch_size / (self.rows_per_forward * self.world_size))
        trainer.accumulate_grad_batches = self._micro_batches
        self._plan = self._make_plan()
        if trainer.max_steps < 1:
            trainer.fit_loop.epoch_loop.max_steps = self.planned_steps(data) or 1
        if trainer.fit_loop.max_epochs is None or trainer.fit_loop.max_epochs > 0:
            trainer.fit_loop.max_epochs = -1  # epochs are counted here; the loader never ends
        self._horizon = trainer.max_steps

    def _take_data(self, data: Any) -> None:
        """Bind the view to the data, and choose the held-out rows."""
        texts = self.view.bind(data.replay)
        self._table = Table(texts, np.arange(len(texts)))
        self._check_prompts(texts, "the data")
        held_out = getattr(data, "eval_replay", None)
        wanted = held_out is not None and self.run.eval_episodes > 0
        self.eval_table = None
        if wanted:
            texts = self.view.bind(held_out)
            self._check_prompts(texts, "the held-out data")
            self.eval_table = Table(texts, eval_sample(len(texts), self.hparams.eval_rows))

    def _check_prompts(self, texts: BoundTexts, what: str) -> None:
        if self.uses_mismatched and len(np.unique(texts.index[:, 0])) < 2:
            raise DataError(
                f"{what} have one prompt; expected two or more, since {type(self).__name__} compares with answers to "
                "other prompts. Pass more rows, or leave the held-out ones out with --data.eval_fraction 0."
            )

    def _longest(self) -> int:
        """Tokens of the longest row of a forward pass."""
        assert self._table is not None
        return int(self._table.texts.lengths.sum(1).max())

    def _make_plan(self) -> Plan | None:
        assert self._table is not None
        return Plan(
            self._table.texts.lengths.sum(1),
            batch_size=self.hparams.batch_size,
            slots=self._micro_batches * self.world_size,
            seed=self.seed or 0,
            by_length=self.hparams.group_by_length,
        )

    def _refuse_half_weights(self) -> None:
        """A policy stored in float16 would be trained in it by dtype "auto"."""
        if any(p.dtype == torch.float16 for p in self.model.parameters() if p.requires_grad):
            raise UsageError(
                f"`dtype` is '{self.hparams.dtype}' and {self.hparams.policy} is stored in float16, which needs loss "
                "scaling; expected 'bfloat16' or 'float32'. Pass --model.dtype bfloat16."
            )

    def _check_texts(self, replay: Any) -> None:
        """Every token and every position must be one that the model knows.

        Raises:
            DataError: one is not.
        """
        self._check_tokens(replay, "texts")
        room = positions(policies.base_of(self.model))
        for table in filter(None, (self._table, self.eval_table)):
            sizes = table.texts.lengths.reshape(len(table.texts), -1, 2)  # rows, sides, prompt and answer
            longest = int(sizes.max((0, 1)).sum() if self.uses_mismatched else sizes.sum(-1).max())
            if longest > room:
                together = "a prompt with another's answer has" if self.uses_mismatched else "the longest text has"
                raise DataError(
                    f"{together} up to {longest} tokens, but {self.hparams.policy} has {room} positions; expected "
                    f"shorter texts. Pass --data.max_length {room // 2 if self.uses_mismatched else room}."
                )

    def _check_tokens(self, replay: Any, what: str) -> None:
        largest = int(np.asarray(replay.steps["token"]).max())
        size = policies.vocabulary_of(self.model)
        if largest >= size:
            raise DataError(
                f"the {what} have the token id {largest}, but {self.hparams.policy} knows ids below {size}; expected "
                f"{what} tokenised for this model. Leave `--data.tokenizer` out; if the tokenizer is the policy's own, "
                "give the model embeddings for all of its tokens."
            )

    def configure_model(self) -> None:
        """Shard the model where the strategy asks for it; make the reference while the policy still is at its start."""
        if getattr(self, "_trainer", None) is None or not self.trainer.training or self._table is None:
            return
        if self._device_mesh is not None:
            from offpolicy.language.sharding import shard

            shard(self.model, self._device_mesh["data_parallel"])
        self.model.to(self.trainer.strategy.root_device)
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
                self._mismatched[epoch] = Table(other_prompts(table.texts, previous), table.needed)
            if held_out is not None:
                in_order, prompts = np.arange(len(held_out.texts)), held_out.texts.index[:, 0]
                previous = previous_of_other_prompt(in_order, prompts)
                self._mismatched[HELD_OUT] = Table(other_prompts(held_out.texts, previous), held_out.needed)
        if self.uses_reference:
            tables = [table, held_out, *self._mismatched.values()]
            self._reference.prepare([one for one in tables if one is not None], self._start_digest)

    # -- scores --------------------------------------------------------------------------------------------------------

    def precision_context(self) -> AbstractContextManager[Any]:
        """The precision that training runs in, for forward passes outside of it."""
        return self.trainer.precision_plugin.forward_context() if self._trainer is not None else nullcontext()

    def layout(self, batch: Any) -> Layout:
        """The rows of one forward pass over a batch of texts, on the device."""
        if isinstance(self.view, PairView):
            layout = pair_layout(batch, self.pad_id, shared_prompt=self.shared_prompt, prompt_too=self.scores_prompt)
        else:
            layout = single_layout(batch, self.pad_id, prompt_too=self.scores_prompt)
        return layout.to(self.device if self._trainer is None else self.trainer.strategy.root_device)

    def answers(self, model: Any, layout: Layout, *, stats: bool = False) -> Answers:
        """The scores of the rows of one forward pass."""
        return score(model, layout, chunk=self.hparams.chunk, stats=stats)

    def scores(self, table: Table, rows: np.ndarray, means: StepMeans, *, stats: bool = False) -> Any:
        """What :meth:`loss` takes, for rows of a table: :class:`PairScores` or :class:`SingleScores`."""
        batch = table.texts.gather(rows)
        layout = self.layout(batch)
        if torch.is_grad_enabled():
            self._real, self._places = self._real + layout.real_tokens, self._places + layout.input_ids.numel()
        answers = self.answers(self.model, layout, stats=stats)
        reference = self._reference.logps(table, rows, layout, answers.sum_logps) if self.uses_reference else None
        facts = {name: value.to(answers.length.device) for name, value in batch.facts.items()}
        size = len(rows)

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
            )

        if isinstance(self.view, PairView):
            chosen, rejected = part(0, 2 if self.scores_prompt else None), part(1, None)
            return PairScores(chosen, rejected, facts, means.length, means.sequence_length)
        answer = part(0, 1 if self.scores_prompt else None)
        return SingleScores(answer, facts, means.length, mismatched_ratio=means.mismatched_ratio)

    def step_means(self, table: Table, rows: np.ndarray) -> StepMeans:
        """What losses need to know of all rows of a step."""
        lengths, weight = table.texts.lengths[rows], row_weights(table.texts, rows)
        total = weight.sum() or 1.0  # of a step whose rows all have the weight 0, which learns nothing
        sequence = lengths[:, 1] + np.maximum(lengths[:, 0] - 1, 0)
        ratio = self._mismatched_ratio(table, rows, weight / total) if self.uses_mismatched else None
        return StepMeans(total, weight @ lengths[:, 1] / total or 1.0, weight @ sequence / total or 1.0, ratio)

    def _mismatched_ratio(self, table: Table, rows: np.ndarray, share: np.ndarray) -> Tensor:
        """Mean log-ratio of answers under other prompts over the rows (B,) of a step, which have these shares, 0-d."""
        epoch = HELD_OUT if table is self.eval_table else self._plan_of().place(self.global_step)[0]
        other = self._mismatched[epoch]
        world, rank = self.world_size, self.global_rank if self.world_size > 1 else 0
        padded = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % world)])
        shares = torch.from_numpy(np.pad(share, (0, len(padded) - len(rows)))[rank::world])
        mine, total = padded[rank::world], torch.zeros((), dtype=torch.float64, device=self.device)
        with evaluating(self.model):
            for start in range(0, len(mine), self.rows_per_forward):
                part = slice(start, start + self.rows_per_forward)
                layout = self.layout(other.texts.gather(mine[part]))
                found = self.answers(self.model, layout).sum_logps
                ratio = found[: len(mine[part])] - self._reference.logps(other, mine[part], layout, found)[0]
                total += (ratio.double() * shares[part].to(ratio.device)).sum()
        return self.sum_over_processes(total).float()

    def sum_over_processes(self, x: Tensor) -> Tensor:
        if self.world_size > 1:
            x = x.clone()
            torch.distributed.all_reduce(x)
        return x

    # -- Lightning: the loop -------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Optimizer:
        h = self.hparams
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": h.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = self._device_mesh is None and self.device.type in ("cpu", "cuda")
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=h.lr, betas=tuple(h.adam_betas), fused=fused)

    def rate(self, step: int) -> float:
        """The learning rate of step ``step`` (from 0): a linear rise, then the schedule, down to 0 after the last."""
        h, horizon = self.hparams, max(1, self._horizon)
        rise = round(h.warmup_ratio * horizon)
        if step < rise:
            return h.lr * (step + 1) / rise
        done = min(1.0, (step - rise) / max(1, horizon - rise))
        left = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
        return h.lr * left[h.lr_schedule]

    def on_fit_start(self) -> None:
        self.apply_settings()
        self.model.train()

    def on_train_start(self) -> None:
        self.meter.to(self.device)
        self._horizon = max(self._horizon, self.trainer.max_steps)
        self._micro, self.step_ended, self._means = 0, True, None
        self._align_batches()

    def _align_batches(self) -> None:
        """Let Lightning's count of micro-batches fit those per step, which a resumed run may have changed."""
        loop = self.trainer.fit_loop.epoch_loop
        progress: Any = loop.batch_progress.current
        count = self.global_step * self._micro_batches
        if progress.ready != count:
            progress.ready = progress.started = progress.processed = count
            progress.completed = count - loop.restarted_on_train_batch_end

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        self._began = time.perf_counter()
        return None

    def stop_clock(self, wait: bool = False) -> None:
        if wait:
            finish_work(self.device)
        self._seconds += time.perf_counter() - self._began
        self._began = time.perf_counter()

    @divergence.named
    def training_step(self, tick: Any, batch_idx: int) -> Tensor:
        t, j, table, plan = self.global_step, self._micro, self._table, self._plan_of()
        assert table is not None
        if j == 0:
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = self.rate(t)
            self._means = (t, self.step_means(table, plan.rows(t)))
        means = self._means[1]  # type: ignore[index]
        world, rank = self.world_size, self.global_rank if self.world_size > 1 else 0
        rows = plan.slot(t, j * world + rank)
        real = len(rows) > 0
        rows = rows if real else plan.rows(t)[-1:]  # every process runs the same number of forward passes
        self._seed_dropout(rank)
        scores = self.scores(table, rows, means, stats=self._logs(t + 1))
        loss, metrics = self.loss(scores)
        if t == 0 and j == 0 and self.uses_reference:
            self._reference.check_start(scores)
        weight = torch.from_numpy(row_weights(table.texts, rows) * real).to(loss)
        self.meter.add_step(loss, metrics, weight=weight, real=torch.full_like(weight, float(real)))
        self._tokens += int(table.texts.lengths[rows].sum()) if real else 0
        self._micro = (j + 1) % self._micro_batches
        self.step_ended = self._micro == 0
        # Lightning takes the mean over micro-batches and processes
        return (loss * weight).sum() * (self._micro_batches * world / means.weight)

    @property
    def has_dropout(self) -> bool:
        """Whether the policy's adapters drop numbers out in training."""
        return drops_out(adapter_settings(self.model))

    def _seed_dropout(self, rank: int) -> None:
        """Let dropout be a function of the seed and the micro-batch."""
        if self.has_dropout:
            place = torch.tensor([self.global_step * self._micro_batches + self._micro], device="cpu")
            torch.manual_seed(int(sampling.keys(self.seed or 0, f"dropout of process {rank}", place)[0]))

    def _plan_of(self) -> Plan:
        assert self._plan is not None
        return self._plan

    def _logs(self, updates: int) -> bool:
        return updates % self.run.log_every == 0 or updates == self.trainer.max_steps

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self._steps_timed += 1
        t = self.global_step
        if self._logs(t + 1):
            self._write_row(t + 1, optimizer)

    def _write_row(self, updates: int, optimizer: Optimizer) -> None:
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        norm: Any = torch.nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.stop_clock(wait=True)
        tokens = self.sum_over_processes(torch.tensor(float(self._tokens), device=self.device)).item()
        seconds = max(self._seconds, 1e-9)
        row = {
            "step": updates,
            **{f"train/{name}": value for name, value in self.meter.read(self.sum_over_processes).items()},
            "train/grad_norm": norm.item(),
            "train/learning_rate": optimizer.param_groups[0]["lr"],
            **self._progress(updates),
            "perf/updates_per_s": self._steps_timed / seconds,
            "perf/tokens_per_s": tokens / seconds,
            "perf/padding_fraction": 1.0 - self._real / max(1, self._places),  # of the first process
            "perf/peak_memory_mb": peak_memory(self.device),
        }
        self._seconds, self._tokens, self._steps_timed, self._real, self._places = 0.0, 0, 0, 0, 0
        self.log_row(row, updates)

    def _progress(self, updates: int) -> dict[str, float]:
        """How far training has come, beside the count of updates."""
        return {"train/epoch": updates / self._plan_of().steps_per_epoch}

    def teardown(self, stage: str) -> None:
        self.restore_settings()
        self._reference.close()


def other_prompts(bound: BoundTexts, previous: np.ndarray) -> BoundTexts:
    """Every prompt of a table of singles with the answer of another row."""
    index = np.stack([bound.index[:, 0], bound.index[previous, 1]], axis=1)
    return BoundTexts(bound.replay, index, {}, bound.kind)


def peak_memory(device: torch.device) -> float:
    """The most memory this process has held so far, MiB: on the GPU, else in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
