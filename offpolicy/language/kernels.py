"""Fused kernels of others in place of a policy's layers, where they are installed and there is a GPU to run them."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from offpolicy.errors import UsageError
from offpolicy.language.policy import base_of

KERNELS = ("liger",)
# the losses are computed from the last states here, whatever a model's own forward pass would do with labels
LIGER = {"fused_linear_cross_entropy": False, "cross_entropy": False}


def use_kernels(model: Any, name: str | None, device: torch.device) -> None:
    """Put kernels into a model: norms, rotary positions and feed-forward layers of Liger, by `transformers`.

    Args:
        model: a causal language model of ``transformers``, or one wrapped by ``peft``.
        name: one of `KERNELS`, or None, which changes nothing.
        device: where the model is trained.

    Raises:
        UsageError: they are not installed, do not run on this device, or do not know the model.
    """
    if name is None:
        return
    if importlib.util.find_spec("liger_kernel") is None:
        raise UsageError(
            "`kernels` is 'liger', and the package liger-kernel is not installed. Install it by pip install "
            "liger-kernel, or leave the option out."
        )
    if device.type != "cuda":
        raise UsageError(
            f"`kernels` is 'liger', whose kernels run on CUDA devices, and this run is on {device.type}; expected a "
            "GPU. Leave the option out."
        )
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    base = base_of(model)
    if base.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UsageError(
            f"`kernels` is 'liger', which has none for models of type {base.config.model_type}; expected one of "
            f"{', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))}. Leave the option out."
        )
    apply_liger_kernel(base, dict(LIGER))
