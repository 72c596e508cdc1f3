"""A variational autoencoder of actions given the observation (BCQ, arXiv:1812.02900)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from offpolicy.nn.critics import state_action
from offpolicy.nn.stacked import MLP

LOG_STD_MIN, LOG_STD_MAX = -4.0, 15.0  # bounds of the encoder's log standard deviation in BCQ's code


class ActionVAE(nn.Module):
    """Encoder (s, a) → normal over z, decoder (s, z) → tanh action.

    Args:
        obs_dim: O, width of an observation.
        action_dim: A, width of an action.
        latent_dim: Z, width of the latent; None takes 2·A.
        hidden_dims: widths of the hidden layers of encoder and decoder.
    """

    def __init__(
        self, obs_dim: int, action_dim: int, latent_dim: int | None = None, hidden_dims: Sequence[int] = (750, 750)
    ) -> None:
        super().__init__()
        self.latent_dim = 2 * action_dim if latent_dim is None else latent_dim
        self.encoder = MLP(obs_dim + action_dim, hidden_dims, 2 * self.latent_dim)  # mean and log-std side by side
        self.decoder = MLP(obs_dim + self.latent_dim, hidden_dims, action_dim)

    def encode(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation, both (…, B, Z), of obs (…, B, O) and action (…, B, A)."""
        mean, log_std = self.encoder(state_action(obs, action)).chunk(2, -1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def decode(self, obs: Tensor, z: Tensor) -> Tensor:
        """Action (…, B, A) in [−1, 1] of obs (…, B, O) and z (…, B, Z)."""
        return torch.tanh(self.decoder(state_action(obs, z)))

    def forward(self, obs: Tensor, action: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode, draw z, decode.

        Args:
            obs: (…, B, O).
            action: (…, B, A).
            noise: (…, B, Z), standard normal.

        Returns:
            Reconstructed action (…, B, A), and mean and log standard deviation of z (…, B, Z).
        """
        mean, log_std = self.encode(obs, action)
        return self.decode(obs, torch.addcmul(mean, log_std.exp(), noise)), mean, log_std


def standard_normal_kl(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, 1)) of each latent, nats, not reduced: −½(1 + log σ² − μ² − σ²), any shape."""
    return -0.5 * (1.0 + 2.0 * log_std - mean.square() - (2.0 * log_std).exp())
