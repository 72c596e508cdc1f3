"""Weights of four bits below adapters (QLoRA, arXiv:2305.14314): NF4 by ``bitsandbytes``, with scales of eight bits."""

from __future__ import annotations

from typing import Any

from torch import nn

# a code of 4 bits, a byte of scale per 64 numbers, and the scale of 256 scales in float32
QUANTIZED_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)


def quantizable(model: Any) -> list[nn.Linear]:
    """The linear layers of a model but its output layer, and but those of adapters."""
    head = model.get_output_embeddings()
    return [
        m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head and "lora_" not in name
    ]
