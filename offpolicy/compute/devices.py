"""What a device wants beside tensors: to be waited for when time is measured, and copies that it need not wait for."""

from __future__ import annotations

import time

import torch
from torch import Tensor


def finish_work(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given, so that the clock counts work and not its orders."""
    if device.type in ("cuda", "xpu", "mps"):
        torch.accelerator.synchronize(device)


class Stopwatch:
    """Updates per second of work that is done.

    On the CPU the time of the updates counts. An accelerator works on while the host does other things, so there the
    clock runs from a block of updates until the device has been waited for.

    Attributes:
        updates, seconds: since the last :meth:`read`.
    """

    def __init__(self) -> None:
        self.updates, self.seconds = 0, 0.0
        self._began: float | None = None

    def start(self) -> None:
        if self._began is None:
            self._began = time.perf_counter()

    def stop(self, device: torch.device, wait: bool) -> None:
        """The host goes on to something else; with ``wait`` once the device has finished, which counts."""
        if wait:
            finish_work(device)
        if self._began is not None and (wait or device.type == "cpu"):
            self.seconds += time.perf_counter() - self._began
            self._began = None

    def read(self) -> float:
        """Updates per second since the last call; starts anew."""
        speed = self.updates / max(self.seconds, 1e-9)
        self.updates, self.seconds = 0, 0.0
        return speed


def send(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. To a GPU it goes from pinned memory, beside the work that the GPU is doing."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


__all__ = ["Stopwatch", "finish_work", "send"]
