"""Whether a run of a language model fits into the memory of its device, asked before its weights are loaded."""

from __future__ import annotations

import platform
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from offpolicy.compute.processes import gathered
from offpolicy.compute.room import NO_LIMIT, available_memory, free_memory, size
from offpolicy.errors import check_choice
from offpolicy.language import policy as policies
from offpolicy.language.adapters import lora_settings
from offpolicy.language.memory import MemoryEstimate, Workload, check_memory, estimate_memory
from offpolicy.language.stepping import MicroBatches
from offpolicy.training.lightning_private import FullySharded
from offpolicy.training.seed_room import USABLE

SMALL = 20_000_000  # weights of models that are not looked at: they fit everywhere
CHECKPOINTING = ("auto", "true", "false")


@dataclass(frozen=True)
class Room:
    """What a run takes of its device, and what follows from it.

    Attributes:
        work: what the run does.
        estimate: what it takes; None where nothing was estimated.
        free: bytes that the device has; ``NO_LIMIT`` where it does not tell.
        note: a setting that was chosen by the room there is, for the first screen.
    """

    work: Workload
    estimate: MemoryEstimate | None = None
    free: int = NO_LIMIT
    note: str = ""

    @property
    def words(self) -> str:
        """For the first screen."""
        if self.estimate is None:
            return ""
        left = f"; {size(self.free)} free" if self.free < NO_LIMIT else "; the device does not tell how much is free"
        return f"{self.estimate.words()}{left}{self.note}"


def wanted_checkpointing(given: bool | str) -> bool | None:
    """What the option ``gradient_checkpointing`` says; None for "auto"."""
    if isinstance(given, bool):
        return given
    check_choice("gradient_checkpointing", given, CHECKPOINTING)
    return None if given == "auto" else given == "true"


def base_dtype(h: Any, device: Any) -> str:
    """The type of the policy's weights as a run of these arguments loads them.

    Args:
        h: arguments of the method.
        device: that trains; None outside of a run.
    """
    if h.dtype is not None:
        return str(h.dtype)
    frozen = bool(h.lora_rank or h.adapter)
    return "bfloat16" if frozen and device is not None and device.type == "cuda" else "float32"


def look_for_room(method: Any, trainer: Any, tokens: int, *, layers: bool | None, **more: Any) -> Room:
    """Estimate the memory of a run, choose whether layers are computed again, and refuse what cannot fit.

    Args:
        method: with its arguments, before its policy is open.
        trainer: of the run.
        tokens: of the longest row of a forward pass.
        layers: whether layers are computed again in the backward pass; None chooses.
        more: fields of :class:`Workload` that only the method knows.

    Raises:
        UsageError: it cannot fit, whatever is chosen; says what would save how much.
    """
    h, device, world = method.hparams, trainer.strategy.root_device, trainer.world_size
    cut = MicroBatches()
    cut.cut(h.batch_size, world, h.micro_batch_size, tokens, method.rows_together)
    work = Workload(
        rows=cut.rows,
        length=tokens,
        chunk=h.chunk,
        dtype="bfloat16" if base_dtype(h, device) == "bfloat16" else "float32",
        precision=str(trainer.precision),
        adapter=_adapter(h),
        quantize=h.quantize,
        optimizer=h.optimizer,
        offload=h.offload_optimizer,
        checkpointing=bool(layers),
        processes=world,
        sharded=isinstance(trainer.strategy, FullySharded),
        device=device.type,
        **more,
    )
    config = policies.peek_config(h.policy)
    known = config is not None and (work.adapter is not None or not h.adapter)  # else opening says what is wrong
    if not known or numbers_of(config) < SMALL:
        return Room(work)
    free, of_host = shared_room(device)
    usable = free if free >= NO_LIMIT else int(USABLE * free)
    if base_dtype(h, device) == "auto":
        work = replace(work, dtype="bfloat16" if "bfloat16" in str(getattr(config, "dtype", "")) else "float32")
    estimate, note = estimate_memory(config, work), ""
    if layers is None and estimate.total > usable:
        again = replace(work, checkpointing=True)
        less = estimate_memory(config, again)
        note = f"; layers are computed again in the backward pass (gradient_checkpointing), else {size(estimate.total)}"
        work, estimate = again, less
    if h.check_memory and estimate.known:
        instead = advice(config, work, h) if estimate.total > usable else []  # an estimate each, which takes a while
        check_memory(estimate, usable, instead, str(device), int(USABLE * of_host))
    return Room(work, estimate, free, note)


def shared_room(device: Any) -> tuple[int, int]:
    """Bytes that every process may take of its device, and of its machine; all processes ask, and get the same.

    Processes on one machine share it, and the one with the least decides for all.
    """
    found = gathered((platform.node(), free_memory(device), available_memory()))
    here = Counter(node for node, _, _ in found)
    host = min(left // here[node] for node, _, left in found)
    least = min(left // here[node] if device.type == "cpu" else left for node, left, _ in found)
    return least, host


def advice(config: Any, work: Workload, h: Any) -> list[tuple[str, MemoryEstimate]]:
    """Options that save memory in a run, in words, and what it takes with each."""
    found: list[tuple[str, Workload]] = []
    if work.dtype == "float32":
        found.append(("--model.dtype bfloat16", replace(work, dtype="bfloat16")))
    if not work.checkpointing:
        found.append(("--model.gradient_checkpointing true", replace(work, checkpointing=True)))
    if work.adapter and not work.quantize and not work.sharded:
        found.append(("--model.quantize 4bit", replace(work, quantize="4bit")))
    if work.rows > 1:
        found.append(("--model.micro_batch_size 1", replace(work, rows=1)))
    if work.adapter is None:
        settings = lora_settings(16, None, 0.0, None)
        own = replace(work, adapter=settings, dtype="bfloat16", reference=None, optimizer="adamw", offload=False)
        found.append(("--model.lora_rank 16 --model.dtype bfloat16", own))
        if work.optimizer != "adamw_8bit" and not work.sharded:
            found.append(("--model.optimizer adamw_8bit", replace(work, optimizer="adamw_8bit")))
        if not work.offload and not work.sharded and work.device != "cpu":
            host = replace(work, offload=True, dtype="bfloat16")
            found.append(("--model.offload_optimizer true --model.dtype bfloat16", host))
    if work.reference and h.reference != "auto":
        found.append(("--model.reference precomputed", replace(work, reference=None)))
    if work.cached_rows > 8:
        few = work.cached_rows // 4
        found.append((f"--model.generation_batch {few}", replace(work, cached_rows=few)))
    if work.length > 512:
        found.append((f"texts of at most {work.length // 2} tokens", replace(work, length=work.length // 2)))
    return [(words, estimate_memory(config, one)) for words, one in found]


def numbers_of(config: Any) -> int:
    """About how many weights a model has, from its configuration; 0 where that does not tell."""
    text = config.get_text_config()
    width, layers = getattr(text, "hidden_size", None), getattr(text, "num_hidden_layers", None)
    if not (width and layers):
        return 0
    inner = getattr(text, "intermediate_size", None) or 4 * width
    return int(layers * (4 * width**2 + 3 * width * inner) + text.vocab_size * width)


def _adapter(h: Any) -> dict[str, Any] | None:
    """Settings of the adapters of a run; None also where those of a folder cannot be had."""
    if h.lora_rank:
        return lora_settings(h.lora_rank, h.lora_alpha, h.lora_dropout, h.lora_targets)
    return policies.peek_adapter(h.adapter) if h.adapter else None
