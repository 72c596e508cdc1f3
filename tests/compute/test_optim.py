"""FusedAdam against torch's own Adam and AdamW."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from offpolicy.compute.optim import FusedAdam, gradients, polyak_
from offpolicy.errors import UsageError

SHAPES = [(4, 5), (2, 1, 5), (1,)]


def start(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, dtype=dtype, generator=generator).requires_grad_() for s in SHAPES]


def random_gradients(steps: int, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(s, dtype=dtype, generator=generator) for s in SHAPES] for _ in range(steps)]


def run(
    optimiser: FusedAdam, params: list[torch.Tensor], grads: list[list[torch.Tensor]], lr: float | torch.Tensor = 1e-2
) -> None:
    for g in grads:
        optimiser.apply(params, g, lr)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("weight_decay", "decoupled"), [(0.0, False), (0.1, False), (0.1, True)])
def test_equals_torch_over_100_steps(weight_decay, decoupled, fused, monkeypatch) -> None:
    if not fused:
        monkeypatch.setattr("offpolicy.compute.optim.FUSED_DEVICES", ())
    ours, theirs = start(torch.float64), start(torch.float64)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    reference = kind(theirs, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay, foreach=False)
    optimiser = FusedAdam(ours, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay, decoupled=decoupled)
    for grads in random_gradients(100, torch.float64):
        optimiser.apply(ours, grads, 1e-2)
        for p, g in zip(theirs, grads):
            p.grad = g.clone()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_first_step_by_hand() -> None:
    """g = 2, so m̂ = 2 and √v̂ = 2: the step is lr · 2 / (2 + eps) = lr whatever the size of the gradient."""
    p = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    FusedAdam([p]).apply([p], [torch.tensor([2.0], dtype=torch.float64)], 0.25)
    torch.testing.assert_close(p.detach(), torch.tensor([0.75], dtype=torch.float64), rtol=0, atol=1e-8)


def test_rate_of_the_call_wins_over_the_group() -> None:
    params = start(torch.float64)
    before = [p.detach().clone() for p in params]
    FusedAdam(params, lr=1.0).apply(params, random_gradients(1, torch.float64)[0], 0.0)
    torch.testing.assert_close([p.detach() for p in params], before)


def test_step_uses_grad_fields() -> None:
    a, b = start(torch.float64), start(torch.float64)
    fields, arguments = FusedAdam(a, lr=1e-2), FusedAdam(b, lr=1e-2)
    for grads in random_gradients(3, torch.float64):
        for p, g in zip(a, grads):
            p.grad = g
        fields.step()
        arguments.apply(b, grads)
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_gradient_with_other_strides() -> None:
    a, b = torch.ones(4, 5, requires_grad=True), torch.ones(4, 5, requires_grad=True)
    g = torch.arange(20.0).reshape(5, 4)
    FusedAdam([a]).apply([a], [g.t()], 1e-1)
    FusedAdam([b]).apply([b], [g.t().contiguous()], 1e-1)
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resume_is_bit_exact_through_a_safe_file(dtype) -> None:
    grads = random_gradients(20, dtype)
    whole = start(dtype)
    run(FusedAdam(whole), whole, grads)

    half = start(dtype)
    optimiser = FusedAdam(half)
    run(optimiser, half, grads[:10])
    file = io.BytesIO()
    torch.save({"params": half, "optimiser": optimiser.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    rest = [p.detach().clone().requires_grad_() for p in loaded["params"]]
    resumed = FusedAdam(rest, lr=0.5)  # the stored rate replaces this one
    run(resumed, rest, grads[:1])  # state that must be forgotten
    with torch.no_grad():
        for p, q in zip(rest, loaded["params"]):
            p.copy_(q)
    resumed.load_state_dict(loaded["optimiser"])
    run(resumed, rest, grads[10:])
    assert all(torch.equal(p, q) for p, q in zip(whole, rest))
    assert resumed.param_groups[0]["lr"] == 3e-4


def test_state_has_the_layout_of_torch_and_moves_both_ways() -> None:
    grads = random_gradients(6, torch.float64)
    ours, theirs = start(torch.float64), start(torch.float64)
    optimiser, reference = FusedAdam(ours, lr=1e-2), torch.optim.Adam(theirs, lr=1e-2)
    run(optimiser, ours, grads[:3])
    for g in grads[:3]:
        for p, q in zip(theirs, g):
            p.grad = q.clone()
        reference.step()
    state, expected = optimiser.state_dict(), reference.state_dict()
    assert state["state"].keys() == expected["state"].keys()
    assert state["state"][0].keys() == expected["state"][0].keys()
    torch.testing.assert_close(state["state"], expected["state"], rtol=1e-12, atol=1e-12)
    optimiser.load_state_dict(copy.deepcopy(expected))  # torch loads by reference
    run(optimiser, ours, grads[3:])
    for g in grads[3:]:
        for p, q in zip(theirs, g):
            p.grad = q.clone()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_two_networks_in_one_optimiser() -> None:
    a, b = start(torch.float64), start(torch.float64)
    optimiser = FusedAdam([{"params": a}, {"params": b, "weight_decay": 0.1}])
    grads = random_gradients(1, torch.float64)[0]
    optimiser.apply(a, grads, 1e-2)
    optimiser.apply(b, grads, 1e-2)
    assert optimiser.state[a[0]]["step"] == optimiser.state[b[0]]["step"] == 1
    assert not torch.equal(a[0], b[0])


def test_impossible_settings_are_named() -> None:
    with pytest.raises(UsageError, match=r"betas\[1\]"):
        FusedAdam(start(torch.float32), betas=(0.9, 1.0))


def test_polyak() -> None:
    """0.9 · 1 + 0.1 · 3 = 1.2."""
    target, source = [torch.ones(2), torch.ones(1, 3)], [torch.full((2,), 3.0), torch.full((1, 3), 3.0)]
    polyak_(target, source, 0.1)
    torch.testing.assert_close(target, [torch.full((2,), 1.2), torch.full((1, 3), 1.2)])
    polyak_(target, source, 1.0)
    assert all(torch.equal(t, s) for t, s in zip(target, source))


def test_gradients_are_those_of_torch_and_the_graph_may_be_kept() -> None:
    params = start(torch.float64)
    loss = torch.stack([(p.square() * p.exp()).sum() for p in params]).sum()
    expected = torch.autograd.grad(loss, params, retain_graph=True)
    for keep_graph in (True, False):
        found = gradients(loss, params, keep_graph=keep_graph)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(p.grad is None for p in params)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(loss, params)


def test_a_parameter_that_the_loss_does_not_depend_on_is_told() -> None:
    used, unused = start(torch.float64)[:2]
    with pytest.raises(RuntimeError, match="not have been used"):
        gradients(used.sum(), [used, unused])


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rate_in_a_tensor_is_the_rate(dtype: torch.dtype, decoupled: bool) -> None:
    """Float64 gives the bits of the number; float32, as CUDA's kernel takes it, another step by a part of 2⁻²⁴."""
    rate, grads, found = 1.2345e-3, random_gradients(3, dtype), {}
    for kind in (None, torch.float64, torch.float32):
        found[kind] = start(dtype)
        lr = rate if kind is None else torch.tensor(rate, dtype=kind)
        run(FusedAdam(found[kind], weight_decay=0.1, decoupled=decoupled), found[kind], grads, lr)
    for number, double, single in zip(found[None], found[torch.float64], found[torch.float32], strict=True):
        assert torch.equal(number, double)
        torch.testing.assert_close(number, single, rtol=2e-7, atol=3 * rate * 2**-23)
