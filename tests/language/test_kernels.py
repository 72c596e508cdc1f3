"""Kernels of Liger: put in by transformers' integration, refused in one sentence where they cannot run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
from test_layout import make

from offpolicy.errors import UsageError
from offpolicy.language.kernels import use_kernels


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A package that knows Llama and notes what it is asked; the kernels themselves need a GPU."""
    from transformers.integrations import liger as integration

    asked: list[Any] = []
    parts = {name: ModuleType(name) for name in ("liger_kernel", "liger_kernel.transformers")}
    patches = ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}  # type: ignore[attr-defined]
    apply = "_apply_liger_kernel_to_instance"
    setattr(parts["liger_kernel.transformers"], apply, lambda model, **how: asked.append((model, how)))
    for name, module in {**parts, patches.__name__: patches}.items():
        monkeypatch.setitem(sys.modules, name, module)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name == "liger_kernel" or find(name, *a))
    monkeypatch.setattr(integration, "is_liger_kernel_available", lambda: True)
    return asked


def test_kernels_are_put_in_without_losses_of_their_own(liger: list[Any]) -> None:
    model = make("Llama")
    use_kernels(model, "liger", torch.device("cuda"))
    assert liger == [(model, {"fused_linear_cross_entropy": False, "cross_entropy": False})]


def test_models_that_liger_does_not_know(liger: list[Any]) -> None:
    with pytest.raises(UsageError, match=r"none for models of type gpt2; expected one of llama"):
        use_kernels(make("GPT2"), "liger", torch.device("cuda"))


def test_without_a_gpu(liger: list[Any]) -> None:
    with pytest.raises(UsageError, match=r"run on CUDA devices, and this run is on cpu"):
        use_kernels(make("Llama"), "liger", torch.device("cpu"))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run says so before it trains; so does a name that nobody knows."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    tiny.make_policy(tmp_path / "policy")
    with pytest.raises(UsageError, match="liger-kernel is not installed"):
        tiny.fit(tiny.method("DPO", tmp_path / "policy", kernels="liger"), max_steps=1)
    with pytest.raises(UsageError, match="kernels"):
        tiny.method("DPO", tmp_path / "policy", kernels="triton")
