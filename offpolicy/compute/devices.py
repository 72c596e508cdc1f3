"""What a device wants beside tensors: to be waited for when time is measured, and copies that it need not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def finish_work(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given, so that the clock counts work and not its orders."""
    if device.type in ("cuda", "xpu", "mps"):
        torch.accelerator.synchronize(device)


def send(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. To a GPU it goes from pinned memory, beside the work that the GPU is doing."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


__all__ = ["finish_work", "send"]
