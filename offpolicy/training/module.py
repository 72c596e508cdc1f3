"""What a method inherits.

``Module`` holds what both worlds share: sizes, normalisers, checkpoint contents, metrics. ``OfflineModule`` adds the
update loop of control: blocks of updates on device-resident data, several optimisers, one count of updates. A method
is one class that says which view it needs, builds its networks, and writes its losses and the order of its steps.
"""

from __future__ import annotations

import copy
import inspect
import logging
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from offpolicy.compute import matmul
from offpolicy.compute.casts import fresh_casts
from offpolicy.compute.devices import finish_work
from offpolicy.compute.memory import keep_freed_memory
from offpolicy.compute.optim import FusedAdam, gradients, polyak_
from offpolicy.data import sampling
from offpolicy.data.batches import check_rows
from offpolicy.data.mixing import SHARE
from offpolicy.data.module import DataModule
from offpolicy.data.normalize import Normalizer, parse_reward_transform
from offpolicy.data.replay import Replay
from offpolicy.data.sizes import Sizes
from offpolicy.data.spaces import check_suits
from offpolicy.data.views import BoundView, Noise, TransitionView, WindowView
from offpolicy.errors import DataError, UsageError, check_range
from offpolicy.given import refuse_half, tidy
from offpolicy.nn.policies import normal_log_prob
from offpolicy.training import divergence
from offpolicy.training.callbacks import Evaluation, HeldOut, Interruption, RestoreSettings
from offpolicy.training.checkpoints import KEY, plain_hparams, to_plain, write_checkpoint
from offpolicy.training.options import RunOptions
from offpolicy.training.seeds import ask_each, build_stacked, checked_seeds, taken
from offpolicy.trust import words

log = logging.getLogger(__name__)
Metrics = dict[str, Any]  # (B,) or one number per seed each; of language methods also means over tokens
Rate = float | Callable[[int], float]


class Draw(NamedTuple):
    """Noise of one name: numbers per row of the batch, and their law ("normal" or "uniform" in [0, 1))."""

    shape: tuple[int, ...]
    law: str = "normal"


