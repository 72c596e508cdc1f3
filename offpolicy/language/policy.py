"""The language model of a method: opened from a folder or the hub, with adapters, and rebuilt from a checkpoint.

Models come from ``transformers``, adapters from ``peft`` (the extra ``lora``); both are imported when they are needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offpolicy.errors import UsageError
from offpolicy.language import adapters
from offpolicy.language.adapters import adapter_base
from offpolicy.language.quantizing import check_read, quantization
from offpolicy.trust import allows, words


def open_model(
    name: str,
    *,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    quantize: str | None = None,
    option: str = "policy",
) -> Any:
    """A causal language model with its weights, on the CPU, without dropout.

    Args:
        name: folder, or id of the Hugging Face hub.
        dtype: of the weights: "float32", "bfloat16" or "auto" (as stored).
        attn_implementation: as of ``transformers``.
        quantize: "4bit" for linear layers of four bits, see :mod:`offpolicy.language.quantizing`; None for whole ones.
        option: what the name was given as, for messages.

    Raises:
        UsageError: no such folder or id, or no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    base = adapter_base(name)
    if base is not None:
        raise UsageError(
            f"`{option}` is '{name}', which holds an adapter of {base}; expected a whole model. For a policy, pass "
            f"--model.policy {base} --model.adapter {name}, or merge them: python -m offpolicy.export RUN OUT --merge."
        )
    settings: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    settings |= quantization(quantize, dtype)
    try:
        with silent(), found(name, option):
            config = without_dropout(AutoConfig.from_pretrained(name, trust_remote_code=False))
            if getattr(config, "is_encoder_decoder", False):
                raise ValueError(f"it is an encoder with a decoder ({config.model_type}), not a decoder alone")
            plain_attention(config, attn_implementation)
            source = stored_dtype(config)
            model: Any = AutoModelForCausalLM.from_pretrained(
                name, config=config, dtype=dtype_of(dtype), trust_remote_code=False, **settings
            )
            check_read(model)
            model.source_dtype = source  # an export has it again
            return model
    except UsageError:
        raise
    except Exception as error:  # a damaged folder raises almost anything
        raise UsageError(_not_opened(option, name, error)) from None


def peek_config(name: str) -> Any:
    """The configuration of a model without its weights; None where it cannot be had, which opening it will say."""
    from transformers import AutoConfig

    try:
        with silent(), found(name):
            config = without_dropout(AutoConfig.from_pretrained(name, trust_remote_code=False))
            plain_attention(config, None)
            return config
    except Exception:  # a damaged folder raises almost anything
        return None


def peek_adapter(folder: str) -> dict[str, Any] | None:
    """The settings of a trained adapter without its weights; None where they cannot be had, as opening it will say."""
    try:
        with silent(), found(folder, "adapter"):
            return adapters.folder_settings(folder)
    except Exception:  # a damaged folder raises almost anything
        return None


def stored_dtype(config: Any) -> str | None:
    """The type that a model's files have by its configuration, such as "bfloat16"; None where it does not tell."""
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return None if found is None else str(found).removeprefix("torch.")


def build_model(config: str, *, dtype: torch.dtype, attn_implementation: str | None = None) -> Any:
    """The same architecture with random weights, from its configuration as JSON."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with silent(), torch.random.fork_rng(devices=[]):
        found = AutoConfig.for_model(**json.loads(config, object_hook=_with_infinity))
        plain_attention(found, attn_implementation)
        return AutoModelForCausalLM.from_config(found, dtype=dtype, trust_remote_code=False, **settings).eval()


def _with_infinity(value: dict[str, Any]) -> Any:
    """What a part of a configuration in JSON stands for, as ``transformers`` writes numbers that JSON has not."""
    return float(value["__float__"]) if set(value) == {"__float__"} else value


def plain_attention(config: Any, wanted: str | None) -> None:
    """Keep `transformers` from fetching code: an attention ``org/name`` is a program of the hub.

    Args:
        config: of the model; what it names by itself comes from a file and is left out.
        wanted: the option, which a file may have set too.

    Raises:
        UsageError: a file has set it.
    """
    if wanted and "/" in wanted and words().in_file and not allows(wanted):
        raise UsageError(
            f"`attn_implementation` is '{wanted}' in a file, which would fetch and run code of the hub; expected a "
            "name such as sdpa. If you trust it, pass --model.attn_implementation yourself."
        )
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "model_type"))):
        for name in ("_attn_implementation", "_experts_implementation"):
            if "/" in str(getattr(part, name, None)):
                setattr(part, name, None)


def describe_model(model: Any) -> str:
    """The configuration of a model as JSON, for :func:`build_model`."""
    return base_of(model).config.to_json_string(use_diff=False)


def add_adapter(model: Any, settings: Mapping[str, Any]) -> Any:
    """New LoRA adapters on a model, see :func:`offpolicy.language.adapters.new_adapter`."""
    with silent():
        return adapters.new_adapter(model, settings)


def same_adapter(model: Any, settings: Mapping[str, Any]) -> Any:
    """The adapters of a checkpoint, see :func:`offpolicy.language.adapters.same_adapter`."""
    with silent():
        return adapters.same_adapter(model, settings)


def open_adapter(model: Any, folder: str) -> Any:
    """A trained adapter on its base model, to be trained further.

    Raises:
        UsageError: peft is not installed, or the folder holds no adapter of this model, or one that cannot be kept.
    """
    adapters.import_peft()
    try:
        if Path(folder).is_dir() and not Path(folder, "adapter_config.json").is_file():
            raise ValueError("it has no adapter_config.json")  # before peft looks for it on the hub
        with silent(), found(folder, "adapter"):
            return adapters.trained_adapter(model, folder)
    except UsageError:
        raise
    except Exception as error:  # a damaged folder raises almost anything
        raise UsageError(_not_opened("adapter", folder, error)) from None


def base_of(model: Any) -> Any:
    """The model under the adapters, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def without_dropout(config: Any) -> Any:
    """Set every dropout rate of a configuration, and of its parts, to 0: policy and reference agree then.

    Losses of routers are not computed, as nothing adds them, and weights are not rescaled between training and
    evaluation.
    """
    for name, value in list(vars(config).items()):
        if type(value) in (int, float) and ("dropout" in name or name.endswith(("_pdrop", "_drop", "layerdrop"))):
            setattr(config, name, type(value)(0))
        elif name == "output_router_logits":
            config.output_router_logits = False
        elif name == "rescale_every":  # RWKV halves its weights in evaluation
            config.rescale_every = 0
        elif hasattr(value, "to_dict") and value is not config:
            without_dropout(value)
    return config


