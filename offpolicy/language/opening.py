"""How a policy is opened for training: from its folder with adapters, or as a checkpoint left it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from offpolicy.errors import UsageError
from offpolicy.language import policy as policies
from offpolicy.language.adapters import adapter_settings, lora_settings, same_settings
from offpolicy.language.quantizing import is_quantized


def open_policy(h: Any, seed: int, dtype: str) -> Any:
    """The policy that the arguments of a method name, with its adapters, which are drawn from the seed.

    Raises:
        UsageError: the model, or its adapter, cannot be opened.
    """
    model = policies.open_model(h.policy, dtype=dtype, attn_implementation=h.attn_implementation, quantize=h.quantize)
    if h.adapter:
        return policies.open_adapter(model, h.adapter)
    if not h.lora_rank:
        return model
    settings = lora_settings(h.lora_rank, h.lora_alpha, h.lora_dropout, h.lora_targets)
    return _adapted(model, settings, policies.add_adapter, seed)


def policy_state(model: Any, policy: str) -> dict[str, Any]:
    """What :func:`reopen_policy` needs beside the weights, as plain values for a checkpoint.

    Args:
        model: the policy in training.
        policy: folder or id that it was opened from.
    """
    base = policies.base_of(model)
    return {
        "policy_config": policies.describe_model(model),
        "policy_folder": os.path.abspath(policy) if os.path.isdir(policy) else None,
        "dtype": str(next(base.parameters()).dtype).removeprefix("torch."),
        "source_dtype": getattr(base, "source_dtype", None),
        "adapter": adapter_settings(model),
        "quantize": "4bit" if is_quantized(base) else None,
        "eos": getattr(getattr(base, "generation_config", None), "eos_token_id", None),
    }


def reopen_policy(state: Mapping[str, Any], h: Any, seed: int) -> Any:
    """The policy of a checkpoint, before its weights are loaded. Below adapters it has the weights of its folder.

    Args:
        state: as of :func:`policy_state`.
        h: the arguments of the method.
        seed: of the run.
    """
    if state["adapter"] is None:
        dtype = policies.dtype_of(state["dtype"])
        model = policies.build_model(state["policy_config"], dtype=dtype, attn_implementation=h.attn_implementation)
        model.source_dtype = state.get("source_dtype")
    else:
        folder = state.get("policy_folder")  # where the run was started from another one than now
        name = folder if folder and os.path.isdir(folder) else h.policy
        how = {"dtype": state["dtype"], "quantize": state.get("quantize")}
        model = policies.open_model(name, attn_implementation=h.attn_implementation, **how)
        model = _adapted(model, state["adapter"], policies.same_adapter, seed)
    settings = getattr(policies.base_of(model), "generation_config", None)
    if settings is not None and state.get("eos") is not None:  # the policy's folder may name more than its config
        settings.eos_token_id = state["eos"]
    return model


def _adapted(model: Any, settings: Mapping[str, Any], add: Callable[..., Any], seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return add(model, settings)


def check_same_start(model: Any, digest: str, state: Mapping[str, Any], policy: str) -> None:
    """The policy in a method must be the one that a checkpoint was started from.

    Args:
        model: the policy.
        digest: hash of the weights it started from; "" where it has not started.
        state: of the checkpoint.
        policy: folder or id of the policy.

    Raises:
        UsageError: its adapters or its weights are others.
    """
    if not same_settings(adapter_settings(model), state["adapter"]):
        raise UsageError("the checkpoint has other adapters than the method now. Pass the settings of its run.")
    if digest and state["start_digest"] and digest != state["start_digest"]:
        raise UsageError(
            f"`policy` is {policy}, whose weights the run did not start from; expected the model that it started "
            "from, which is its reference. Pass the model the run was started with."
        )
