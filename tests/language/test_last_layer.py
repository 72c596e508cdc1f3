"""What the last layer says of answers, against autograd and the full table of logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from offpolicy.language.last_layer import gradient_norms, policy_shift

LENGTH = [4, 0, 1, 3]
D, V = 5, 23
HOW: list[dict[str, Any]] = [{}, {"softcap": 3.0, "scale": 0.7, "temperature": 0.8}, {"scale": 0.3, "temperature": 2.0}]


def made(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """States, weight, bias and tokens of the answers."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((sum(LENGTH), D), (V, D), (V,))
    numbers = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return *numbers, torch.randint(V, (sum(LENGTH),), generator=generator)


def full_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, how: dict[str, Any]) -> Tensor:
    z = (hidden @ weight.T + (0 if bias is None else bias)) * how.get("scale", 1.0)
    cap = how.get("softcap")
    return (z if cap is None else cap * torch.tanh(z / cap)) / how.get("temperature", 1.0)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("chunk", [1, 7, 256])
@pytest.mark.parametrize("with_bias", [False, True])
def test_norms_of_gradients(how: dict[str, Any], chunk: int, with_bias: bool) -> None:
    hidden, weight, bias, target = made()
    given = bias if with_bias else None
    found = gradient_norms(hidden, weight, target, torch.tensor(LENGTH), bias=given, chunk=chunk, **how)
    weight.requires_grad_()
    logp = full_logits(hidden, weight, given, how).log_softmax(-1).gather(1, target[:, None])[:, 0]
    expected = [torch.autograd.grad(part.sum(), weight, retain_graph=True)[0].norm() for part in logp.split(LENGTH)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)
    assert found[1] == 0 and found.dtype == torch.float64


def test_norms_in_half_precision_are_float32() -> None:
    hidden, weight, _, target = made()
    exact = gradient_norms(hidden, weight, target, torch.tensor(LENGTH))
    found = gradient_norms(hidden.bfloat16(), weight.bfloat16(), target, torch.tensor(LENGTH))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0.03, atol=1e-6)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("chunk", [3, 256])
def test_a_move_to_second_order(how: dict[str, Any], chunk: int) -> None:
    """Along W + ε·ΔW: the slope of log p(y) is the shift, the second slope of KL(before ‖ after) the variance, and
    where no logit is capped that of ρ is shift² − variance and that of log p(y) −variance."""
    hidden, weight, bias, target = made()
    move = torch.randn(V, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shift, variance = policy_shift(hidden, weight, move, target, bias=bias, chunk=chunk, **how)
    before = full_logits(hidden, weight, bias, how).log_softmax(-1)
    far = torch.zeros(len(target), 1, dtype=torch.float64, requires_grad=True)  # ε of each place
    z = hidden @ weight.T + far * (hidden @ move.T)
    after = full_logits(z, torch.eye(V, dtype=torch.float64), bias, how).log_softmax(-1)
    logp = after.gather(1, target[:, None])[:, 0]
    ratio = (logp - before.gather(1, target[:, None])[:, 0]).exp()

    def slopes(values: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.autograd.grad(values.sum(), far, create_graph=True)[0]
        return first[:, 0].detach(), torch.autograd.grad(first.sum(), far, retain_graph=True)[0][:, 0]

    torch.testing.assert_close(shift, slopes(logp)[0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(variance, slopes((before.exp() * (before - after)).sum(-1))[1], rtol=1e-10, atol=1e-11)
    if "softcap" not in how:
        torch.testing.assert_close(-variance, slopes(logp)[1], rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(shift.square() - variance, slopes(ratio)[1], rtol=1e-10, atol=1e-11)
