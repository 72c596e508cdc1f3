"""What the engine vLLM reads from its folder: the shape of the model, and weights by the number of their sync."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from offpolicy.errors import UsageError
from offpolicy.language.adapters import adapter_settings
from offpolicy.language.policy import base_of
from offpolicy.language.sharding import units
from offpolicy.language.weights import adapter_state, exported

SHARD = 1 << 30  # bytes of a file of weights, at most unless a single tensor has more
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of adapters that vLLM can hold
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # sizes of heads that it knows on a CPU


def shape_of(model: Any) -> Any:
    """The configuration of a model as an engine reads it."""
    base = base_of(model)
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__.removeprefix("FSDP")]
    if hasattr(config, "quantization_config"):  # weights come as numbers
        del config.quantization_config
    return config


def write_weights(tensors: Iterable[tuple[str, Tensor]], config: Any, folder: Path, *, writes: bool = True) -> None:
    """Write a model, its tensors as files of a bounded size; the folder is whole or absent.

    Args:
        tensors: name and tensor.
        config: of the model.
        folder: to be made.
        writes: whether this process writes; else it only goes through the tensors, which may take all processes.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    part: dict[str, Tensor] = {}
    files = 0

    def flush() -> None:
        nonlocal part, files
        if part:
            save_file(part, temporary / f"model-{files:05d}.safetensors", metadata={"format": "pt"})
            part, files = {}, files + 1

    if writes:
        temporary.mkdir()
    for name, tensor in tensors:
        if writes:
            known = {t.data_ptr() for t in part.values()}
            here = tensor.detach().contiguous()
            part[name] = here.clone() if here.data_ptr() in known else here  # tied ones are written twice
            if sum(t.nbytes for t in part.values()) >= SHARD:
                flush()
    if writes:
        flush()
        config.save_pretrained(temporary)
        os.replace(temporary, folder)


def write_adapter(model: Any, folder: Path, *, writes: bool = True) -> None:
    """Write the adapters of a model as ``peft`` does, which is a collective where weights are cut over processes."""
    state = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    if not writes:
        return
    temporary = folder.with_name(f"{folder.name}.tmp")
    temporary.mkdir()
    save_file(state, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = adapter_settings(model) or {}
    text = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "", **settings, "inference_mode": True}
    (temporary / "adapter_config.json").write_text(json.dumps(text))
    os.replace(temporary, folder)


def write_for_engine(
    model: Any, folder: Path, *, adapter: str, dtype: torch.dtype, writes: bool = True, alone: bool = False
) -> None:
    """Write what an engine needs of a policy.

    Args:
        model: the policy.
        folder: to be made.
        adapter: what becomes of adapters, as of :func:`offpolicy.language.weights.exported`.
        dtype: of the weights.
        writes: whether this process writes.
        alone: write the adapters alone.
    """
    if not (writes or units(model)):
        return  # nobody needs this process to gather anything
    if alone:
        write_adapter(model, folder, writes=writes)
    else:
        write_weights(exported(model, adapter, dtype), shape_of(model), folder, writes=writes)


def forget_weights(folder: Path, keep: Collection[Path], newest: int = 2) -> None:
    """Remove all but the newest weights below a folder, and those that somebody still asks for."""
    for old in sorted(folder.glob("v*"))[:-newest]:
        if old not in keep:
            shutil.rmtree(old, ignore_errors=True)


def adapter_rank(model: Any) -> int:
    """The rank of adapters as vLLM counts it, for adapters that it can hold beside the weights.

    Raises:
        UsageError: it cannot hold them.
    """
    settings = adapter_settings(model)
    if settings is None:
        raise UsageError("`engine.adapter` is 'keep', and the policy has no adapter; expected 'merge', the default.")
    rank = max(settings.get("r", 0), *(settings.get("rank_pattern") or {}).values(), 0)
    odd = [name for name in ("use_dora", "modules_to_save", "trainable_token_indices") if settings.get(name)]
    odd += ["bias"] if settings.get("bias", "none") != "none" else []
    odd += ["lora_bias"] if settings.get("lora_bias") else []
    if settings.get("peft_type") != "LORA" or odd or not 0 < rank <= RANKS[-1]:
        what = ", ".join(odd) or f"kind {settings.get('peft_type')}, rank {rank}"
        raise UsageError(
            f"`engine.adapter` is 'keep', and vLLM cannot hold this adapter beside the weights ({what}); expected "
            f"plain LoRA of rank ≤ {RANKS[-1]}. Use 'merge', the default."
        )
    return next(one for one in RANKS if one >= rank)


def check_model(model: Any, *, longest: int, on_cpu: bool) -> None:
    """Refuse what is known to fail or to be wrong in vLLM, before it is started.

    Args:
        model: the policy.
        longest: tokens of the longest prompt with the longest answer.
        on_cpu: whether the engine runs on a CPU.

    Raises:
        UsageError: a head size, too few positions, or a head that is tied to adapted embeddings.
    """
    base = base_of(model)
    config = base.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    if on_cpu and size and size not in CPU_HEADS:
        raise UsageError(
            f"the heads of the policy have {size} numbers, which vLLM does not know on a CPU; expected one of "
            f"{', '.join(map(str, CPU_HEADS))}. Pass --model.engine transformers."
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions and longest > positions:
        raise UsageError(
            f"the longest prompt and answer have {longest} tokens and the policy {positions} positions; expected no "
            "more, held-out prompts included. Pass a smaller --model.max_new_tokens or --data.max_prompt_length."
        )
    first, last = base.get_input_embeddings(), base.get_output_embeddings()
    if getattr(config, "tie_word_embeddings", False) and hasattr(first, "base_layer") != hasattr(last, "base_layer"):
        raise UsageError(
            "adapters change the embeddings of the policy and not its head, which vLLM takes for one; expected "
            "adapters of neither. Leave embed_tokens out of --model.lora_targets, or pass --model.engine transformers."
        )
