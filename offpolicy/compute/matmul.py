"""Which library multiplies float32 matrices on the CPU.

torch's CPU builds carry two: MKL, the default, and oneDNN. On some processors oneDNN is up to twice as fast at the same
precision. The switch torch offers for it (`torch.backends.mkldnn.matmul.fp32_precision`) *permits* bfloat16, which
oneDNN uses where the processor has AMX tiles; without them it computes in plain float32. So the choice follows the
processor kind, which is the same on every start, and a product is checked against float64 before it is trusted.

Where they have tiles, "bf16" takes that permission openly: products of float32 matrices rounded to bfloat16, sums in
float32. It is never chosen by itself.

oneDNN's float32 is chosen on the kind of processor where it was measured to help and on no other: AMD with AVX-512 and
without AMX (Zen 5: 1.5 to 2 times MKL). On AMD with AVX2 alone (Zen 3) the two are level, and on Intel MKL is faster.

The switch concerns oneDNN alone: products on a GPU keep their precision, and TF32 is never allowed by this module.

Attention is left to MKL: its kernel multiplies small blocks one by one, for each of which oneDNN takes its time to set
up (measured with 4 heads of width 32: 16 times slower for 256 rows of 16 tokens, 6 for 72, 1.4 for 512).
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from offpolicy.compute.torch_private import cpu_attention, cpu_attention_backward
from offpolicy.errors import UsageError, nearest

CHOICES = ("auto", "mkl", "onednn", "bf16")
# relative to the largest entry of a 256³ product; float32 stays near 5e-7, bfloat16 near 4e-3
FLOAT32_ERROR = 1e-5


def choose_matmul(setting: str = "auto") -> str:
    """The library for float32 products on this machine's CPU.

    Args:
        setting: ``"auto"``, or a library by name, which is taken as it is unless torch lacks it.

    Returns:
        ``"mkl"`` (torch's default, whatever it was built with), ``"onednn"`` or ``"bf16"``. For one processor and one
        torch the answer never changes: it does not depend on timings.

    Raises:
        UsageError: the setting is unknown; oneDNN was asked for and is not float32-exact here; or bfloat16 was, and
            this processor has no tiles that multiply it.
    """
    if setting not in CHOICES:
        raise UsageError(f"Unknown matmul setting '{setting}'; expected one of {CHOICES}.{nearest(setting, CHOICES)}")
    if setting == "auto":
        return "onednn" if onednn_is_faster() and onednn_error() < FLOAT32_ERROR else "mkl"
    if setting == "onednn" and not onednn_error() < FLOAT32_ERROR:
        raise UsageError(
            f"matmul 'onednn' gives products with relative error {onednn_error():.1g} on this machine; expected float32"
            f" precision (below {FLOAT32_ERROR:g}). Use matmul 'mkl', or bfloat16 openly by precision 'bf16-mixed'."
        )
    if setting == "bf16" and not has_bf16():
        raise UsageError(
            "matmul 'bf16' needs a processor that multiplies bfloat16 in tiles (AMX), and this one has none; expected "
            f"one of {CHOICES[:-1]}. Leave it out."
        )
    return setting


def has_bf16() -> bool:
    """Whether oneDNN multiplies in bfloat16 where it is permitted to, by the error of a product."""
    return _switchable() and onednn_error() >= FLOAT32_ERROR


def library_in_words(choice: str) -> str:
    """A library for the first screen; with the error of a product where that is not float32's."""
    return f"bf16 (products with relative error {onednn_error():.1g})" if choice == "bf16" else choice


@contextmanager
def matmul_setting(choice: str) -> Iterator[None]:
    """Use a library inside the block and put the former setting back, whatever happens.

    Args:
        choice: what `choose_matmul` returned, or a stored choice of an earlier run.
    """
    former = apply_matmul(choice)
    try:
        yield
    finally:
        restore_matmul(former)


def apply_matmul(choice: str) -> str | None:
    """Switch to a library from now on.

    Returns:
        What `restore_matmul` needs; None when there was nothing to switch.
    """
    if choice not in CHOICES[1:]:
        raise UsageError(f"Unknown matmul library '{choice}'; expected one of {CHOICES[1:]}.")
    if not _switchable():
        return None
    former = str(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]
    _switch("ieee" if choice == "mkl" else "bf16")
    return former


def restore_matmul(former: str | None) -> None:
    """Undo `apply_matmul`, given what it returned."""
    if former is not None:
        _switch(former)


def _switch(precision: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = precision  # type: ignore[attr-defined]
    functional.scaled_dot_product_attention = attention if precision == "bf16" else _attention


_attention = functional.scaled_dot_product_attention


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What stands for torch's `scaled_dot_product_attention` while oneDNN is on: the same, with MKL's products.

    Only where torch would take its fused float32 kernel for CPUs; everything else goes on to torch's own.
    """
    same = query.ndim == 4 and query.shape[:2] == key.shape[:2] and query.shape[3] == key.shape[3] == value.shape[3]
    plain = all(x.device.type == "cpu" and x.dtype == torch.float32 and not x.is_nested for x in (query, key, value))
    masked = attn_mask is not None and (is_causal or attn_mask.requires_grad or attn_mask.ndim not in (2, 4))
    busy = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    if busy or masked or dropout_p or not (same and plain and query.numel() and key.numel()):
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    return _Attention.apply(query, key, value, attn_mask, is_causal, scale)


class _Attention(torch.autograd.Function):
    """torch's fused kernel, both ways under MKL."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> Tensor:
        with matmul_setting("mkl"):
            out, logsumexp = cpu_attention(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        ctx.save_for_backward(query, key, value, out, logsumexp, mask)
        ctx.options = causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, logsumexp, mask = ctx.saved_tensors
        causal, scale = ctx.options
        with matmul_setting("mkl"):
            found = cpu_attention_backward(
                grads[0], query, key, value, out, logsumexp, 0.0, causal, attn_mask=mask, scale=scale
            )
        return (*found, None, None, None)


@cache
def onednn_error() -> float:
    """Largest error of a 256³ float32 product through oneDNN against float64, relative to the largest entry."""
    if not _switchable():
        return float("inf")
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator, dtype=torch.float64, device="cpu") for _ in range(2))
    with matmul_setting("onednn"):
        product = a.float() @ b.float()
    exact = a.float().double() @ b.float().double()
    return float((product - exact).abs().max() / exact.abs().max())


@cache
def onednn_is_faster() -> bool:
    """Whether this kind of processor is one where oneDNN's float32 kernel beats MKL's: AMD with AVX-512, no AMX."""
    vendor, flags = _processor()
    return vendor == "AuthenticAMD" and "avx512f" in flags and not any(flag.startswith("amx") for flag in flags)


def _switchable() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.backends.mkldnn, "matmul")


def _processor() -> tuple[str, frozenset[str]]:
    """Vendor and feature flags of the first processor; empty where the system does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return ("AuthenticAMD" if "AuthenticAMD" in platform.processor() else "", frozenset())
    vendor, flags = "", frozenset[str]()
    for line in cpuinfo.read_text(errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "vendor_id":
            vendor = value.strip()
        elif key.strip() == "flags":
            flags = frozenset(value.split())
            break
    return vendor, flags
