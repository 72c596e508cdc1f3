"""Action-value and state-value networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from offpolicy.moved import names_of
from offpolicy.nn.stacked import MLP, Init


def state_action(obs: Tensor, action: Tensor) -> Tensor:
    """(…, B, O + A): the observation repeated over the leading axes that only the action has."""
    if obs.shape[:-1] != action.shape[:-1]:
        obs = obs.expand(*action.shape[:-1], obs.shape[-1])
    return torch.cat((obs, action), -1)


class EnsembleCritic(nn.Module):
    """Q(s, a) of several independent critics, computed together.

    Args:
        obs_dim: O, width of an observation.
        action_dim: A, width of an action.
        num_critics: E, members of the ensemble, ≥ 1.
        hidden_dims: widths of the hidden layers.
        activation: name of the activation, see `MLP`.
        layer_norm: ``"before"`` or ``"after"`` the activation, or none.
        layer_norm_eps: added to the variance in the normalisation.
        hidden_init: how the hidden layers start.
        final_init: how the last layer starts.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        num_critics: int = 2,
        hidden_dims: Sequence[int] = (256, 256),
        *,
        activation: str = "relu",
        layer_norm: Literal["before", "after"] | None = None,
        layer_norm_eps: float = 1e-5,
        hidden_init: Init | None = None,
        final_init: Init | None = None,
    ) -> None:
        super().__init__()
        self.net = MLP(
            obs_dim + action_dim,
            hidden_dims,
            1,
            stack=(num_critics,),
            activation=activation,
            layer_norm=layer_norm,
            layer_norm_eps=layer_norm_eps,
            hidden_init=hidden_init,
            final_init=final_init,
        )

    def forward(self, obs: Tensor, action: Tensor, members: Tensor | None = None) -> Tensor:
        """q (…, E, B) of obs (…, B, O) and action (…, B, A); more leading axes of the action repeat the observation.

        With ``members``, int64 (…, M), q (…, M, B) of these critics; the others are not computed.
        """
        return self.net(state_action(obs, action).unsqueeze(-3), members=members).squeeze(-1)

    def member(self, obs: Tensor, action: Tensor, index: int = 0) -> Tensor:
        """q (…, B) of one critic; the others are not computed and get no gradient (zero, if asked for)."""
        return self.net(state_action(obs, action), member=index).squeeze(-1)


class ValueNetwork(nn.Module):
    """V(s).

    Args:
        obs_dim: O, width of an observation.
        hidden_dims: widths of the hidden layers.
        activation: name of the activation, see `MLP`.
        layer_norm: ``"before"`` or ``"after"`` the activation, or none.
        hidden_init: how the hidden layers start.
        final_init: how the last layer starts.
    """

    def __init__(
        self,
        obs_dim: int,
        hidden_dims: Sequence[int] = (256, 256),
        *,
        activation: str = "relu",
        layer_norm: Literal["before", "after"] | None = None,
        hidden_init: Init | None = None,
        final_init: Init | None = None,
    ) -> None:
        super().__init__()
        self.net = MLP(
            obs_dim,
            hidden_dims,
            1,
            activation=activation,
            layer_norm=layer_norm,
            hidden_init=hidden_init,
            final_init=final_init,
        )

    def forward(self, obs: Tensor) -> Tensor:
        """v (…, B) of obs (…, B, O)."""
        return self.net(obs).squeeze(-1)


__getattr__ = names_of("offpolicy.nn.critics")  # the names that stood here in version 0.1