def weights_digest(model: nn.Module, *, with_adapters: bool = True) -> str:
    """A hash of names, types and bytes of all weights and buffers; equal for equal models on any machine.

    Args:
        with_adapters: also hash the adapters; else only the model below them.
    """
    digest = hashlib.blake2b(digest_size=16)
    state = {n.removeprefix("base_model.model.").replace(".base_layer.", "."): v for n, v in model.state_dict().items()}
    for name, value in sorted(state.items()):
        if "lora_" in name and not with_adapters:
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def dtype_of(name: str) -> Any:
    found = name if name == "auto" else getattr(torch, name, None)
    if not (name == "auto" or isinstance(found, torch.dtype)):
        raise UsageError(f"`dtype` is '{name}'; expected one of torch's, such as float32 or bfloat16.")
    return found


def pad_id(model: Any, tokenizer: Any) -> int:
    """A token id to fill rows with; any id will do, as padding is never looked at."""
    found = getattr(tokenizer, "pad_token_id", None)
    return int(found) if found is not None and found < vocabulary_of(model) else 0


def vocabulary_of(model: Any) -> int:
    """Tokens that a model knows, with the adapters on its embeddings or without."""
    layer = base_of(model).get_input_embeddings()
    while not hasattr(layer, "num_embeddings"):
        layer = getattr(layer, "token_adapter", layer)
        layer = layer.base_layer
    return int(layer.num_embeddings)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    with silent():
        tokenizer.save_pretrained(folder)


def open_tokenizer(name: str) -> Any:
    """The tokenizer of a policy; only its name where it is a folder, which nobody has to read if there are no texts."""
    from offpolicy.data.texts.tokens import load_tokenizer

    if Path(name).is_dir():
        return name
    with found(name):
        return load_tokenizer(name)


@contextlib.contextmanager
def found(name: str, option: str = "policy") -> Iterator[None]:
    """Look for a name of the hub in the local cache alone when the hub does not answer, which is known within seconds.

    Args:
        option: what the name was given as, for messages.

    Raises:
        UsageError: no folder, not in the cache, and no answer.
    """
    from offpolicy.data.texts.hub import hub_answers, hub_mode

    if Path(name).is_dir():
        yield
        return
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    reachable = hub_answers()
    files = ("config.json", "adapter_config.json")
    try:
        cached = any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
    except HFValidationError:
        raise UsageError(
            f"`{option}` is '{name}', which is no folder, and no id of the hub either (org/name). Check the path."
        ) from None
    if not (reachable or cached):
        raise UsageError(
            f"`{option}` is '{name}', and '{name}' is no folder here, so it was taken for a model of the Hugging Face "
            f"hub, which does not answer; it is not in {constants.HF_HUB_CACHE} either. Check the path, or the network."
        )
    with hub_mode(offline=not reachable):
        yield


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without the bars and remarks of ``transformers`` and ``peft`` while a model is opened."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _not_opened(option: str, name: str, error: Exception) -> str:
    expected = "an adapter of this model" if option == "adapter" else "a causal language model"
    if "trust_remote_code" in str(error):
        return (
            f"`{option}` is '{name}', which needs code of its own (auto_map in its config.json) that would have to be "
            "run; expected an architecture that transformers has. Use a version of the model that was converted to it."
        )
    place = adapters.first(error).rstrip(".")
    return f"`{option}` is '{name}', which does not open as {expected}: {place}. Pass a folder or a hub id org/name."
