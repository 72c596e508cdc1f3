"""Log-probabilities in tiles against the full table of logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from offpolicy.language import logprobs
from offpolicy.language.logprobs import token_divergence, token_logps
from offpolicy.language.nucleus import nucleus_entropy

N, D, V = 13, 6, 29


@pytest.fixture(params=[4, 10**9])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tiles of a few logits, so that many are needed in both directions, and one tile for all."""
    monkeypatch.setattr(logprobs, "CPU_TILE", 7 * request.param)
    monkeypatch.setattr(logprobs, "TILE_TOKENS", request.param)
    return request.param


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((N, D), (V, D), (V,)))
    target = torch.randint(V, (N,), generator=generator)
    return (*(x.to(dtype).requires_grad_() for x in (hidden, 2 * weight, bias)), target)


def slow(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    temperature: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """All logits at once."""
    z = hidden @ weight.T + (0 if bias is None else bias)
    z = z * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    logp = z.log_softmax(-1)
    facts = {"logits": z.mean(-1), "entropy": -(logp.exp() * logp).sum(-1), "hits": (z.argmax(-1) == target).to(z)}
    facts |= {"top_logp": logp.amax(-1), "mean_logp": logp.mean(-1)}
    return logp.gather(1, target[:, None])[:, 0], facts


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [6, 256])
def test_equals_full_logits(tile: int, softcap: float | None, scale: float, with_bias: bool, chunk: int) -> None:
    """C16 in float64: values, gradients and facts to 1e-10."""
    hidden, weight, bias, target = inputs()
    used = bias if with_bias else None
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64)
    logps, facts = token_logps(hidden, weight, target, bias=used, softcap=softcap, scale=scale, chunk=chunk, stats=True)
    expected, expected_facts = slow(hidden, weight, target, used, softcap, scale)
    torch.testing.assert_close(logps, expected, atol=1e-10, rtol=0)
    for name, value in expected_facts.items():
        torch.testing.assert_close(facts[name], value, atol=1e-10, rtol=0)
        assert not facts[name].requires_grad
    wanted = [hidden, weight, bias] if with_bias else [hidden, weight]
    for found, right in zip(
        torch.autograd.grad(logps @ upstream, wanted), torch.autograd.grad(expected @ upstream, wanted), strict=True
    ):
        torch.testing.assert_close(found, right, atol=1e-10, rtol=0)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [6, 256])
