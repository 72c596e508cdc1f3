"""A language model as a folder of Hugging Face, which ``transformers`` and everything that reads such folders opens."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offpolicy.data.texts.stops import stop_ids
from offpolicy.errors import UsageError
from offpolicy.files import WriteError
from offpolicy.language.adapters import adapter_settings, merged
from offpolicy.language.policy import base_of, save_tokenizer, silent, vocabulary_of
from offpolicy.language.quantizing import is_quantized


def export_model(
    model: Any,
    tokenizer: Any,
    folder: str | os.PathLike[str],
    merge: bool = False,
    *,
    policy: str = "",
    keep: bool = True,
    replace: bool = False,
) -> Path:
    """Write a model with its tokenizer. The folder is whole or absent.

    Args:
        model: a causal language model, wrapped by ``peft`` where it has adapters.
        tokenizer: of the model; None writes none.
        folder: to be written; must be absent or empty.
        merge: add adapters to the weights of the base model. Otherwise a model with adapters is written as adapters
            alone, which name their base model; they take a few megabytes. Without adapters there is no difference.
        policy: folder or hub id of the model that was tuned, for its settings of generation.
        keep: the model goes on being used, so that a copy of it is merged.
        replace: remove what the folder holds, once its successor is complete.

    Returns:
        The folder.

    Raises:
        UsageError: the folder holds something.
        WriteError: it cannot be written.
    """
    out = Path(folder)
    check_free(out, replace)
    if merge and is_quantized(model):
        raise UsageError(
            "the policy's weights are kept in four bits, into which adapters are not merged; expected adapters alone. "
            "Leave merging out here, and merge the adapters into the whole model."
        )
    if merge and adapter_settings(model) is not None:
        model = merged(copy.deepcopy(model) if keep else model, vocabulary_of(model))
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
            model.save_pretrained(temporary)
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
