"""Policies over actions scaled to [−1, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offpolicy.nn.stacked import MLP, Init

HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


def normal_log_prob(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of a diagonal normal, summed over the last axis: (…, B, A) -> (…, B)."""
    z = (x - mean) * torch.exp(-log_std)
    return -(0.5 * z * z + log_std + HALF_LOG_TWO_PI).sum(-1)


def tanh_log_det(u: Tensor) -> Tensor:
    """log |d tanh(u)/du| summed over the last axis.

    ``log(1 − tanh²u) = 2 (log 2 − u − softplus(−2u))``: finite for every u, where the left side is log 0 from |u| ≈ 9
    in float32.
    """
    return (2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))).sum(-1)


class DeterministicPolicy(nn.Module):
    """tanh(MLP(s)).

    Args:
        obs_dim: O, width of an observation.
        action_dim: A, width of an action.
        hidden_dims: widths of the hidden layers.
        dropout: probability of zeroing a hidden unit in training mode, in [0, 1).
        activation: name of the activation, see `MLP`.
        hidden_init: how the hidden layers start.
        final_init: how the last layer starts.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden_dims: Sequence[int] = (256, 256),
        *,
        dropout: float = 0.0,
        activation: str = "relu",
        hidden_init: Init | None = None,
        final_init: Init | None = None,
    ) -> None:
        super().__init__()
        self.net = MLP(
            obs_dim,
            hidden_dims,
            action_dim,
            activation=activation,
            dropout=dropout,
            hidden_init=hidden_init,
            final_init=final_init,
        )

    def forward(self, obs: Tensor) -> Tensor:
        """action (…, B, A) in [−1, 1] of obs (…, B, O)."""
        return torch.tanh(self.net(obs))


class GaussianPolicy(nn.Module):
    """A normal around tanh(MLP(s)) with one standard deviation per action axis for all states (IQL, arXiv:2110.06169).

    The mean lies in [−1, 1]; samples need not.

    Args:
        obs_dim: O, width of an observation.
        action_dim: A, width of an action.
        hidden_dims: widths of the hidden layers.
        dropout: probability of zeroing a hidden unit in training mode, in [0, 1).
        log_std_min: lower clamp of the log standard deviation.
        log_std_max: upper clamp of the log standard deviation.
        tanh_mean: squash the mean; without it the mean is unbounded (AWAC, arXiv:2006.09359).
        hidden_init: how the hidden layers start.
        final_init: how the last layer starts.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden_dims: Sequence[int] = (256, 256),
        *,
        dropout: float = 0.0,
        log_std_min: float = -20.0,
        log_std_max: float = 2.0,
        tanh_mean: bool = True,
        hidden_init: Init | None = None,
        final_init: Init | None = None,
    ) -> None:
        super().__init__()
        self.net = MLP(
            obs_dim, hidden_dims, action_dim, dropout=dropout, hidden_init=hidden_init, final_init=final_init
        )
        self.log_std = nn.Parameter(torch.zeros(1, action_dim))
        self.log_std_min, self.log_std_max, self.tanh_mean = log_std_min, log_std_max, tanh_mean

    def mean(self, obs: Tensor) -> Tensor:
        """Mean action (…, B, A) of obs (…, B, O)."""
        mean = self.net(obs)
        return torch.tanh(mean) if self.tanh_mean else mean

    forward = mean

    def clamped_log_std(self) -> Tensor:
        """Log standard deviation (…, 1, A)."""
        return self.log_std.clamp(self.log_std_min, self.log_std_max)

    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Action (…, B, A) from standard normal noise of the same shape; not clamped."""
        return torch.addcmul(self.mean(obs), torch.exp(self.clamped_log_std()), noise)

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """Log-density (…, B), nats, of action (…, B, A)."""
        return normal_log_prob(action, self.mean(obs), self.clamped_log_std())


class TanhGaussianPolicy(nn.Module):
    """tanh of a normal whose mean and standard deviation depend on the state (SAC, arXiv:1801.01290, appendix C).

    Args:
        obs_dim: O, width of an observation.
        action_dim: A, width of an action.
        hidden_dims: widths of the hidden layers.
        log_std_min: lower clamp of the log standard deviation.
        log_std_max: upper clamp of the log standard deviation.
        log_std_multiplier: start of a learnt factor of the network's log standard deviation; None for no factor.
        log_std_offset: start of a learnt offset of it; None for no offset.
        log_det_eps: > 0 adds this to 1 − tanh² inside the logarithm of the density instead of the exact form, as SAC's
            authors do with 1e-6.
        dropout: probability of zeroing a hidden unit in training mode, in [0, 1).
        hidden_init: how the hidden layers start.
        final_init: how the last layer, both heads, starts.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden_dims: Sequence[int] = (256, 256),
        *,
        log_std_min: float = -20.0,
        log_std_max: float = 2.0,
        log_std_multiplier: float | None = None,
        log_std_offset: float | None = None,
        log_det_eps: float = 0.0,
        dropout: float = 0.0,
        hidden_init: Init | None = None,
        final_init: Init | None = None,
    ) -> None:
        super().__init__()
        self.net = MLP(
            obs_dim, hidden_dims, 2 * action_dim, dropout=dropout, hidden_init=hidden_init, final_init=final_init
        )
        self.log_std_min, self.log_std_max, self.log_det_eps = log_std_min, log_std_max, log_det_eps
        for name, start in (("log_std_multiplier", log_std_multiplier), ("log_std_offset", log_std_offset)):
            # (1, 1), not a scalar, so that a seed axis in front still broadcasts against (…, B, A)
            self.register_parameter(name, None if start is None else nn.Parameter(torch.full((1, 1), float(start))))

    def heads(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and clamped log standard deviation before the tanh, both (…, B, A), of obs (…, B, O)."""
        mean, log_std = self.net(obs).chunk(2, -1)
        if self.log_std_multiplier is not None:
            log_std = log_std * self.log_std_multiplier
        if self.log_std_offset is not None:
            log_std = log_std + self.log_std_offset
        return mean, log_std.clamp(self.log_std_min, self.log_std_max)

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Action (…, B, A) and its log-density (…, B) from standard normal noise (…, B, A); differentiable."""
        return self.sample_from(*self.heads(obs), noise)

    def draw(self, obs: Tensor, noise: Tensor) -> Tensor:
        """The action of :meth:`sample` alone, for collecting, where its density takes a third of the time."""
        mean, log_std = self.heads(obs)
        return torch.tanh(torch.addcmul(mean, torch.exp(log_std), noise))

    def sample_from(self, mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`sample`, from heads already at hand, which broadcast against the noise."""
        u = torch.addcmul(mean, torch.exp(log_std), noise)
        action = torch.tanh(u)
        logp = -(0.5 * noise * noise + log_std + HALF_LOG_TWO_PI).sum(-1)
        return action, logp - self._log_det(u, action)

    def _log_det(self, u: Tensor, action: Tensor) -> Tensor:
        if self.log_det_eps:
            return torch.log(1.0 - action.square() + self.log_det_eps).sum(-1)
        return tanh_log_det(u)

    def mode(self, obs: Tensor) -> Tensor:
        """tanh of the mean, (…, B, A): the action for evaluation."""
        return torch.tanh(self.net(obs).chunk(2, -1)[0])

    forward = mode

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """Log-density (…, B), nats, of action (…, B, A).

        Actions at ±1 have no finite inverse and are moved inside by the resolution of their type (1e-6 in float32).
        """
        return self.log_prob_from(*self.heads(obs), action)

    def log_prob_from(self, mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
        """As :meth:`log_prob`, from heads already at hand."""
        limit = 1.0 - 8.0 * torch.finfo(action.dtype).eps
        action = action.clamp(-limit, limit)
        u = torch.atanh(action)
        return normal_log_prob(u, mean, log_std) - self._log_det(u, action)
