"""What every method inherits: options, seed, metrics, and what of it stands in a checkpoint.

``LanguageModule`` adds texts and one optimiser of Lightning's; ``OfflineModule`` the update loop of control.
"""

from __future__ import annotations

import inspect
import logging
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor

from offpolicy.compute import matmul, processes
from offpolicy.compute.casts import fresh_casts
from offpolicy.compute.memory import keep_freed_memory
from offpolicy.compute.optim import num_trained
from offpolicy.data.module import DataModule
from offpolicy.errors import DataError, UsageError
from offpolicy.given import tidy
from offpolicy.training import divergence
from offpolicy.training.callbacks import Interruption, RestoreSettings, ThreadWatch
from offpolicy.training.checkpoints import KEY, plain_hparams, to_plain
from offpolicy.training.description import Description
from offpolicy.training.keeping import Spacing
from offpolicy.training.measurement import HeldOut
from offpolicy.training.meter import Meter
from offpolicy.training.options import RunOptions
from offpolicy.training.run_log import RunLog
from offpolicy.training.seeds import checked_seeds
from offpolicy.training.slices import wide_row
from offpolicy.trust import words

log = logging.getLogger(__name__)


class Module(LightningModule):
    """Options, seed, metrics and checkpoint contents: what every method has."""

    run_defaults: ClassVar[dict[str, Any]] = {}  # of `--run.*`, where they differ from those of RunOptions
    trains_on_texts: ClassVar[bool] = False
    seed_axis: ClassVar[bool] = False  # whether several seeds can be trained at once
    evaluations: ClassVar[Spacing] = Spacing(times=5, least=200, most=5000, before=5000)
    saved_again: ClassVar[bool] = True  # after an evaluation, which may change the method, as well as before it
    divergence_advice: ClassVar[str] = "Lower the learning rate"  # begins a sentence
    has_adapters: bool = False  # of peft
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
        self.data_each: dict[int, tuple[str, dict[str, Any]]] = {}  # of seeds that began with their own
        self.meter: Any = Meter()
        self.run_log = RunLog()  # of the newest fit
        self.words = words()  # whose word the names in its options are
        self._seeds: tuple[int, ...] = ()
        self._eval_every = self.evaluations.most  # where `run` does not say
        self.finite_at = -1  # the update after which losses and weights were last found finite
        self._undo = ExitStack()

    def __repr__(self) -> str:
        """The method in a few lines: sizes and parameters, and its options."""
        facts = [f"{name} {value}" for name, value in self.repr_facts() if value]
        built = num_trained(self)
        facts.append(f"{built:,} trained parameters" if built else "no networks yet")
        known = inspect.signature(type(self)).parameters  # a base class saves first
        named = [n for n in known if n in self.hparams] if self.hparams.keys() <= known.keys() else list(self.hparams)
        options = ", ".join(f"{name}={self.hparams[name]!r}" for name in named if name[0] != "_")
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
        tidy(self.hparams, types)

    @classmethod
    def data_class(cls) -> type[DataModule]:
        """What reads this kind of method's data; its arguments are the command line's ``--data.*``."""
        return DataModule

    @classmethod
    def data_class_for(cls, options: Mapping[str, Any]) -> type[DataModule]:
        """The same with these options, given or as text; it differs where what is learned from does."""
        return cls.data_class()

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
        found, name = checked_seeds(seeds), type(self).__name__
        if found and not self.seed_axis:
            raise UsageError(f"{name} trains one seed per process; expected `seeds` empty. Start one each.")
        if found != self._seeds and getattr(self, "sizes", None) is not None:
            raise UsageError(
                f"`seeds` is {found}, but {name} has its networks already, with `seeds` {self._seeds}; expected it to "
                "be set before they are made. Set it on a new method."
            )
        self._seeds = found

    def describe(self) -> Description:
        """Itself in lines for the first screen; asked once training begins, on the first process."""
        return Description()

    @property
    def metric_row(self) -> dict[str, Any]:
        """The newest row of metrics, with its ``step``."""
        return self.run_log.metrics

    @property
    def eval_row(self) -> dict[str, Any]:
        """The newest row of an evaluation, with its ``step``; empty before the first."""
        return self.run_log.evaluation

    @property
    def interrupted_by(self) -> int:
        """The signal that ended the last fit, 0 when none did."""
        return self.run_log.interrupted_by

    def watchers(self) -> list[Callback]:
        """What accompanies training between blocks of updates, in the order in which it is called."""
        self.run_log.files = None  # an earlier fit that ended by an error may have left its own
        bars = [] if self.run_log.bar is None else [self.run_log.bar]
        return [RestoreSettings(), ThreadWatch(), divergence.Divergence(), self.measurement(), Interruption(), *bars]

    @property
    def eval_every(self) -> int:
        """Updates between evaluations of the run at hand, 0 for one at the end only."""
        return self._eval_every if self.run.eval_every is None else self.run.eval_every

    def space_evaluations(self, total: int) -> None:
        """Let the evaluations fit a new run of so many updates; one that goes on has its own in the checkpoint."""
        self._eval_every = self.evaluations.every(total)

    @property
    def save_every(self) -> int:
        """Updates between checkpoints of the run at hand, 0 for one at the end only."""
        return self.eval_every if self.run.save_every is None else self.run.save_every

    def measurement(self) -> Callback:
        """What judges the method in training."""
        return HeldOut()

    @property
    def evaluates_first(self) -> bool:
        """Whether a run that goes on is evaluated before its first update, if it was not then."""
        return False

    def facts_of_update(self) -> dict[str, float]:
        """Numbers that stand in the row of an evaluation beside its update."""
        return {}

    def held_out(self) -> dict[str, float]:
        """Numbers on data held out of training, for :class:`HeldOut`; none where nothing is held out."""
        return {}

    def stop_clock(self, wait: bool = False) -> None:
        """Training stands still from here on: evaluation and files do not count as its time.

        Args:
            wait: until an accelerator has done what training gave it, which does count.
        """

    @property
    def dtype_of_weights(self) -> torch.dtype:
        return next(self.parameters()).dtype

    # -- files of a run ------------------------------------------------------------------------------------------------

    def wants_checkpoint(self) -> bool:
        """Whether a checkpoint should be written now; asked after every update, on every process."""
        return False

    def keep_files(self, folder: Path) -> None:
        """Write into the folder of a run, when it starts, what its checkpoints need beside them."""

    def take_files(self, folder: Path) -> None:
        """Take back what :meth:`keep_files` wrote, when a checkpoint is opened."""

    def finish_files(self, folder: Path) -> None:
        """Write into the folder of a run, on the first process, what is wanted once it has trained to its end."""

    def last_words(self, folder: Path) -> str:
        """A line for the end of a run, on the first process; empty where there is nothing to say."""
        return ""

    # -- statistics over processes -------------------------------------------------------------------------------------

    @property
    def world_size(self) -> int:
        return processes.world_size()

    @property
    def process_rank(self) -> int:
        """The number of this process among those that share a batch, from 0."""
        return processes.rank()

    def batch_mean(self, x: Tensor) -> Tensor:
        """Mean over the batch axis (−1) of the global batch, detached: (…, B) → (…,).

        For every statistic of the batch that is not a plain mean of the loss, so that two processes equal one.
        """
        return self.mean_over_processes(x.detach().mean(-1))

    def mean_over_processes(self, x: Tensor) -> Tensor:
        """The mean of a tensor over the processes of the run."""
        return processes.mean_over_processes(x)

    def on_any_process(self, flag: bool) -> bool:
        """Whether a flag is set on one of the processes; all of them must ask."""
        if self.world_size == 1:
            return flag
        return bool(processes.sum_over_processes(torch.tensor(float(flag), device=self.device)) > 0)

    def check_finite(self) -> None:
        """Stop a run whose losses or weights are not finite; asked between blocks, on every process.

        Raises:
            DivergenceError: they are not.
        """
        if self.finite_at != self.updates:
            divergence.check_finite(self)
            self.finite_at = self.updates

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
                "eval_every": self.eval_every,
                "threads": torch.get_num_threads(),
                "matmul": self.run.matmul,
                "data": self.data_facts(),
                "meters": processes.gathered(self.meter.state_dict()),
                **self.extra_state(),
            }
        )

    def data_facts(self) -> dict[str, Any]:
        """What a checkpoint says of the data; of several seeds that began with other data each, of those too."""
        found: dict[str, Any] = {"fingerprint": self.data_fingerprint, "meta": self.data_meta}
        each = {seed: {"fingerprint": own, "meta": meta} for seed, (own, meta) in self.data_each.items()}
        return found | ({"of_seeds": each} if each else {})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get(KEY)
        if state is None:
            raise UsageError("the checkpoint was not written by this library; expected its 'offpolicy' entry.")
        data = state["data"]
        if self.data_fingerprint and self.data_fingerprint != data["fingerprint"] and not self.run.allow_other_data:
            held = data["meta"].get("held_out") or {}
            part = held.get("of") == self.data_fingerprint
            why = f", of which it held out {held['share']:g} of the episodes (`data.holdout`)" if part else ""
            raise DataError(
                f"the checkpoint was trained on other data ({data['meta'].get('name', 'unnamed')}, fingerprint "
                f"{data['fingerprint'][:12]}) than those given ({self.data_fingerprint[:12]}){why}. Pass the same "
                "data, or --run.allow_other_data=true to go on with these."
            )
        self.seed = state["seed"]
        self.restore_networks(state)
        self.data_meta = self.data_meta or data["meta"]
        self.run.threads, self.run.matmul = state["threads"], state["matmul"]
        self._eval_every = state.get("eval_every", self.evaluations.before)
        self.meter.load_state_dict(state["meters"], processes.rank(), self.world_size)
        self.load_extra_state(state)

    @property
    def updates(self) -> int:
        """Updates made so far."""
        return self.global_step

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
        self.run_log.metrics = row
        scalars = {k: float(v) for k, v in wide_row(row, self.seeds).items()}
        self.show_callbacks(scalars)
        self.log_to_loggers(scalars, updates)

    def show_callbacks(self, values: dict[str, float]) -> None:
        """Let the Trainer's callbacks see numbers, as Lightning does with learning rates; ``log`` makes a module of
        each."""
        dtype = torch.get_default_dtype()
        shown = {k: torch.tensor(v, dtype=dtype, device="cpu") for k, v in values.items() if k != "step"}
        self.trainer.callback_metrics.update(shown)

    def log_to_loggers(self, values: dict[str, float], updates: int) -> None:
        """Hand a row to the Trainer's loggers; one that fails is a warning, not the end of the run."""
        for logger in self.loggers:
            try:
                logger.log_metrics({k: v for k, v in values.items() if k != "step"}, step=updates)
            except Exception as error:
                log.warning("logger %s failed at update %d: %s", type(logger).__name__, updates, error)
