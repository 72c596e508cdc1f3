"""What control methods inherit: the view of the data, and the update loop over blocks of batches.

A method is one class that says which view it needs, builds its networks, and writes its losses and the order of its
steps.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial, wraps
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from offpolicy.compute.casts import fresh_casts
from offpolicy.compute.devices import Stopwatch
from offpolicy.compute.memory import keep_freed_memory, peak_memory
from offpolicy.compute.optim import num_trained
from offpolicy.data.batches import check_rows
from offpolicy.data.collection import Collection
from offpolicy.data.mixing import SHARE
from offpolicy.data.module import DataModule
from offpolicy.data.replay import Replay
from offpolicy.data.seed_collections import SeedCollections
from offpolicy.data.sizes import Sizes
from offpolicy.data.spaces import check_suits
from offpolicy.data.views import BoundView, TransitionView
from offpolicy.errors import UsageError, amount, check_range
from offpolicy.given import refuse_half
from offpolicy.training import divergence
from offpolicy.training.acting import ActingModule
from offpolicy.training.collecting import check_collects
from offpolicy.training.common import CommonOptions
from offpolicy.training.compiled import CompiledUpdates, compile_advice
from offpolicy.training.description import EVALUATE, EXPORT, Description, origin
from offpolicy.training.drawing import Counters, Draw, draw_batches, has_dropout, seed_dropout
from offpolicy.training.graph import Blocks
from offpolicy.training.joint_folder import parts_of, share_rounds
from offpolicy.training.lightning_private import count_updates, save_interval
from offpolicy.training.measurement import Evaluation
from offpolicy.training.meter import Metrics
from offpolicy.training.seed_data import SeedViews, data_of_seeds
from offpolicy.training.slices import wide_row
from offpolicy.training.stepping import Rate, SteppingModule
from offpolicy.training.switching import switch_words, write_switch


def counted(update: Callable[[Any, Any, int], Metrics]) -> Callable[[Any, Any, int], Metrics]:
    """A method's ``update`` that also remembers its number, as learning rates are functions of it.

    A batch from outside of :meth:`OfflineModule.run_block` is checked first.
    """

    @wraps(update)
    def counting(self: OfflineModule, batch: Any, step: int) -> Metrics:
        if not self._in_block:
            self._check_update(batch)
        self._updates = step
        return update(self, batch, step)

    return counting


class OfflineModule(SteppingModule):
    """Base of control methods: one update = one batch = one ``trainer.global_step``, whatever the optimisers.

    A method declares ``view``, and defines ``build``, ``learning_rates``, ``update`` and ``policy``; ``draws`` when its
    losses need noise. The base acts on arguments of a method that :class:`CommonOptions` names.

    Attributes:
        compiled: the methods that ``run.compile`` compiles; None for all whose name ends in ``_loss``.
    """

    takes_discrete_actions: ClassVar[bool] = False  # else data with discrete actions are refused
    takes_images: ClassVar[bool] = False  # observations of any shape and type; else only vectors of floats
    compiled: ClassVar[tuple[str, ...] | None] = None
    view: Any = TransitionView()  # of the class, or of an instance where it depends on hyperparameters
    divergence_advice: ClassVar[str] = (
        "Lower the learning rates, limit gradients by `max_grad_norm`, or look at the scale of the rewards and "
        "observations (`reward_transform`, `normalize_obs`)"
    )

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "update" in vars(cls):
            cls.update = counted(vars(cls)["update"])  # type: ignore[method-assign, assignment]

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self._in_block = False
        self.has_dropout = False  # it takes no noise of the batch
        self.bound: BoundView | None = None  # the view of the data, where they lie
        self._bound_version: list[tuple[int, int]] = []  # of each replay that is trained on
        self._blocks: Blocks | None = None  # how updates are made, once data are bound
        self._compiled: CompiledUpdates | None = None
        self._counters: Counters | None = None
        self._watch = Stopwatch()

    # -- to be written by a method -------------------------------------------------------------------------------------

    def rows_per_row(self) -> dict[str, int]:
        """By the name of a network, the rows that it sees for each row of the batch, where they are more than one.

        The memory of several seeds is estimated by it.
        """
        return {}

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
        raise UsageError(f"{type(self).__name__} must define update(batch, step).")

    def phase(self, step: int) -> Hashable:
        """What the Python of :meth:`update` decides by ``step``: updates of equal phases do the same operations.

        A method whose ``update`` looks at ``step`` (or at ``updates``) defines it in the same class, as ``step %
        policy_freq == 0`` for a condition on that; else its updates are never made as CUDA graphs. Rates of
        :meth:`learning_rates` may depend on the update without it.
        """
        return None

    def select(self, replay: Replay) -> Replay:
        """The episodes this method trains on; all by default.

        Statistics of observations, and scales of actions that no environment bounds, are those of the chosen episodes.
        """
        return replay

    def bind_data(self, data: DataModule) -> None:
        if data.online.env_steps:
            check_collects(self, data.online)
            data.seed, data.seeds = self.seed or 0, self.seeds

    def planned_steps(self, data: DataModule) -> int | None:
        return data.planned_updates()

    def finish_files(self, folder: Path) -> None:
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        collection = getattr(data, "collection", None)
        if collection is not None:
            collection.save(folder / "replay")
            share_rounds(folder)
            if collection.switch:
                for place in (folder, *parts_of(folder).values()):
                    write_switch(place, collection.switch)

    def last_words(self, folder: Path) -> str:
        collection = self._collection
        return switch_words(folder, collection.switch) if collection is not None and collection.switch else ""

    @property
    def evaluates_first(self) -> bool:
        """Whether an offline run begins to collect now, and is judged as it is before that."""
        collection = self._collection
        return collection is not None and 0 < collection.switch == self.trainer.global_step and not collection.rounds

    def check_data(self, replay: Replay) -> None:
        """Refuse observations and actions of kinds that the method does not declare to take (DataError)."""
        check_suits(replay, type(self).__name__, discrete=self.takes_discrete_actions, images=self.takes_images)

    def on_bind(self, bound: BoundView) -> None:
        """Called when the data lie on the device, and again whenever they changed: the place for an index over them."""

    def _check_update(self, batch: Any) -> None:
        """What an update needs and fit has always; asked where a batch comes from outside."""
        self.check_built()
        if not self._optimizers and self.learning_rates():
            raise self.no_optimizers()
        draws = self.draws()
        missing = [name for name in draws if not hasattr(getattr(batch, "noise", None), name)]
        if missing:
            raise UsageError(
                f"the batch has no noise `{missing[0]}`; {type(self).__name__} needs {', '.join(draws)}. Take batches "
                "of `draw(t, k)`, or pass `noise=offpolicy.Noise(…)`."
            )
        check_rows(batch)

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
        self.updates = 0  # or those of a checkpoint, which is opened next
        self.common = CommonOptions.of(self.hparams)
        if self.seed is None:
            self.seed = int(self.trainer.strategy.broadcast(torch.initial_seed())) % (1 << 63)
        self.check_data(data.replay)
        replay = self.select(data.replay)
        self.data_meta, self.data_fingerprint = dict(data.replay.meta), data.replay.fingerprint()
        self.initialize(Sizes.of(replay))
        self.constant_rates = self._collection is not None and self._collection.switch > 0
        self.plan_rates(self.trainer.max_steps)
        self.trainer.precision_plugin.convert_module(self)  # before a checkpoint is loaded, so that it loses no digit
        self.fit_normalizer(replay)
        self.data_each = {} if self._collection is None else data_of_seeds(self, self._collection)

    def fit_normalizer(self, replay: Replay) -> None:
        """Statistics of the rows that training draws."""
        self.normalizer.fit(
            replay,
            self.view.rows(replay) if isinstance(self.view, TransitionView) else replay.rows,
            normalize_obs=self.common.normalize_obs,
            reward_transform=self.common.reward_transform,
            eps=self.common.obs_eps,
        )

    def prepare(self, replay: Replay | DataModule, seed: int = 0, *, max_steps: int | None = None) -> Self:
        """Ready for :meth:`run_block` without a Trainer: networks, normaliser, optimisers, data. Returns self.

        Args:
            replay: the data; of a data module the replay that it opens.
            seed: of weights, batches and noise, unless ``seeds`` are set.
            max_steps: updates to be made, ≥ 1, over which learning rates with ``lr_decay_steps=None`` fall. Without it
                such rates stay constant, and a warning says so.
        """
        if max_steps is not None:
            check_range("max_steps", max_steps, 1)
        self.common = CommonOptions.of(self.hparams)
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
        self.has_dropout = any(map(has_dropout, self.modules()))
        self.bind(chosen)
        if self.device.type == "cpu":
            keep_freed_memory()  # as a fit does
        return self

    def on_fit_start(self) -> None:
        trainer = self.trainer
        if trainer.max_steps < 1:
            raise UsageError("the Trainer has no `max_steps`; expected the number of updates, e.g. max_steps=10000.")
        if self.common.batch_size % self.world_size:
            raise UsageError(
                f"`batch_size` is {self.common.batch_size}; expected a multiple of the {self.world_size} "
                "processes, as it is the size of the global batch."
            )
        self.warn_of_rates_at_0(trainer.max_steps)
        self.apply_settings()
        if self.run.compile is True:
            self._compile_losses()
        self.meter.to(self.device)
        self.has_dropout = any(map(has_dropout, self.modules()))
        self._cuts = self._intervals()
        self._bind_newest()

    def _compile_losses(self) -> None:
        names = self.compiled
        if names is None:
            names = tuple(n for n in dir(type(self)) if n.endswith("_loss") and callable(getattr(self, n)))
        for name in names:
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False))
            self._undo.callback(partial(delattr, self, name))

    def _intervals(self) -> set[tuple[int, int]]:
        """Every interval, in updates, at which a block must end, and the update that it is counted from."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        found = {(n, 0) for n in (self.run.log_every, self.eval_every, self.save_every)}
        found |= {(save_interval(callback), 0) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        found.add((getattr(data, "change_every", 0), getattr(data, "change_from", 0)))
        return {(n, start) for n, start in found if isinstance(n, int) and n > 0}

    def bind(self, replay: Replay) -> None:
        """Put the episodes that are trained on where batches are gathered from."""
        bound = self.view.bind(replay, self.normalizer, self.device)
        if SHARE in replay.meta and bound.cumulative is None:
            raise UsageError(
                f"{type(self.view).__name__} draws all rows alike; expected a view that keeps the synthetic share. "
                "Pass `mixture_weights(replay, rows)` to its BoundView, or take --data.synthetic.share 1."
            )
        self._take_bound(bound)

    def _take_bound(self, bound: BoundView) -> None:
        """Draw batches from a view from now on."""
        self.bound = bound
        self.on_bind(bound)
        self._counters, self._blocks = Counters(self._drawn_seeds(), self.bound.device), Blocks(self)
        self._compiled = CompiledUpdates(self) if self.run.compile == "update" else None

    def _drawn_seeds(self) -> int | list[int]:
        return list(self.seeds) if self.seeds else self.seed or 0

    def configure_optimizers(self) -> list[Optimizer]:
        found = super().configure_optimizers()
        for optimizer in found:
            optimizer.register_load_state_dict_post_hook(self._forget_graphs)
        self._forget_graphs()
        return found

    @property
    def one_by_one(self) -> str:
        """Why updates are made one by one, not as CUDA graphs; empty where they are graphs, or run as one would."""
        return "no data are bound" if self._blocks is None else self._blocks.reason

    def _forget_graphs(self, *_: Any) -> None:
        """Tensors that graphs know have been replaced."""
        for repeated in (self._blocks, self._compiled):
            if repeated is not None:
                repeated.forget()

    @property
    def bound_rows(self) -> Tensor:
        """The rows of the replay that batches are drawn from, int64, once the data are bound."""
        assert self.bound is not None
        return self.bound.row(torch.arange(len(self.bound), device=self.bound.device))

    def _bind_newest(self) -> None:
        """Bind the Trainer's data, again whenever they have changed."""
        several = self._collection.stores if self.seeds and self._collection is not None else []
        replays = several or [self.trainer.datamodule.replay]  # type: ignore[attr-defined]
        version = [(id(replay), replay.version) for replay in replays]  # the last round may bring rows to some alone
        if self.bound is None or version != self._bound_version:
            chosen = list(map(self.select, replays))
            if not self._grows(chosen):
                if several:
                    self._take_bound(SeedViews([self.view.bind(one, self.normalizer, self.device) for one in chosen]))
                else:
                    self.bind(chosen[0])
            self._bound_version = version

    @property
    def has_index(self) -> bool:
        """Whether the method keeps an index over the data (:meth:`on_bind`)."""
        return type(self).on_bind is not OfflineModule.on_bind

    def _grows(self, replays: list[Replay]) -> bool:
        """Whether what is bound took up what the data have gained, so that graphs and compiled code stay.

        Not where a method has an index over the data (:meth:`on_bind`).
        """
        if self.has_index or self.bound is None:
            return False
        return self.bound.grow_each(replays) if isinstance(self.bound, SeedViews) else self.bound.grow(replays[0])

    def teardown(self, stage: str) -> None:
        self.restore_settings()
        self.bound = self._blocks = self._compiled = self._counters = None

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
        return self.watchers()

    def measurement(self) -> Callback:
        return Evaluation()

    def describe(self) -> Description:
        data, meta, sizes = self.trainer.datamodule, self.data_meta, self.sizes  # type: ignore[attr-defined]
        renewal, collection = getattr(data, "renewal", None), getattr(data, "collection", None)
        replay = data.replay if renewal is None else renewal.real
        found = f"{amount(replay.num_steps, 'step')} in {amount(replay.num_episodes, 'episode')}"
        limits = f", {sizes.max_steps} steps at most" if sizes.max_steps else ""
        size = self.common.batch_size
        batch = f"batch size {size}"
        if self.bound is not None and renewal is None and collection is None:
            epochs = self.trainer.max_steps * size / self.bound.count
            batch += f", {epochs:,.0f} epochs" if epochs >= 10 else f", {epochs:.2g} epochs"
        episodes, env, tasks = self.run.eval_episodes, meta.get("env_id"), meta.get("tasks")
        each = f" for each of {tasks} goals" if tasks else ""
        each += f" by each of {len(self.seeds)} seeds" if self.seeds else ""
        return Description(
            facts=[
                ("data", f"{found}{limits} ({origin(meta)})"),
                ("sizes", f"observation {sizes.obs_dim}, action {sizes.action_dim}, {num_trained(self):,} parameters"),
                *([] if renewal is None else renewal.facts(self.trainer.max_steps)),
                *([] if collection is None else collection.facts()),
                *self._facts_of_rates(),
                *([] if self._blocks is None else self._blocks.facts()),
                *([] if self._compiled is None else [("compile", self._compiled.fact())]),
            ],
            batch=batch,
            evaluates=f"{amount(episodes, 'episode')} of {env}{each}" if episodes and env else "",
            notes=compile_advice(self, self.trainer.max_steps - self.updates),
            look=EVALUATE if env or type(self).policy is ActingModule.policy else EXPORT,
        )

    def _facts_of_rates(self) -> list[tuple[str, str]]:
        """What becomes of rates that fell in the offline part of a run."""
        fell = [name for name, rate in self.learning_rates().items() if self.constant_rates and callable(rate)]
        told = ", ".join(f"{name} {self.rates()[name]:g}" for name in fell)
        return [("rates", f"{told}, constant from here on")] if fell else []

    # -- Lightning: the loop -------------------------------------------------------------------------------------------

    def block_length(self, t: int) -> int:
        """Updates until the next interval ends, at most ``run.block``; a function of the update count alone."""
        return min([self.run.block, self.trainer.max_steps - t, *(n - (t - start) % n for n, start in self._cuts)])

    def draw(self, t: int, k: int) -> list[Any]:
        """The batches of updates t + 1 … t + k: this process's rows of each, with their noise."""
        self._count_from(t)
        return self._next_batches(k)

    def _count_from(self, t: int) -> None:
        """Tell the device how many updates there have been, and of which seeds."""
        if self.bound is None or self._counters is None:
            raise UsageError(
                f"{type(self).__name__} has no data to draw batches from; expected them to be laid out. Call "
                "`prepare(replay)` first."
            )
        if self._counters.given != self._drawn_seeds():
            self._counters = Counters(self._drawn_seeds(), self.bound.device)
            self._forget_graphs()
        self._counters.updates.fill_(t)

    def _next_batches(self, k: int) -> list[Any]:
        assert self.bound is not None and self._counters is not None
        local = self.common.batch_size // self.world_size
        first = self.process_rank * local
        return draw_batches(
            self.bound,
            self.draws(),
            self._counters.seeds,
            updates=self._counters.numbers(k),
            rows=range(first, first + local),
            device=self.device,
            dtype=self.normalizer.obs_scale.dtype,
        )

    def run_block(self, t: int, k: int) -> None:
        """Updates t + 1 … t + k, without any reading of values back to the host."""
        self._count_from(t)
        assert self._blocks is not None
        with self.planned_rates(t, k):
            self._blocks.run(t, k)
        self._updates = t + k

    def run_updates(self, t: int, k: int) -> None:
        """The updates of a block, one by one. All that changes from block to block is a tensor in its place.

        Args:
            t: updates made before, which stand in the counters too.
            k: updates to make.
        """
        self._in_block, compiled = True, self._compiled
        try:
            with fresh_casts():
                for step, batch in enumerate(self._next_batches(k), t + 1):
                    if self.has_dropout:
                        seed_dropout(self.seed or 0, step, self.process_rank)
                    self.meter.add(self.update(batch, step) if compiled is None else compiled.run(batch, step))
        finally:
            self._in_block = False

    @divergence.named
    def training_step(self, tick: Any, _: int) -> None:
        t = self.global_step
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        change_every = getattr(data, "change_every", 0)
        if change_every and (t - getattr(data, "change_from", 0)) % change_every == 0:
            self.check_finite()  # before the data are changed by the policy
            self.stop_clock(wait=True)
            data.on_block_start(self)
            self._bind_newest()
        k = self.block_length(t)
        self._watch.start()
        self.run_block(t, k)
        count_updates(self.trainer, k)
        self._watch.updates += k
        self.stop_clock()
        if (t + k) % self.run.log_every == 0 or t + k == self.trainer.max_steps:
            self._write_row(t + k)

    def stop_clock(self, wait: bool = False) -> None:
        self._watch.stop(self.device, wait)

    def _write_row(self, updates: int) -> None:
        """One row of metrics: means since the last row, read back once."""
        self.stop_clock(wait=True)
        means = self.meter.read(self.mean_over_processes)
        row: dict[str, Any] = {k if k.startswith("synthetic/") else f"train/{k}": v for k, v in means.items()}
        if self._collection is not None:
            row |= self._collection.row(updates, self._watch.seconds)
        row |= {"perf/updates_per_s": self._watch.read(), "perf/peak_memory_mb": peak_memory(self.device)}
        self.log_row({"step": updates, **row}, updates)

    @property
    def _collection(self) -> Collection | SeedCollections | None:
        """What collects data in this run, if anything does."""
        return getattr(self.trainer.datamodule, "collection", None)  # type: ignore[attr-defined]

    def facts_of_update(self) -> dict[str, float]:
        return {} if self._collection is None else wide_row(self._collection.counts(), self.seeds)


__all__ = ["Draw", "Metrics", "OfflineModule", "Rate", "Sizes"]  # what the file of a method needs
