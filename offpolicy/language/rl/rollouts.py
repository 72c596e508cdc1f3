"""What a method inherits that lets a language model learn from its own answers.

Training goes in iterations. At the start of one the policy π_k answers new problems, answers of earlier iterations are
drawn from the store, and all of them are scored under π_k (and the base of the divergence); then come ``sweeps`` times
``minibatches`` optimiser steps. ``max_steps`` counts optimiser steps; iterations have a count of their own, which
schedules of the papers follow.

Everything is a function of (seed, iteration) and the weights at its start, and every process holds the whole store, so
a run goes on exactly from anywhere, and two processes learn what one does.

Where it is told, in the order of an iteration::

    iteration.py   how many groups are fresh and replayed, which rows each step takes, where the run stands
    answering.py   the policy answers problems, by an engine (engines.py), and rewards.py judges the answers
    advantages.py  rewards become the advantage of an answer, or by a critic (critic.py) of a token
    scoring.py     log-probabilities of the answers under π_k and the base, and which old answers may stay
    objective.py   the parts of the loss, with those that the user names in their place
    rollouts.py    ``roll_out`` puts these in their order; ``tokens`` hands a step its micro-batch

How a token gets its advantage: the formula is in ``losses/advantages.py``, ``advantages.py`` applies it to the answers
of an iteration, and ``RolloutModule.tokens`` below gives it to the loss (``losses/policy_gradient.py``).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offpolicy.compute import processes
from offpolicy.data.module import DataModule
from offpolicy.data.replay import Replay
from offpolicy.data.texts import rollouts as store_of
from offpolicy.data.texts.problems import ProblemData
from offpolicy.data.texts.rollouts import DEMONSTRATION, OWN, BoundRollouts, Rollouts
from offpolicy.data.texts.sequences import spread
from offpolicy.errors import DataError, UsageError, check_range
from offpolicy.language import policy as policies
from offpolicy.language.checks import check_tokens
from offpolicy.language.head import TokenScores, score_tokens
from offpolicy.language.layout import Layout, group_layout
from offpolicy.language.meters import SumMeter
from offpolicy.language.module import LanguageModule
from offpolicy.language.reference import evaluating
from offpolicy.language.rl.advantages import from_groups
from offpolicy.language.rl.answering import Answering, Stopped, problem_texts
from offpolicy.language.rl.critic import CRITICS, Critic
from offpolicy.language.rl.iteration import Course, Shape, check_groups, replayed_now, sweeps_of
from offpolicy.language.rl.objective import composed
from offpolicy.language.rl.records import Recorder
from offpolicy.language.rl.scoring import Scoring
from offpolicy.language.rl.solving import solve
from offpolicy.losses.policy_gradient import Objective, Tokens, Totals
from offpolicy.training import divergence
from offpolicy.training.description import Description
from offpolicy.training.lightning_private import trainer_of

log = logging.getLogger(__name__)
LANE = 1024  # tokens of a prompt with several answers behind it: attention to more costs what the prompt saves


class RolloutModule(LanguageModule):
    """Base of methods that improve a language model on problems with answers that can be checked.

    A method is an :class:`Objective` (its ``preset``), and what it makes of old answers: :meth:`mixture`.

    Args:
        objective: slot → component in place of the method's own: ``{"trust": "none"}``, ``{"ratio": {"name": "mis",
            "uniform": "one"}}``, or an import path of one's own component; the slots are those of
            :class:`offpolicy.losses.policy_gradient.Objective`.
        rewards: names (exact, math, final_number, format, length), import paths ``package.module.function`` or
            ``{"name": …, "weight": …}``; their weighted sum is the reward. None is "math" where solutions mark the
            answer by "####" or \\boxed{}, else "exact". An own function is ``def f(prompt, answer, reference)`` and
            returns a number, or ``def f(prompts, completions, **kwargs)`` and returns a list; columns of the data are
            given to parameters of their name.
        reward_seconds: longest time a reward may take for one answer, ≥ 0; then it is interrupted and scores 0. 0 is no
            limit.
        group_size: answers per problem, ≥ 1, a demonstration included.
        minibatches: optimiser steps per sweep, ≥ 1; an iteration has ``batch_size · minibatches`` answers.
        sweeps: times that an iteration goes over its answers, ≥ 1.
        iterations: iterations in all, used when no ``max_steps`` are given; None for ``epochs`` over the problems.
        max_new_tokens: longest answer in tokens, ≥ 1.
        temperature: of sampling, > 0; log-probabilities in training are at the same.
        engine: who writes the answers: "transformers" (with a cache), "tiny" (without), "replay" (from ``records``), or
            an import path ``package.module.Class``.
        records: file of the engine "replay".
        record: write the answers of every iteration to ``records.jsonl`` in the folder of the run, for that engine.
        generation_batch: answers drawn at once by one process, ≥ 1. Does not change the result.
        replay_fraction: share of an iteration's answers that are drawn from earlier iterations, in [0, 1).
        replay_window: iterations back from which they may come, ≥ 0; older answers are forgotten.
        min_ess: answers of an iteration are forgotten once their effective sample size under π_k, as a share of their
            number, is below this, in [0, 1].
        drop_duplicates: leave out replayed answers that repeat another one of their group.
        demonstrations: answers of each group that are demonstrations of the data, where there is one: 0 or 1.
        base_kl: measure the divergence from the base at every row of metrics even where the loss does not need it.
        eval_samples: answers per held-out problem for mean@k and pass@k, ≥ 0; 0 for the most likely answer alone.
        save_seconds: before answers are drawn, a checkpoint is written unless one is younger than this, so that a run
            that is killed loses less than this beside the answers themselves; ≥ 0.
        critic: of objectives with one: "model", a decoder of its own that starts as the policy's, or "head", two layers
            on the policy's last states.
        critic_lr: its learning rate.
        lr: peak learning rate of AdamW.
        lr_schedule: "constant", or "cosine" or "linear" decay.
        warmup_ratio: part of the steps in which the rate rises from 0.
    """

    preset: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        *,
        objective: dict[str, Any] | None = None,
        rewards: list[Any] | None = None,
        reward_seconds: float = 10.0,
        group_size: int = 8,
        minibatches: int = 1,
        sweeps: int = 1,
        iterations: int | None = None,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        engine: str = "transformers",
        records: str | None = None,
        record: bool = False,
        generation_batch: int = 256,
        replay_fraction: float = 0.0,
        replay_window: int = 0,
        min_ess: float = 0.0,
        drop_duplicates: bool = False,
        demonstrations: int = 0,
        base_kl: bool = True,
        eval_samples: int = 4,
        save_seconds: float = 5.0,
        critic: str = "model",
        critic_lr: float = 1e-5,
        lr: float = 1e-6,
        lr_schedule: str = "constant",
        warmup_ratio: float = 0.0,
        **language: Any,
    ) -> None:
        super().__init__(lr=lr, lr_schedule=lr_schedule, warmup_ratio=warmup_ratio, **language)
        for name, value, low in (
            ("group_size", group_size, 1),
            ("minibatches", minibatches, 1),
            ("sweeps", sweeps, 1),
            ("iterations", 1 if iterations is None else iterations, 1),
            ("max_new_tokens", max_new_tokens, 1),
            ("generation_batch", generation_batch, 1),
            ("replay_window", replay_window, 0),
            ("eval_samples", eval_samples, 0),
            ("save_seconds", save_seconds, 0),
            ("reward_seconds", reward_seconds, 0),
        ):
            check_range(name, value, low)
        check_range("temperature", temperature, 0.0, lower_open=True)
        check_range("replay_fraction", replay_fraction, 0.0, 1.0, upper_open=True)
        check_range("min_ess", min_ess, 0.0, 1.0)
        check_range("critic_lr", critic_lr, 0.0)
        if critic not in CRITICS:
            raise UsageError(f"`critic` is '{critic}'; expected one of {', '.join(CRITICS)}.")
        check_range("demonstrations", demonstrations, 0, 1)
        check_groups(self.hparams.batch_size, group_size, minibatches, replay_fraction, replay_window, demonstrations)
        if self.hparams.reference != "auto":
            raise UsageError(
                "`reference` is for preference methods; here the base is the policy as it was at its start. Leave it "
                "out."
            )
        self.save_hyperparameters()
        if type(self).parts is RolloutModule.parts:
            self.objective = self.compose()
        self.meter = SumMeter()
        self.critic: Any = None
        self.course = Course()
        self._recorder: Recorder | None = None
        self._saved = 0.0
        self.answering: Answering = None  # type: ignore[assignment]
        self.scoring: Scoring = None  # type: ignore[assignment]
        self.eval_problems: Replay | None = None

    # -- to be written by a method -------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Any]:
        """Slot → component of the method's objective; ``vocabulary`` is known once the policy is open."""
        return dict(self.preset)

    def compose(self) -> Objective:
        """The objective of the method's parts, with those of the option ``objective`` in their place.

        Raises:
            UsageError: a slot or component is not known, or they do not go together.
        """
        h = self.hparams
        return composed(self.parts(), h.objective or {}, group_size=h.group_size, words=self.words)

    @property
    def vocabulary(self) -> int:
        """Tokens the policy knows; 1 before it is open."""
        return 1 if self.model is None else policies.vocabulary_of(self.model)

    def mixture(self, iteration: int) -> tuple[float, int]:
        """Share of replayed answers, and sweeps, of an iteration (from 1)."""
        return self.hparams.replay_fraction, self.hparams.sweeps

    def before_iteration(self, iteration: int, store: Replay | None) -> Replay | None:
        """What is left of the store of answers when an iteration begins; also the place to move the base."""
        return store_of.recent(store, iteration - self.hparams.replay_window)

    # -- construction --------------------------------------------------------------------------------------------------

    @classmethod
    def data_class(cls) -> type[DataModule]:
        return ProblemData

    def _take_model(self, model: Any) -> None:
        super()._take_model(model)
        self.objective = self.compose()
        if self.objective.uses_critic and self.critic is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed or 0)
                self.critic = Critic(policies.base_of(model), self.hparams.critic)

    def copies(self) -> list[nn.Module]:
        decoder = getattr(self.critic, "decoder", None)
        return [] if decoder is None else [decoder]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.critic is not None:
            self.critic.train()
        if self.micro.number * self.world_size > 1:
            cut = f"{self.micro.number} micro-batches on {self.world_size} process(es)"
            self.objective.own.check_split(f"a step of this run is cut into {cut}")

    def configure_optimizers(self) -> Optimizer:
        optimizer = super().configure_optimizers()
        if self.critic is not None:
            scale = self.hparams.critic_lr / self.hparams.lr if self.hparams.lr else 0.0
            settings = {"lr": self.hparams.critic_lr, "weight_decay": 0.0, "lr_scale": scale}
            optimizer.add_param_group({"params": list(self.critic.parameters()), **settings})
        return optimizer

    @property
    def shape(self) -> Shape:
        """Groups and steps of an iteration."""
        h = self.hparams
        return Shape(h.batch_size, h.group_size, h.minibatches, h.replay_window, self.mixture)

    def planned_steps(self, data: DataModule) -> int | None:
        h = self.hparams
        if h.iterations:
            return next(islice((steps for steps, _ in self.schedule()), h.iterations - 1, None))
        wanted = math.ceil(h.epochs * len(data.load().tables["problems"]))
        return next(steps for steps, problems in self.schedule() if problems >= wanted)

    def schedule(self) -> Iterator[tuple[int, int]]:
        """Optimiser steps, and problems answered, after every iteration, as long as no answers are forgotten early."""
        return self.shape.schedule()

    def held_out(self) -> dict[str, float]:
        return {} if self.eval_problems is None else solve(self)

    def take_data(self, data: Any) -> None:
        h = self.hparams
        if self.trainer.strategy.__class__.__name__ == "FullySharded":
            raise UsageError("`trainer.strategy` is 'fsdp2', under which no answers can be drawn yet; expected 'ddp'.")
        if "problems" not in data.replay.tables:
            raise DataError(
                f"{data.replay.meta.get('name', 'the data')} holds no problems; expected prompts with answers that can "
                "be checked. Pass --data gsm8k, --data addition or a file."
            )
        problems = data.replay
        held_out = getattr(data, "eval_replay", None)
        self.eval_problems = held_out if held_out is not None and self.run.eval_episodes > 0 else None
        self.tokenizer = data.tokenizer if self.tokenizer is None else self.tokenizer
        self.answering = Answering(self, problems, self.tokenizer)
        if h.demonstrations and not (problems.tables["problems"][:, 1] >= 0).any():
            raise DataError(
                f"{type(self).__name__} learns from demonstrations, and {data.replay.meta.get('name', 'the data')} has "
                "none; expected a column `solution`. Name it with --data.columns, or choose GRPO."
            )

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

    def longest_row(self) -> int:
        return self.answering.open()

    def check_texts(self, replay: Any) -> None:
        check_tokens(replay, self.model, self.hparams.policy, "problems")

    def configure_model(self) -> None:
        if trainer_of(self) is None or not self.trainer.training or self.answering is None:
            return
        self.model.to(self.trainer.strategy.root_device)
        self.scoring = Scoring(self)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        return super().extra_state() | {
            **self.course.state_dict(),
            "objective": processes.gathered(self.objective.own.state_dict()),
            **({} if self.scoring is None else self.scoring.state_dict()),
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state(state)
        self.course.load_state_dict(state)
        parts = state.get("objective") or [{}]  # of each process; checkpoints of earlier versions have none
        without = self.objective.own.load_state_dict(parts[self.global_rank if self.global_rank < len(parts) else 0])
        if without:
            log.warning("The checkpoint has no state of the objective's %s, which begins anew.", ", ".join(without))
        if self.scoring is not None:
            self.scoring.load_state_dict({name: state.get(name) for name in ("base", "previous")})

    # -- what the first screen says ------------------------------------------------------------------------------------

    def describe(self) -> Description:
        h, meta, held_out = self.hparams, self.problems.meta, self.eval_problems
        shown = self.trainer.datamodule.options.get("show", 0)  # type: ignore[attr-defined]
        lengths = ", ".join(f"{role} {'/'.join(map(str, q))}" for role, q in meta.get("lengths", {}).items())
        return Description(
            facts=[
                ("problems", f"{meta.get('problems', 0):,}, {meta.get('demonstrations', 0):,} with a demonstration"),
                ("tokens", f"{lengths} (median/95 %/largest), answers up to {self.answering.length}"),
                ("reward", ", ".join(self.answering.rewards.names)),
                self.policy_fact(),
            ],
            batch=(
                f"{h.batch_size} answers; an iteration has {self.shape.answers}, {h.group_size} to a problem, and "
                f"{h.minibatches * h.sweeps} update{'s' if h.minibatches * h.sweeps > 1 else ''}"
            ),
            evaluates="" if held_out is None else f"{len(held_out.tables['problems']):,} held-out problems",
            notes=self.precision_notes(),
            samples=problem_texts(self.problems, self.tokenizer, shown),
            look="python -m offpolicy.evaluate {folder}, or offpolicy.export {folder} OUT [--merge]",
        )

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
            old = replayed_now(store, self.iteration, self.shape, self.seed or 0)
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
            return self._stop()
        return None

    def roll_out(self, store: Replay | None) -> Replay:
        """The store of answers for the next iteration: fresh ones, and those of earlier iterations that may stay.

        Raises:
            Stopped: the user wants to stop; nothing has changed.
        """
        k, began, course, shape = self.iteration + 1, time.perf_counter(), self.course, self.shape
        fraction, sweeps = self.mixture(k)
        self.answering.engine.sync(self.model, k)
        with evaluating(self.model), self.precision_context():
            store = self.before_iteration(k, store)
            store, old = self.scoring.admit(self.problems, store, shape.replayed(fraction), sweeps, k)
            groups = shape.groups - len(old[0])
            fresh, facts = self.answering.fresh(k, groups, course.problems_seen)
            if not self.objective.uses_critic:
                fresh.episodes["advantage"] = from_groups(self.objective, fresh)
            store = store_of.merged(store, fresh)
            steps = self._plan_steps(store, k, sweeps_of(old, len(old[0]) > 0, fraction))
            store = self.scoring.score(BoundRollouts(self.problems, store), steps, k)
        store.version = k
        written = int((fresh.episodes["source"] == OWN).sum())
        course.problems_seen, course.generated = course.problems_seen + groups, course.generated + written
        course.iteration, course.first_step = k, self.global_step
        course.lay_out(steps, BoundRollouts(self.problems, store))
        course.note(facts | {"answers/fresh": float(written), "perf/rollout_seconds": time.perf_counter() - began})
        return store

    def _plan_steps(self, store: Replay, k: int, old: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The rows of each optimiser step of an iteration."""
        return store_of.steps_of(
            store,
            old,
            minibatches=self.hparams.minibatches,
            seed=self.seed or 0,
            iteration=k,
            drop_duplicates=self.hparams.drop_duplicates,
        )

    # -- a step --------------------------------------------------------------------------------------------------------

    def forward_tokens(self, batch: Rollouts, **options: Any) -> TokenScores:
        """Scores of the tokens of a batch of answers, at the temperature of sampling."""
        layout = self.layout(batch)
        if torch.is_grad_enabled():
            self.pace.add_pass(layout.real_tokens, layout.input_ids.numel())
        h = self.hparams
        return score_tokens(self.model, layout, chunk=h.chunk, temperature=h.temperature, **options)

    def gather(self, bound: BoundRollouts, rows: np.ndarray) -> Rollouts:
        """The batch of these rows of the store; answers of a group stand behind one prompt where that is exact."""
        return bound.gather(rows, LANE if self.shared_prompt else 0)

    def layout(self, batch: Any) -> Layout:
        return group_layout(batch, self.pad_id).to(self.trainer.strategy.root_device)

    @divergence.named
    def training_step(self, tick: Any, batch_idx: int) -> Tensor:
        t, j = self.global_step, self.micro.current
        bound, rows = self.course.rollouts, self.course.rows(t)
        assert bound is not None
        if j == 0:
            self.begin_step()
        world, rank = self.world_size, self.process_rank
        mine = np.array_split(rows, self.micro.number * world)[j * world + rank]
        real = len(mine) > 0
        self.seed_dropout(rank)
        length = bound.store.length[rows]
        totals = Totals(len(rows), int(length.sum()), self.answering.length, int(length.max()))
        batch = self.gather(bound, mine if real else rows[-1:])
        tokens = self.tokens(batch, real)
        loss, sums = self.objective.loss(tokens, totals, iteration=self.iteration)
        share = loss.new_tensor(len(mine) / len(rows))
        if real and self.course.begins(t):
            self.scoring.hear(batch, tokens.logp, tokens.mask)
        self.meter.add({"loss": torch.stack([loss.detach(), share]).double(), **sums})
        self.pace.tokens += int(bound.lengths[mine].sum()) if real else 0
        self.end_micro_batch()
        return loss * (self.micro.number * world)  # Lightning takes the mean over micro-batches and processes

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.objective.own.check_memory()
        if self.course.begins(self.global_step):
            rollouts = self.course.rollouts
            assert rollouts is not None
            self.scoring.keep(rollouts.store, self.iteration)
            if self._recorder is not None:
                self._recorder.write(self.problems, rollouts.store, self.iteration)

    def tokens(self, batch: Rollouts, real: bool = True) -> Tokens:
        """What the objective sees of a batch of answers; all of it padding unless ``real``."""
        wanted, others = self.objective.reads, self.scoring.others(batch)
        scores = self.forward_tokens(
            batch, entropy=True, entropy_gradient=self.objective.entropy_gradient, others=others
        )
        device, length = scores.logps.device, batch.answer.length
        size, width = len(length), int(length.max())
        owner, column = spread(length)
        place = (owner * width + column).to(device)

        def padded(flat: Tensor) -> Tensor:
            return flat.new_zeros(size * width).index_put((place,), flat).view(size, width)

        steps = {k: padded(v.to(scores.logps)) for k, v in batch.steps.items()}
        facts = {k: v.to(device) for k, v in batch.facts.items()}
        external = (facts["source"] == DEMONSTRATION)[:, None].expand(size, width)
        advantage = steps["advantage"] if "advantage" in steps else facts["advantage"].to(scores.logps)
        behavior, previous, logp = steps["logp"], steps["previous_logp"], padded(scores.logps)
        if self.course.begins(self.global_step):  # its own log-probabilities, where nobody asked before
            behavior = torch.where(behavior.isnan() & ~external, logp.detach(), behavior)
            previous = torch.where(previous.isnan(), logp.detach(), previous)
        return Tokens(
            logp=logp,
            mask=padded(torch.full_like(scores.logps, float(real)).detach()),
            advantage=advantage,
            behavior_logp=behavior,
            previous_logp=previous,
            base_logp=steps.get("base_logp"),
            sampler_logp=torch.where(steps["sampler_logp"].isnan(), behavior.detach(), steps["sampler_logp"]),
            external=external if self.hparams.demonstrations else None,
            entropy=None if scores.entropy is None else padded(scores.entropy),
            lag=self.iteration - facts["policy_version"],
            **({"value": padded(self.values(batch, scores))} if "value" in wanted else {}),
            **{f"{name}_kl": padded(apart) for name, apart in scores.divergence.items()},
            **{name: steps[name] for name in ("old_value", "returns") if name in steps},
        )

    def values(self, batch: Rollouts, scores: TokenScores) -> Tensor:
        """What the critic says before each token, (n,)."""
        return self.critic(scores.hidden, self.layout(batch))

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

    def wants_to_stop(self) -> bool:
        """Whether the user wants this process to stop."""
        return bool(self.run_log.received)

    def _stop(self) -> int:
        """End the run before the iteration begins, with its weights on disk."""
        trainer: Any = self.trainer
        self.run_log.interrupted_by = int(max(trainer.strategy.broadcast(self.run_log.received), 2))
        trainer.should_stop = True
        if self.run_log.files is not None:
            self.run_log.files.save(trainer, self)
        return -1


__all__ = ["RolloutModule", "Stopped"]
