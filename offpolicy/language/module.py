"""What every method for language models inherits: the policy, its optimiser, its checkpoints and the rows of metrics.

Training uses Lightning's automatic optimisation: a micro-batch per ``training_step``, gradients summed over the
micro-batches and processes of a step, one optimiser. What a step learns from is told by the two children:
``PreferenceModule`` takes texts that are given, ``RolloutModule`` answers that the policy draws itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from torch import nn
from torch.optim import Optimizer

from offpolicy import moved
from offpolicy.compute.devices import finish_work
from offpolicy.compute.optim import num_trained
from offpolicy.compute.processes import sum_over_processes
from offpolicy.data import sampling
from offpolicy.errors import UsageError, check_choice, check_range
from offpolicy.given import refuse_half
from offpolicy.language import policy as policies
from offpolicy.language.adapters import adapter_names, adapter_settings, drops_out
from offpolicy.language.checks import (
    check_suited,
    check_texts_given,
    check_trainer,
    padding_in_words,
    padding_is_left_out,
    precision_notes,
    prompt_is_shared,
    refuse_half_weights,
)
from offpolicy.language.export import export_dtype, export_model
from offpolicy.language.head_checks import check_head
from offpolicy.language.kernels import KERNELS, use_kernels
from offpolicy.language.meters import Pace
from offpolicy.language.noise import without_noise
from offpolicy.language.opening import check_same_start, open_policy, policy_state, reopen_policy
from offpolicy.language.optimisers import check_optimizer, check_sharding, make_optimizer
from offpolicy.language.quantizing import check_quantize, numbers
from offpolicy.language.room import Room, base_dtype, look_for_room, wanted_checkpointing
from offpolicy.language.stepping import SCHEDULES, MicroBatches, rate_at
from offpolicy.training.keeping import Spacing
from offpolicy.training.lightning_private import FullySharded, trainer_of
from offpolicy.training.module import Module
from offpolicy.trust import names_of_method, trusting

DTYPES = ("float32", "bfloat16", "auto")
EXPORTS = ("auto", "merged", "none")


class LanguageModule(Module):
    """Base of methods for causal language models.

    A user's class that extends this one directly is a preference method: :class:`offpolicy.PreferenceModule` is put in
    between.

    Args:
        policy: Hugging Face id or folder of the causal language model that is tuned.
        lr: peak learning rate of the optimiser.
        optimizer: "adamw", "adamw_8bit" (its moments take a quarter of the memory; needs the extra ``quantized``) or
            "adafactor" (as good as no moments; rates mean what they mean to AdamW).
        offload_optimizer: keep float32 masters of the weights, and moments, on the host, which moves them; the device
            holds weights and gradients alone.
        batch_size: rows per optimiser step over all processes, ≥ 1; the last step of an epoch has the rows that remain.
        micro_batch_size: rows per forward pass on one process; None for as many as fit into 8,192 tokens. Does not
            change the result.
        epochs: passes over the data, > 0; used when no ``max_steps`` are given.
        warmup_ratio: part of the steps in which the rate rises from 0, in [0, 1].
        lr_schedule: "cosine" or "linear" decay to 0 after that, or "constant".
        weight_decay: of the optimiser, ≥ 0; not applied to biases and norms.
        adam_betas: AdamW's.
        lora_rank: rank of LoRA adapters, 0 to train all weights; needs the extra ``lora``.
        lora_alpha: their scale; None for twice the rank.
        lora_dropout: dropout in front of them, in [0, 1).
        lora_targets: names of layers that get one; None for all linear layers but the head.
        quantize: "4bit" keeps the linear layers below adapters in four bits (QLoRA, arXiv:2305.14314; NF4, the extra
            ``quantized``): a quarter of the memory of bfloat16. None keeps them whole.
        adapter: folder of a trained adapter to go on from; its starting point is the reference.
        gradient_checkpointing: recompute layers in the backward pass instead of keeping their activations: true, false,
            or "auto" where the device has too little memory otherwise. Does not change the result.
        check_memory: refuse a run whose estimated memory its device does not have.
        reference: "auto", "precomputed", "live" (a frozen copy), "adapter_off", or another model's id or folder.
        ref_cache: folder of reference log-probabilities shared by runs; None for a folder beside the user's caches.
        shared_prompt: compute a prompt that both answers share once; None where that is exact for the model.
        padding_free: pack the rows of a forward pass behind each other, without padding; None where that is exact for
            the model and more than a tenth of the rows would be padding. Does not change the result.
        chunk: tokens whose logits exist at once.
        dtype: of the weights: "float32", "bfloat16" or "auto" (as stored); None for float32, and for bfloat16 below
            adapters on a GPU, which stay as they are. Adapters are float32.
        attn_implementation: of transformers, such as "sdpa" or "eager"; None for its default.
        kernels: "liger" puts the fused kernels of the package liger-kernel into the policy for training on a CUDA
            device; None for the model's own layers. Numbers are the same up to rounding.
        group_by_length: put rows of similar length into one micro-batch. Does not change the result.
        export: what a finished run leaves in its folder ``hf/`` for transformers: "auto" (the model, or its adapters
            alone), "merged" (adapters added to the weights) or "none".
        eval_rows: held-out rows looked at per evaluation, a fixed sample, ≥ 0; 0 for all.
    """

    trains_on_texts = True
    divergence_advice = "Lower --model.lr, or give it a longer rise by --model.warmup_ratio"
    run_defaults: ClassVar[dict[str, Any]] = {"log_every": 10}
    evaluations: ClassVar[Spacing] = Spacing(times=10, least=10, most=500, before=100)
    saved_again = False  # an evaluation changes nothing here, and weights take long to write

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        moved.extend_successors(cls)

    def __init__(
        self,
        *,
        policy: str = "",
        lr: float = 1e-6,
        optimizer: str = "adamw",
        offload_optimizer: bool = False,
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
        quantize: str | None = None,
        adapter: str | None = None,
        gradient_checkpointing: bool | str = "auto",
        check_memory: bool = True,
        reference: str = "auto",
        ref_cache: str | None = None,
        shared_prompt: bool | None = None,
        padding_free: bool | None = None,
        chunk: int = 256,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        kernels: str | None = None,
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
        check_range("lora_alpha", lora_alpha or 0.0)
        check_range("lora_dropout", lora_dropout, 0.0, 1.0, upper_open=True)
        check_range("chunk", chunk, 1)
        check_range("eval_rows", eval_rows, 0)
        check_choice("lr_schedule", lr_schedule, SCHEDULES)
        if dtype is not None:
            check_choice("dtype", dtype, DTYPES)
        wanted_checkpointing(gradient_checkpointing)
        check_choice("export", export, EXPORTS)
        if kernels is not None:
            check_choice("kernels", kernels, KERNELS)
        check_optimizer(optimizer, adam_betas)
        check_quantize(quantize, has_adapters=bool(lora_rank or adapter))
        if adapter and lora_rank:
            raise UsageError(
                "`adapter` and `lora_rank` were both given; expected one: go on with an adapter, or begin."
            )
        if reference == "adapter_off" and (adapter or not lora_rank):
            raise UsageError(
                "`reference` is 'adapter_off', the untouched base model; expected a new adapter (`lora_rank`). Use "
                "'auto', which takes the policy as it is at the start."
            )
        self.model: Any = None  # the causal language model, wrapped by peft where there are adapters
        self.tokenizer: Any = None
        self.has_adapters = bool(lora_rank or adapter)
        self.strict_loading = not self.has_adapters  # checkpoints of adapters hold nothing else
        self.save_hyperparameters()
        self.micro = MicroBatches()
        self._horizon = 0  # steps over which the rate falls
        self._start_digest = ""  # of the weights that training started from
        self.pace = Pace()
        self._room: Room | None = None  # once it is known what the run will do
        self.prepare_state()

    # -- what a child tells --------------------------------------------------------------------------------------------

    def prepare_state(self) -> None:
        """Make what the child keeps, which therefore needs no ``__init__`` and has the options of this class."""

    def take_data(self, data: Any) -> None:
        """Lay out what training reads, and choose what is held out."""
        raise NotImplementedError(f"{type(self).__name__} must define take_data(data).")

    def check_texts(self, replay: Any) -> None:
        """Refuse texts that the model cannot read."""
        raise NotImplementedError(f"{type(self).__name__} must define check_texts(replay).")

    def longest_row(self) -> int:
        """Tokens of the longest row of a forward pass; the policy is open."""
        raise NotImplementedError(f"{type(self).__name__} must define longest_row().")

    def expected_tokens(self) -> int:
        """Tokens of the longest row of a forward pass, at most; before the policy is open."""
        return self.longest_row()

    @property
    def rows_together(self) -> int:
        """Rows of a step that a forward pass holds together, or not at all; ``batch_size`` is a multiple."""
        return 1

    def workload(self) -> dict[str, Any]:
        """Fields of :class:`offpolicy.language.memory.Workload` that only the method knows."""
        return {}

    def plan_steps(self) -> None:
        """Lay out the steps, once it is known into how many micro-batches each is cut."""

    def progress(self, updates: int) -> dict[str, float]:
        """How far training has come beside the count of updates: columns of a row of metrics."""
        return {}

    def copies(self) -> list[nn.Module]:
        """Copies of parts of the policy, which are kept without noise as the policy is."""
        return []

    # -- construction --------------------------------------------------------------------------------------------------

    def bind_data(self, data: Any) -> None:
        check_suited(data, type(self).__name__, self.hparams.policy)
        data.bind_tokenizer(policies.open_tokenizer(self.hparams.policy))

    def initialize(self, seed: int | None = None) -> LanguageModule:
        """Open the policy and add its adapters, reproducibly from the seed, without data or trainer. Returns self."""
        if self.model is not None:
            return self
        known = self.seed if seed is None else seed
        self.seed = (torch.initial_seed() if known is None else known) % (1 << 63)
        self._take_model(open_policy(self.hparams, self.seed, base_dtype(self.hparams, self._training_device)))
        return self

    def _take_model(self, model: Any) -> None:
        self.model = model
        policies.base_of(model).config.use_cache = False
        if wanted_checkpointing(self.hparams.gradient_checkpointing):
            self._recompute_layers()

    def _recompute_layers(self) -> None:
        """Compute layers again in the backward pass instead of keeping their activations."""
        with policies.silent():  # newer versions have another name for it too
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            if self.has_adapters:
                self.model.enable_input_require_grads()

    @property
    def _training_device(self) -> torch.device | None:
        """The device that trains; None outside of a run."""
        return None if trainer_of(self) is None else self.trainer.strategy.root_device

    @property
    def pad_id(self) -> int:
        return policies.pad_id(self.model, self.tokenizer)

    @property
    def shared_prompt(self) -> bool:
        """Whether prompts that two answers share are computed once."""
        return prompt_is_shared(self.model, self.hparams.shared_prompt)

    @property
    def padding_free(self) -> bool | None:
        """Whether rows are packed without padding; None for those of which much would be padding."""
        return padding_is_left_out(self.model, self.hparams.padding_free)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def network_state(self) -> dict[str, Any]:
        return policy_state(self.model, self.hparams.policy) | {"start_digest": self._start_digest}

    def restore_networks(self, state: Mapping[str, Any]) -> None:
        if self.model is None:
            self._take_model(reopen_policy(state, self.hparams, self.seed or 0))
        else:
            check_same_start(self.model, self._start_digest, state, self.hparams.policy)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.has_adapters:
            trained = {name for name, p in self.named_parameters() if p.requires_grad}
            kept = trained | {f"model.{name}" for name in adapter_names(self.model)}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}

    def extra_state(self) -> dict[str, Any]:
        return {"horizon": self._horizon}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self._horizon = state["horizon"]

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
        with trusting(names=names_of_method(self)):
            # a sharded model is whole in its checkpoint alone
            tuned = self if self.device_mesh is None else type(self).load_from_checkpoint(folder)
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

    def policy_fact(self) -> tuple[str, str]:
        """The line on the policy."""
        count, trained = sum(map(numbers, self.model.parameters())), num_trained(self.model)
        kind = policies.base_of(self.model).config.model_type
        kept = ", linear layers in four bits (NF4)" if self.hparams.quantize else ""
        kernels = f", kernels {self.hparams.kernels}" if self.hparams.kernels else ""
        return "policy", f"{self.hparams.policy} ({kind}), {count:,} parameters, {trained:,} trained{kept}{kernels}"

    def memory_facts(self) -> list[tuple[str, str]]:
        """The lines on what the run takes of its device, and on the types of frozen and exported weights."""
        h, found = self.hparams, [("memory", self._room.words)] if self._room is not None and self._room.words else []
        if h.dtype is None and base_dtype(h, self._training_device) == "bfloat16":
            found.append(("frozen", "weights below the adapters are bfloat16 on this device (--model.dtype float32)"))
        return found + self._export_facts()

    def _export_facts(self) -> list[tuple[str, str]]:
        """The line on the type of ``hf/``, where it is another one than that of training."""
        how, base = self.hparams.export, policies.base_of(self.model)
        dtype = export_dtype(self.model, self.hparams.policy)
        if how == "none" or (self.has_adapters and how != "merged") or policies.dtype_of(dtype) == base.dtype:
            return []
        return [("export", f"weights in hf/ are made {dtype}, the type of the policy's files")]

    def padding_fact(self) -> tuple[str, str]:
        """The line on padding."""
        return "padding", padding_in_words(self.model, self.hparams.padding_free)

    def precision_notes(self) -> list[str]:
        """A sentence where the weights can hardly move."""
        return precision_notes(self.model, self.hparams.lr, has_adapters=self.has_adapters)

    # -- Lightning: construction ---------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        check_trainer(self.trainer, compiles=self.run.compile, graph=self.run.graph)
        if getattr(self.trainer, "datamodule", None) is not None:
            self.bind_data(self.trainer.datamodule)  # type: ignore[attr-defined]
        return self.watchers()

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        trainer = self.trainer
        data: Any = getattr(trainer, "datamodule", None)
        check_texts_given(data)
        refuse_half(trainer.precision)
        if self.hparams.quantize and isinstance(trainer.strategy, FullySharded):
            raise UsageError(
                "`quantize` is '4bit', and weights of four bits are not cut by 'fsdp2'; expected whole weights. Leave "
                "`quantize` out, or pass --trainer.strategy ddp."
            )
        check_sharding(self.hparams.optimizer, self.hparams.offload_optimizer, trainer.strategy)
        if self.seed is None:
            self.seed = int(trainer.strategy.broadcast(torch.initial_seed())) % (1 << 63)
        self.take_data(data)
        self.data_meta, self.data_fingerprint = dict(data.replay.meta), data.replay.fingerprint()
        if self.tokenizer is None and "tokenizer" in data.replay.meta:
            self.tokenizer = data.tokenizer
        self._ready_policy(data.replay)
        self._lay_out_steps(data)

    def _ready_policy(self, replay: Any) -> None:
        """Open the policy, and try on a few tokens whether it can be trained so."""
        h = self.hparams
        wanted = wanted_checkpointing(h.gradient_checkpointing)
        self._room = look_for_room(self, self.trainer, self.expected_tokens(), layers=wanted, **self.workload())
        self.initialize()
        if self._room.work.checkpointing and not wanted:
            self._recompute_layers()
        refuse_half_weights(self.model, h.dtype or "float32", h.policy)
        self.check_texts(replay)
        device = self.trainer.strategy.root_device
        use_kernels(self.model, h.kernels, device)
        flash = str(policies.base_of(self.model).config._attn_implementation).startswith("flash_attention")
        if flash or h.kernels:  # they compute on a GPU alone, and the first in half precision, in the trials below too
            self.model.to(device)
        without_noise(self.model, *self.copies())
        with self.precision_context() if flash else nullcontext():
            check_head(self.model)  # here, as it runs the model once
            _ = self.shared_prompt, self.padding_free  # here too: a sharded model takes no plain tensors of trials
        self.trainer.precision_plugin.convert_module(self)  # before a checkpoint is loaded, so that it loses no digit
        # new adapters begin as no change, so the digest leaves them out
        self._start_digest = policies.weights_digest(self.model, with_adapters=bool(h.adapter))

    def _lay_out_steps(self, data: Any) -> None:
        """Cut a step into micro-batches, and plan as many steps as the run makes."""
        h, trainer = self.hparams, self.trainer
        self.micro.cut(h.batch_size, self.world_size, h.micro_batch_size, self.longest_row(), self.rows_together)
        trainer.accumulate_grad_batches = self.micro.number
        self.plan_steps()
        if trainer.max_steps < 1:
            trainer.fit_loop.epoch_loop.max_steps = self.planned_steps(data) or 1
        if trainer.fit_loop.max_epochs is None or trainer.fit_loop.max_epochs > 0:
            trainer.fit_loop.max_epochs = -1  # epochs are counted here; the loader never ends
        self._horizon = trainer.max_steps

    # -- Lightning: the loop -------------------------------------------------------------------------------------------

    def precision_context(self) -> AbstractContextManager[Any]:
        """The precision that training runs in, for forward passes outside of it."""
        return self.trainer.precision_plugin.forward_context() if trainer_of(self) is not None else nullcontext()

    def configure_optimizers(self) -> Optimizer:
        h = self.hparams
        return make_optimizer(
            h.optimizer,
            self.model.parameters(),
            lr=h.lr,
            weight_decay=h.weight_decay,
            betas=h.adam_betas,
            fused=self.device_mesh is None and self.device.type in ("cpu", "cuda"),
            offload=h.offload_optimizer,
        )

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        h = self.hparams
        return rate_at(step, self._horizon, lr=h.lr, warmup_ratio=h.warmup_ratio, lr_schedule=h.lr_schedule)

    def on_fit_start(self) -> None:
        self.apply_settings()
        self.model.train()

    def on_train_start(self) -> None:
        self.meter.to(self.device)
        self._horizon = max(self._horizon, self.trainer.max_steps)
        self.step_ended = True
        self.micro.begin(self.trainer.fit_loop.epoch_loop, self.global_step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        self.pace.start()
        return None

    def begin_step(self) -> None:
        """Set the learning rates of the step, at its first micro-batch."""
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.rate(self.global_step) * group.get("lr_scale", 1.0)

    def end_micro_batch(self) -> None:
        """Count a micro-batch of the step."""
        self.step_ended = self.micro.end()

    def stop_clock(self, wait: bool = False) -> None:
        if wait:
            finish_work(self.device)
        self.pace.stop()

    @property
    def has_dropout(self) -> bool:
        """Whether the policy's adapters drop numbers out in training."""
        return drops_out(adapter_settings(self.model))

    def seed_dropout(self, rank: int) -> None:
        """Let dropout be a function of the seed and the micro-batch."""
        if self.has_dropout:
            place = torch.tensor([self.micro.place(self.global_step)], device="cpu")
            torch.manual_seed(int(sampling.keys(self.seed or 0, f"dropout of process {rank}", place)[0]))

    def writes_row(self, updates: int) -> bool:
        """Whether a row of metrics follows that many updates."""
        return updates % self.run.log_every == 0 or updates == self.trainer.max_steps

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.pace.steps += 1
        updates = self.global_step + 1
        if self.writes_row(updates):
            self._write_row(updates, optimizer)

    def _write_row(self, updates: int, optimizer: Optimizer) -> None:
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        norm: Any = torch.nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.stop_clock(wait=True)
        row = {
            "step": updates,
            **{f"train/{name}": value for name, value in self.meter.read(sum_over_processes).items()},
            "train/grad_norm": norm.item(),
            "train/learning_rate": optimizer.param_groups[0]["lr"],
            **self.progress(updates),
            **self.pace.read(sum_over_processes, self.device),
        }
        self.log_row(row, updates)

    def teardown(self, stage: str) -> None:
        self.restore_settings()


__getattr__ = moved.names_of("offpolicy.language.module")  # the names that stood here in version 0.1