def test_entropy_with_gradient(tile: int, softcap: float | None, with_bias: bool, chunk: int) -> None:
    """Sampled at temperature 0.7, in float64: log-probabilities, entropies and gradients of both to 1e-10."""
    hidden, weight, bias, target = inputs()
    used, options = bias if with_bias else None, {"softcap": softcap, "scale": 0.3, "temperature": 0.7}
    logps, facts = token_logps(hidden, weight, target, bias=used, chunk=chunk, entropy=True, **options)
    expected, expected_facts = slow(hidden, weight, target, used, **options)
    assert set(facts) == {"entropy"}
    torch.testing.assert_close(logps, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(facts["entropy"], expected_facts["entropy"], atol=1e-10, rtol=0)
    first, second = torch.linspace(-1, 2, N, dtype=torch.float64), torch.linspace(3, -1, N, dtype=torch.float64)
    wanted = [hidden, weight, bias] if with_bias else [hidden, weight]
    right = torch.autograd.grad(expected @ first + expected_facts["entropy"] @ second, wanted)
    whole = logps @ first + facts["entropy"] @ second
    for again in (True, False):  # the second pass makes the tiles anew
        for a, b in zip(torch.autograd.grad(whole, wanted, retain_graph=again), right, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_entropy_alone_and_with_stats() -> None:
    """Only one of two outputs used; and `stats` adds facts without gradient."""
    hidden, weight, _, target = inputs()
    logps, facts = token_logps(hidden, weight, target, stats=True, entropy=True)
    assert facts["entropy"].requires_grad and not facts["hits"].requires_grad and not facts["logits"].requires_grad
    expected, expected_facts = slow(hidden, weight, target, None, None, 1.0)
    for found, right in ((facts["entropy"], expected_facts["entropy"]), (logps, expected)):
        a = torch.autograd.grad(found.sum(), hidden, retain_graph=True)[0]
        torch.testing.assert_close(a, torch.autograd.grad(right.sum(), hidden, retain_graph=True)[0])


def test_entropy_of_a_certain_token() -> None:
    """Logits of ±1000: p underflows to 0, and 0·log 0 is no NaN."""
    hidden = torch.tensor([[1000.0]], requires_grad=True)
    _, facts = token_logps(hidden, torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([0]), entropy=True)
    facts["entropy"].sum().backward()
    assert facts["entropy"].item() == 0 and hidden.grad is not None and hidden.grad.item() == 0


def test_second_backward_pass(tile: int) -> None:
    """The first uses up the tiles that were kept; the second gives the same."""
    hidden, weight, _, target = inputs()
    logps = token_logps(hidden, weight, target, chunk=6)
    first = torch.autograd.grad(logps.sum(), [hidden, weight], retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(logps.sum(), [hidden, weight]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.slow
def test_gradcheck(tile: int) -> None:
    hidden, weight, bias, target = inputs()
    torch.autograd.gradcheck(lambda h, w, b: token_logps(h, w, target, bias=b, softcap=4.0), (hidden, weight, bias))


def test_float32_sums() -> None:
    """C16 in float32: the sum of 200 log-probabilities over a vocabulary of 5000 to 1e-4 relative to one nat each."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(200, 16, generator=generator), torch.randn(5000, 16, generator=generator)
    target = torch.randint(5000, (200,), generator=generator)
    expected = slow(hidden.double(), weight.double(), target, None, None, 1.0)[0]
    found = token_logps(hidden, weight, target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-6)


def test_large_logits_stay_finite(tile: int) -> None:
    """Logits of ±1000: the certain token has log-probability 0, another −2000, and no gradient is NaN."""
    hidden = torch.tensor([[1000.0], [1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    logps = token_logps(hidden, weight, torch.tensor([0, 1]))
    assert logps.tolist() == [0.0, -2000.0]
    logps.sum().backward()
    assert hidden.grad is not None and hidden.grad.flatten().tolist() == [0.0, -2.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(tile: int, dtype: torch.dtype) -> None:
    """Result in float32, near the float64 one of the same rounded inputs; never above 0."""
    hidden, weight, _, target = inputs(dtype)
    logps = token_logps(hidden, weight, target)
    expected = slow(hidden.double(), weight.double(), target, None, None, 1.0)[0]
    assert logps.dtype == torch.float32 and logps.max() <= 0
    torch.testing.assert_close(logps.double(), expected, atol=0.1, rtol=0.02)
    found = torch.autograd.grad(logps.sum(), [hidden, weight])
    for a, b in zip(found, torch.autograd.grad(expected.sum(), [hidden, weight]), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, atol=0.1, rtol=0.05)


def test_autocast() -> None:
    hidden, weight, _, target = inputs(torch.float32)
    plain = token_logps(hidden, weight, target)
    with torch.autocast("cpu", torch.bfloat16):
        logps = token_logps(hidden, weight, target)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, plain, atol=0.15, rtol=0.02)
    a, b = (torch.autograd.grad(x.sum(), [hidden, weight]) for x in (logps, plain))
    for found, right in zip(a, b, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, right, atol=0.15, rtol=0.05)


def test_no_tokens() -> None:
    hidden, weight, _, target = inputs()
    logps = token_logps(hidden[:0], weight, target[:0])
    assert logps.shape == (0,)
    found = torch.autograd.grad(logps.sum(), [hidden, weight])
    assert all(float(g.abs().max()) == 0 for g in found)


def test_frozen_parts() -> None:
    hidden, weight, _, target = inputs()
    frozen = weight.detach()
    upstream = torch.ones(N, dtype=torch.float64)
    expected = torch.autograd.grad(token_logps(hidden, weight, target), [hidden, weight], upstream)
    alone = torch.autograd.grad(token_logps(hidden, frozen, target), hidden, upstream)[0]
    torch.testing.assert_close(alone, expected[0], atol=0, rtol=0)
    alone = torch.autograd.grad(token_logps(hidden.detach(), weight, target), weight, upstream)[0]
    torch.testing.assert_close(alone, expected[1], atol=0, rtol=0)
    with torch.no_grad():
        assert token_logps(hidden, weight, target).grad_fn is None


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [3, 20, 256])
def test_exact_divergence(softcap: float | None, with_bias: bool, chunk: int) -> None:
    """Values and gradients of states, head and bias against two full tables, in float64 to 1e-10; 0 from itself."""
    hidden, weight, bias, target = inputs()
    generator = torch.Generator().manual_seed(1)
    other, head, shift = (torch.randn(x.shape, generator=generator).double() for x in (hidden, weight, bias))
    options = {"softcap": softcap, "scale": 0.3, "temperature": 0.7}
    used, moved = (bias, shift) if with_bias else (None, None)

    def table(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        each = [slow(h, w, torch.full_like(target, v), b, **options)[0] for v in range(V)]
        return torch.stack(each, -1)

    logp, logq = table(hidden, weight, used), table(other, head, moved)
    expected = (logp.exp() * (logp - logq)).sum(-1)
    found = token_divergence(hidden, weight, other, head, bias=used, other_bias=moved, chunk=chunk, **options)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    assert (found > 0).all()
    wanted, upstream = [hidden, weight, bias] if with_bias else [hidden, weight], torch.linspace(-1, 2, N).double()
    for ours, right in zip(
        torch.autograd.grad(found @ upstream, wanted), torch.autograd.grad(expected @ upstream, wanted), strict=True
    ):
        torch.testing.assert_close(ours, right, atol=1e-10, rtol=0)
    itself = token_divergence(hidden, weight, hidden.detach(), weight.detach(), chunk=chunk)
    assert (itself.detach() == 0).all()
    assert torch.autograd.grad(itself.sum(), hidden)[0].abs().max() < 1e-14
    assert token_divergence(hidden[:0], weight, other[:0], head).shape == (0,)


def test_gradcheck_of_the_exact_divergence() -> None:
    hidden, weight, bias, _ = inputs()
    other, head = hidden.detach().flip(0)[:3], weight.detach().flip(0)

    def divergence(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return token_divergence(h, w, other, head, bias=b, softcap=4.0, temperature=0.8, chunk=8)

    assert torch.autograd.gradcheck(divergence, (hidden.detach()[:3].requires_grad_(), weight, bias))


def test_memory_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made, watched through every operation, has at most chunk · V numbers."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, Tensor):
                    self.numbers = max(self.numbers, x.numel())
            return out

    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    with Largest() as largest:
        token_logps(hidden, weight, torch.randint(1000, (64,)), chunk=8).sum().backward()
        logps, facts = token_logps(hidden, weight, torch.randint(1000, (64,)), chunk=8, entropy=True)
        (logps + facts["entropy"]).sum().backward()
        token_divergence(hidden, weight, hidden.detach() + 1, weight.detach(), chunk=8).sum().backward()
    assert largest.numbers <= 8 * 1000


def test_entropy_of_a_nucleus() -> None:
    """Probabilities ½, ¼, ⅛, ⅛: of a share of 0.7 the first two count, with ⅔ and ⅓; of 1 all, 1.75·ln 2; of little
    one, which has none. The gradient is that of the formula, in chunks or not."""
    logits = torch.tensor([[0.5, 0.125, 0.25, 0.125]], dtype=torch.float64).log()
    weight = torch.eye(4, dtype=torch.float64)
    two = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    for share, expected in ((0.7, two), (1.0, 1.75 * math.log(2)), (0.3, 0.0), (0.5, 0.0), (0.51, two)):
        found = nucleus_entropy(logits, weight, share)
        torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64), atol=1e-12, rtol=0)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, generator=generator, dtype=torch.float64, requires_grad=True)

    def found(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return nucleus_entropy(h, w, 0.8, bias=b, softcap=3.0, scale=0.7, temperature=1.3, chunk=12)

    whole = nucleus_entropy(hidden, head, 0.8, bias=bias, softcap=3.0, scale=0.7, temperature=1.3)
    torch.testing.assert_close(found(hidden, head, bias), whole)
    assert torch.autograd.gradcheck(found, (hidden, head, bias))