class Module(LightningModule):
    """Options, seed, metrics and checkpoint contents: what every method has."""

    run_defaults: ClassVar[dict[str, Any]] = {}  # of `--run.*`, where they differ from those of RunOptions
    trains_on_texts: ClassVar[bool] = False
    look_command: ClassVar[str] = "python -m offpolicy.evaluate {folder}"  # shown at the end of a run
    saved_again: ClassVar[bool] = True  # after an evaluation, which may change the method, as well as before it
    divergence_advice: ClassVar[str] = "Lower the learning rate"  # begins a sentence
    step_ended: bool = True  # false between the micro-batches of one optimiser step
    if TYPE_CHECKING:
        hparams: Any  # the arguments of the method's __init__, by name

        def __getattr__(self, name: str) -> Any: ...  # networks, made in `build`

    def __init__(self) -> None:
        super().__init__()
        self.run = RunOptions(**self.run_defaults)
        self.seed: int | None = None
        self.data_meta: dict[str, Any] = {}
        self.data_fingerprint = ""
        self.meter: Any = Meter()
        self.metric_row: dict[str, Any] = {}  # the newest row of metrics, and of an evaluation
        self.eval_row: dict[str, Any] = {}
        self.interrupted_by = 0  # signal that ended the last fit, 0 when none did
        self.words = words()  # whose word the names in its options are
        self._seeds: tuple[int, ...] = ()
        self._finite_at = -1  # the update after which losses and weights were last found finite
        self._undo = ExitStack()

    def __repr__(self) -> str:
        """The method in a few lines: sizes and parameters, and its options."""
        facts = [f"{name} {value}" for name, value in self.repr_facts() if value]
        built = num_trained(self)
        facts.append(f"{built:,} trained parameters" if built else "no networks yet")
        options = ", ".join(f"{name}={value!r}" for name, value in self.hparams.items() if name[0] != "_")
        text = textwrap.fill(options, 110, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        return f"{type(self).__name__}: {', '.join(facts)}" + (f"\n{text}" if options else "")

    def repr_facts(self) -> list[tuple[str, Any]]:
        """What stands in the first line of :meth:`__repr__`: (label, value)."""
        return [("data", self.data_meta.get("name")), ("update", self.updates)]

    # -- construction --------------------------------------------------------------------------------------------------

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = None, **changed: Any) -> Module:  # type: ignore[override]
        """As ``offpolicy.load(checkpoint_path, method=…)``; Lightning's own would import what the file names."""
        from offpolicy.training.opening import load

        if changed:
            raise UsageError(
                f"load_from_checkpoint was given {', '.join(changed)}; expected a path alone, as a method opens with "
                "the options it was trained with. Leave them out."
            )
        return load(checkpoint_path, method=cls).to(map_location or "cpu")

    def save_hyperparameters(self, *args: Any, frame: Any = None, **kwargs: Any) -> None:
        """Keep the arguments of ``__init__`` as ``hparams``, numbers of NumPy as Python's own and ``~`` expanded."""
        frame = frame or inspect.currentframe().f_back  # type: ignore[union-attr]
        super().save_hyperparameters(*args, frame=frame, **kwargs)
        types = {name: p.annotation for name, p in inspect.signature(type(self)).parameters.items()}
        tidy(self._hparams, types)

    @classmethod
    def data_class(cls) -> type[DataModule]:
        """What reads this kind of method's data; its arguments are the command line's ``--data.*``."""
        return DataModule

    def bind_data(self, data: DataModule) -> None:
        """Give the data, before they are opened, what they need of the method."""

    def planned_steps(self, data: DataModule) -> int | None:
        """Updates to make when the user gave no ``max_steps``; None when they have to be given."""
        return None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Several seeds trained at once, each with weights and batches of its own; empty for one, which is ``seed``."""
        return self._seeds

    @seeds.setter
    def seeds(self, seeds: Sequence[int]) -> None:
        found = checked_seeds(seeds)
        name = type(self).__name__
        if found and self.trains_on_texts:
            raise UsageError(f"{name} trains one seed per process; expected `seeds` empty. Start one each.")
        if found != self._seeds and getattr(self, "sizes", None) is not None:
            raise UsageError(
                f"`seeds` is {found}, but {name} has its networks already, with `seeds` {self._seeds}; expected it to "
                "be set before they are made. Set it on a new method."
            )
        self._seeds = found

    def option(self, name: str, default: Any) -> Any:
        """A hyperparameter that a method may leave out."""
        return getattr(self.hparams, name, default)

    def facts(self) -> list[tuple[str, str]]:
        """Lines of the first screen about data and networks: (label, text)."""
        return []

    def notes(self) -> list[str]:
        """Sentences for the first screen."""
        return []

    def samples(self) -> str:
        """A few rows of the data for a person to read before training; empty for none."""
        return ""

    def evaluates(self) -> str:
        """What an evaluation measures, in a few words; empty when there is none."""
        return ""

    def measurement(self) -> Callback:
        """What judges the method in training."""
        return HeldOut()

    def held_out(self) -> dict[str, float]:
        """Numbers on data held out of training, for :class:`HeldOut`; none where nothing is held out."""
        return {}

    def stop_clock(self, wait: bool = False) -> None:
        """Training stands still from here on: evaluation and files do not count as its time.

        Args:
            wait: until an accelerator has done what training gave it, which does count.
        """

    def batch_words(self) -> str:
        """What one update takes, in a few words."""
        return f"batch size {self.option('batch_size', 256)}"

    def wants_checkpoint(self) -> bool:
        """Whether a checkpoint should be written now; asked after every update, on every process."""
        return False

    def keep_files(self, folder: Path) -> None:
        """Write into the folder of a run, when it starts, what its checkpoints need beside them."""

    def take_files(self, folder: Path) -> None:
        """Take back what :meth:`keep_files` wrote, when a checkpoint is opened."""

    def finish_files(self, folder: Path) -> None:
        """Write into the folder of a run, on the first process, what is wanted once it has trained to its end."""

    @property
    def dtype_of_weights(self) -> torch.dtype:
        return next(self.parameters()).dtype

    # -- statistics over processes -------------------------------------------------------------------------------------

    @property
    def world_size(self) -> int:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return torch.distributed.get_world_size() if distributed else 1

    def batch_mean(self, x: Tensor) -> Tensor:
        """Mean over the batch axis (−1) of the global batch, detached: (…, B) → (…,).

        For every statistic of the batch that is not a plain mean of the loss, so that two processes equal one.
        """
        return self._mean_over_processes(x.detach().mean(-1))

    def _mean_over_processes(self, x: Tensor) -> Tensor:
        if self.world_size > 1:
            x = x.clone()
            torch.distributed.all_reduce(x)
            x = x / self.world_size
        return x

    def on_any_process(self, flag: bool) -> bool:
        """Whether a flag is set on one of the processes; all of them must ask."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.device)
        torch.distributed.all_reduce(flags)
        return bool(flags > 0)

    def check_finite(self) -> None:
        """Stop a run whose losses or weights are not finite; asked between blocks, on every process.

        Raises:
            DivergenceError: they are not.
        """
        if self._finite_at != self.updates:
            divergence.check_finite(self)
            self._finite_at = self.updates

    def _of_all_processes(self, value: Any) -> list[Any]:
        """The value of every process, by rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_finite()  # a checkpoint is one that training can go on from
        checkpoint["hyper_parameters"] = plain_hparams(self.hparams)
        checkpoint[KEY] = to_plain(
            {
                "class": f"{type(self).__module__}.{type(self).__qualname__}",
                **self.network_state(),
                "seed": self.seed,
                "updates": self.updates,
                "threads": torch.get_num_threads(),
                "matmul": self.run.matmul,
                "data": {"fingerprint": self.data_fingerprint, "meta": self.data_meta},
                "meters": self._of_all_processes(self.meter.state_dict()),
                **self.extra_state(),
            }
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get(KEY)
        if state is None:
            raise UsageError("the checkpoint was not written by this library; expected its 'offpolicy' entry.")
        data = state["data"]
        if self.data_fingerprint and self.data_fingerprint != data["fingerprint"] and not self.run.allow_other_data:
            raise DataError(
                f"the checkpoint was trained on other data ({data['meta'].get('name', 'unnamed')}, fingerprint "
                f"{data['fingerprint'][:12]}) than those given ({self.data_fingerprint[:12]}). Pass the same data, or "
                "--run.allow_other_data=true to go on with these."
            )
        self.seed = state["seed"]
        self.restore_networks(state)
        self.restore_step(state["updates"])
        self.data_meta = self.data_meta or data["meta"]
        self.run.threads, self.run.matmul = state["threads"], state["matmul"]
        self.meter.load_state_dict(state["meters"], self.global_rank, self.world_size)
        self.load_extra_state(state)

    @property
    def updates(self) -> int:
        """Updates made so far."""
        return self.global_step

    def restore_step(self, updates: int) -> None:
        """Take the count of updates from a checkpoint."""

    def network_state(self) -> dict[str, Any]:
        """What the networks are built from, as plain values for a checkpoint."""
        return {}

    def restore_networks(self, state: Mapping[str, Any]) -> None:
        """Build the networks from :meth:`network_state`, unless they exist."""

    def extra_state(self) -> dict[str, Any]:
        """Further plain values or tensors to keep in a checkpoint."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`extra_state` gave."""

    # -- settings of the process during a fit --------------------------------------------------------------------------

    def apply_settings(self) -> None:
        """Take the thread count and the library of products that the run asks for."""
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.run.threads is not None:
            self._undo.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(self.run.threads)
        self._undo.enter_context(fresh_casts())  # the user may train inside an autocast of his own
        self.run.matmul = matmul.choose_matmul(self.run.matmul)
        self._undo.enter_context(matmul.matmul_setting(self.run.matmul))

    def restore_settings(self) -> None:
        """Put thread count, matmul choice and uncompiled losses back as they were before the fit."""
        self._undo.close()

    def log_row(self, row: dict[str, Any], updates: int) -> None:
        """Make a row of metrics known: to the files of the run, the bar and the loggers."""
        self.metric_row = row
        scalars = {k: float(v) for k, v in row.items() if not isinstance(v, list)}
        self.log_dict({k: v for k, v in scalars.items() if k != "step"}, logger=False)
        self.log_to_loggers(scalars, updates)

    def log_to_loggers(self, values: dict[str, float], updates: int) -> None:
        """Hand a row to the Trainer's loggers; one that fails is a warning, not the end of the run."""
        for logger in self.loggers:
            try:
                logger.log_metrics({k: v for k, v in values.items() if k != "step"}, step=updates)
            except Exception as error:
                log.warning("logger %s failed at update %d: %s", type(logger).__name__, updates, error)


