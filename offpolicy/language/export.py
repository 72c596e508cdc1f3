"""A language model as a folder of Hugging Face, which ``transformers`` and everything that reads such folders opens."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offpolicy.data.texts.stops import stop_ids
from offpolicy.errors import UsageError, check_choice
from offpolicy.files import WriteError
from offpolicy.language import policy as policies
from offpolicy.language.adapters import adapter_settings, check_merged, merged, probabilities
from offpolicy.language.policy import base_of, save_tokenizer, silent, vocabulary_of
from offpolicy.language.quantizing import is_quantized
from offpolicy.language.weights import exported

EXPORT_DTYPES = ("float32", "bfloat16", "float16")


def export_model(
    model: Any,
    tokenizer: Any,
    folder: str | os.PathLike[str],
    merge: bool = False,
    *,
    policy: str = "",
    keep: bool = True,
    replace: bool = False,
    dtype: str | None = None,
) -> Path:
    """Write a model with its tokenizer. The folder is whole or absent.

    Whole models are written in the type that the files of the tuned model have: weights trained in float32 are rounded
    once to bfloat16 where those are bfloat16. Adapters alone stay in the type that they were trained in.

    Args:
        model: a causal language model, wrapped by ``peft`` where it has adapters.
        tokenizer: of the model; None writes none.
        folder: to be written; must be absent or empty.
        merge: add adapters to the weights of the base model. Otherwise a model with adapters is written as adapters
            alone, which name their base model; they take a few megabytes. Without adapters there is no difference.
        policy: folder or hub id of the model that was tuned, for its settings of generation.
        keep: the model goes on being used, so that a copy of it is merged.
        replace: remove what the folder holds, once its successor is complete.
        dtype: of the weights of a whole model: "float32", "bfloat16" or "float16"; None for that of the files.

    Returns:
        The folder.

    Raises:
        UsageError: the folder holds something, or `dtype` is given for adapters alone.
        WriteError: it cannot be written.
    """
    out = Path(folder)
    check_free(out, replace)
    if dtype is not None:
        check_choice("dtype", dtype, EXPORT_DTYPES)
    adapted = adapter_settings(model) is not None
    if dtype is not None and adapted and not merge:
        raise UsageError(
            f"`dtype` is '{dtype}', and adapters alone are written as they were trained; expected a whole model. Merge "
            "the adapters too (--merge), or leave `dtype` out."
        )
    written = export_dtype(model, policy, dtype)
    if merge and adapted:
        model = _merged_copy(model, written) if is_quantized(model) else _merged(model, keep)
    base = base_of(model)
    temporary, former = (out.with_name(f".{out.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old.tmp"))
    try:
        with silent(), _caching(base.config):
            _take_generation_settings(base, policy)
            if tokenizer is not None and hasattr(base, "generation_config"):
                base.generation_config.eos_token_id = stop_ids(base, tokenizer) or None
            for adapter in getattr(model, "peft_config", {}).values():
                if Path(policy).is_dir():  # found from any working folder
                    adapter.base_model_name_or_path = os.path.abspath(policy)
            if adapted and not merge:
                model.save_pretrained(temporary)
            else:
                _save_as(model, policies.dtype_of(written), temporary)
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary)
        if out.exists():
            os.replace(out, former)
        os.replace(temporary, out)
        shutil.rmtree(former, ignore_errors=True)
    except OSError as error:
        raise WriteError.of(error, out) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def export_dtype(model: Any, policy: str, dtype: str | None = None) -> str:
    """The type in which a whole model is written.

    Args:
        model: the policy.
        policy: folder or hub id that it was opened from.
        dtype: that the user wants; None for that of the files.
    """
    base = base_of(model)
    source = dtype or getattr(base, "source_dtype", None)
    if source is None and policy:  # of a checkpoint that an earlier version wrote
        config = policies.peek_config(policy)
        source = None if config is None else policies.stored_dtype(config)
    known = source in EXPORT_DTYPES  # files of 8-bit floats, say, are not written here
    return str(source) if known else str(base.dtype).removeprefix("torch.")


def _merged(model: Any, keep: bool) -> Any:
    return merged(copy.deepcopy(model) if keep else model, vocabulary_of(model))


@torch.no_grad()
def _merged_copy(model: Any, dtype: str) -> Any:
    """A model of whole weights on the CPU: numbers in place of four bits, with the adapters added."""
    config = json.loads(policies.describe_model(model))
    config.pop("quantization_config", None)
    whole = policies.build_model(json.dumps(config), dtype=policies.dtype_of(dtype))
    own = whole.state_dict()
    missing = set(own)
    for name, tensor in exported(model):  # one at a time, as all of them may be too much for the device
        own[name].copy_(tensor)
        missing.discard(name)
    if missing:
        raise UsageError(
            f"the model has no weights for {', '.join(sorted(missing)[:3])}, which its configuration has; expected "
            "all of them. Export the adapters alone, and merge them by peft."
        )
    vocabulary, training = vocabulary_of(model), model.training
    expected = probabilities(model.eval(), vocabulary)
    model.train(training)
    same = dtype == "float32" and base_of(model).dtype == torch.float32  # what is compared has one precision
    check_merged(probabilities(whole, vocabulary), expected, 1e-3 if same else 0.1)
    return whole


def _save_as(model: Any, dtype: torch.dtype, folder: Path) -> None:
    """Write a whole model with its weights in a type, and that type in its configuration."""
    if model.dtype == dtype:
        model.save_pretrained(folder)
        return
    model.save_pretrained(folder, state_dict=_cast(model, dtype))
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8"))
    name = str(dtype).removeprefix("torch.")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part |= {key: name for key in ("dtype", "torch_dtype") if part.get(key)}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _cast(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state of a model in another type. Weights that are one stay one; what a model always has in float32 stays."""
    whole = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    made: dict[tuple[int, torch.Size], Tensor] = {}
    found = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and whole.isdisjoint(name.split(".")):
            key = (tensor.data_ptr(), tensor.shape)
            if key not in made:
                made[key] = tensor.to(dtype)
            tensor = made[key]
        found[name] = tensor
    return found


def check_free(folder: Path, replace: bool = False) -> None:
    """Raise :class:`UsageError` when a folder to be written holds something, unless that may be replaced."""
    if folder.exists() and not replace and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists already; expected a new or empty folder. Pass another, or remove it.")


@contextlib.contextmanager
def _caching(config: Any) -> Iterator[None]:
    """Within it, the model keeps keys and values, which training alone switches off."""
    cached, config.use_cache = config.use_cache, True
    try:
        yield
    finally:
        config.use_cache = cached


def _take_generation_settings(model: Any, policy: str) -> None:
    """Stop tokens and the like, which a model rebuilt from a checkpoint has lost, where the policy is still at hand."""
    from transformers import GenerationConfig

    if not policy:
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(policy, local_files_only=True)
    except (OSError, ValueError):  # no such file, or a model that is not on this disk
        return
