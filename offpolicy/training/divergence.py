"""Whether training has diverged: losses and weights that are no longer finite.

They are looked at where a row of metrics or a checkpoint is written, never inside a block of updates. Only losses and
weights count: other metrics may be NaN for good reasons, such as the mean over a group that is empty.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from offpolicy.compute.torch_private import foreach_norm
from offpolicy.errors import DivergenceError
from offpolicy.training.checkpoints import newest_checkpoint
from offpolicy.training.headlines import is_loss_name
from offpolicy.training.lightning_private import trainer_of
from offpolicy.training.run_log import due

log = logging.getLogger(__name__)
SHOWN = 3  # names in a message


def infinite_losses(row: Mapping[str, Any], seeds: tuple[int, ...] = ()) -> list[str]:
    """The losses of a row of metrics that are not finite, in words; with seeds a loss is a list of numbers."""
    found = []
    for name, value in row.items():
        numbers = value if isinstance(value, list) else [value]
        for i, number in enumerate(numbers if is_loss_name(name) else []):
            if not math.isfinite(number):
                found.append(f"{name} is {number}" + (f" for seed {seeds[i]}" if i < len(seeds) else ""))
    return found


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number is finite: one reduction on the device and one value read, without a copy of the tensors."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        own: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # this process's part of a sharded one
        if own.numel() and own.is_floating_point():
            kinds.setdefault((own.device, own.dtype), []).append(own.detach())
    largest = [torch.stack(foreach_norm(some, math.inf)) for some in kinds.values()]  # NaN where one is
    return all(bool(torch.isfinite(norms).all()) for norms in largest)


def check_finite(method: Any) -> None:
    """Stop a run that has diverged. Every process asks at the same updates, and all stop alike.

    Looks at the losses of the newest row, at those added up since, and at the trained weights.

    Raises:
        DivergenceError: one of them is not finite.
    """
    losses = infinite_losses(method.run_log.metrics_at(method.updates), method.seeds)
    since = {name: value for name, value in method.meter.by_name().items() if is_loss_name(name)}
    trained = {n: p for n, p in method.named_parameters() if p.requires_grad or not method.trains_on_texts}
    diverged = bool(losses) or not all_finite([*since.values(), *trained.values()])
    if not method.on_any_process(diverged):
        return
    losses = losses or [f"{name} is not finite" for name, value in since.items() if not all_finite([value])]
    weights = [name for name, p in trained.items() if not all_finite([p])]
    error = DivergenceError(divergence_message(method, losses, weights))
    error.together = True  # as the answer above is the same on every process
    raise error


def divergence_message(method: Any, losses: list[str], weights: list[str]) -> str:
    """What was found, where training was finite, and what to do."""
    found = list(losses[:SHOWN])
    if weights:
        more = f" and {len(weights) - SHOWN} more" if len(weights) > SHOWN else ""
        found.append(f"the weights {', '.join(weights[:SHOWN])}{more} are not finite")
    checkpoint = last_checkpoint(method)
    where = (
        "No checkpoint was written before it" if checkpoint is None else f"The last finite checkpoint is {checkpoint}"
    )
    go_on = "start anew" if checkpoint is None else "start anew, or go on from it"
    return (
        f"training diverged: at update {method.updates} {', '.join(found) or 'another process has such numbers'}; "
        f"expected finite numbers. {where}. {method.divergence_advice}, then {go_on}.{words_on_seeds(method)}"
    )


def words_on_seeds(method: Any) -> str:
    """Which of several seeds have diverged, and how the others go on; nothing for one seed."""
    bad = diverged_seeds(method)
    if not bad:
        return ""
    parts = getattr(method.run_log.files, "parts", {})
    left = [str(part.folder) for seed, part in parts.items() if seed not in bad]
    shown = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")  # whole, to be used
    who = f" It is seed {bad[0]}." if len(bad) == 1 else f" They are the seeds {', '.join(map(str, bad))}."
    return who + (f" The others go on without, each by itself: `ckpt_path` {shown}." if left else "")


@torch.no_grad()
def diverged_seeds(method: Any) -> list[int]:
    """Of several seeds those whose newest losses or weights are not finite."""
    row = method.run_log.metrics_at(method.updates).items()
    losses = [
        torch.tensor(value, device="cpu") for name, value in row if is_loss_name(name) and isinstance(value, list)
    ]
    losses += [value for name, value in method.meter.by_name().items() if is_loss_name(name)]
    bad = set()
    for tensor in [*losses, *method.parameters()] if method.seeds else []:
        finite = torch.isfinite(tensor.reshape(len(method.seeds), -1)).all(1).tolist()
        bad |= {seed for seed, sound in zip(method.seeds, finite, strict=True) if not sound}
    return [seed for seed in method.seeds if seed in bad]


def named(step: Callable[..., Any]) -> Callable[..., Any]:
    """A ``training_step`` whose errors are a :class:`DivergenceError` where weights are not finite, as searches and
    tables refuse NaN in words of their own."""

    @wraps(step)
    def stepping(self: Any, *args: Any) -> Any:
        try:
            return step(self, *args)
        except Exception as error:
            weights = [name for name, p in self.named_parameters() if not all_finite([p])]
            if not weights or isinstance(error, DivergenceError):
                raise
            raise DivergenceError(
                divergence_message(self, [f"an update failed ({type(error).__name__})"], weights)
            ) from error

    return stepping


def last_checkpoint(method: Any) -> Path | None:
    """The newest checkpoint of the run that a method is trained in; all of them are finite."""
    for callback in getattr(trainer_of(method), "checkpoint_callbacks", ()):
        folder = getattr(callback, "folder", None) or getattr(callback, "dirpath", None)
        try:
            getattr(callback, "settle", lambda: None)()  # it may be on its way to the disk
        except OSError as error:
            log.warning("The newest checkpoint was not written: %s", error)
        path = newest_checkpoint(folder) if folder is not None else None
        if path is not None:
            return path
    return None


class Divergence(Callback):
    """Looks at losses and weights after every row of metrics, and before an evaluation."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.finite_at = -1

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        updates = trainer.global_step
        if not pl_module.step_ended:
            return
        if pl_module.run_log.metrics_at(updates) or due(updates, pl_module.eval_every, trainer.max_steps):
            pl_module.check_finite()