class Meter:
    """Running means of metrics on the device: nothing is read back before a row is wanted."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    @torch.no_grad()  # a metric that was not detached must not keep the graphs of all updates
    def add(self, metrics: Mapping[str, Tensor]) -> None:
        new = [name for name in metrics if name not in self.sums]
        for name in new:
            self.sums[name] = torch.zeros_like(metrics[name], dtype=torch.float32)
            self.counts[name] = 0
        if metrics:
            torch._foreach_add_([self.sums[name] for name in metrics], list(metrics.values()))
        for name in metrics:
            self.counts[name] += 1

    def read(self, mean_over_processes: Callable[[Tensor], Tensor]) -> dict[str, float | list[float]]:
        """Means since the last call, in one transfer; starts anew."""
        if not self.sums:
            return {}
        means = torch.stack([self.sums[name] / self.counts[name] for name in self.sums])
        values = mean_over_processes(means).tolist()
        row = dict(zip(self.sums, values, strict=True))
        self.sums, self.counts = {}, {}
        return row

    def by_name(self) -> dict[str, Tensor]:
        """What was added up since the last row."""
        return self.sums

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {k: v.cpu() for k, v in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> None:
        """Take this process's own state, or the mean of all when their number has changed."""
        mine = states[rank : rank + 1] if len(states) == world_size else states
        self.counts = dict(mine[0]["counts"])
        self.sums = {k: torch.stack([state["sums"][k] for state in mine]).mean(0) for k in self.counts}

    def to(self, device: torch.device) -> None:
        self.sums = {k: v.to(device) for k, v in self.sums.items()}


def counted(update: Callable[[Any, Any, int], Metrics]) -> Callable[[Any, Any, int], Metrics]:
    """A method's ``update`` that also remembers its number, as learning rates are functions of it.

    A batch from outside of :meth:`OfflineModule.run_block` is checked first.
    """

    @wraps(update)
    def counting(self: OfflineModule, batch: Any, step: int) -> Metrics:
        if not self._in_block:
            self._check_update(batch)
        self._step = step
        return update(self, batch, step)

    return counting


