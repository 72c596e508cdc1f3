"""The arguments of a control method that its base acts on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from offpolicy.data.normalize import parse_reward_transform
from offpolicy.errors import check_range


@dataclass(frozen=True)
class CommonOptions:
    """Arguments of control methods that their base acts on; a method without one of them has its value here.

    Args:
        batch_size: rows per update over all processes, ≥ 1.
        normalize_obs: standardise observations: (s - mean) / (std + obs_eps).
        obs_eps: added to the standard deviation, ≥ 0.
        reward_transform: "r", an affine form such as "0.1r" or "r-1", or "return_range".
        max_grad_norm: limit on each network's gradient norm, > 0; None for no limit.
    """

    batch_size: int = 256
    normalize_obs: bool = True
    obs_eps: float = 1e-3
    reward_transform: str = "r"
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        check_range("batch_size", self.batch_size, 1)
        check_range("obs_eps", self.obs_eps, 0.0)
        parse_reward_transform(self.reward_transform)
        if self.max_grad_norm is not None:
            check_range("max_grad_norm", self.max_grad_norm, 0.0, lower_open=True)

    @classmethod
    def of(cls, hparams: Mapping[str, Any]) -> Self:
        """Those among the arguments of a method.

        Raises:
            UsageError: one is out of its range.
        """
        return cls(**{f.name: hparams[f.name] for f in fields(cls) if f.name in hparams})
