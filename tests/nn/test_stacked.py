"""Stacked layers against an obvious loop over members."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offpolicy.errors import UsageError
from offpolicy.nn.stacked import MLP, Init, LayerNorm, Linear

SHAPES = [
    # stack of the parameters, leading axes of the input
    ((), ()),
    ((), (3,)),
    ((), (2, 3)),
    ((2,), ()),
    ((2,), (2,)),
    ((2,), (1,)),
    ((2,), (4, 1)),
    ((2,), (4, 2)),
    ((3, 2), ()),
    ((3, 2), (3, 1)),
    ((3, 2), (3, 2)),
    ((3, 2), (4, 3, 1)),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def normalised(norm: LayerNorm, own: tuple[int, ...], h: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[-1:], norm.weight[own][0], norm.bias[own][0], norm.eps)


def member_by_member(net: MLP, x: Tensor) -> Tensor:
    """The forward pass as a loop of `torch.nn.functional` calls over every member."""
    stack = net.layers[0].weight.shape[:-2]
    lead = torch.broadcast_shapes(x.shape[:-2], stack)
    x = x.expand(*lead, *x.shape[-2:])
    out = x.new_empty(*lead, x.shape[-2], net.layers[-1].weight.shape[-1])
    for where in itertools.product(*map(range, lead)):
        own = where[len(where) - len(stack) :]
        h = x[where]
        for i, layer in enumerate(net.layers):
            h = F.linear(h, layer.weight[own].t(), layer.bias[own][0])
            if i < len(net.layers) - 1:
                if net.layer_norm == "before":
                    h = normalised(net.norms[i], own, h)
                h = getattr(F, net.activation)(h)
                if net.layer_norm == "after":
                    h = normalised(net.norms[i], own, h)
        out[where] = h
    return out


@pytest.mark.parametrize("layer_norm", [None, "before", "after"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(("stack", "lead"), SHAPES)
def test_mlp_is_the_loop_over_members(stack, lead, activation, layer_norm) -> None:
    net = MLP(5, (7, 6), 3, stack=stack, activation=activation, layer_norm=layer_norm).double()
    for norm in net.norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(*lead, 4, 5, dtype=torch.float64, requires_grad=True)
    fast, slow = net(x), member_by_member(net, x)
    assert fast.shape == slow.shape
    torch.testing.assert_close(fast, slow)
    wrt = (x, *net.parameters())
    g = torch.randn_like(slow)
    torch.testing.assert_close(torch.autograd.grad(fast, wrt, g), torch.autograd.grad(slow, wrt, g))


def test_no_hidden_layer_is_one_linear_layer() -> None:
    net = MLP(5, (), 3)
    x = torch.randn(4, 5)
    torch.testing.assert_close(net(x), F.linear(x, net.layers[0].weight.t(), net.layers[0].bias[0]))


@pytest.mark.parametrize("stack", [(2,), (3, 2)])
@pytest.mark.parametrize("layer_norm", [None, "after"])
def test_one_member(stack, layer_norm) -> None:
    net = MLP(5, (7,), 3, stack=stack, layer_norm=layer_norm).double()
    x = torch.randn(*stack[:-1], 4, 5, dtype=torch.float64)
    torch.testing.assert_close(net(x, member=1), net(x.unsqueeze(-3)).select(-3, 1))


def test_plain_network_becomes_many_by_stacking_its_parameters() -> None:
    nets = [MLP(5, (7, 7), 3, layer_norm="after") for _ in range(3)]
    many = copy.deepcopy(nets[0])
    for module, *singles in zip(many.modules(), *(n.modules() for n in nets)):
        for name, _ in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.stack([getattr(s, name) for s in singles])))
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(many(x), torch.stack([n(x[i]) for i, n in enumerate(nets)]))


@pytest.mark.parametrize("stack", [(), (2,)])
def test_gradients_of_first_and_second_order(stack) -> None:
    """Of the input and of every parameter; O-DICE and EDAC differentiate gradients."""
    net = MLP(3, (4, 4), 1, stack=stack).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *params: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(dict(net.named_parameters()), params)), (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in net.parameters()))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_gradient_of_the_input_only() -> None:
    net = MLP(5, (7, 7), 1, stack=(2,))
    x = torch.randn(4, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(x).sum(), x)
    assert gradient.shape == x.shape and all(p.grad is None for p in net.parameters())


def test_autocast_gives_bfloat16_near_float32() -> None:
    net, x = MLP(5, (32, 32), 3, stack=(2,)), torch.randn(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), net(x), rtol=0.05, atol=0.02)


def test_tracing_by_the_compiler_finds_one_graph() -> None:
    net, x = MLP(5, (8, 8), 1, stack=(2,)), torch.randn(4, 5)
    traced = torch.compile(lambda x: net(x).square().mean(), backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(x), net(x).square().mean())


def test_default_initialisation_is_that_of_torch() -> None:
    layer, torch_layer = Linear(400, 300), nn.Linear(400, 300)
    for ours, theirs in ((layer.weight, torch_layer.weight), (layer.bias, torch_layer.bias)):
        assert ours.abs().max() <= 400**-0.5
        torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.05, atol=0.0)


def test_members_start_different() -> None:
    layer = Linear(5, 4, stack=(2,))
    assert not torch.equal(layer.weight[0], layer.weight[1])


def test_initialisations() -> None:
    orthogonal = Linear(6, 6, (2,), Init("orthogonal", 2.0))
    torch.testing.assert_close(orthogonal.weight[1] @ orthogonal.weight[1].t(), 4.0 * torch.eye(6))
    assert orthogonal.bias.abs().max() == 0
    uniform = Linear(50, 40, init=Init("uniform", 1e-3))
    assert uniform.weight.abs().max() <= 1e-3 and 9e-4 < uniform.bias.abs().max() <= 1e-3
    xavier = Linear(50, 40, init=Init("xavier", 0.1))
    assert xavier.weight.abs().max() <= 0.1 * (6 / 90) ** 0.5 and xavier.bias.abs().max() == 0
    net = MLP(5, (4, 4), 1, hidden_init=Init(bias=0.1), final_init=Init("uniform", 3e-3))
    assert all((layer.bias == torch.tensor(0.1)).all() for layer in net.layers[:-1])
    assert net.layers[-1].bias.abs().max() <= 3e-3


def test_layer_norm_is_that_of_torch() -> None:
    ours, theirs = LayerNorm(8, eps=1e-6), nn.LayerNorm(8, eps=1e-6)
    x = torch.randn(3, 4, 8)
    torch.testing.assert_close(ours(x), theirs(x))


def test_dropout_acts_in_training_only() -> None:
    net = MLP(5, (64,), 3, dropout=0.5)
    x = torch.randn(4, 5)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "rleu"}, "Did you mean 'relu'"),
        ({"layer_norm": True}, "before"),
        ({"dropout": 1.0}, r"\[0, 1\)"),
    ],
)
def test_impossible_options_are_named(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        MLP(5, (4,), 3, **options)


def test_unknown_initialisation_is_named() -> None:
    with pytest.raises(UsageError, match="orthogonal"):
        Linear(5, 4, init=Init("ortogonal"))  # type: ignore[arg-type]
