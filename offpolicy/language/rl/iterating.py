"""The iterations of a method that learns from its own answers, and the optimiser steps of each, in their order.

A map of the files is in :mod:`offpolicy.language.rl.rollouts`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from offpolicy.compute import processes
from offpolicy.data.replay import Replay
from offpolicy.data.texts import rollouts as store_of
from offpolicy.data.texts.replaying import Recent
from offpolicy.data.texts.rollouts import BoundRollouts, Rollouts
from offpolicy.language.head import output_weight
from offpolicy.language.optimisers import trial_move
from offpolicy.language.reference import evaluating
from offpolicy.language.rl.advantages import from_groups, left_out_facts
from offpolicy.language.rl.ahead import Ahead, mean_age
from offpolicy.language.rl.answering import Stopped
from offpolicy.language.rl.drawing import DrawingModule
from offpolicy.language.rl.forward import Forward
from offpolicy.language.rl.iteration import Course, Shape, replayed_now, sweeps_of
from offpolicy.language.rl.records import Recorder
from offpolicy.language.rl.scoring import Scoring
from offpolicy.language.rl.tempering import with_tempered
from offpolicy.language.rl.tokens import batch_tokens
from offpolicy.language.rl.trial import limited, unknown_shift, wants_trial
from offpolicy.language.rl.whole_step import WholeStep, pieces
from offpolicy.language.rl.window import unfinished_rows
from offpolicy.language.sharding import gathered_model
from offpolicy.losses.policy_gradient import Objective, Tokens, Totals
from offpolicy.training import divergence


class IteratingModule(DrawingModule):
    """The loop of iterations; methods extend :class:`offpolicy.RolloutModule`, which has the options too.

    Attributes:
        objective: what is learned.
        ahead: what is asked for iterations to come, once there are data.
        passes: through the policy, once it is on its device.
        scoring: scores under earlier weights, once the policy is on its device.
        whole_step: what is known of the step that is being made, once the policy is on its device.
        course: where the run stands.
    """

    objective: Objective
    critic: Any
    replay_rule: Recent

    def prepare_state(self) -> None:
        self.course = Course()
        self.ahead: Ahead = None  # type: ignore[assignment]
        self.passes: Forward = None  # type: ignore[assignment]
        self.scoring: Scoring = None  # type: ignore[assignment]
        self.whole_step: WholeStep = None  # type: ignore[assignment]
        self._recorder: Recorder | None = None
        self._saved = 0.0  # when a checkpoint was last written

    # -- what the child tells ------------------------------------------------------------------------------------------

    @property
    def shape(self) -> Shape:
        """Groups and steps of an iteration."""
        raise NotImplementedError(f"{type(self).__name__} must define shape.")

    def mixture(self, iteration: int) -> tuple[float, int]:
        """Share of replayed answers, and sweeps, of an iteration (from 1)."""
        raise NotImplementedError(f"{type(self).__name__} must define mixture(iteration).")

    def before_iteration(self, iteration: int, store: Replay | None) -> Replay | None:
        """What is left of the store of answers when an iteration begins; also the place to move the base."""
        raise NotImplementedError(f"{type(self).__name__} must define before_iteration(iteration, store).")

    def extended(self, store: Replay, iteration: int) -> tuple[Replay, dict[str, float]]:
        """The store with what a method adds to it before the steps of an iteration are planned, and facts on that."""
        return store, {}

    # -- where a run stands --------------------------------------------------------------------------------------------

    @property
    def iteration(self) -> int:
        """The iteration whose steps are being made, from 1; 0 before the first."""
        return self.course.iteration

    @property
    def generated(self) -> int:
        """Answers written so far."""
        return self.course.generated

    @property
    def problems(self) -> Replay:
        """What the policy is asked."""
        return self.answering.problems

    # -- an iteration --------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        self._saved = time.monotonic()
        store = self.trainer.datamodule.rollouts  # type: ignore[attr-defined]
        self._recorder = None
        if self.hparams.record and self.trainer.is_global_zero:
            self._recorder = Recorder(Path(self.trainer.default_root_dir) / "records.jsonl", self.iteration)
        self.course.lay_out([], None)
        if store is not None and self.iteration:  # a checkpoint stopped in the middle of an iteration
            old = replayed_now(store, self.iteration, self.shape, self.seed or 0, self.replay_rule)
            self.course.lay_out(self._plan_steps(store, self.iteration, old), BoundRollouts(self.problems, store))

    def on_train_end(self) -> None:
        super().on_train_end()
        if not self.interrupted_by:
            self.answering.check_rewards()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        super().on_train_batch_start(batch, batch_idx)
        if not self.course.is_over(self.global_step):
            return None
        self.check_finite()  # before answers are drawn
        try:
            self.trainer.datamodule.on_block_start(self)  # type: ignore[attr-defined]
        except Stopped:
            return self.stop_drawing()
        return None

    def roll_out(self, store: Replay | None) -> Replay:
        """The store of answers for the next iteration: fresh answers, and answers of earlier iterations that may stay.

        Raises:
            Stopped: the user wants to stop; nothing has changed.
        """
        k, began, course, shape = self.iteration + 1, time.perf_counter(), self.course, self.shape
        seed, ahead = self.seed or 0, self.ahead
        fraction, sweeps = self.mixture(k)
        ahead.collect()  # before the engine gets other weights
        with evaluating(self.model), self.precision_context(), gathered_model(self.model), gathered_model(self.critic):
            self.answering.sync(self.model, k)
            carried = [] if self.answering.window is None else unfinished_rows(store, k, self.answering.length)
            store = self.before_iteration(k, store)
            wanted = min(shape.replayed(fraction), shape.groups - ahead.groups_of(k))
            draw = partial(self.replay_rule.drawn, count=wanted, sweeps=sweeps, seed=seed, iteration=k)
            store, old = self.scoring.admit(self.problems, store, draw, k, least=self.hparams.min_ess if wanted else 0)
            groups = shape.groups - len(old[0]) - len(carried)
            stop = self.wants_to_stop, self.on_any_process
            seen = course.problems_seen + ahead.groups

            def ask_ahead(extra: int) -> None:
                late = ahead.plan(k, self.hparams.lag, groups, course.problems_seen + extra, store, shape)
                ahead.ask(late, stop)

            drawn = ahead.answers(k, stop), ask_ahead
            fresh, facts, asked, written, tempered = self.answering.fresh(
                k, groups - ahead.groups_of(k), seen, seed, stop, *drawn, carried
            )
            ahead.drop(k)
            if not self.objective.uses_critic:
                fresh, injected = self.replay_rule.completed(fresh, store)
                facts |= {} if self.replay_rule.draws else {"replay/injected": float(injected)}
                told = self.scoring.told(BoundRollouts(self.problems, fresh), k)
                columns, said = from_groups(self.objective, fresh, k, told, self.answering.filters)
                fresh.episodes.update(columns)
                facts |= left_out_facts(fresh) | said
                if self.answering.correction is not None:
                    fresh.steps["advantage"] = self.answering.correction.advantages(fresh, k)
                fresh = fresh if self.answering.tempering is None else with_tempered(fresh, tempered)
            store, said = self.extended(store_of.merged_answers(store, fresh), k)
            facts |= said
            steps = self._plan_steps(store, k, sweeps_of(old, len(old[0]) > 0, fraction))
            bound = BoundRollouts(self.problems, store)
            store = self.scoring.score(bound, steps, k, base=self._wants_base(len(steps)))
        store.version = k
        course.problems_seen, course.generated = course.problems_seen + asked, course.generated + written
        course.iteration, course.first_step = k, self.global_step
        course.lay_out(steps, BoundRollouts(self.problems, store))
        if self.hparams.lag or ahead.asked:
            facts |= ahead.facts() | {"engine/version_lag": mean_age(fresh)}
        course.note(facts | {"answers/fresh": float(written), "perf/rollout_seconds": time.perf_counter() - began})
        return store

    def _wants_base(self, steps: int) -> bool:
        """Whether somebody asks in the next steps what the base thinks: the objective, or a row of metrics."""
        now = self.global_step
        row = any(map(self.writes_row, range(now + 1, now + 1 + steps)))
        return "base_logp" in self.objective.reads or (self.hparams.base_kl and row)

    def _plan_steps(self, store: Replay, k: int, old: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The rows of each optimiser step of an iteration."""
        return store_of.steps_of(
            store,
            old,
            minibatches=self.hparams.minibatches,
            seed=self.seed or 0,
            iteration=k,
            drop_duplicates=self.hparams.drop_duplicates,
            used=self.replay_rule.used(store),
        )

    # -- a step --------------------------------------------------------------------------------------------------------

    @divergence.named
    def training_step(self, tick: Any, batch_idx: int) -> Tensor:
        t, j = self.global_step, self.micro.current
        bound, rows = self.course.rollouts, self.course.rows(t)
        assert bound is not None
        mine = self._mine(rows)
        split = len(mine) * self.world_size > 1
        if j == 0:
            self.begin_step()
            self.whole_step.forget()
            if self.objective.sees_step and split:
                self._look_at_step(rows, mine)
            if wants_trial(self.objective):
                self._try_step(rows, mine)
        loss, sums, batch, tokens, real = self._loss(rows, mine[j], split=split)
        share = torch.full_like(loss, len(mine[j]) / max(1, len(rows))).detach()
        if real and self.course.begins(t):
            self.scoring.hear(batch, tokens.logp)
        self.meter.add({"loss": torch.stack([loss.detach(), share]).double(), **sums})
        self.pace.tokens += int(bound.lengths[mine[j]].sum()) if real else 0
        self.end_micro_batch()
        return loss * (len(mine) * self.world_size)  # Lightning takes the mean over micro-batches and processes

    def _loss(
        self, rows: np.ndarray, some: np.ndarray, *, split: bool
    ) -> tuple[Tensor, dict[str, Tensor], Rollouts, Tokens, bool]:
        """The share of a micro-batch in the loss of a step, its sums for the metrics, and what they are of.

        Args:
            rows: of the step.
            some: of the micro-batch.
            split: whether that is not the step.
        """
        assert self.course.rollouts is not None
        padded = int(self.course.rollouts.store.length[rows].max(initial=1))
        counted, finished = (int(tokens[rows].sum()) for tokens in (self.course.counted, self.course.whole))
        totals = Totals(max(1, len(rows)), counted, self.answering.turns * self.answering.length, padded, finished)
        batch, tokens, real = self._micro_batch(some)
        if self.objective.sees_step and not split and self.whole_step.facts is None:
            seen, whole = [(batch.row.numpy(), tokens)], rows if real else self._filler
            self.whole_step.look(seen, whole, iteration=self.iteration, device=self.passes.device)
        facts = self.whole_step.of(batch.row.numpy(), tokens.mask.shape[1])
        return *self.objective.loss(tokens, totals, iteration=self.iteration, facts=facts), batch, tokens, real

    def _mine(self, rows: np.ndarray) -> list[np.ndarray]:
        """The rows of each micro-batch of this process."""
        assert self.course.rollouts is not None
        group, world = self.course.rollouts.store.episodes["group"], self.world_size
        cut = pieces(rows, group, self.micro.number * world, whole=self.objective.whole_groups)
        return cut[self.process_rank :: world]

    def _micro_batch(self, rows: np.ndarray) -> tuple[Rollouts, Tokens, bool]:
        """A micro-batch, what the objective sees of it, and whether it is one or only fills up."""
        bound, real = self.course.rollouts, len(rows) > 0
        assert bound is not None
        self.seed_dropout(self.process_rank)
        batch = self.passes.gather(bound, rows if real else self._filler)
        return batch, self.tokens(batch, real), real

    @property
    def _filler(self) -> np.ndarray:
        """A row for a batch that only fills up: the last of the step, or any where all of them are left out."""
        rows = self.course.rows(self.global_step)
        return rows[-1:] if len(rows) else np.zeros(1, np.int64)

    @torch.no_grad()
    def _look_at_step(self, rows: np.ndarray, mine: Sequence[np.ndarray]) -> None:
        """Compute a step once without gradient, for what must be known of all of it before the first gradient."""
        seen = []
        for j, some in enumerate(mine):
            self.micro.current = j  # dropout is that of the micro-batch
            batch, tokens, real = self._micro_batch(some)
            seen += [(batch.row.numpy(), tokens)] if real or not len(rows) else []
        self.micro.current = 0
        torch.clear_autocast_cache()  # weights that were rounded here have no gradient
        rows = rows if len(rows) else self._filler
        self.whole_step.look(seen, rows, iteration=self.iteration, device=self.passes.device)

    def _try_step(self, rows: np.ndarray, mine: Sequence[np.ndarray]) -> None:
        """Find how the optimiser would move the output layer if all tokens of the step counted.

        Gradients of other weights are taken where their norm is limited, and otherwise only what the output layer needs
        of them where it is the embedding too.
        """
        optimizer: Any = self.trainer.optimizers[0]
        weight, limit = output_weight(self.model), self.trainer.gradient_clip_val
        others = [p for group in optimizer.param_groups for p in group["params"] if p is not weight] if limit else []
        gradients = [torch.zeros_like(p) for p in (weight, *others)]
        for j, some in enumerate(mine):
            self.micro.current = j  # dropout is that of the micro-batch
            loss = self._loss(rows, some, split=len(mine) * self.world_size > 1)[0]
            found = torch.autograd.grad(loss, (weight, *others), allow_unused=True)
            for total, one in zip(gradients, found, strict=True):
                total += 0.0 if one is None else one
        self.micro.current = 0
        torch.clear_autocast_cache()
        move = trial_move(optimizer, weight, limited([processes.sum_over_processes(g) for g in gradients], limit))
        factor = self.whole_step.factor  # both optimisers move in proportion to their rate
        self.whole_step.move = move if factor is None else move * factor

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.meter.add(self.whole_step.take_rate(optimizer.param_groups))
        super().on_before_optimizer_step(optimizer)
        if self.whole_step.skips:
            optimizer.zero_grad(set_to_none=True)  # what has no gradient is not moved, nor its moments
        self.objective.own.check_memory()
        if self.course.begins(self.global_step):
            rollouts = self.course.rollouts
            assert rollouts is not None
            self.scoring.keep(rollouts.store, self.iteration)
            if self._recorder is not None:
                self._recorder.write(self.problems, rollouts.store, self.iteration)

    def tokens(self, batch: Rollouts, real: bool = True) -> Tokens:
        """What the objective sees of a batch of answers; all of it padding unless ``real``."""
        objective, passes = self.objective, self.passes
        scores = passes.scores(
            batch,
            entropy=True,
            entropy_gradient=objective.entropy_gradient,
            others=self.scoring.others(batch),
            vocabulary=bool(objective.reads & {"top_logp", "mean_log_ratio"}),
            nucleus=objective.nucleus,
            move=self.whole_step.move,
        )
        if wants_trial(objective) and self.whole_step.move is None:
            scores = scores._replace(**unknown_shift(scores.logps.detach()))
        return batch_tokens(
            batch,
            scores,
            passes.values(batch, scores) if "value" in objective.reads else None,
            iteration=self.iteration,
            first=self.course.begins(self.global_step),
            real=real,
            demonstrations=bool(self.hparams.demonstrations),
            columns=objective.columns,
            uniform=(self.seed or 0, self.global_step) if "uniform" in objective.reads else None,
        )

    # -- metrics, files, stopping --------------------------------------------------------------------------------------

    def progress(self, updates: int) -> dict[str, float]:
        facts = self.course.read()
        named = {(name if name.startswith("perf/") else f"train/{name}"): value for name, value in facts.items()}
        passes = self.course.problems_seen / len(self.problems.tables["problems"])
        return named | {
            "train/iteration": float(self.iteration),
            "train/answers": float(self.generated),
            "train/epoch": passes,
        }

    def wants_checkpoint(self) -> bool:
        """Whether the weights should be on disk before what comes next: answers are drawn after this step."""
        if not self.course.is_over(self.global_step) or self.global_step >= self.trainer.max_steps:
            return False
        wanted = time.monotonic() - self._saved >= self.hparams.save_seconds
        return bool(self.trainer.strategy.broadcast(wanted))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self._saved = time.monotonic()
