"""Layers whose parameters may carry leading axes: an ensemble of networks, or many seeds, as one batched product.

Axes are counted from the right: features −1, batch −2 inside a layer, and anything in front of them is a stack of
members. A layer follows the shape its parameters have *now*, not the one it was built with: replacing the parameters of
a plain network by stacked ones (``torch.stack`` over seeds) turns it into many networks in one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from offpolicy.compute.torch_private import parameters_here
from offpolicy.errors import UsageError, check_widths, nearest

# Numbers in a hidden layer of one member, 1 MB. Larger ones a CPU computes faster member by member and in parts of this
# size: they stay in its cache, and bias and layer norm are parts of larger operations.
IN_PARTS = 1 << 18


class GeluTanh(torch.autograd.Function):
    """x·σ(2√(2/π)·(x + 0.044715·x³)), which is x·½(1 + tanh √(2/π)·(x + 0.044715·x³)), for float32 on the CPU.

    Twice as fast as torch's form there, in which tanh costs more than all the rest.
    """

    SCALE = 2.0 * (2.0 / math.pi) ** 0.5

    @staticmethod
    def gate(x: Tensor) -> Tensor:
        """σ(…), a new tensor."""
        scale = torch.full((), GeluTanh.SCALE, dtype=x.dtype, device=x.device)
        return torch.addcmul(scale, x, x, value=0.044715 * GeluTanh.SCALE).mul_(x).sigmoid_()

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate = GeluTanh.gate(x)
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """σ + x·σ·(1 - σ)·(slope of the argument)."""
        x, gate = ctx.saved_tensors
        scale = torch.full((), GeluTanh.SCALE, dtype=x.dtype, device=x.device)
        slope = torch.addcmul(scale, x, x, value=3 * 0.044715 * GeluTanh.SCALE)
        return slope.mul_(x).mul_(torch.addcmul(gate, gate, gate, value=-1.0)).add_(gate).mul_(gradient)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form; without gradients it may be computed in the place of x."""
    if not x.is_cpu or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    if torch.is_grad_enabled() and x.requires_grad:
        return GeluTanh.apply(x)
    return x.mul_(GeluTanh.gate(x))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "silu": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
}


class Init(NamedTuple):
    """How a linear layer starts.

    Args:
        scheme: ``"default"`` draws weight and bias from U(±gain/√fan_in), which with gain 1 is what `torch.nn.Linear`
            does; ``"uniform"`` draws both from U(±gain); ``"orthogonal"`` and ``"xavier"`` draw the weight and set the
            bias to zero.
        gain: the factor or bound of the scheme, ≥ 0.
        bias: a constant for every bias instead of what the scheme does.
    """

    scheme: Literal["default", "uniform", "orthogonal", "xavier"] = "default"
    gain: float = 1.0
    bias: float | None = None


def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight + bias`` of matrices (B, in) @ (in, out), or of equally long stacks of them."""
    if weight.shape[-1] == 1 and x.is_cpu:
        # CPU libraries are built for wide products: a single column is 2 to 6 times faster as a weighted sum
        return (x * weight.mT).sum(-1, keepdim=True) + bias
    return torch.addmm(bias, x, weight) if x.dim() == 2 else torch.baddbmm(bias, x, weight)


def per_member(p: Tensor, member: int | None = None) -> Tensor:
    """A parameter as (rows, columns) or (members, rows, columns); of one member of the last stack axis if given."""
    if member is not None:
        p = p.select(-3, member)
    return p.flatten(0, -3) if p.dim() > 3 else p


def of_members(p: Tensor, members: Tensor) -> Tensor:
    """Of a parameter (…, E, rows, columns) the members (…, M), int64: (…, M, rows, columns)."""
    each = p.flatten(0, -3)
    first = torch.arange(0, len(each), p.shape[-3], device=members.device).reshape(*members.shape[:-1], 1)
    return each.index_select(0, (first + members).flatten()).unflatten(0, members.shape)


def fold(x: Tensor, stack: torch.Size) -> tuple[Tensor, torch.Size]:
    """One matrix per member, (B', in) or (members, B', in), and the axes in front of the stack, now part of B'."""
    extra = x.shape[: max(0, x.dim() - 2 - len(stack))]
    if extra:
        x = x.flatten(0, len(extra) - 1).movedim(0, -3).flatten(-3, -2)
    if stack:
        x = x.expand(*stack, *x.shape[-2:]).flatten(0, -3)
    return x, extra


