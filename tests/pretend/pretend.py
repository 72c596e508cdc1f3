"""A CUDA device for machines without one: tensors of the processor that torch takes for tensors of ``cuda:0``.

It shows two kinds of faults: operands on two devices, which raise as they do on a GPU, and values that the host reads,
which :data:`READS` counts with the line that asked for them. It shows nothing about kernels, speed or memory. Import it
before torch, in a process of its own: the device cannot be taken back.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("device.cpp")
ROOT = Path(__file__).parents[2]
OURS = tuple(str(ROOT / name) + os.sep for name in ("offpolicy", "lightning_modules"))
READS: Counter[str] = Counter()


def compiler() -> str | None:
    """A C++ compiler of this machine."""
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))), None
    )


def torch_folder() -> Path:
    """Where torch lies; it is not imported."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def reason_to_skip() -> str:
    """Why there can be no pretend device here; empty when there can be."""
    if sys.platform != "linux":
        return f"the pretend CUDA device is made for Linux, and this is {sys.platform}"
    if compiler() is None:
        return "the pretend CUDA device needs a C++ compiler (g++ or clang++, or $CXX), and none was found"
    if (torch_folder() / "lib" / "libtorch_cuda.so").exists():
        return "the pretend CUDA device needs a build of torch without CUDA; here the tests of real devices count"
    return ""


def build() -> Path:
    """The library of the device, compiled once for this source and this torch."""
    torch = torch_folder()
    digest = hashlib.sha256(SOURCE.read_bytes() + (torch / "version.py").read_bytes() + str(torch).encode()).hexdigest()
    library = Path(tempfile.gettempdir()) / f"offpolicy-pretend-{os.getuid()}" / f"{digest[:16]}.so"
    if library.exists():
        return library
    library.parent.mkdir(mode=0o700, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    include, lib = torch / "include", str(torch / "lib")
    command = [compiler() or "", "-O0", "-std=c++20", "-fPIC", "-shared", "-w", f"-I{include}"]
    command += [f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}", str(SOURCE), "-o", str(unfinished)]
    command += [f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the pretend device does not compile with this torch:\n{done.stderr[-4000:]}")
    unfinished.rename(library)
    return library


def install() -> Any:
    """Give this process the device, before torch is imported. Returns torch."""
    assert "torch" not in sys.modules, "the device must be there before torch"
    library = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
    import torch
    import torch.cuda.amp.common

    install.callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(_note)  # type: ignore[attr-defined]  # must stay alive
    library.pretend_on_read(install.callback)  # type: ignore[attr-defined]
    facts: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_device_name": "pretend",
        "get_device_capability": (8, 0),
        "is_bf16_supported": True,
        "max_memory_allocated": 0,
    }
    for name, value in facts.items():
        setattr(torch.cuda, name, lambda *_, _value=value, **__: _value)
    for name in (
        "_lazy_init",
        "set_device",
        "empty_cache",
        "reset_peak_memory_stats",
        "manual_seed",
        "manual_seed_all",
    ):
        setattr(torch.cuda, name, lambda *_, **__: None)
    for name in ("to", "clone"):  # torch makes storages of known kinds of devices only
        setattr(torch.UntypedStorage, name, lambda self, device=None, **_: _moved(self, device))
    torch._C._cuda_getCurrentRawStream = lambda *_: 0  # bitsandbytes asks for it when it is imported
    torch.cuda.synchronize = lambda *_: _note(b"synchronize")
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    return torch


def _moved(storage: Any, device: Any) -> Any:
    """A copy of a storage, on another device where one is given."""
    import torch

    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return whole.to(storage.device if device is None else device, copy=True).untyped_storage()


def _note(what: bytes) -> None:
    READS[f"{what.decode()} at {where()}"] += 1


def where() -> str:
    """The innermost lines of the package that lead here."""
    frame: Any = sys._getframe(1)
    found = []
    while frame is not None and len(found) < 2:
        name = frame.f_code.co_filename
        if name.startswith(OURS):
            found.append(f"{os.path.relpath(name, ROOT)}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found) or "another place"


@contextmanager
def reads() -> Iterator[Counter[str]]:
    """The reads of the host inside the context, by kind and place."""
    before, found = Counter(READS), Counter[str]()
    try:
        yield found
    finally:
        found.update(READS - before)


def counting(method: Callable[..., Any], found: Counter[str]) -> Callable[..., Any]:
    """A function that adds the reads of its calls to ``found``."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        with reads() as those:
            try:
                return method(*args, **kwargs)
            finally:
                pass
        return those

    return counted
