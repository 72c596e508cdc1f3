"""Parts of a model that draw random numbers in training are kept as they are in evaluation.

The log-probabilities that an objective compares depend on the weights alone then.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from offpolicy.errors import UsageError
from offpolicy.language.policy import base_of, vocabulary_of


@torch.no_grad()
def without_noise(model: Any, *others: nn.Module) -> bool:
    """Keep parts of a model that draw numbers in training, such as the jitter of a router, as they are in evaluation.

    Log-probabilities of the same weights are the same then. Dropout of adapters stays.

    Args:
        model: the policy.
        others: copies of parts of the policy, which are kept in the same way.

    Returns:
        Whether there were such parts.

    Raises:
        UsageError: a part cannot be kept so while layers are recomputed.
    """
    base, mark = base_of(model), getattr(getattr(model, "base_model", None), "prefix", "lora_")
    own = [m for name, m in base.named_modules() if mark not in name and not hasattr(m, "base_layer")]
    device = next(base.parameters()).device
    ids = torch.arange(3, 11, device=device)[None] % vocabulary_of(base)
    training = [module for module in model.modules() if module.training]

    def noisy() -> bool:
        """Whether random numbers are drawn, or the numbers are others, in training."""
        model.eval()
        expected = base(input_ids=ids, use_cache=False).logits.float()
        for module in own:
            module.training = not isinstance(module.__dict__.get("train"), partial)
        with torch.random.fork_rng(devices=[]):
            before = torch.random.get_rng_state()
            try:
                found = base(input_ids=ids, use_cache=False).logits.float()
            except Exception:  # a part that cannot read texts of any length in training
                return True
            return not (
                torch.equal(before, torch.random.get_rng_state())
                and torch.allclose(expected, found, rtol=1e-2, atol=1e-2)
            )

    found = noisy()
    if found:  # layers that are recomputed in the backward pass ask whether they are in training
        parts = [*own, *(module for other in others for module in other.modules())]
        keep_in_eval(m for m in parts if m is not base and not hasattr(m, "gradient_checkpointing"))
        if noisy():
            if any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
                raise UsageError(
                    f"{type(base).__name__} draws random numbers in training, which `gradient_checkpointing` needs it "
                    "to be in; expected false. Pass --model.gradient_checkpointing false."
                )
            keep_in_eval(parts)
    model.eval()
    for module in training:
        module.training = not isinstance(module.__dict__.get("train"), partial)
    return found


def keep_in_eval(modules: Iterable[nn.Module]) -> None:
    """Let `train` have no effect on these modules alone."""
    for module in modules:
        module.training = False
        module.train = partial(_stay, module)  # type: ignore[method-assign]


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    for child in module.children():
        child.train(mode)
    return module