def unfold(y: Tensor, stack: torch.Size, extra: torch.Size) -> Tensor:
    """Undo `fold`: (B', out) or (members, B', out) -> (*extra, *stack, B, out)."""
    if len(stack) > 1:
        y = y.unflatten(0, stack)
    if extra:
        y = y.unflatten(-2, (extra.numel(), -1)).movedim(-3, 0).unflatten(0, extra)
    return y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Over the last axis of (…, B, F), with weight and bias (…, 1, F)."""
    if weight.dim() == 2:
        return F.layer_norm(x, x.shape[-1:], weight[0], bias[0], eps)
    return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:], eps=eps), weight)


class Linear(nn.Module):
    """A linear layer, or a stack of them.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        stack: leading axes of the parameters, e.g. ``(2,)`` for twin critics.
        init: how every member starts, each drawn on its own.

    `weight` is (*stack, in, out) and `bias` (*stack, 1, out).
    """

    def __init__(
        self, in_features: int, out_features: int, stack: Sequence[int] = (), init: Init | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*stack, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(*stack, 1, out_features))
        self.reset_parameters(init or Init())

    @torch.no_grad()
    def reset_parameters(self, init: Init) -> None:
        """Draw new parameters for every member."""
        scheme, gain, bias = init
        fan_in, fan_out = self.weight.shape[-2:]
        if scheme in ("default", "uniform"):
            bound = gain / fan_in**0.5 if scheme == "default" else gain
            self.weight.uniform_(-bound, bound)
            self.bias.uniform_(-bound, bound)
        elif scheme == "xavier":
            bound = gain * (6.0 / (fan_in + fan_out)) ** 0.5
            self.weight.uniform_(-bound, bound)
            self.bias.zero_()
        elif scheme == "orthogonal":
            for member in self.weight.view(-1, fan_in, fan_out):
                nn.init.orthogonal_(member, gain)
            self.bias.zero_()
        else:
            schemes = ("default", "uniform", "orthogonal", "xavier")
            raise UsageError(f"Unknown initialisation '{scheme}'; expected one of {schemes}.{nearest(scheme, schemes)}")
        if bias is not None:
            self.bias.fill_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """(…, B, in) -> (…, B, out)."""
        stack = self.weight.shape[:-2]
        x, extra = fold(x, stack)
        return unfold(product(x, per_member(self.weight), per_member(self.bias)), stack, extra)

    def extra_repr(self) -> str:
        *stack, fan_in, fan_out = self.weight.shape
        return f"{fan_in}, {fan_out}" + (f", stack={tuple(stack)}" if stack else "")


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis with parameters per member of the stack.

    Args:
        features: width of the last axis.
        stack: leading axes of the parameters.
        eps: added to the variance, > 0.
    """

    def __init__(self, features: int, stack: Sequence[int] = (), eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*stack, 1, features))
        self.bias = nn.Parameter(torch.zeros(*stack, 1, features))
        self.eps = eps

    def forward(self, x: Tensor, member: int | None = None) -> Tensor:
        """(…, B, F) -> (…, B, F), with the parameters of one member of the last stack axis if it is given."""
        return layer_norm(x, per_member(self.weight, member), per_member(self.bias, member), self.eps)


