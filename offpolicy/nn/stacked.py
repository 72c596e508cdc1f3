"""Layers whose parameters may carry leading axes: an ensemble of networks, or many seeds, as one batched product.

Axes are counted from the right: features −1, batch −2 inside a layer, and anything in front of them is a stack of
members. A layer follows the shape its parameters have *now*, not the one it was built with: replacing the parameters of
a plain network by stacked ones (``torch.stack`` over seeds) turns it into many networks in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offpolicy.errors import UsageError, nearest

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
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


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight + bias`` with the bias inside the product.

    Args:
        x: (…, B, in).
        weight: (*stack, in, out); the leading axes of `x` broadcast against ``stack``.
        bias: (*stack, 1, out).

    Returns:
        (…, B, out).
    """
    if weight.dim() == 2:
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y = torch.addmm(bias, flat, weight)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])
    stack = weight.shape[:-2]
    if x.shape[:-2] != stack:
        lead = torch.broadcast_shapes(x.shape[:-2], stack)
        if lead != stack:  # more inputs than members: each member sees several batches
            return torch.matmul(x, weight) + bias
        x = x.expand(*stack, *x.shape[-2:])
    if weight.dim() == 3:
        return torch.baddbmm(bias, x, weight)
    y = torch.baddbmm(bias.flatten(0, -3), x.reshape(-1, *x.shape[-2:]), weight.flatten(0, -3))
    return y.view(*stack, *y.shape[-2:])


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
        return linear(x, self.weight, self.bias)

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
        weight, bias = (p if member is None else p.select(-3, member) for p in (self.weight, self.bias))
        if weight.dim() == 2:
            return F.layer_norm(x, x.shape[-1:], weight[0], bias[0], self.eps)
        return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:], eps=self.eps), weight)


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
        widths = [in_dim, *hidden_dims, out_dim]
        inits = [hidden_init] * len(hidden_dims) + [final_init]
        self.layers = nn.ModuleList(Linear(i, o, stack, init) for i, o, init in zip(widths, widths[1:], inits))
        self.norms = nn.ModuleList(LayerNorm(h, stack, layer_norm_eps) for h in hidden_dims if layer_norm)
        self.activation, self.layer_norm, self.dropout = activation, layer_norm, dropout

    def forward(self, x: Tensor, member: int | None = None) -> Tensor:
        """(…, B, in_dim) -> (…, B, out_dim).

        Args:
            x: the input.
            member: compute only this member of the last stack axis, which the output then lacks.
        """
        activate = ACTIVATIONS[self.activation]
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x = linear(x, *(p if member is None else p.select(-3, member) for p in (layer.weight, layer.bias)))
            if i == last:
                return x
            if self.layer_norm == "before":
                x = self.norms[i](x, member)
            x = activate(x)
            if self.layer_norm == "after":
                x = self.norms[i](x, member)
            if self.dropout:
                x = F.dropout(x, self.dropout, self.training)
        return x
