"""Weights of four bits below adapters (QLoRA, arXiv:2305.14314): NF4 by ``bitsandbytes``, with scales of eight bits."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from offpolicy.errors import UsageError, check_choice
from offpolicy.language.optimisers import import_bitsandbytes

BLOCK = 64  # numbers with one scale
# a code of 4 bits, a byte of scale per block, and the scale of 256 scales in float32
QUANTIZED_BYTES = 1 / 2 + 1 / BLOCK + 4 / (BLOCK * 256)


KINDS = ("4bit",)


def check_quantize(kind: str | None, *, has_adapters: bool) -> None:
    """Raise :class:`UsageError` for weights of four bits that would be trained, or that nothing here can make."""
    if kind is None:
        return
    check_choice("quantize", kind, KINDS)
    if not has_adapters:
        raise UsageError(
            f"`quantize` is '{kind}', and weights of four bits cannot be trained; expected adapters above them. Pass "
            "--model.lora_rank 16 too, or leave `quantize` out."
        )
    import_bitsandbytes(f"`quantize` is '{kind}'", "bfloat16 weights (--model.dtype bfloat16)")


def quantization(kind: str | None, dtype: str) -> dict[str, Any]:
    """Arguments with which ``transformers`` reads weights so; none where they stay as they are.

    Args:
        kind: "4bit" or None.
        dtype: of products: weights are made numbers of this type for each.
    """
    if kind is None:
        return {}
    from transformers import BitsAndBytesConfig

    compute = torch.float32 if dtype == "float32" else torch.bfloat16
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **settings)}


def check_read(model: nn.Module) -> None:
    """Let weights of four bits stay what was read, and see that their numbers come back.

    On CPUs with products in bfloat16 ``bitsandbytes`` packs them anew in place before the first product without a
    gradient, with scales rounded to bfloat16, so training would change at its first evaluation; this is turned off. Its
    CPU code for AVX-512 (0.50.2) takes scales from the wrong blocks in layers of some widths.

    Raises:
        UsageError: a layer whose numbers do not come back on this processor.
    """
    for name, layer in model.named_modules():
        if getattr(getattr(layer, "weight", None), "quant_state", None) is None:
            continue
        layer.support_avx512bf16_for_cpu = False
        width = int(layer.in_features)  # type: ignore[arg-type]
        if width % BLOCK and not comes_back(width):
            raise UsageError(
                f"{name} has {width} inputs, no multiple of {BLOCK}, and this version of bitsandbytes does not give "
                "back the weights of four bits of such a layer on this processor; expected another width. Leave "
                "`quantize` out; bfloat16 weights (--model.dtype bfloat16) save memory too."
            )


@cache
def comes_back(width: int) -> bool:
    """Whether weights of four bits of a layer of so many inputs are read as they were written on this CPU."""
    from bitsandbytes import functional

    written = torch.arange(BLOCK * width, device="cpu") // BLOCK + 1.0  # a block is its scale: no rounding
    written = written.reshape(BLOCK, width)
    return torch.equal(functional.dequantize_4bit(*functional.quantize_4bit(written, quant_type="nf4")), written)


def is_quantized(model: nn.Module) -> bool:
    """Whether some weights of a model are kept in four bits."""
    return any(getattr(p, "quant_state", None) is not None for p in model.parameters())


def numbers(p: torch.Tensor) -> int:
    """How many numbers a weight has, of which one of four bits holds two to a byte."""
    state = getattr(p, "quant_state", None)
    return p.numel() if state is None else int(state.shape.numel())


def quantizable(model: Any) -> list[nn.Linear]:
    """The linear layers of a model but its output layer, and but those of adapters."""
    head = model.get_output_embeddings()
    return [
        m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head and "lora_" not in name
    ]
