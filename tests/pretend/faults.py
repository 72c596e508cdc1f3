"""What the pretend device must refuse and what it must count; prints "as a GPU" when it does."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import pretend

torch = pretend.install()

there, here = torch.ones(3, 3, device="cuda"), torch.ones(3, 3)
mask, counts = there > 0, torch.tensor([1, 2], device="cuda")
layer = torch.nn.Linear(3, 2).to("cuda")
REFUSED: dict[str, Callable[[], Any]] = {
    "a sum": lambda: there + here,
    "a sum in place": lambda: there.add_(here),
    "a product": lambda: there @ here,
    "a join": lambda: torch.cat([there, here]),
    "a choice": lambda: torch.where(there > 0, there, here),
    "an index of the device for the host": lambda: here[torch.arange(2, device="cuda")],
    "a row number at the host": lambda: there.index_select(0, torch.arange(2)),
    "a scalar at the host for a product": lambda: torch.index_select(there, 0, torch.tensor(1)),
    "numpy": lambda: there.numpy(),
    "a list of tensors": lambda: torch._foreach_add_([there], [here]),
}
WAITS: dict[str, tuple[bool, Callable[[], Any]]] = {
    "item": (True, lambda: there.sum().item()),
    "a condition": (True, lambda: bool(mask.all())),
    "a list": (True, lambda: there.tolist()),
    "a copy": (True, lambda: there.cpu()),
    "nonzero": (True, lambda: mask.nonzero()),
    "a mask as an index": (True, lambda: there[mask]),
    "values put at a mask": (True, lambda: there.index_put_((mask,), torch.ones(9, device="cuda"))),
    "a number put at a mask": (False, lambda: there.masked_fill_(mask, 2.0)),
    "repeats": (True, lambda: torch.repeat_interleave(counts)),
    "repeats of a known sum": (
        False,
        lambda: torch.repeat_interleave(counts, output_size=3),
    ),
    "checked lengths": (True, lambda: torch.segment_reduce(there[0], "sum", lengths=counts)),
    "lengths that are right": (False, lambda: torch.segment_reduce(there[0], "sum", lengths=counts, unsafe=True)),
    "arithmetic": (False, lambda: layer(there).square().sum().backward()),
    "a number at the host": (False, lambda: there * torch.tensor(2.0)),
    "numbers sent": (True, lambda: torch.tensor([1.0, 2.0], device="cuda")),
    "numbers sent from pinned memory": (False, lambda: there.copy_(here.pin_memory(), non_blocking=True)),
    "a number of Python": (False, lambda: there.fill_(2.0)),
    "rows chosen by numbers of the host": (True, lambda: there[torch.arange(2)]),
}


def main() -> None:
    for name, call in REFUSED.items():
        try:
            call()
        except (RuntimeError, TypeError):
            continue
        raise SystemExit(f"{name} on two devices was not refused")
    for name, (waits, call) in WAITS.items():
        with pretend.reads() as found:
            call()
        if bool(found) != waits:
            raise SystemExit(f"{name}: counted {dict(found)}, expected {'a read' if waits else 'none'}")
    with torch.device("cuda"):
        assert torch.arange(3).device.type == torch.tensor([1]).device.type == "cuda"
    with torch.autocast("cuda", torch.bfloat16):
        assert (there @ there).dtype == torch.bfloat16
    assert here.pin_memory().is_pinned() and not here.is_pinned()
    print("as a GPU", flush=True)
    os._exit(0)  # threads that torch started for a device that is none may abort the end of the interpreter


if __name__ == "__main__":
    main()
