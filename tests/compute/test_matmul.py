"""The choice of library is a fixed one, float32-exact, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from offpolicy.compute import matmul
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


def test_bfloat16_is_only_for_processors_that_have_it_and_says_its_error(monkeypatch) -> None:
    fresh(monkeypatch, XEON, error=4e-3)
    assert matmul.choose_matmul("bf16") == "bf16" and matmul.choose_matmul() == "mkl"
    assert matmul.library_in_words("bf16") == "bf16 (products with relative error 0.004)"
    fresh(monkeypatch, ZEN5)
    with pytest.raises(UsageError, match="this one has none"):
        matmul.choose_matmul("bf16")
    assert matmul.library_in_words("onednn") == "onednn"


def test_misspelt_setting() -> None:
    with pytest.raises(UsageError, match="Did you mean 'onednn'"):
        matmul.choose_matmul("onednm")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("choice", ["mkl", "onednn", "bf16"])
def test_setting_is_restored_even_after_an_error(choice) -> None:
    before = setting()
    with pytest.raises(RuntimeError), matmul.matmul_setting(choice):
        assert setting() == ("ieee" if choice == "mkl" else "bf16")
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


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
def test_attention_is_that_of_the_default_library(mask: str) -> None:
    """Under oneDNN, values and gradients of attention equal those without it to the last bit, also where the gradient
    is taken later; and torch's function is back afterwards."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, 2, 5, 8, generator=generator, requires_grad=True) for _ in range(3))
    seen = torch.rand(3, 1, 5, 5, generator=generator) > 0.4
    seen |= torch.eye(5, dtype=torch.bool)
    given = {"bool": seen, "float": torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)}.get(mask)
    torchs_own = functional.scaled_dot_product_attention

    def run() -> list[torch.Tensor]:
        out = functional.scaled_dot_product_attention(query, key, value, given, is_causal=mask == "causal", scale=0.3)
        return [out, *torch.autograd.grad(out.square().sum(), (query, key, value))]

    with matmul.matmul_setting("onednn"):
        assert functional.scaled_dot_product_attention is matmul.attention
        found = run()
    assert functional.scaled_dot_product_attention is torchs_own
    with matmul.matmul_setting("mkl"):
        expected = run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_attention_of_other_kinds_goes_to_torch(monkeypatch) -> None:
    """float64, dropout, fewer heads for keys than for queries, 3 axes and autocast."""

    def never(*arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr(matmul._Attention, "apply", never)
    x, few = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
    with matmul.matmul_setting("onednn"):
        attend = functional.scaled_dot_product_attention
        assert attend(x.double(), x.double(), x.double()).dtype == torch.float64
        assert attend(x, few, few, enable_gqa=True).shape == x.shape
        assert attend(x, x, x, dropout_p=0.5).shape == x.shape
        with torch.autocast("cpu", torch.bfloat16):
            assert attend(x, x, x).shape == x.shape
        assert attend(x[0], x[0], x[0]).shape == x[0].shape
