"""Networks of goal-conditioned methods against torch's own layers, and how they start."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal

from offpolicy.nn import stacked
from offpolicy.nn.goals import Representation, UnitGaussian, Values, to_length, unit_log_prob
from offpolicy.nn.stacked import MLP, gelu_tanh


def plain(mlp: MLP, x: Tensor, member: int | None = None) -> Tensor:
    """Linear, GELU in its tanh form by its formula, then layer norm with 1e-6, layer by layer."""

    def of(p: Tensor) -> Tensor:
        return p if member is None else p[member]

    for i, layer in enumerate(mlp.layers):
        if i:
            x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
            if len(mlp.norms):
                x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
                x = x * of(mlp.norms[i - 1].weight) + of(mlp.norms[i - 1].bias)
        x = x @ of(layer.weight) + of(layer.bias)
    return x


def shaken(module: nn.Module) -> nn.Module:
    """In float64, with layer norms and biases that are not at their start."""
    with torch.no_grad():
        for p in module.double().parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(p.numel())))
    return module


def test_values_are_independent_networks() -> None:
    value, s, g = shaken(Values(5, (6, 4))), torch.randn(7, 3).double(), torch.randn(7, 2).double()
    found = value(s, g)
    assert found.shape == (2, 7)
    for j in range(2):
        torch.testing.assert_close(found[j], plain(value.net, torch.cat((s, g), 1), j)[:, 0])
    assert not torch.equal(Values(5, (6,)).net.layers[0].weight[0], Values(5, (6,)).net.layers[0].weight[1])


def test_representation_has_one_length() -> None:
    """√Z, whatever the length before; no constant under the root."""
    phi, s, g = shaken(Representation(3, (6, 4), 5)), torch.randn(7, 3).double(), torch.randn(7, 3).double()
    raw = plain(phi.net, torch.cat((s, g), 1))
    torch.testing.assert_close(phi(s, g), raw / raw.norm(dim=1, keepdim=True) * math.sqrt(5))
    torch.testing.assert_close(phi(s, g).norm(dim=1), torch.full((7,), math.sqrt(5)).double())
    torch.testing.assert_close(to_length(1e-9 * raw), to_length(1e9 * raw))


def test_policies_have_no_norm_and_unit_deviation() -> None:
    actor, s, z = shaken(UnitGaussian(5, 2, (6, 4))), torch.randn(7, 3).double(), torch.randn(7, 2).double()
    mean = actor(s, z)
    torch.testing.assert_close(mean, plain(actor.net, torch.cat((s, z), 1)))
    action = torch.randn(7, 2).double()
    torch.testing.assert_close(unit_log_prob(mean, action), Normal(mean, 1.0).log_prob(action).sum(1))


@pytest.mark.parametrize("final", [False, True])
def test_start(final: bool) -> None:
    """Uniform up to √(6/(in + out)); the last layer of a policy up to a tenth of that; biases 0."""
    networks = {1.0: Values(40, (200, 100)).net, 0.1: UnitGaussian(40, 30, (200, 100)).net}
    for scale, net in networks.items():
        layer = net.layers[-1 if final else 1]
        bound = math.sqrt(6 / sum(layer.weight.shape[-2:])) * (scale if final else 1.0)
        assert 0.97 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


# -- fast paths ------------------------------------------------------------------------------------------------------


def test_fast_gelu_equals_torchs() -> None:
    """float32 on the CPU: values with and without gradients, the gradient, and the limits, within a few roundings."""
    x = torch.linspace(-12, 12, 10_001).requires_grad_()
    exact = F.gelu(x.detach().double().requires_grad_(), approximate="tanh")
    torch.testing.assert_close(gelu_tanh(x).double(), exact, rtol=2e-6, atol=2e-7)
    assert torch.equal(gelu_tanh(x.detach().clone()), gelu_tanh(x))
    (found,), y = torch.autograd.grad(gelu_tanh(x).sum(), x), x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(F.gelu(y, approximate="tanh").sum(), y)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)
    far = torch.tensor([-1e4, 1e4, math.inf]).requires_grad_()
    assert gelu_tanh(far).tolist() == [0.0, 1e4, math.inf]


@pytest.mark.parametrize("seeds", [(), (3,)])
def test_computing_in_parts_equals_computing_at_once(seeds: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Member by member, with rows 5 + 5 + 1 without gradients: values and gradients."""
    net = shaken(stacked.MLP(4, (6, 5), 2, stack=(*seeds, 2), activation="gelu_tanh", layer_norm="after"))
    x = torch.randn(*seeds, 1, 11, 4).double()[None] if seeds else torch.randn(1, 11, 4).double()
    results = []
    for limit in (1 << 18, 30):
        monkeypatch.setattr(stacked, "IN_PARTS", limit)
        with torch.no_grad():
            y = net(x)
        found = net(x)
        grads = torch.autograd.grad(found.square().sum(), net.parameters())
        results.append([y, found.detach(), *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
