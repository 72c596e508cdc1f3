"""What a method inherits that lets a language model learn from its own answers.

Training goes in iterations. At the start of one the policy π_k answers new problems, answers of earlier iterations are
drawn from the store, and all of them are scored under π_k (and the base of the divergence); then come ``sweeps`` times
``minibatches`` optimiser steps. ``max_steps`` counts optimiser steps; iterations have a count of their own, which
schedules of the papers follow.

Everything is a function of (seed, iteration) and the weights at its start, and every process holds the whole store, so
a run goes on exactly from anywhere, and two processes learn what one does.

Where it is told, in the order of an iteration::

    iteration.py   how many groups are fresh and replayed, which rows each step takes, where the run stands
    asking.py      which problems are asked, and in which words; by curricula.py and hints.py
    correcting.py  second answers, where the policy corrects its first ones
    tempering.py   hot and cold answers, where the entropy has a target
    window.py      answers that are drawn a window of tokens at a time, over several iterations
    answering.py   the policy answers problems, by an engine (engines.py), and rewards.py judges the answers
    ahead.py       answers that are drawn before the iteration that they are for
    advantages.py  rewards become the advantage of an answer, or by a critic (critic.py) of a token
    scoring.py     log-probabilities of the answers under π_k and the base, and which old answers may stay
    trial.py       how the optimiser would move the output layer, for parts that ask before the step
    tokens.py      what the loss sees of a micro-batch: columns of the store, and scores of the policy
    whole_step.py  what parts of the loss want to know of all answers of a step, however it is cut
    objective.py   the parts of the loss; a part that the user names replaces the method's
    iterating.py   ``roll_out`` and ``training_step`` put these in their order
    rollouts.py    the options, what a method defines, and what stands in checkpoints

forward.py has the forward passes, options.py what options are possible, solving.py held-out problems, records.py the
answers in a file.

How a token gets its advantage is told in three files: the formula is in ``losses/advantages.py``, ``advantages.py``
applies it to the answers of an iteration, and ``tokens.py`` hands it to the loss (``losses/policy_gradient.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from offpolicy.compute import processes
from offpolicy.compute.room import size
from offpolicy.data.module import DataModule
from offpolicy.data.replay import Replay
from offpolicy.data.texts.problems import ProblemData, problem_texts
from offpolicy.data.texts.replaying import RULES, Recent
from offpolicy.language import policy as policies
from offpolicy.language.checks import check_tokens
from offpolicy.language.meters import SumMeter
from offpolicy.language.reference import evaluating
from offpolicy.language.rl.ahead import Ahead
from offpolicy.language.rl.answering import Answering, Stopped
from offpolicy.language.rl.asking import check_asking, check_kept_hints
from offpolicy.language.rl.correcting import check_correction
from offpolicy.language.rl.critic import Critic
from offpolicy.language.rl.forward import Forward
from offpolicy.language.rl.iterating import IteratingModule
from offpolicy.language.rl.iteration import Shape
from offpolicy.language.rl.objective import age_fact, composed, load_parts, objective_facts
from offpolicy.language.rl.options import (
    check_demonstrations,
    check_engine_lag,
    check_masks,
    check_problems,
    check_reads_of_answers,
    check_replay,
    check_rollout_options,
)
from offpolicy.language.rl.scoring import Scoring
from offpolicy.language.rl.solving import solve
from offpolicy.language.rl.tempering import check_tempering
from offpolicy.language.rl.tokens import check_columns
from offpolicy.language.rl.trial import check_trial, wants_trial
from offpolicy.language.rl.whole_step import WholeStep
from offpolicy.language.rl.window import check_window
from offpolicy.language.room import base_dtype
from offpolicy.language.sharding import gathered_model, shard
from offpolicy.losses.policy_gradient import Objective
from offpolicy.registry import make
from offpolicy.training.description import Description
from offpolicy.training.lightning_private import trainer_of
from offpolicy.trust import speaking


class RolloutModule(IteratingModule):
    """Base of methods that improve a language model on problems with answers that can be checked.

    A method is an :class:`Objective` (its ``preset``), and what it makes of old answers: :meth:`mixture`.

    Args:
        objective: slot → component in place of the method's own: ``{"trust": "none"}``, ``{"ratio": {"name": "mis",
            "uniform": "one"}}``, or an import path of a component of your own. The slots are in
            :class:`offpolicy.losses.policy_gradient.Objective`.
        rewards: names (exact, math, final_number, last_number, format, length, structure, and those that compare the
            answers of a group: majority, agreement, majority_novelty), import paths ``package.module.function`` or
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
        length_cycle: lets the longest answer fall and rise along a cosine of the iteration (SIRI): ``{"low": share of
            max_new_tokens, "iterations": of a cycle}``; None for no such cycle.
        window: new tokens that an iteration draws of an answer at most, ≥ 1; the next iteration goes on with what has
            not ended and is shorter than ``max_new_tokens``, in the place of new problems. Needs a critic that knows of
            cuts (``variant`` "t_ppo"). ``epochs`` are planned as if every answer ended in its first window. None draws
            whole answers.
        temperature: of sampling and of the log-probabilities in training, > 0.
        engine: what writes the answers: "transformers" (with a cache), "tiny" (without), "vllm" (in a process of its
            own, :class:`offpolicy.language.rl.vllm.VllmEngine` has its options), "replay" (from ``records``), an import
            path ``package.module.Class``, or ``{"name": …, option: value}``. Engines with weights of their own are
            compared with the policy after every sync.
        records: file of the engine "replay".
        record: write the answers of every iteration to ``records.jsonl`` in the folder of the run, for that engine.
        lag: L ≥ 0: answers are drawn L iterations before the one that learns from them, so that an engine that can
            draws while the policy trains. 0 draws when an iteration begins.
        generation_batch: answers drawn at once by one process, ≥ 1. Does not change the result.
        replay_fraction: share of an iteration's answers that are drawn from earlier iterations, in [0, 1).
        replay_window: iterations back from which replayed answers may come, ≥ 0; older answers are forgotten.
        min_ess: answers of an iteration are forgotten once their effective sample size under π_k, as a share of their
            number, is below this, in [0, 1].
        drop_duplicates: leave out replayed answers that repeat another one of their group.
        filter: which new answers an iteration learns from: "signal", "ended", "spread", "variance", ``{"name": …,
            parameters}``, an import path of your own, or a list of them (:mod:`offpolicy.language.rl.filtering`).
        replay: which answers of earlier iterations are used again: "recent", "ssb", "exgrpo", "r3", ``{"name": …,
            parameters}``, or an import path (:mod:`offpolicy.data.texts.replaying`).
        curriculum: which problems are asked: None for all of them in turn, "vade" for those that are neither easy nor
            hard by what is known of them, "gain" by the angles between the policy's states of their tokens, ``{"name":
            …, parameters}``, or an import path (:class:`offpolicy.language.rl.curricula.Curriculum`).
        templates: texts with {prompt} in them, of which each group of new answers gets one in place of the data's
            template; None for that of the data, which evaluations always have.
        hints: shows the beginning of its solution, or a column of the data, with a problem that the policy has failed:
            "tiers" to whole groups, "scaffold" to one answer of a failed group; "written" lets the policy write hints
            from the solution, for whole groups. ``{"name": …, "tiers": [0.25, 0.5, 0.75], "patience": 1, "text":
            "{prompt}\\nHint: {hint}"}``, or an import path (:class:`offpolicy.language.rl.hints.Hints`); None for no
            hints.
        correction: gives answers a second turn, in which the policy corrects the first: "score", ``{"name": "score",
            "bonus": 10.0, "first_stage": 100, "instruction": …}`` (:class:`offpolicy.language.rl.correcting.Score`), or
            an import path; None for one turn. ``max_new_tokens`` is of a turn.
        tempering: asks some problems once more at a higher or lower temperature, so that the entropy comes to a target:
            "aepo", ``{"name": "aepo", "target": 0.5, "high": 1.2, "low": 0.8, "share": 0.015625}``
            (:class:`offpolicy.language.rl.tempering.Tempering`), or an import path; None for none. Beside the part
            ``aepo`` of ``entropy``, which learns from the right ones.
        demonstrations: answers of each group that are demonstrations of the data, where there is one: 0 or 1.
        demonstration_share: of a demonstration that is given, in (0, 1]: below 1 the policy goes on from its first
            tokens (a share of them, rounded down; at least one, never the last).
        base_kl: measure the divergence from the base at every row of metrics even where the loss does not need it.
        eval_samples: answers per held-out problem for mean@k and pass@k, ≥ 0; 0 for the most likely answer alone.
        eval_top_p: drawn answers to held-out problems take the likeliest tokens of this share, in (0, 1]; 1 for all.
        eval_top_k: they take so many of the likeliest tokens, ≥ 0; 0 for all.
        save_seconds: ≥ 0. Before answers are drawn, a checkpoint is written unless the newest one is younger than this:
            a run that is killed then loses the answers and less than this of training.
        critic: for objectives with a critic: "model", a decoder of its own that starts as the policy's, or "head", two
            layers on the policy's last states.
        critic_lr: its learning rate.
        lr: peak learning rate of AdamW.
        lr_schedule: "constant", or "cosine" or "linear" decay.
        warmup_ratio: part of the steps in which the rate rises from 0.
    """

    preset: ClassVar[Mapping[str, Any]] = {}
    own_columns: ClassVar[frozenset[str]] = frozenset()  # of the answers, that ``extended`` writes

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
        length_cycle: dict[str, Any] | None = None,
        window: int | None = None,
        temperature: float = 1.0,
        engine: dict[str, Any] | str = "transformers",
        records: str | None = None,
        record: bool = False,
        lag: int = 0,
        generation_batch: int = 256,
        replay_fraction: float = 0.0,
        replay_window: int = 0,
        min_ess: float = 0.0,
        drop_duplicates: bool = False,
        filter: Any = None,
        replay: Any = "recent",
        curriculum: Any = None,
        templates: list[str] | None = None,
        hints: Any = None,
        correction: Any = None,
        tempering: Any = None,
        demonstrations: int = 0,
        demonstration_share: float = 1.0,
        base_kl: bool = True,
        eval_samples: int = 4,
        eval_top_p: float = 1.0,
        eval_top_k: int = 0,
        save_seconds: float = 5.0,
        critic: str = "model",
        critic_lr: float = 1e-5,
        lr: float = 1e-6,
        lr_schedule: str = "constant",
        warmup_ratio: float = 0.0,
        **language: Any,
    ) -> None:
        super().__init__(lr=lr, lr_schedule=lr_schedule, warmup_ratio=warmup_ratio, **language)
        check_rollout_options(locals(), self.hparams.batch_size, self.hparams.reference)
        self.save_hyperparameters()
        with speaking(self.words):
            self.replay_rule = make("replay", replay, RULES)
        if type(self).parts is RolloutModule.parts:
            self.objective = self.compose()
        self.meter = SumMeter()
        self.critic: Any = None
        self.eval_problems: Replay | None = None

    # -- to be written by a method -------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Any]:
        """Slot → component of the method's objective; ``vocabulary`` is known once the policy is open."""
        return dict(self.preset)

    def compose(self) -> Objective:
        """The objective of the method's parts; a part that the option ``objective`` names replaces the method's.

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
        return self.replay_rule.stays(store, iteration - self.hparams.replay_window)

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
        if wants_trial(self.objective):
            check_trial(self.model, self.hparams, self.trainer, sharded=self.device_mesh is not None)
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
        if self.eval_problems is None:
            return {}
        h = self.hparams
        self.ahead.collect()  # the engine gets other weights
        with evaluating(self.model), self.precision_context(), gathered_model(self.model):
            numbers = {"samples": h.eval_samples, "limit": h.eval_rows}
            return solve(self.eval_problems, self.answering, self.model, self.iteration, **numbers)

    def take_data(self, data: Any) -> None:
        problems = data.replay
        check_problems(problems, type(self).__name__, demonstrations=bool(self.hparams.demonstrations))
        check_asking(self.hparams, self.replay_rule)
        kind = type(self)
        mixes = kind.mixture is not RolloutModule.mixture or kind.extended is not RolloutModule.extended
        check_correction(self.hparams, mixes=mixes, critic=self.objective.uses_critic)
        check_window(self.hparams, self.replay_rule, self.objective, mixes=mixes)
        held_out = getattr(data, "eval_replay", None)
        self.eval_problems = held_out if held_out is not None and self.run.eval_episodes > 0 else None
        self.tokenizer = data.tokenizer if self.tokenizer is None else self.tokenizer
        self.answering = Answering(
            problems, self.tokenizer, self.hparams, words=self.words, held_out=self.eval_problems
        )
        check_kept_hints(self.answering.asking.hints, mixes=mixes)
        check_replay(self.replay_rule, self.hparams, critic=self.objective.uses_critic)
        check_masks(self.answering.filters.masks, critic=self.objective.uses_critic)
        check_tempering(self.hparams, self.objective, self.answering, mixes=mixes)
        given = self.objective.gives | self.own_columns | ({"tempered"} if self.answering.tempering else set())
        check_columns(self.objective.columns, self.answering.rewards.names, given)
        check_demonstrations(self.objective, self.hparams.demonstrations, problems)
        self.objective.check_answers(self.answering.rewards.names, self.hparams.group_size)
        self.ahead = Ahead(self.answering, lambda: self.seed or 0, self.wants_to_stop)

    def expected_tokens(self) -> int:
        longest = self.hparams.max_new_tokens
        return self.answering.longest_prompt() + self.answering.before_last(longest) + longest

    @property
    def rows_together(self) -> int:
        return self.hparams.group_size if self.objective.whole_groups else 1

    def workload(self) -> dict[str, Any]:
        h = self.hparams
        kind = "bfloat16" if base_dtype(h, self._training_device) == "bfloat16" else "float32"
        return {
            "critic": h.critic if self.objective.uses_critic else None,
            "reference": None if self.has_adapters else kind,  # the base of the divergence is a copy
            "cached_rows": self.cached_rows(),
            "cached_length": self.expected_tokens(),
        }

    def longest_row(self) -> int:
        longest = self.open_engine()
        check_engine_lag(self.hparams.lag, self.answering.engine)
        check_reads_of_answers(self.objective, self.hparams.lag, self.answering.engine)
        return longest

    def check_texts(self, replay: Any) -> None:
        check_tokens(replay, self.model, self.hparams.policy, "problems")

    def configure_model(self) -> None:
        if trainer_of(self) is None or not self.trainer.training or self.answering is None:
            return
        h, device = self.hparams, self.trainer.strategy.root_device
        for one in (self.model, self.critic):
            if one is not None and self.device_mesh is not None:
                shard(one, self.device_mesh["data_parallel"])
            if one is not None:
                one.to(device)
        self.passes = Forward(
            self.model,
            device,
            self.pad_id,
            shares=self.shared_prompt,
            padding_free=self.padding_free,
            rows=self.micro.rows,
            chunk=h.chunk,
            temperature=h.temperature,
            critic=self.critic,
            pace=self.pace,
        )
        on_policy = getattr(self.answering.engine, "on_policy", True)
        self.scoring = Scoring(self.passes, self.objective, on_policy=on_policy, dropout=self.has_dropout)
        self.whole_step = WholeStep(self.objective)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        return super().extra_state() | {
            **self.course.state_dict(),
            "objective": processes.gathered(self.objective.own.state_dict()),
            **({} if self.scoring is None else self.scoring.state_dict()),
            "ahead": [] if self.ahead is None else self.ahead.state_dict(),
            "asking": None if self.answering is None else self.answering.asking.state_dict(),
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state(state)
        self.course.load_state_dict(state)
        load_parts(self.objective, state.get("objective"), self.global_rank)
        if self.answering is not None:
            self.answering.asking.load_state_dict(state.get("asking"))
        if self.ahead is not None:
            self.ahead.load_state_dict(state.get("ahead", ()))
        if self.scoring is not None:
            self.scoring.load_state_dict({name: state.get(name) for name in ("base", "previous")})

    # -- what the first screen says ------------------------------------------------------------------------------------

    def _lag_facts(self) -> list[tuple[str, str]]:
        """The lines on answers that are older than the policy."""
        if not self.hparams.lag:
            return []
        return [("lag", self.ahead.fact(self.hparams.lag)), ("age", age_fact(self.objective))]

    def objective_facts(self) -> list[tuple[str, str]]:
        """The lines on the objective."""
        turns = 1 if self.answering is None else self.answering.turns
        return objective_facts(self.objective, self.micro.number * self.world_size, turns)

    def _replay_facts(self) -> list[tuple[str, str]]:
        """The line on a rule of replay other than the usual one."""
        rule = type(self.replay_rule)
        return [] if rule is Recent else [("replay", (rule.__doc__ or rule.__name__).strip().partition("\n")[0])]

    def sharding_notes(self) -> list[str]:
        """A sentence on the memory that drawing takes where the weights are shared out."""
        if self.device_mesh is None:
            return []
        held = [*self.model.parameters(), *(() if self.critic is None else self.critic.parameters())]
        whole = sum(p.numel() * p.element_size() for p in held)
        return [f"While answers are drawn and scored, every process holds all weights: {size(whole)} more."]

    def describe(self) -> Description:
        h, held_out, updates = self.hparams, self.eval_problems, self.hparams.minibatches * self.hparams.sweeps
        shown = self.trainer.datamodule.options.get("show", 0)  # type: ignore[attr-defined]
        return Description(
            facts=[
                *self.answering.facts(),
                *self._lag_facts(),
                *self._replay_facts(),
                *self.objective_facts(),
                self.policy_fact(),
                self.padding_fact(),
                *self.memory_facts(),
            ],
            batch=(
                f"{h.batch_size} answers; an iteration has {self.shape.answers}, {h.group_size} to a problem, and "
                f"{updates} update{'s' if updates > 1 else ''}"
            ),
            evaluates="" if held_out is None else f"{len(held_out.tables['problems']):,} held-out problems",
            notes=[*self.precision_notes(), *self.sharding_notes()],
            samples=problem_texts(self.problems, self.tokenizer, shown),
            look="python -m offpolicy.evaluate {folder}, or offpolicy.export {folder} OUT [--merge]",
        )


__all__ = ["RolloutModule", "Stopped"]