class MLP(nn.Module):
    """Linear layers with an activation between them, possibly a stack of such networks.

    Args:
        in_dim: width of the input.
        hidden_dims: widths of the hidden layers; empty gives one linear layer.
        out_dim: width of the output, which has no activation.
        stack: leading axes of the parameters: ``(E,)`` for an ensemble.
        activation: one of `ACTIVATIONS`.
        layer_norm: normalise each hidden layer ``"before"`` or ``"after"`` its activation, or not at all.
        layer_norm_eps: added to the variance in the normalisation.
        dropout: probability of zeroing a hidden unit in training mode, in [0, 1); torch's global generator.
        hidden_init: how the hidden layers start.
        final_init: how the last layer starts.

    The forward pass takes (…, B, in_dim) and returns (…, B, out_dim). The leading axes of the input broadcast against
    ``stack``; axes in front of the stack are more batches for every member.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dims: Sequence[int],
        out_dim: int,
        *,
        stack: Sequence[int] = (),
        activation: str = "relu",
        layer_norm: Literal["before", "after"] | None = None,
        layer_norm_eps: float = 1e-5,
        dropout: float = 0.0,
        hidden_init: Init | None = None,
        final_init: Init | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            hint = nearest(activation, ACTIVATIONS)
            raise UsageError(f"Unknown activation '{activation}'; expected one of {sorted(ACTIVATIONS)}.{hint}")
        if layer_norm not in (None, "before", "after"):
            raise UsageError(f"`layer_norm` is {layer_norm!r}; expected None, 'before' or 'after' the activation.")
        if not 0.0 <= dropout < 1.0:
            raise UsageError(f"`dropout` is {dropout}; expected a probability in [0, 1).")
        check_widths("hidden_dims", hidden_dims)
        widths = [in_dim, *hidden_dims, out_dim]
        inits = [hidden_init] * len(hidden_dims) + [final_init]
        self.layers = nn.ModuleList(Linear(i, o, stack, init) for i, o, init in zip(widths, widths[1:], inits))
        self.norms = nn.ModuleList(LayerNorm(h, stack, layer_norm_eps) for h in hidden_dims if layer_norm)
        self.activation, self.layer_norm, self.dropout = activation, layer_norm, dropout
        self.layer_norm_eps = layer_norm_eps

    def forward(self, x: Tensor, member: int | None = None, members: Tensor | None = None) -> Tensor:
        """(…, B, in_dim) -> (…, B, out_dim).

        Args:
            x: the input.
            member: compute only this member of the last stack axis, which the output then lacks.
            members: compute only these members of the last stack axis, int64 (…, M); with seeds those of each.
        """
        params: list[Tensor] = [p for layer in self.layers for p in parameters_here(layer).values() if p is not None]
        norms: list[Tensor] = []
        if self.layer_norm:
            norms = [p for norm in self.norms for p in parameters_here(norm).values() if p is not None]
        if members is not None:
            params, norms = ([of_members(p, members) for p in some] for some in (params, norms))
        stack = params[0].shape[:-2]
        if member is not None or len(stack) > 1:
            params, norms = ([per_member(p, member) for p in some] for some in (params, norms))
            stack = stack if member is None else stack[:-1]
        x, extra = fold(x, stack)
        if x.is_cpu and not torch.compiler.is_compiling() and x.shape[-2] * params[0].shape[-1] >= IN_PARTS:
            y = self.in_parts(x, params, norms)
        else:
            y = self.network(x, params, norms)
        return unfold(y, stack, extra)

    def in_parts(self, x: Tensor, params: Sequence[Tensor], norms: Sequence[Tensor]) -> Tensor:
        """As :meth:`network`, member by member and, without gradients, some rows at a time."""
        if x.dim() == 3:
            members = zip(x, *(p.unbind() for p in (*params, *norms)))
            return torch.stack([self.in_parts(x, own[: len(params)], own[len(params) :]) for x, *own in members])
        rows = len(x) if torch.is_grad_enabled() else max(1, IN_PARTS // params[0].shape[-1])
        parts = [self.network(part, params, norms) for part in x.split(rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def network(self, x: Tensor, params: Sequence[Tensor], norms: Sequence[Tensor]) -> Tensor:
        """One network, (B, in_dim) -> (B, out_dim), or several at once with one more axis in front of everything."""
        affine = torch.addmm if x.dim() == 2 else torch.baddbmm
        for i in range(len(params) // 2 - 1):
            x = affine(params[2 * i + 1], x, params[2 * i])
            if self.layer_norm == "before":
                x = layer_norm(x, norms[2 * i], norms[2 * i + 1], self.layer_norm_eps)
            x = x.relu_() if self.activation == "relu" else ACTIVATIONS[self.activation](x)
            if self.layer_norm == "after":
                x = layer_norm(x, norms[2 * i], norms[2 * i + 1], self.layer_norm_eps)
            if self.dropout:
                x = F.dropout(x, self.dropout, self.training)
        return product(x, *params[-2:])
