"""What a method inherits that lets a language model learn from its own answers.

Training goes in iterations. At the start of one the policy π_k answers new problems, answers of earlier iterations are
drawn from the store, and all of them are scored under π_k (and the base of the divergence); then come ``sweeps`` times
``minibatches`` optimiser steps. ``max_steps`` counts optimiser steps; iterations have a count of their own, which
schedules of the papers follow.

Everything is a function of (seed, iteration) and the weights at its start, and every process holds the whole store, so
a run goes on exactly from anywhere, and two processes learn what one does.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.optim import Optimizer

from offpolicy.callbacks import Interruption, RunFolder
from offpolicy.data import rollouts as store_of
from offpolicy.data.module import DataModule
from offpolicy.data.problems import ProblemData, step_column
from offpolicy.data.replay import Replay
from offpolicy.data.rollouts import DEMONSTRATION, OWN, BoundRollouts, Rollouts
from offpolicy.data.sampling import permutation
from offpolicy.data.sequences import token_ids
from offpolicy.errors import DataError, UsageError, check_range, nearest
from offpolicy.language import policy as policies
from offpolicy.language.critic import CRITICS, Critic
from offpolicy.language.engines import Completion, Request, Sampling, make_engine, room
from offpolicy.language.generation import prompt_text, stop_ids
from offpolicy.language.layout import Layout, TokenScores, group_layout, score_tokens
from offpolicy.language.meters import SumMeter
from offpolicy.language.module import LanguageModule
from offpolicy.language.reference import evaluating
from offpolicy.language.rewards import Rewards, Scored
from offpolicy.language.solving import Solving
from offpolicy.losses.health import effective_sample_size, group_metrics
from offpolicy.losses.policy_gradient import COMPONENTS, Objective, Tokens, Totals

LANE = 1024  # tokens of a prompt with several answers behind it: attention to more costs what the prompt saves


class RolloutModule(LanguageModule):
    """Base of methods that improve a language model on problems with answers that can be checked.

    A method is an :class:`Objective` (its ``preset``), and what it makes of old answers: :meth:`mixture`.

    Args:
        objective: slot → component in place of the method's own: ``{"trust": "none"}``, ``{"ratio": {"name": "mis",
            "uniform": "one"}}``, or an import path of one's own component; the slots are those of
            :class:`offpolicy.losses.policy_gradient.Objective`.
        rewards: names (exact, math, final_number, format, length), import paths ``package.module.function`` or
            ``{"name": …, "weight": …}``; their weighted sum is the reward. None is "math" where solutions end with
            "####", else "exact".
        group_size: answers per problem, ≥ 1, a demonstration included.
        minibatches: optimiser steps per sweep, ≥ 1; an iteration has ``batch_size · minibatches`` answers.
        sweeps: times that an iteration goes over its answers, ≥ 1.
        iterations: iterations in all, used when no ``max_steps`` are given; None for ``epochs`` over the problems.
        max_new_tokens: longest answer in tokens, ≥ 1.
        temperature: of sampling, > 0; log-probabilities in training are at the same.
        engine: who writes the answers: "transformers" (with a cache), "tiny" (without), "replay" (from ``records``), or
            an import path ``package.module.Class``.
        records: file of the engine "replay".
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
    uses_reference = False
    look_command = "python -m offpolicy.evaluate {folder}, or offpolicy.export {folder} OUT [--merge]"

    def __init__(
        self,
        *,
        objective: dict[str, Any] | None = None,
        rewards: list[Any] | None = None,
        group_size: int = 8,
        minibatches: int = 1,
        sweeps: int = 1,
        iterations: int | None = None,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        engine: str = "transformers",
        records: str | None = None,
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
        ):
            check_range(name, value, low)
        check_range("temperature", temperature, 0.0, lower_open=True)
        check_range("replay_fraction", replay_fraction, 0.0, 1.0, upper_open=True)
        check_range("min_ess", min_ess, 0.0, 1.0)
        check_range("critic_lr", critic_lr, 0.0)
        if critic not in CRITICS:
            raise UsageError(f"`critic` is '{critic}'; expected one of {', '.join(CRITICS)}.")
        check_range("demonstrations", demonstrations, 0, min(1, group_size - 1))
        batch = self.hparams.batch_size
        if batch % group_size:
            raise UsageError(
                f"`batch_size` is {batch} and `group_size` {group_size}; expected a multiple, as groups stay whole. "
                f"Pass --model.batch_size {max(1, batch // group_size) * group_size}."
            )
        if replay_fraction and not replay_window:
            raise UsageError(
                "`replay_fraction` is above 0 and `replay_window` is 0; expected ≥ 1 iterations to draw from."
            )
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
        self.iteration = 0  # the one whose steps are being made
        self.generated = 0  # answers written so far
        self._problems_seen = 0
        self._first_step = 0  # of the iteration
        self._steps: list[np.ndarray] = []  # rows of each of its steps
        self._rollouts: BoundRollouts | None = None
        self._base: dict[str, Tensor] | None = None  # trained weights of the base of the divergence
        self._base_moved = False
        self._facts: dict[str, list[float]] = {}  # of iterations since the last row: sum, count
        self._saved = 0.0
        self._said: list[Any] = []  # by the first step: rows, and log-probabilities of their tokens
        self._problems: Replay = None  # type: ignore[assignment]
        self._length = 0  # longest answer

    # -- to be written by a method -------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Any]:
        """Slot → component of the method's objective; ``vocabulary`` is known once the policy is open."""
        return dict(self.preset)

    def compose(self) -> Objective:
        """The objective of the method's parts, with those of the option ``objective`` in their place.

        Raises:
            UsageError: a slot or component is not known, or they do not go together.
        """
        own = self.hparams.objective or {}
        for slot in own:
            if slot not in COMPONENTS:
                raise UsageError(
                    f"`objective` has the slot '{slot}'; expected {', '.join(COMPONENTS)}.{nearest(slot, COMPONENTS)}"
                )
        return Objective(**{**self.parts(), **own})

    @property
    def vocabulary(self) -> int:
        """Tokens the policy knows; 1 before it is open."""
        return 1 if self.model is None else policies.base_of(self.model).get_input_embeddings().num_embeddings

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

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.critic is not None:
            self.critic.train()

    def configure_optimizers(self) -> Optimizer:
        optimizer = super().configure_optimizers()
        if self.critic is not None:
            scale = self.hparams.critic_lr / self.hparams.lr if self.hparams.lr else 0.0
            settings = {"lr": self.hparams.critic_lr, "weight_decay": 0.0, "lr_scale": scale}
            optimizer.add_param_group({"params": list(self.critic.parameters()), **settings})
        return optimizer

    @property
    def rows_per_iteration(self) -> int:
        return self.hparams.batch_size * self.hparams.minibatches

    def planned_steps(self, data: DataModule) -> int | None:
        h = self.hparams
        if h.iterations:
            return next(islice((steps for steps, _ in self.schedule()), h.iterations - 1, None))
        wanted = math.ceil(h.epochs * len(data.load().tables["problems"]))
        return next(steps for steps, problems in self.schedule() if problems >= wanted)

    def schedule(self) -> Iterator[tuple[int, int]]:
        """Optimiser steps, and problems answered, after every iteration, as long as no answers are forgotten early."""
        h, steps, problems = self.hparams, 0, 0
        for k in count(1):
            fraction, sweeps = self.mixture(k)
            old = self._replayed_groups(fraction) if k > 1 else 0
            steps += h.minibatches * (sweeps if old or not fraction else 1)
            problems += self.rows_per_iteration // h.group_size - old
            yield steps, problems

    def _replayed_groups(self, fraction: float) -> int:
        """Groups of an iteration that are not fresh; the rest, (1 − p)·B answers, is."""
        return round(fraction * self.rows_per_iteration / self.hparams.group_size)

    def held_out(self) -> Callback:
        return Solving()

    def _take_data(self, data: Any) -> None:
        h = self.hparams
        if self.trainer.strategy.__class__.__name__ == "FullySharded":
            raise UsageError("`trainer.strategy` is 'fsdp2', under which no answers can be drawn yet; expected 'ddp'.")
        if "problems" not in data.replay.tables:
            raise DataError(
                f"{data.replay.meta.get('name', 'the data')} holds no problems; expected prompts with answers that can "
                "be checked. Pass --data gsm8k, --data addition or a file."
            )
        self._problems = data.replay
        held_out = getattr(data, "eval_replay", None)
        self.eval_problems = held_out if held_out is not None and self.run.eval_episodes > 0 else None
        self.tokenizer = data.tokenizer if self.tokenizer is None else self.tokenizer
        self.rewards = Rewards(h.rewards or [data.replay.meta.get("reward", "exact")])
        if h.demonstrations and not (self._problems.tables["problems"][:, 1] >= 0).any():
            raise DataError(
                f"{type(self).__name__} learns from demonstrations, and {data.replay.meta.get('name', 'the data')} has "
                "none; expected a column `solution`. Name it with --data.columns, or choose GRPO."
            )

    def _longest(self) -> int:
        prompts = self._problems.length[self._problems.tables["problems"][:, 0]]
        self._length = room(policies.base_of(self.model), int(prompts.max()), self.hparams.max_new_tokens)
        return int(prompts.max()) + self._length

    def _make_plan(self) -> None:
        h = self.hparams
        settings = {"batch_size": h.generation_batch, "records": h.records, "tokenizer": self.tokenizer}
        self.engine = make_engine(h.engine, **settings)

    def _check_texts(self, replay: Any) -> None:
        largest = int(np.asarray(replay.steps["token"]).max())
        size = policies.base_of(self.model).get_input_embeddings().num_embeddings
        if largest >= size:
            raise DataError(
                f"the problems have the token id {largest}, but {self.hparams.policy} knows ids below {size}; expected "
                "problems tokenised for this model. Leave `--data.tokenizer` out."
            )

    def configure_model(self) -> None:
        if getattr(self, "_trainer", None) is None or not self.trainer.training or self._problems is None:
            return
        self.model.to(self.trainer.strategy.root_device)
        self._base, self._base_moved = self._snapshot(), False

    # -- the base of the divergence ------------------------------------------------------------------------------------

    def _snapshot(self) -> dict[str, Tensor]:
        """A copy of the trained weights of the policy."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def move_base(self) -> None:
        """Take the policy as it is now for the base of the divergence; no answer may stay in the store then."""
        self._base, self._base_moved = self._snapshot(), True

    @contextlib.contextmanager
    def _as_base(self) -> Iterator[None]:
        """Within it, the policy has the weights of the base."""
        own = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        assert self._base is not None
        for name, p in own.items():
            p.data, self._base[name] = self._base[name], p.data
        try:
            yield
        finally:
            for name, p in own.items():
                p.data, self._base[name] = self._base[name], p.data

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        return super().extra_state() | {
            "iteration": self.iteration,
            "first_step": self._first_step,
            "steps": len(self._steps),
            "problems_seen": self._problems_seen,
            "generated": self.generated,
            "facts": self._facts,
            "base": {k: v.cpu() for k, v in self._base.items()} if self._base_moved and self._base else None,
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state(state)
        self.iteration, self._first_step = state["iteration"], state["first_step"]
        self._problems_seen, self.generated = state["problems_seen"], state["generated"]
        self._facts = {name: list(pair) for name, pair in state["facts"].items()}
        if state["base"] is not None:
            self._base, self._base_moved = {k: v.to(self.device) for k, v in state["base"].items()}, True

    # -- what the first screen says ------------------------------------------------------------------------------------

    def facts(self) -> list[tuple[str, str]]:
        meta, h = self._problems.meta, self.hparams
        numbers = sum(p.numel() for p in self.model.parameters())
        kind = policies.base_of(self.model).config.model_type
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        lengths = ", ".join(f"{role} {'/'.join(map(str, q))}" for role, q in meta.get("lengths", {}).items())
        return [
            ("problems", f"{meta.get('problems', 0):,}, {meta.get('demonstrations', 0):,} with a demonstration"),
            ("tokens", f"{lengths} (median/95 %/largest), answers up to {self._length}"),
            ("reward", ", ".join(self.rewards.names)),
            ("policy", f"{h.policy} ({kind}), {numbers:,} parameters, {trained:,} trained"),
        ]

    def batch_words(self) -> str:
        h = self.hparams
        return (
            f"{h.batch_size} answers; an iteration has {self.rows_per_iteration}, {h.group_size} to a problem, and "
            f"{h.minibatches * h.sweeps} update{'s' if h.minibatches * h.sweeps > 1 else ''}"
        )

    def evaluates(self) -> str:
        return "" if self.eval_problems is None else f"{len(self.eval_problems.tables['problems']):,} held-out problems"

    def samples(self) -> str:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        lines = []
        for number in range(min(data.options.get("show", 0), len(self._problems.tables["problems"]))):
            prompt, demonstration = self._problems.tables["problems"][number].tolist()
            text = self.tokenizer.decode(token_ids(self._problems, prompt)) + " ▶ "
            if demonstration >= 0:
                text += self.tokenizer.decode(token_ids(self._problems, demonstration))
            answer = self._problems.tables["problems/answer"][number]
            lines.append(f"problem {number}\n  {text}\n  answer {answer}")
        return "\n".join(lines)

    # -- an iteration --------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        self._saved = time.monotonic()
        store = self.trainer.datamodule.rollouts  # type: ignore[attr-defined]
        self._steps, self._rollouts, self._said = [], None, []
        if store is not None and self.iteration:
            self._go_on(store)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        super().on_train_batch_start(batch, batch_idx)
        if self.global_step < self._first_step + len(self._steps):
            return None
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
        h, k, began = self.hparams, self.iteration + 1, time.perf_counter()
        fraction, sweeps = self.mixture(k)
        self.engine.sync(self.model, k)
        with evaluating(self.model), self.precision_context():
            store = self.before_iteration(k, store)
            wanted = self._replayed_groups(fraction)
            store, old = self._admit(store, wanted, sweeps, k)
            mixed = len(old[0]) > 0
            old = old if mixed or not fraction else old[:1]
            groups = self.rows_per_iteration // h.group_size - len(old[0])
            fresh, facts = self._fresh(k, groups)
            store = self._score(store_of.joined(store, fresh), k, old)
        store.version = k
        self._problems_seen += groups
        written = int((fresh.episodes["source"] == OWN).sum())
        self.generated += written
        self.iteration, self._first_step = k, self.global_step
        self._steps, self._rollouts = self._plan_steps(store, k, old), BoundRollouts(self._problems, store)
        facts |= {"answers/fresh": float(written), "perf/rollout_seconds": time.perf_counter() - began}
        for name, value in facts.items():
            pair = self._facts.setdefault(name, [0.0, 0.0])
            pair[0], pair[1] = pair[0] + value, pair[1] + 1.0
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

    def _go_on(self, store: Replay) -> None:
        """Lay out the steps of an iteration that a checkpoint stopped in the middle of."""
        k, version = self.iteration, store.episodes["policy_version"]
        fraction, sweeps = self.mixture(k)
        fresh = len(np.unique(store.episodes["group"][version == k]))
        wanted = self.rows_per_iteration // self.hparams.group_size - fresh
        old = store_of.drawn(store_of.select(store, version < k), wanted, sweeps, self.seed or 0, k)
        old = old if wanted or not fraction else old[:1]
        self._steps, self._rollouts = self._plan_steps(store, k, old), BoundRollouts(self._problems, store)

    def _admit(self, store: Replay | None, wanted: int, sweeps: int, k: int) -> tuple[Replay | None, list[np.ndarray]]:
        """Draw replayed groups, forgetting iterations whose answers are too far from the policy."""
        h = self.hparams
        while True:
            old = store_of.drawn(store, wanted, sweeps, self.seed or 0, k)
            if not (h.min_ess and store is not None and wanted):
                return store, old
            rows = np.flatnonzero(np.isin(store.episodes["group"], np.concatenate(old)))
            found = self._columns(BoundRollouts(self._problems, store), rows, ("previous_logp",))["previous_logp"]
            index = store_of.spans(store, rows)
            gap = torch.from_numpy(found - np.asarray(store.steps["logp"])[index]).double()
            length = torch.from_numpy(store.length[rows])
            log_weight = torch.segment_reduce(gap, "sum", lengths=length)
            version = store.episodes["policy_version"]
            far = [
                v
                for v in np.unique(version[rows])
                if effective_sample_size(log_weight[torch.from_numpy(version[rows] == v)]) < h.min_ess
            ]
            if not far:
                return store, old
            store = store_of.select(store, ~np.isin(version, far))

    def _fresh(self, k: int, groups: int) -> tuple[Replay, dict[str, float]]:
        """New answers of the policy, and demonstrations, judged; the same on every process."""
        h = self.hparams
        problems = self._next_problems(groups)
        table = self._problems.tables
        given = table["problems"][problems, 1]
        shown = (given >= 0) & (h.demonstrations > 0)
        world, rank = self.world_size, self.global_rank if self.world_size > 1 else 0
        mine = np.arange(rank, groups, world)
        requests = [
            Request(token_ids(self._problems, table["problems"][problems[i], 0]), int(i), h.group_size - int(shown[i]))
            for i in mine
        ]
        answers = self.engine.generate(requests, self.sampling(k), self._wants_to_stop)
        if self.trainer.strategy.reduce_boolean_decision(self._wants_to_stop(), all=False):
            raise Stopped
        made: list[dict[str, Any]] = []
        for i, some in zip(mine, answers):
            for answer in some:
                made.append(_row(int(i), int(problems[i]), OWN, answer))
            if shown[i]:
                token = token_ids(self._problems, given[i])[: self._length]
                logp = step_column(self._problems, given[i], "logp")[: self._length]
                whole = len(token) == self._problems.length[given[i]]
                made.append(_row(int(i), int(problems[i]), DEMONSTRATION, Completion(token, logp, bool(whole))))
        self._judge(made)
        everyone = [row for part in self._of_all_processes(made) for row in part]
        everyone.sort(key=lambda row: row["slot"])  # stable: answers of a group keep their order
        return self._stored(everyone, k)

    def _stored(self, made: list[dict[str, Any]], k: int) -> tuple[Replay, dict[str, float]]:
        column = {name: [row[name] for row in made] for name in made[0]}
        rewards, source = torch.tensor(column["reward"], dtype=torch.float64), np.asarray(column["source"], np.uint8)
        group = np.asarray(column["slot"], np.int64) + (k << 32)
        own = torch.from_numpy(source == OWN)
        episodes: dict[str, Any] = {
            "policy_version": np.full(len(made), k, np.int64),
            "group": group,
            "prompt": np.asarray(column["problem"], np.int64),
            "source": source,
            "reward": rewards.numpy(),
            "ended": np.asarray(column["ended"], bool),
        }
        for name in made[0]["parts"]:
            episodes[f"reward/{name}"] = np.asarray([row["parts"][name] for row in made], np.float32)
        if not self.objective.uses_critic:
            episodes["advantage"] = self.objective.advantages(rewards, torch.from_numpy(group), own).numpy()
        logp = column["logp"]
        steps = {"logp": logp, "sampler_logp": logp}
        store = store_of.make_store(column["token"], steps, episodes, self._problems.steps["token"].dtype)
        mine = np.flatnonzero(source == OWN)
        facts = group_metrics(rewards, torch.from_numpy(group), own) | {
            "answers/length": float(store.length[mine].mean()),
            "answers/ended": float(episodes["ended"][mine].mean()),
            "answers/empty": float((store.length[mine] == 1).mean()),
            "answers/duplicates": store_of.duplicates(store, mine),
            "reward/problems": float(sum(row["problem_with_reward"] for row in made)),
        }
        for name in made[0]["parts"]:
            facts[f"reward/{name}"] = float(episodes[f"reward/{name}"][mine].mean())
        return store, facts

    def _next_problems(self, count: int) -> np.ndarray:
        """The next problems of an endless stream in which every one comes once per pass."""
        n, first = len(self._problems.tables["problems"]), self._problems_seen
        passes = range(first // n, (first + count - 1) // n + 1)
        stream = np.concatenate([permutation(self.seed or 0, p, n).numpy() for p in passes])
        return stream[first - n * passes[0] :][:count]

    def sampling(self, iteration: int) -> Sampling:
        """How answers are drawn in an iteration."""
        return Sampling(
            stop=tuple(stop_ids(self.model, self.tokenizer)),
            max_new_tokens=self._length,
            temperature=self.hparams.temperature,
            seed=self.seed or 0,
            iteration=iteration,
        )

    def texts(self, answers: Sequence[np.ndarray]) -> list[str]:
        """Answers as texts, without special tokens; equal ones are decoded once."""
        known: dict[bytes, str] = {}
        for token in answers:
            if token.tobytes() not in known:
                known[token.tobytes()] = self.tokenizer.decode(
                    token, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
        return [known[token.tobytes()] for token in answers]

    def judge(
        self, problems: Replay, rows: Sequence[int], answers: Sequence[np.ndarray], ended: Sequence[bool]
    ) -> Scored:
        """Rewards of answers to rows of problems."""
        prompts = {
            row: prompt_text(self.tokenizer, token_ids(problems, problems.tables["problems"][row, 0]))
            for row in set(rows)
        }
        references = problems.tables["problems/answer"]
        return self.rewards(
            [prompts[row] for row in rows],
            self.texts(answers),
            [str(references[row]) for row in rows],
            ended=ended,
            lengths=[len(answer) for answer in answers],
        )

    def _judge(self, made: list[dict[str, Any]]) -> None:
        rows = [row["problem"] for row in made]
        answers, ended = [row["token"] for row in made], [row["ended"] for row in made]
        scores, parts, problems = self.judge(self._problems, rows, answers, ended)
        for i, row in enumerate(made):
            row["reward"], row["parts"] = float(scores[i]), {name: float(part[i]) for name, part in parts.items()}
            row["problem_with_reward"] = problems / len(made)

    # -- what π_k and the base think of the answers --------------------------------------------------------------------

    def _score(self, store: Replay, k: int, old: Sequence[np.ndarray]) -> Replay:
        """The store with the columns of this iteration, filled in for the rows of its steps.

        The first step is made by π_k itself, so its own forward pass says what π_k thinks of its rows
        (:meth:`_keep_first`), except where a critic needs all of them at once.
        """
        bound, steps = BoundRollouts(self._problems, store), self._plan_steps(store, k, old)
        rows, critic = np.unique(np.concatenate(steps)), self.objective.uses_critic
        known = rows if critic else np.setdiff1d(rows, steps[0])
        columns: dict[str, Any] = dict(store.steps)

        def fill(where: np.ndarray, found: dict[str, np.ndarray]) -> None:
            for name, values in found.items():
                columns.setdefault(name, np.full(store.num_steps, np.nan, values.dtype))
                columns[name][store_of.spans(store, where)] = values

        found = self._columns(bound, known, ("previous_logp", *(("old_value",) if critic else ())))
        fill(known, found | (self._critic_advantages(store, rows, found["old_value"]) if critic else {}))
        if self._wants_base(k, len(steps)):
            said = columns.get("base_logp", np.full(store.num_steps, np.nan))
            new = rows[np.isnan(said[store.start[rows]])]  # the base stays the same as long as answers are kept
            with self._as_base():
                fill(new, self._columns(bound, new, ("base_logp",)))
        else:
            columns.pop("base_logp", None)
        columns["logp"] = np.where(self._drawn_now(store, k), columns["previous_logp"], columns["logp"])
        return Replay(columns, start=store.start, length=store.length, episodes=store.episodes)

    def _drawn_now(self, store: Replay, k: int) -> np.ndarray:
        """Tokens that π_k drew, so that what it thinks of them is the behaviour; (tokens of the store,) bool."""
        fresh = np.repeat((store.episodes["policy_version"] == k) & (store.episodes["source"] == OWN), store.length)
        return fresh if getattr(self.engine, "on_policy", True) else fresh & np.isnan(np.asarray(store.steps["logp"]))

    def _keep_first(self) -> None:
        """Put into the store what π_k said of the rows of the first step, for the steps and iterations to come."""
        assert self._rollouts is not None
        store: Any = self._rollouts.store
        drawn = self._drawn_now(store, self.iteration)
        for rows, logps in (part for parts in self._of_all_processes(self._said) for part in parts):
            place = store_of.spans(store, rows)
            for name in ("previous_logp", "logp"):
                store.steps[name] = store.steps[name].astype(logps.dtype, copy=False)
            store.steps["previous_logp"][place] = logps
            store.steps["logp"][place] = np.where(drawn[place], logps, store.steps["logp"][place])
        self._said = []
        store.__dict__.pop("_fingerprint", None)

    def _wants_base(self, k: int, steps: int) -> bool:
        if "base_logp" in self.objective.reads:
            return True
        now = self.global_step
        return self.hparams.base_kl and any(self._logs(step) for step in range(now + 1, now + 1 + steps))

    def _columns(self, bound: BoundRollouts, rows: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns of the tokens of these rows, ascending, under the weights of now; processes share the work."""
        world, rank = self.world_size, self.global_rank if self.world_size > 1 else 0
        by_length = rows[np.argsort(-bound.lengths[rows].sum(1), kind="stable")]
        by_length = by_length[np.argsort(bound.store.episodes["group"][by_length], kind="stable")]
        mine, parts = np.array_split(by_length, world)[rank], []
        for start in range(0, len(mine), self.rows_per_forward):
            batch = self.gather(bound, mine[start : start + self.rows_per_forward])
            scores = self.forward_tokens(batch)
            values = {"previous_logp": scores.logps, "base_logp": scores.logps}
            if "old_value" in names:
                values["old_value"] = self.values(batch, scores)
            parts.append((batch.row.numpy(), {name: values[name].cpu().numpy() for name in names}))
        length = bound.store.length[rows]
        first, size = np.cumsum(length) - length, int(length.sum())
        out: dict[str, np.ndarray] = {name: np.full(size, np.nan, np.float32) for name in names}
        for part in self._of_all_processes(parts):
            for some, values in part:
                count = bound.store.length[some]
                start = first[np.searchsorted(rows, some)]
                place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - start, count)
                for name in names:
                    out[name] = out[name].astype(values[name].dtype, copy=False)
                    out[name][place] = values[name]
        return out

    def _critic_advantages(self, store: Replay, rows: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        """Advantages and returns of the tokens of these rows, stale ones too, under the critic of now."""
        length = torch.from_numpy(store.length[rows])
        mask = torch.arange(int(length.max())) < length[:, None]
        value = torch.zeros(mask.shape, dtype=torch.from_numpy(values).dtype)
        value[mask] = torch.from_numpy(values)
        rewards = torch.from_numpy(store.episodes["reward"][rows]).to(value)
        found = self.objective.critic_advantages(rewards, value, mask.to(value))
        return {name: part[mask].numpy() for name, part in zip(("advantage", "returns"), found)}

    def forward_tokens(self, batch: Rollouts, **options: Any) -> TokenScores:
        """Scores of the tokens of a batch of answers, at the temperature of sampling."""
        layout = self.layout(batch)
        if torch.is_grad_enabled():
            self._real, self._places = self._real + layout.real_tokens, self._places + layout.input_ids.numel()
        h = self.hparams
        return score_tokens(self.model, layout, chunk=h.chunk, temperature=h.temperature, **options)

    def gather(self, bound: BoundRollouts, rows: np.ndarray) -> Rollouts:
        """The batch of these rows of the store; answers of a group stand behind one prompt where that is exact."""
        return bound.gather(rows, LANE if self.shared_prompt else 0)

    def layout(self, batch: Any) -> Layout:
        return group_layout(batch, self.pad_id).to(self.trainer.strategy.root_device)

    # -- a step --------------------------------------------------------------------------------------------------------

    def training_step(self, tick: Any, batch_idx: int) -> Tensor:
        t, j = self.global_step, self._micro
        bound, rows = self._rollouts, self._steps[t - self._first_step]
        assert bound is not None
        if j == 0:
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = self.rate(t) * group.get("lr_scale", 1.0)
        world, rank = self.world_size, self.global_rank if self.world_size > 1 else 0
        mine = np.array_split(rows, self._micro_batches * world)[j * world + rank]
        real = len(mine) > 0
        length = bound.store.length[rows]
        totals = Totals(len(rows), int(length.sum()), self._length, int(length.max()))
        batch = self.gather(bound, mine if real else rows[-1:])
        tokens = self.tokens(batch, real)
        loss, sums = self.objective.loss(tokens, totals, iteration=self.iteration)
        share = loss.new_tensor(len(mine) / len(rows))
        if real and t == self._first_step and not self.objective.uses_critic:
            kept = tokens.mask > 0
            self._said.append((batch.row.numpy(), tokens.logp.detach()[kept].cpu().numpy()))
        self.meter.add({"loss": torch.stack([loss.detach(), share]).double(), **sums})
        self._tokens += int(bound.lengths[mine].sum()) if real else 0
        self._micro = (j + 1) % self._micro_batches
        self.step_ended = self._micro == 0
        return loss * (self._micro_batches * world)  # Lightning takes the mean over micro-batches and processes

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        if self.global_step == self._first_step and not self.objective.uses_critic:
            self._keep_first()

    def tokens(self, batch: Rollouts, real: bool = True) -> Tokens:
        """What the objective sees of a batch of answers; all of it padding unless ``real``."""
        wanted = self.objective.reads
        scores = self.forward_tokens(batch, entropy=True, entropy_gradient=self.objective.entropy_gradient)
        device, length = scores.logps.device, batch.answer.length
        size, width = len(length), int(length.max())
        owner = torch.repeat_interleave(torch.arange(size), length)
        place = (owner * width + torch.arange(len(owner)) - (length.cumsum(0) - length)[owner]).to(device)

        def padded(flat: Tensor) -> Tensor:
            return flat.new_zeros(size * width).index_put((place,), flat).view(size, width)

        steps = {k: padded(v.to(scores.logps)) for k, v in batch.steps.items()}
        facts = {k: v.to(device) for k, v in batch.facts.items()}
        external = (facts["source"] == DEMONSTRATION)[:, None].expand(size, width)
        advantage = steps["advantage"] if "advantage" in steps else facts["advantage"].to(scores.logps)
        behavior, previous, logp = steps["logp"], steps["previous_logp"], padded(scores.logps)
        if self.global_step == self._first_step:  # still π_k: its own log-probabilities, where nobody asked before
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
            **{name: steps[name] for name in ("old_value", "returns") if name in steps},
        )

    def values(self, batch: Rollouts, scores: TokenScores) -> Tensor:
        """What the critic says before each token, (n,)."""
        return self.critic(scores.hidden, self.layout(batch))

    # -- metrics, files, stopping --------------------------------------------------------------------------------------

    def _progress(self, updates: int) -> dict[str, float]:
        facts = {name: total / count for name, (total, count) in self._facts.items()}
        self._facts = {}
        named = {(name if name.startswith("perf/") else f"train/{name}"): value for name, value in facts.items()}
        passes = self._problems_seen / len(self._problems.tables["problems"])
        return named | {
            "train/iteration": float(self.iteration),
            "train/answers": float(self.generated),
            "train/epoch": passes,
        }

    def wants_checkpoint(self) -> bool:
        """Whether the weights should be on disk before what comes next: answers are drawn after this step."""
        if self.global_step < self._first_step + len(self._steps) or self.global_step >= self.trainer.max_steps:
            return False
        wanted = time.monotonic() - self._saved >= self.hparams.save_seconds
        return bool(self.trainer.strategy.broadcast(wanted))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self._saved = time.monotonic()

    def _wants_to_stop(self) -> bool:
        return any(isinstance(c, Interruption) and c.received for c in self.trainer.callbacks)  # type: ignore[attr-defined]

    def _stop(self) -> int:
        """End the run before the iteration begins, with its weights on disk."""
        trainer: Any = self.trainer
        received = [c.received for c in trainer.callbacks if isinstance(c, Interruption) and c.received]
        self.interrupted_by = int(max(trainer.strategy.broadcast(max(received, default=0)), 2))
        trainer.should_stop = True
        for callback in trainer.callbacks:
            if isinstance(callback, RunFolder):
                callback.save(trainer, self)
        return -1


class Stopped(Exception):
    """The user wants to stop while answers are drawn."""


def _row(slot: int, problem: int, source: int, answer: Completion) -> dict[str, Any]:
    token, logp, ended = answer
    return {"slot": slot, "problem": problem, "source": source, "token": token, "logp": logp, "ended": ended}


__all__ = ["RolloutModule", "Stopped"]
