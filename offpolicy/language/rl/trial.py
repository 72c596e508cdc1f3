"""How the optimiser would move the output layer by a step, found before that step: what CAPO's mask looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offpolicy.errors import UsageError
from offpolicy.language.head import output_weight
from offpolicy.losses.policy_gradient import Objective

TRIED = ("adamw", "adafactor")  # optimisers whose step of one weight can be tried on a copy
FIELDS = ("shift", "shift_variance")  # of the tokens


def wants_trial(objective: Objective) -> bool:
    """Whether a part asks what the step would do to the output layer."""
    return bool(objective.reads & set(FIELDS))


def check_trial(model: Any, options: Any, trainer: Any, *, sharded: bool) -> None:
    """Raise :class:`UsageError` where the move of the output layer cannot be known before the step.

    Args:
        model: the policy.
        options: of the method.
        trainer: of the run.
        sharded: whether weights are cut over processes.
    """
    found, expected = "", ""
    if not output_weight(model).requires_grad:
        found, expected = "the output layer is not trained", "all weights. Leave --model.adapter out"
    elif sharded:
        found, expected = "weights are cut by 'fsdp2'", "whole ones. Pass --trainer.strategy ddp"
    elif options.optimizer not in TRIED:
        found, expected = f"`optimizer` is '{options.optimizer}'", "'adamw'. Pass --model.optimizer adamw"
    elif options.offload_optimizer:
        found, expected = "`offload_optimizer` is true", "moments on the device. Leave it out"
    elif trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        found, expected = "`gradient_clip_algorithm` is 'value'", "'norm'. Leave --trainer.gradient_clip_algorithm out"
    if found:
        raise UsageError(
            "a part of `objective` asks how the optimiser would move the output layer, which is found before the step; "
            f"{found}; expected {expected}, or choose another part."
        )


def limited(gradients: Sequence[Tensor], limit: float | None) -> Tensor:
    """The first of some gradients, as it is once the norm of all is at most a limit."""
    if not limit:
        return gradients[0]
    norm = torch.nn.utils.get_total_norm(gradients)
    return gradients[0] * (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_


def unknown_shift(like: Tensor) -> dict[str, Any]:
    """The fields of tokens as long as the move is not known: NaN, shaped as ``like``."""
    return {name: torch.full_like(like, torch.nan) for name in FIELDS}
