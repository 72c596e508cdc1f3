"""Optimiser steps: what a method trains, at rates that follow one count of updates."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offpolicy.compute import processes
from offpolicy.compute.optim import FUSED_DEVICES, FusedAdam, clip_per_seed, gradients, polyak_
from offpolicy.data.sizes import Sizes
from offpolicy.errors import UsageError, check_range
from offpolicy.training.acting import ActingModule
from offpolicy.training.checkpoints import KEY
from offpolicy.training.common import CommonOptions

log = logging.getLogger(__name__)
Rate = float | Callable[[int], float]


class SteppingModule(ActingModule):
    """One optimiser per name of :meth:`learning_rates`, targets that follow, and gradients over processes and seeds.

    Attributes:
        common: arguments of the method that the base acts on, as they are when networks are made and when training
            begins.
    """

    _updates_asked: bool = False  # whether somebody has asked for `updates`
    common: CommonOptions

    def __init__(self) -> None:
        super().__init__()
        self._updates = 0
        self._params: dict[str, list[Tensor]] = {}
        self._optimizers: dict[str, FusedAdam] = {}
        self._rates: dict[str, Rate] = {}
        self._rate_rows: dict[tuple[str, int], Tensor] = {}  # of K updates, in one place for every block of K
        self._planned: dict[str, tuple[Tensor, ...]] = {}  # rates of the updates of a block that follow a schedule
        self._planned_from = 0  # the first update of the block
        self._decay_steps: int | None = None  # of a run that has begun
        self.constant_rates = False  # as in a run that collects data after an offline one, whose rates had fallen

    @property
    def updates(self) -> int:
        """Updates made so far: the number of the newest, which learning rates are functions of."""
        self._updates_asked = True
        return self._updates

    @updates.setter
    def updates(self, updates: int) -> None:
        self._updates = updates

    # -- to be written by a method -------------------------------------------------------------------------------------

    def learning_rates(self) -> dict[str, Rate]:
        """What is trained: name of a network or parameter of this module → its rate, or a function of the update."""
        raise UsageError(f"{type(self).__name__} must define learning_rates(), e.g. {{'actor': 3e-4}}.")

    def make_optimizer(self, name: str, params: list[Tensor]) -> FusedAdam:
        """The optimiser of one name: Adam (0.9, 0.999, 1e-8) by default."""
        return FusedAdam(params)

    # -- construction --------------------------------------------------------------------------------------------------

    def initialize(self, sizes: Sizes, seed: int | None = None) -> Self:
        self.common = CommonOptions.of(self.hparams)
        return super().initialize(sizes, seed)

    def configure_optimizers(self) -> list[Optimizer]:
        self._rates = self.rates()
        for name, rate in self._rates.items():
            if not callable(rate):
                options = [option for option, value in self.hparams.items() if option.endswith("lr") and value is rate]
                check_range(f"{name} learning rate", rate, 0.0, option=f"model.{(*options, f'{name}_lr')[0]}")
        self._params.clear()
        self._optimizers = {name: self.make_optimizer(name, self.params(name)) for name in self._rates}
        return list(self._optimizers.values())

    def rates(self) -> dict[str, Rate]:
        """Those of :meth:`learning_rates`; where rates are constant, what each is at the first update."""
        found = self.learning_rates()
        return {name: rate(1) if self.constant_rates and callable(rate) else rate for name, rate in found.items()}

    def no_optimizers(self) -> UsageError:
        """The error of a step before there are optimisers."""
        return UsageError(
            f"{type(self).__name__} has no optimisers yet, so it can make no update; expected them first. Call "
            "`prepare(replay)`, or `configure_optimizers()` after `initialize(sizes)`."
        )

    # -- rates over a run ----------------------------------------------------------------------------------------------

    @property
    def decay_steps(self) -> int | None:
        """The updates over which learning rates fall: ``lr_decay_steps``, or those of the run that started.

        Rates stay constant where it is 0 or None.
        """
        given = getattr(self.hparams, "lr_decay_steps", None)
        return self._decay_steps if given is None else given

    def plan_rates(self, max_steps: int | None) -> None:
        """Called before training with the updates of the run, for learning rates that fall over them.

        None is for updates without a Trainer whose number nobody gave.
        """
        if "lr_decay_steps" in self.hparams and self.decay_steps is None:
            self._decay_steps = self.planned_horizon(max_steps)

    def planned_horizon(self, max_steps: int | None) -> int | None:
        """The updates over which a rate falls that follows the length of the run; None for a constant one."""
        if max_steps is None:
            log.warning(
                "%s has `lr_decay_steps` None, which stands for the updates of the run, and `prepare` was not told how "
                "many there are: the rate stays constant. Pass `max_steps` to `prepare`, or `lr_decay_steps`.",
                type(self).__name__,
            )
        return max_steps

    def warn_of_rates_at_0(self, max_steps: int) -> None:
        """Say which networks a run leaves as they are from some update on, as their rate has fallen to 0."""
        fallen = self.decay_steps
        if not fallen or fallen >= max_steps or not processes.is_first_process():
            return
        names = [name for name, rate in self.rates().items() if callable(rate) and not rate(max_steps)]
        if names:
            log.warning(
                "The learning rate of %s falls to 0 over %s updates, and the run has %s: after update %s it trains "
                "nothing there. Pass --model.lr_decay_steps %d to go on learning, or 0 for a constant rate.",
                " and ".join(names),
                *(f"{n:,}" for n in (fallen, max_steps, fallen)),
                max_steps,
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.updates = checkpoint[KEY]["updates"]

    def extra_state(self) -> dict[str, Any]:
        return {"lr_decay_steps": self.decay_steps} if "lr_decay_steps" in self.hparams else {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self._decay_steps = state.get("lr_decay_steps")

    @contextmanager
    def planned_rates(self, t: int, k: int) -> Iterator[None]:
        """Within it the updates t + 1 … t + k find their rates on the device.

        Those of a schedule are sent there at once; constant ones are numbers.
        """
        self._planned_from = t + 1
        try:
            for name, rate in self._rates.items():
                if callable(rate) and self.device.type in FUSED_DEVICES:
                    self._planned[name] = self._rate_row(name, [rate(t + 1 + j) for j in range(k)]).unbind()
            yield
        finally:
            self._planned = {}

    def _rate_row(self, name: str, rates: list[float]) -> Tensor:
        at_host = self.device.type == "cpu"
        row = torch.tensor(rates, dtype=torch.float64 if at_host else torch.float32, device="cpu")
        place = self._rate_rows.get((name, len(rates)))
        if place is None or place.device != self.device:
            place = self._rate_rows[name, len(rates)] = torch.empty_like(row, device=self.device)
        return place.copy_(row if at_host else row.pin_memory(), non_blocking=True)

    # -- steps of an update --------------------------------------------------------------------------------------------

    def params(self, name: str) -> list[Tensor]:
        """The parameters of a network (or the parameter) of this name."""
        if name not in self._params:
            part = getattr(self, name, None)
            if part is None:
                self.check_built()
                raise UsageError(
                    f"`{name}` is no network or parameter of {type(self).__name__}; expected a name that its `build` "
                    f"makes: {', '.join(dict(self.named_children()))}."
                )
            self._params[name] = [part] if isinstance(part, Tensor) else list(part.parameters())
        return self._params[name]

    def target_of(self, network: nn.Module) -> Any:
        """A copy that follows a network by :meth:`track` and takes no gradient."""
        return copy.deepcopy(network).requires_grad_(False)

    def track(self, name: str, tau: float) -> None:
        """Polyak step of ``target_<name>``: θ̄ ← (1 − τ)·θ̄ + τ·θ."""
        polyak_(self.params(f"target_{name}"), self.params(name), tau)

    def step(self, name: str, loss: Tensor | None = None, *, grads: list[Tensor] | None = None) -> None:
        """One optimiser step of one network, from its loss or from ready gradients.

        Only this network's gradient is computed, so other networks in the graph need no detaching and keep nothing.
        With several processes gradients are averaged first; with ``max_grad_norm`` they are clipped per seed.

        Args:
            name: a key of :meth:`learning_rates`.
            loss: (…,), one number per seed.
            grads: instead of the loss, one gradient per parameter, of the local batch's mean loss.
        """
        params = self.params(name)
        if grads is None:
            assert loss is not None
            grads = gradients(loss.sum() if loss.dim() else loss, params)
        if self.world_size > 1:
            grads = self.reduce_gradients(grads)
        if self.common.max_grad_norm is not None:
            grads = clip_per_seed(grads, self.common.max_grad_norm, seeds=bool(self.seeds))
        try:
            optimizer, rate = self._optimizers[name], self._rates[name]
        except KeyError:
            if not self._optimizers:
                raise self.no_optimizers() from None
            known = ", ".join(self._rates)
            raise UsageError(f"`{name}` has no learning rate; expected one of {known}. See learning_rates.") from None
        if name in self._planned:
            optimizer.apply(params, grads, self._planned[name][self._updates - self._planned_from])
        else:
            optimizer.apply(params, grads, rate(self._updates or 1) if callable(rate) else rate)

    def reduce_gradients(self, grads: list[Tensor]) -> list[Tensor]:
        """Mean over processes of a list of tensors, as one flat all-reduce."""
        if self.world_size == 1:
            return grads
        flat = torch.cat([g.reshape(-1) for g in grads])
        torch.distributed.all_reduce(flat)
        flat /= self.world_size
        return [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads, strict=True)]