class OfflineModule(Module):
    """Base of control methods: one update = one batch = one ``trainer.global_step``, whatever the optimisers.

    A method declares ``view``, and defines ``build``, ``learning_rates``, ``update`` and ``policy``; ``draws`` when its
    losses need noise. Hyperparameters understood by the base when a method has them: ``batch_size`` (global, 256),
    ``normalize_obs`` (True), ``obs_eps`` (1e-3), ``reward_transform`` ("r"), ``max_grad_norm`` (None).
    """

    takes_discrete_actions: ClassVar[bool] = False  # else data with discrete actions are refused
    takes_images: ClassVar[bool] = False  # observations of any shape and type; else only vectors of floats
    view: Any = TransitionView()  # of the class, or of an instance where it depends on hyperparameters
    divergence_advice: ClassVar[str] = (
        "Lower the learning rates, limit gradients by `max_grad_norm`, or look at the scale of the rewards and "
        "observations (`reward_transform`, `normalize_obs`)"
    )
    seed_axis: ClassVar[bool] = True  # false where a layer or a loss has no room for several seeds
    sizes: Sizes = None  # type: ignore[assignment]  # set by `initialize`
    normalizer: Normalizer

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "update" in vars(cls):
            cls.update = counted(vars(cls)["update"])  # type: ignore[method-assign, assignment]

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self._step = 0  # the newest update, which learning rates are functions of
        self._in_block = False
        self._params: dict[str, list[Tensor]] = {}
        self._optimizers: dict[str, FusedAdam] = {}
        self._rates: dict[str, Rate] = {}
        self._bound: BoundView | None = None
        self._bound_version: tuple[int, int] = (0, 0)
        self._update_time = 0.0
        self._updates_timed = 0

    # -- to be written by a method -------------------------------------------------------------------------------------

    def build(self, sizes: Sizes) -> None:
        """Make the networks. Called once, before training or when a checkpoint is opened without data."""
        raise NotImplementedError(f"{type(self).__name__} must define build(sizes) and make its networks there.")

    def learning_rates(self) -> dict[str, Rate]:
        """What is trained: name of a network or parameter of this module → its rate, or a function of the update."""
        raise NotImplementedError(f"{type(self).__name__} must define learning_rates(), e.g. {{'actor': 3e-4}}.")

    def draws(self) -> dict[str, Draw]:
        """Noise that the losses need; arrives as ``batch.noise.<name>`` with shape (B, *shape)."""
        return {}

    def update(self, batch: Any, step: int) -> Metrics:
        """One update in the order of the paper; ``step`` counts from 1. Returns detached metrics.

        Learning rates are those of update ``step``.

        Raises:
            UsageError: called from outside of training, and there are no networks, optimisers or noise yet, or a field
                of the batch has another number of axes than it should.
        """
        raise NotImplementedError(f"{type(self).__name__} must define update(batch, step).")

    def policy(self, obs: Tensor) -> Tensor:
        """Deterministic action in [-1, 1] for normalised observations: (…, B, O) → (…, B, A)."""
        raise NotImplementedError(f"{type(self).__name__} must define policy(obs), used by act() and evaluation.")

    def log_density(self, obs: Tensor, action: Tensor) -> Tensor:
        """log π(a|s), nats, (B,), of actions (B, A) in [-1, 1] for normalised observations (B, O).

        A normal of unit variance around :meth:`policy`, as Policy-Guided Diffusion (arXiv:2404.06356, authors' code)
        takes it for deterministic actors; a method with a stochastic actor gives that one's law.
        """
        return normal_log_prob(action, self.policy(obs).clamp(-1.0, 1.0), action.new_zeros(()).expand_as(action))

    def select(self, replay: Replay) -> Replay:
        """The episodes this method trains on; all by default.

        Statistics of observations, and scales of actions that no environment bounds, are those of the chosen episodes.
        """
        return replay

    def check_data(self, replay: Replay) -> None:
        """Refuse observations and actions of kinds that the method does not declare to take (DataError)."""
        check_suits(replay, type(self).__name__, discrete=self.takes_discrete_actions, images=self.takes_images)

    def on_bind(self, bound: BoundView) -> None:
        """Called when the data lie on the device, and again whenever they changed: the place for an index over them."""

    def make_optimizer(self, name: str, params: list[Tensor]) -> FusedAdam:
        """The optimiser of one name: Adam (0.9, 0.999, 1e-8) by default."""
        return FusedAdam(params)

    # -- construction --------------------------------------------------------------------------------------------------

    def initialize(self, sizes: Sizes, seed: int | None = None) -> OfflineModule:
        """Build the networks for these sizes, reproducibly from the seed, without data or trainer. Returns self."""
        if self.sizes is not None:
            if self.sizes != sizes:
                raise UsageError(f"the method was built for {self.sizes} but the data have {sizes}; expected the same.")
            return self
        self.sizes = sizes
        self.seed = seed if seed is not None else (self.seed if self.seed is not None else torch.initial_seed())
        self.seed %= 1 << 63
        self.normalizer = Normalizer((sizes.obs_dim,), sizes.action_dim)
        with torch.random.fork_rng(devices=[]):
            if not self.seeds:
                torch.manual_seed(self.seed)
                self.build(sizes)
            else:
                build_stacked(self, partial(self.build, sizes))
        return self

    def _check_built(self) -> None:
        if self.sizes is None:
            raise UsageError(
                f"{type(self).__name__} has no networks yet; expected a trained method. Fit it, load a checkpoint, or "
                "call `prepare(replay)`."
            )

    def _check_update(self, batch: Any) -> None:
        """What an update needs and fit has always; asked where a batch comes from outside."""
        self._check_built()
        if not self._optimizers and self.learning_rates():
            raise self._no_optimizers()
        draws = self.draws()
        missing = [name for name in draws if not hasattr(getattr(batch, "noise", None), name)]
        if missing:
            raise UsageError(
                f"the batch has no noise `{missing[0]}`; {type(self).__name__} needs {', '.join(draws)}. Take batches "
                "of `draw(t, k)`, or pass `noise=offpolicy.Noise(…)`."
            )
        check_rows(batch)

    def _no_optimizers(self) -> UsageError:
        return UsageError(
            f"{type(self).__name__} has no optimisers yet, so it can make no update; expected them first. Call "
            "`prepare(replay)`, or `configure_optimizers()` after `initialize(sizes)`."
        )

    def take_seed(self, seed: int) -> OfflineModule:
        """A method of one seed alone, out of a method of several.

        Its weights are those of that seed, bit by bit, so it acts and is evaluated as that seed is; it can be saved by
        :meth:`save`. It does not share memory with this method, and its optimisers are new.

        Args:
            seed: one of ``seeds``, the number itself and not its place.

        Raises:
            UsageError: no such seed, or no networks yet.
        """
        self._check_built()
        if seed not in self.seeds:
            held = f"the seeds {', '.join(map(str, self.seeds))}" if self.seeds else f"one seed, {self.seed}, alone"
            raise UsageError(
                f"there is no seed {seed} to take: {type(self).__name__} holds {held}. Pass one of several."
            )
        return taken(self, seed)

    def save(self, path: str | Path) -> None:
        """Write the weights and settings into a file that :func:`offpolicy.load` opens, as ``policy.ckpt``.

        Training cannot go on from it, since it has no optimisers: a run writes checkpoints for that.

        Raises:
            UsageError: no networks yet.  WriteError: the file cannot be written.
        """
        self._check_built()
        checkpoint: dict[str, Any] = {"state_dict": self.state_dict(), "global_step": self.updates}
        self.on_save_checkpoint(checkpoint)
        write_checkpoint(checkpoint, path)

    @property
    def updates(self) -> int:
        return self._step if self._trainer is None else self.global_step

    def restore_step(self, updates: int) -> None:
        self._step = updates

    def repr_facts(self) -> list[tuple[str, Any]]:
        widths = [] if self.sizes is None else [("observation", self.sizes.obs_dim), ("action", self.sizes.action_dim)]
        seeds = ", ".join(map(str, self.seeds))
        return [*widths, ("seeds", f"({seeds})" if seeds else ""), *super().repr_facts()]

    def network_state(self) -> dict[str, Any]:
        return {"sizes": asdict(self.sizes), "seeds": self.seeds}

    def restore_networks(self, state: Mapping[str, Any]) -> None:
        self.seeds = tuple(state["seeds"])
        self.initialize(Sizes(**state["sizes"]), seed=state["seed"])

    def facts(self) -> list[tuple[str, str]]:
        data, meta, sizes = self.trainer.datamodule, self.data_meta, self.sizes  # type: ignore[attr-defined]
        renewal = getattr(data, "renewal", None)
        replay = data.replay if renewal is None else renewal.real
        limits = f", {sizes.max_steps} steps at most" if sizes.max_steps else ""
        return [
            ("data", f"{replay.num_steps:,} steps in {replay.num_episodes:,} episodes{limits} ({origin(meta)})"),
            ("sizes", f"observation {sizes.obs_dim}, action {sizes.action_dim}, {num_trained(self):,} parameters"),
            *([] if renewal is None else renewal.facts(self.trainer.max_steps)),
        ]

    # -- acting --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, obs: Any) -> Any:
        """Deterministic action in environment units.

        Args:
            obs: raw observation(s), NumPy or tensor, shape (O,) or (n, O).

        Returns:
            Action(s) of the same kind, (A,) or (n, A). With S seeds what each of them does, (S, A) or (S, n, A).
        """
        x = self.normalized(obs)
        action = self.ask(lambda: self.normalizer.environment_action(self.policy(x).clamp(-1.0, 1.0)))
        action = action[..., 0, :] if np.ndim(obs) == 1 else action
        return action if isinstance(obs, Tensor) else action.float().cpu().numpy()

    def ask(self, question: Callable[[], Any]) -> Any:
        """The answer of the networks in evaluation mode; with seeds that of each, along a new first axis."""
        training = self.training
        self.eval()
        answer = ask_each(self, question) if self.seeds else question()
        self.train(training)
        return answer

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """log π(action | obs) under the policy as trained, summed over the dimensions of the action.

        Deterministic policies count as normals of unit variance around their action. Differentiable.

        Args:
            obs: raw observations (…, O).
            action: (…, A) in [-1, 1].

        Returns:
            Nats, (…,).

        Raises:
            UsageError: the method is no policy of one observation, or holds several seeds.
        """
        if self.seeds:
            raise UsageError(
                f"the method holds {len(self.seeds)} seeds, each a policy of its own; expected one. Take one out: "
                f"take_seed({self.seeds[0]})."
            )
        x = self.normalized(obs.reshape(-1, obs.shape[-1]))
        training = self.training
        self.eval()
        found = self.log_density(x, action.to(x).reshape(len(x), -1))
        self.train(training)
        return found.reshape(obs.shape[:-1])

    def normalized(self, obs: Any, name: str = "obs") -> Tensor:
        """Raw observation(s), NumPy or tensor, (O,) or (n, O), as normalised ones (n, O) on the method's device."""
        self._check_built()
        x = torch.as_tensor(obs, device=self.device, dtype=self.dtype_of_weights)
        if x.shape[-1:] != (self.sizes.obs_dim,) or x.dim() not in (1, 2):
            raise UsageError(
                f"`{name}` has shape {tuple(x.shape)}; expected ({self.sizes.obs_dim},) or (n, {self.sizes.obs_dim})."
            )
        return self.normalizer.obs(x if x.dim() == 2 else x[None])

    def agent(self) -> Any:
        """What evaluation plays with: a function of observations (n, O), or an object that remembers.

        See :class:`offpolicy.evaluation.rollout.Agent`; ``act`` unless a method needs the history.
        """
        return self.act

    # -- steps of an update --------------------------------------------------------------------------------------------

    def params(self, name: str) -> list[Tensor]:
        """The parameters of a network (or the parameter) of this name."""
        if name not in self._params:
            part = getattr(self, name, None)
            if part is None:
                self._check_built()
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
        limit = self.option("max_grad_norm", None)
        if limit is not None:
            grads = clip_per_seed(grads, limit, seeds=bool(self.seeds))
        try:
            optimizer, rate = self._optimizers[name], self._rates[name]
        except KeyError:
            if not self._optimizers:
                raise self._no_optimizers() from None
            known = ", ".join(self._rates)
            raise UsageError(f"`{name}` has no learning rate; expected one of {known}. See learning_rates.") from None
        optimizer.apply(params, grads, rate(self._step or 1) if callable(rate) else rate)

    def reduce_gradients(self, grads: list[Tensor]) -> list[Tensor]:
        """Mean over processes of a list of tensors, as one flat all-reduce."""
        if self.world_size == 1:
            return grads
        flat = torch.cat([g.reshape(-1) for g in grads])
        torch.distributed.all_reduce(flat)
        flat /= self.world_size
        return [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads, strict=True)]

    # -- Lightning: construction ---------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        data: Any = getattr(self.trainer, "datamodule", None)
        if getattr(data, "replay", None) is None:
            raise UsageError(
                "fit was given no replay; expected a data module. Use `data = offpolicy.load_data(...)` and "
                "`trainer.fit(method, data)`."
            )
        refuse_half(self.trainer.precision)
        self._check_hyperparameters()
        if self.seed is None:
            self.seed = int(self.trainer.strategy.broadcast(torch.initial_seed())) % (1 << 63)
        self.check_data(data.replay)
        replay = self.select(data.replay)
        self.data_meta, self.data_fingerprint = dict(data.replay.meta), data.replay.fingerprint()
        self.initialize(Sizes.of(replay))
        self.plan_rates(self.trainer.max_steps)
        self.trainer.precision_plugin.convert_module(self)  # before a checkpoint is loaded, so that it loses no digit
        self.fit_normalizer(replay)

    def batch_words(self) -> str:
        words, trainer = super().batch_words(), self.trainer
        if self._bound is None or getattr(trainer.datamodule, "renewal", None) is not None:  # type: ignore[attr-defined]
            return words
        epochs = trainer.max_steps * self.option("batch_size", 256) / self._bound.count
        return f"{words}, {epochs:,.0f} epochs" if epochs >= 10 else f"{words}, {epochs:.2g} epochs"

    def evaluates(self) -> str:
        episodes, env = self.run.eval_episodes, self.data_meta.get("env_id")
        tasks = self.data_meta.get("tasks")
        each = f" for each of {tasks} goals" if tasks else ""
        each += f" by each of {len(self.seeds)} seeds" if self.seeds else ""
        return f"{episodes} episodes of {env}{each}" if episodes and env else ""

    def fit_normalizer(self, replay: Replay) -> None:
        """Statistics of the rows that training draws."""
        self.normalizer.fit(
            replay,
            self.view.rows(replay) if isinstance(self.view, TransitionView) else replay.rows,
            normalize_obs=self.option("normalize_obs", True),
            reward_transform=self.option("reward_transform", "r"),
            eps=self.option("obs_eps", 1e-3),
        )

    def prepare(self, replay: Replay | DataModule, seed: int = 0, *, max_steps: int | None = None) -> OfflineModule:
        """Ready for :meth:`run_block` without a Trainer: networks, normaliser, optimisers, data. Returns self.

        Args:
            replay: the data; of a data module the replay that it opens.
            seed: of weights, batches and noise, unless ``seeds`` are set.
            max_steps: updates to be made, ≥ 1, over which learning rates with ``lr_decay_steps=None`` fall. Without it
                such rates stay constant, and a warning says so.
        """
        if max_steps is not None:
            check_range("max_steps", max_steps, 1)
        self._check_hyperparameters()
        replay = replay.load() if isinstance(replay, DataModule) else replay
        if not isinstance(replay, Replay):
            raise UsageError(
                f"`replay` is a {type(replay).__name__}; expected a Replay or a DataModule. Call "
                "`prepare(offpolicy.load_data(...))`."
            )
        self.check_data(replay)
        self.data_meta = dict(replay.meta)
        chosen = self.select(replay)
        self.initialize(Sizes.of(chosen), seed)
        self.plan_rates(max_steps)
        self.fit_normalizer(chosen)
        self.configure_optimizers()
        self._has_dropout = any(map(has_dropout, self.modules()))
        self._bound = self.view.bind(chosen, self.normalizer, self.device)
        self.on_bind(self._bound)
        return self

    def plan_rates(self, max_steps: int | None) -> None:
        """Called before training with the updates of the run, for learning rates that fall over them.

        None is for updates without a Trainer whose number nobody gave.
        """

    def planned_horizon(self, max_steps: int | None) -> int | None:
        """The updates over which a rate falls that follows the length of the run; None for a constant one."""
        if max_steps is None:
            log.warning(
                "%s has `lr_decay_steps` None, which stands for the updates of the run, and `prepare` was not told how "
                "many there are: the rate stays constant. Pass `max_steps` to `prepare`, or `lr_decay_steps`.",
                type(self).__name__,
            )
        return max_steps

    def _check_hyperparameters(self) -> None:
        check_range("batch_size", self.option("batch_size", 256), 1)
        check_range("obs_eps", self.option("obs_eps", 1e-3), 0.0)
        parse_reward_transform(self.option("reward_transform", "r"))
        for name, value in self.hparams.items():
            if name.endswith("hidden_dims") and value is not None:
                for width in value:
                    check_range(name, width, 1)
        if self.option("max_grad_norm", None) is not None:
            check_range("max_grad_norm", self.hparams["max_grad_norm"], 0.0, lower_open=True)

    def configure_optimizers(self) -> list[Optimizer]:
        self._rates = self.learning_rates()
        for name, rate in self._rates.items():
            if not callable(rate):
                check_range(f"{name} learning rate", rate, 0.0)
        self._params.clear()
        self._optimizers = {name: self.make_optimizer(name, self.params(name)) for name in self._rates}
        return list(self._optimizers.values())

    def on_fit_start(self) -> None:
        trainer = self.trainer
        if trainer.max_steps < 1:
            raise UsageError("the Trainer has no `max_steps`; expected the number of updates, e.g. max_steps=10000.")
        if self.option("batch_size", 256) % self.world_size:
            raise UsageError(
                f"`batch_size` is {self.option('batch_size', 256)}; expected a multiple of the {self.world_size} "
                "processes, as it is the size of the global batch."
            )
        self.apply_settings()
        if self.run.compile:
            self._compile_losses()
        self.meter.to(self.device)
        self._has_dropout = any(map(has_dropout, self.modules()))
        self._cuts = self._intervals()
        self._bind()

    def _compile_losses(self) -> None:
        for name in dir(type(self)):
            if name.endswith("_loss") and callable(getattr(self, name)):
                setattr(self, name, torch.compile(getattr(self, name), dynamic=False))
                self._undo.callback(partial(delattr, self, name))

    def _intervals(self) -> set[int]:
        """Every interval, in updates, at which a block must end."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        found = {self.run.log_every, self.run.eval_every, getattr(data, "change_every", 0)}
        found |= {getattr(callback, "_every_n_train_steps", 0) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        return {n for n in found if isinstance(n, int) and n > 0}

    def _bind(self) -> None:
        """Put the data where batches are gathered from; again whenever the replay has changed."""
        replay = self.trainer.datamodule.replay  # type: ignore[attr-defined]
        version = (id(replay), replay.version)
        if self._bound is None or version != self._bound_version:
            self._bound = self.view.bind(self.select(replay), self.normalizer, self.device)
            if SHARE in replay.meta and self._bound.cumulative is None:
                raise UsageError(
                    f"{type(self.view).__name__} draws all rows alike; expected a view that keeps the synthetic share. "
                    "Pass `mixture_weights(replay, rows)` to its BoundView, or take --data.synthetic.share 1."
                )
            self._bound_version = version
            self.on_bind(self._bound)

    def teardown(self, stage: str) -> None:
        self.restore_settings()
        self._bound = None

    def configure_callbacks(self) -> list[Callback]:
        for name, usual, instead in (
            ("gradient_clip_val", (None, 0), "max_grad_norm"),
            ("accumulate_grad_batches", (None, 1), "batch_size"),
        ):
            value = getattr(self.trainer, name)
            if value not in usual:
                raise UsageError(
                    f"the Trainer has {name}={value}; expected none, as methods step their own optimisers. Set "
                    f"`{instead}` of the method."
                )
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise UsageError("sharding (fsdp2) is for language models; expected another strategy. Use ddp.")
        return [RestoreSettings(), divergence.Divergence(), self.measurement(), Interruption()]

    def measurement(self) -> Callback:
        return Evaluation()

    # -- Lightning: the loop -------------------------------------------------------------------------------------------

    def block_length(self, t: int) -> int:
        """Updates until the next interval ends, at most ``run.block``; a function of the update count alone."""
        return min([self.run.block, self.trainer.max_steps - t, *(n - t % n for n in self._cuts)])

    def draw(self, t: int, k: int) -> list[Any]:
        """The batches of updates t + 1 … t + k: this process's rows of each, with their noise."""
        if self._bound is None:
            raise UsageError(
                f"{type(self).__name__} has no data to draw batches from; expected them to be laid out. Call "
                "`prepare(replay)` first."
            )
        size = self.option("batch_size", 256)
        local = size // self.world_size
        rank = self.global_rank if self.world_size > 1 else 0
        rows = torch.arange(rank * local, (rank + 1) * local, device=self._bound.device)
        steps = torch.arange(t + 1, t + k + 1, device=rows.device)
        seeds: Any = list(self.seeds) if self.seeds else self.seed or 0
        words = sampling.bits(sampling.keys(seeds, "index", steps), rows)
        more = self._bound.uniforms
        uniforms = [sampling.uniforms(sampling.keys(seeds, "view", steps), rows, (more,))] if more else []
        batch = self._bound.gather(self._bound.pick(words), *uniforms)
        rows, steps = rows.to(self.device), steps.to(self.device)
        laws, dtype = {"normal": sampling.normals, "uniform": sampling.uniforms}, self.normalizer.obs_scale.dtype
        noise = {
            name: laws[draw.law](sampling.keys(seeds, name, steps), rows, draw.shape).to(dtype).unbind(0)
            for name, draw in self.draws().items()
        }
        parts = {name: value.unbind(0) for name, value in batch._asdict().items() if isinstance(value, Tensor)}
        return [
            type(batch)(
                **{name: part[j] for name, part in parts.items()},
                noise=Noise(**{name: part[j] for name, part in noise.items()}),
            )
            for j in range(k)
        ]

    def run_block(self, t: int, k: int) -> None:
        """Updates t + 1 … t + k, without any reading of values back to the host."""
        self._in_block = True
        try:
            with fresh_casts():
                for step, batch in enumerate(self.draw(t, k), t + 1):
                    if self._has_dropout:  # it has no noise argument: make its generator a function of the update too
                        stream = f"dropout of process {self.global_rank if self.world_size > 1 else 0}"
                        number = torch.tensor([step], device="cpu")
                        torch.manual_seed(int(sampling.keys(self.seed or 0, stream, number)[0]))
                    self.meter.add(self.update(batch, step))
        finally:
            self._in_block = False

    @divergence.named
    def training_step(self, tick: Any, _: int) -> None:
        t = self.global_step
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        change_every = getattr(data, "change_every", 0)
        if change_every and t % change_every == 0:
            self.check_finite()  # before the data are changed by the policy
            data.on_block_start(self)
            self._bind()
        k = self.block_length(t)
        began = time.perf_counter()
        self.run_block(t, k)
        self._count(k)
        self._update_time += time.perf_counter() - began
        self._updates_timed += k
        if (t + k) % self.run.log_every == 0 or t + k == self.trainer.max_steps:
            self._write_row(t + k)

    def stop_clock(self, wait: bool = False) -> None:
        if wait:
            began = time.perf_counter()
            finish_work(self.device)
            self._update_time += time.perf_counter() - began

    def _count(self, k: int) -> None:
        """Let ``global_step`` count k updates. The only place that touches the Trainer's private counters."""
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        for part in (progress.total, progress.current):
            part.ready += k
            part.completed += k

    def _write_row(self, updates: int) -> None:
        """One row of metrics: means since the last row, read back once."""
        self.stop_clock(wait=True)
        means = self.meter.read(self._mean_over_processes)
        row: dict[str, Any] = {k if k.startswith("synthetic/") else f"train/{k}": v for k, v in means.items()}
        speed = self._updates_timed / max(self._update_time, 1e-9)
        self._update_time, self._updates_timed = 0.0, 0
        self.log_row({"step": updates, **row, "perf/updates_per_s": speed}, updates)


def num_trained(module: nn.Module) -> int:
    """Numbers that are trained (targets and buffers are not)."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def origin(meta: Mapping[str, Any]) -> str:
    """Where data come from, in a few words."""
    return str(meta.get("file") or {"made": "made here"}.get(str(meta.get("source")), meta.get("source", "arrays")))


def has_dropout(module: nn.Module) -> bool:
    """Whether a module draws a dropout mask of its own: torch's layers, or an attribute ``dropout`` > 0."""
    rate = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout", 0.0)
    return isinstance(rate, float) and rate > 0.0


def clip_per_seed(grads: list[Tensor], max_norm: float, *, seeds: bool) -> list[Tensor]:
    """Scale gradients so that their joint norm is at most ``max_norm``, for each seed by itself.

    Args:
        grads: one gradient per parameter, with a seed axis in front when ``seeds``.
        max_norm: limit > 0 on the Euclidean norm over all parameters.
    """
    if not seeds:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return list(torch._foreach_mul(grads, scale))
    norm = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return [g * scale.reshape(-1, *(1,) * (g.dim() - 1)) for g in grads]


__all__ = ["Draw", "Metrics", "Module", "Noise", "OfflineModule", "Sizes", "TransitionView", "WindowView"]
