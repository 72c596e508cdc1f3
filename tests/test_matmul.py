"""The choice of library is a fixed one, float32-exact, and leaves no trace."""

from __future__ import annotations

import pytest
import torch

from offpolicy import matmul
from offpolicy.errors import UsageError

ZEN5 = ("AuthenticAMD", frozenset({"avx2", "avx512f"}))
XEON = ("GenuineIntel", frozenset({"avx512f", "amx_tile"}))


def setting() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


def fresh(monkeypatch, processor, error: float = 5e-7) -> None:
    monkeypatch.setattr(matmul, "_processor", lambda: processor)
    monkeypatch.setattr(matmul, "onednn_error", lambda: error)
    matmul.onednn_is_faster.cache_clear()


@pytest.fixture(autouse=True)
def _forget():
    yield
    matmul.onednn_is_faster.cache_clear()


def test_choice_follows_the_processor(monkeypatch) -> None:
    fresh(monkeypatch, ZEN5)
    assert matmul.choose_matmul() == "onednn"
    assert matmul.choose_matmul("mkl") == "mkl"
    fresh(monkeypatch, XEON)
    assert matmul.choose_matmul() == "mkl"


def test_a_library_that_is_not_float32_is_refused(monkeypatch) -> None:
    fresh(monkeypatch, ZEN5, error=4e-3)
    assert matmul.choose_matmul() == "mkl"
    with pytest.raises(UsageError, match="bf16-mixed"):
        matmul.choose_matmul("onednn")


def test_misspelt_setting() -> None:
    with pytest.raises(UsageError, match="Did you mean 'onednn'"):
        matmul.choose_matmul("onednm")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("choice", ["mkl", "onednn"])
def test_setting_is_restored_even_after_an_error(choice) -> None:
    before = setting()
    with pytest.raises(RuntimeError), matmul.matmul_setting(choice):
        assert setting() == ("bf16" if choice == "onednn" else "ieee")
        raise RuntimeError
    assert setting() == before
    former = matmul.apply_matmul(choice)
    matmul.restore_matmul(former)
    assert setting() == before


def test_tf32_is_not_allowed() -> None:
    allowed = torch._C._get_fp32_precision_getter("cuda", "matmul")
    with matmul.matmul_setting("onednn"):
        assert torch._C._get_fp32_precision_getter("cuda", "matmul") == allowed


def test_probe_sees_the_precision_of_the_product() -> None:
    error = matmul.onednn_error()
    assert error == float("inf") or 0.0 < error < 1e-2
