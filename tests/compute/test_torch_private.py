"""What torch does not document and the library uses: each part is there and does what it is used for."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from offpolicy.compute import torch_private as private


def test_lists_of_tensors() -> None:
    """On [1, 2] and [3]: + [1, 1] and + [1], lerp of a half, · 2, and Euclidean norms."""
    some = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    private.foreach_add_(some, [torch.ones(2), torch.ones(1)])
    assert [t.tolist() for t in some] == [[2.0, 3.0], [4.0]]
    private.foreach_lerp_(some, [torch.zeros(2), torch.zeros(1)], 0.5)
    assert [t.tolist() for t in some] == [[1.0, 1.5], [2.0]]
    assert [t.tolist() for t in private.foreach_mul(some, torch.tensor(2.0))] == [[2.0, 3.0], [4.0]]
    assert [float(t) for t in private.foreach_norm([torch.tensor([3.0, 4.0])])] == [5.0]


@pytest.mark.parametrize("kernel", [private.fused_adam_, private.fused_adamw_])
def test_the_fused_kernels_step_against_the_gradient(kernel: object) -> None:
    param, moments = torch.ones(2), [torch.zeros(2) for _ in range(2)]
    kernel(  # type: ignore[operator]
        [param], [torch.tensor([1.0, -1.0])], [moments[0]], [moments[1]], [], [torch.tensor(1.0)], lr=0.1, beta1=0.9,
        beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip
    assert param.tolist() == pytest.approx([0.9, 1.1])


def test_the_engine_of_gradients() -> None:
    x = torch.tensor([3.0], requires_grad=True)
    (grad,) = private.run_backward((x**2).sum(), [x], keep_graph=False)
    assert grad.tolist() == [6.0] and x.grad is None


def test_parts_of_layers() -> None:
    layer = nn.Linear(2, 1, bias=False)
    assert private.parameters_here(layer) == {"weight": layer.weight, "bias": None}
    assert private.is_dropout(nn.Dropout(0.1)) and private.is_dropout(nn.Dropout2d(0.1))
    assert not private.is_dropout(layer)
    state = layer.state_dict()
    assert private.state_notes(state)[""] == {"version": 1} and private.state_notes({}) is None
    private.set_state_notes(copied := OrderedDict(state), {"": {"version": 2}})
    assert private.state_notes(copied) == {"": {"version": 2}}


def test_the_attention_of_processors() -> None:
    query, key, value, grad = torch.randn(4, 1, 2, 8, 16, generator=torch.Generator().manual_seed(0))
    found, logsumexp = private.cpu_attention(query, key, value, 0.0, True, attn_mask=None, scale=None)
    for x in (query, key, value):
        x.requires_grad_()
    expected = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(found, expected)
    grads = private.cpu_attention_backward(
        grad, query, key, value, found, logsumexp, 0.0, True, attn_mask=None, scale=None
    )
    for mine, theirs in zip(grads, torch.autograd.grad(expected, (query, key, value), grad)):
        torch.testing.assert_close(mine, theirs)
