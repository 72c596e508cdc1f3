"""Networks of goal-conditioned methods, as in OGBench's reference agents (arXiv:2410.20092, code).

Linear layers start Xavier-uniform with zero biases; the activation is GELU in its tanh form; values and representations
normalise each hidden layer *after* its activation, with 1e-6 added to the variance, policies do not normalise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from offpolicy.nn.policies import HALF_LOG_TWO_PI
from offpolicy.nn.stacked import MLP, Init

XAVIER = Init("xavier")
SMALL = Init("xavier", 0.1)  # a hundredth of the variance: policies start near 0
LAYER_NORM_EPS = 1e-6


def normed_mlp(in_dim: int, hidden_dims: Sequence[int], out_dim: int, stack: Sequence[int] = ()) -> MLP:
    """The network of values and representations; ``stack=(E,)`` for an ensemble."""
    return MLP(
        in_dim,
        hidden_dims,
        out_dim,
        stack=stack,
        activation="gelu_tanh",
        layer_norm="after",
        layer_norm_eps=LAYER_NORM_EPS,
        hidden_init=XAVIER,
        final_init=XAVIER,
    )


class Values(nn.Module):
    """State values of several independent networks, computed together.

    Args:
        in_dim: width of the input: state and goal, or state and representation.
        hidden_dims: widths of the hidden layers.
        num_values: E, members, ≥ 1.
    """

    def __init__(self, in_dim: int, hidden_dims: Sequence[int], num_values: int = 2) -> None:
        super().__init__()
        self.net = normed_mlp(in_dim, hidden_dims, 1, (num_values,))

    def forward(self, *parts: Tensor) -> Tensor:
        """v (…, E, B) of parts (…, B, ·) of the input."""
        return self.net(torch.cat(parts, -1).unsqueeze(-3)).squeeze(-1)


class Representation(nn.Module):
    """φ([s; g]), a goal as seen from a state, of length √Z (HIQL, arXiv:2307.11949, code).

    Args:
        obs_dim: O, width of states and goals.
        hidden_dims: widths of the hidden layers.
        rep_dim: Z.
    """

    def __init__(self, obs_dim: int, hidden_dims: Sequence[int], rep_dim: int) -> None:
        super().__init__()
        self.net = normed_mlp(2 * obs_dim, hidden_dims, rep_dim)

    def forward(self, obs: Tensor, goal: Tensor) -> Tensor:
        """(…, B, Z) of obs and goal (…, B, O)."""
        return to_length(self.net(torch.cat((obs, goal), -1)))


def to_length(z: Tensor) -> Tensor:
    """z (…, Z) rescaled to the length √Z."""
    return z / torch.linalg.vector_norm(z, dim=-1, keepdim=True) * z.shape[-1] ** 0.5


class UnitGaussian(nn.Module):
    """A normal with standard deviation 1 on every axis around an unbounded mean.

    Args:
        in_dim: width of the input: state and goal, or state and representation.
        out_dim: A, width of the output.
        hidden_dims: widths of the hidden layers.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dims: Sequence[int]) -> None:
        super().__init__()
        self.net = MLP(in_dim, hidden_dims, out_dim, activation="gelu_tanh", hidden_init=XAVIER, final_init=SMALL)

    def forward(self, *parts: Tensor) -> Tensor:
        """Mean (…, B, A) of parts (…, B, ·) of the input."""
        return self.net(torch.cat(parts, -1))


def unit_log_prob(mean: Tensor, x: Tensor) -> Tensor:
    """Log-density (…, B), nats, of x (…, B, A) under normals with these means and standard deviation 1."""
    return -0.5 * (x - mean).square().sum(-1) - x.shape[-1] * HALF_LOG_TWO_PI
