"""Rounds of a preference method inside one run: the policy answers, its answers are judged, and it learns from them.

A round: π_t ← π_θ; π_t draws ``answers`` answers to each of ``prompts`` problems; rewards or a judge make pairs of
them; what the method needs is scored (its reference, and π_t); the method learns from the pairs for ``epochs``, with an
optimiser and a schedule of the rate that begin anew. So R rounds of one run are R runs of one round, each from the
weights of the one before. The data are problems (:class:`offpolicy.data.texts.problems.ProblemData`).

Everything is a function of (seed, round) and the weights at its start. The answers of a round travel with checkpoints,
with what was scored, so that a run goes on exactly from the middle of a round. They stand in ``RUN/rounds`` as well, as
data that can be trained on.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from offpolicy.compute import processes
from offpolicy.data.module import DataModule
from offpolicy.data.replay import Replay
from offpolicy.data.texts.problems import ProblemData, problem_texts
from offpolicy.errors import DataError, UsageError
from offpolicy.files import atomic_write
from offpolicy.language.checks import check_tokens
from offpolicy.language.optimisers import forget_moments
from offpolicy.language.preference import PreferenceModule
from offpolicy.language.reference import Reference, ReferenceTable, evaluating
from offpolicy.language.rl import pairing as pairs_of
from offpolicy.language.rl.answering import Answering, Stopped
from offpolicy.language.rl.drawing import DrawingModule
from offpolicy.language.rl.options import check_problems
from offpolicy.language.rl.pairing import Chosen, Judge
from offpolicy.language.rl.round_options import MADE, answering_options, check_round_options, reference_words
from offpolicy.language.rl.solving import solve
from offpolicy.language.stepping import rate_at
from offpolicy.training.description import Description
from offpolicy.training.lightning_private import FullySharded
from offpolicy.trust import speaking

log = logging.getLogger(__name__)
EVAL_SAMPLES = 4  # answers to a held-out problem, beside the most likely one
NOTHING = "offpolicy.language.rl.pairing.nothing"


@dataclass
class Round:
    """Where a run of rounds stands.

    Attributes:
        number: of the round whose steps are being made, from 1; 0 before the first.
        first_step: of the round.
        steps: that it makes.
        facts: on its answers, for the metrics.
    """

    number: int = 0
    first_step: int = 0
    steps: int = 0
    facts: dict[str, float] = field(default_factory=dict)

    def is_over(self, step: int) -> bool:
        """Whether the round has made its steps once that many were made in all."""
        return step >= self.first_step + self.steps


class RoundModule(DrawingModule, PreferenceModule):
    """Base of preference methods that can learn in rounds from answers that the policy draws.

    Args:
        rounds: R ≥ 0: the policy answers problems, its answers are judged and paired, and it learns from the pairs for
            ``epochs``, R times. 0 learns from the texts that are given.
        prompts: problems of a round, ≥ 1, taken one after the other; None for all.
        answers: drawn to each problem in a round, ≥ 2.
        pairing: "independent" pairs the first answer with the second and so on; "best_worst" takes one pair of all.
        rewards, reward_seconds, max_new_tokens, temperature, engine, generation_batch: of the answers, as of
            :class:`offpolicy.language.rl.rollouts.RolloutModule`. Answers with equal rewards make no pair.
        judge: import path of ``def judge(prompt, answer, other)``, which returns the probability that the first answer
            is preferred; it makes the pairs in place of rewards.
        reference: as of other methods, "auto" being the policy at the start of the run, in every round; "round" is the
            policy at the start of each round.
        lr: peak learning rate of a round.
    """

    makes: ClassVar[str] = "pairs"  # of answers; "lists" keeps all to a prompt with their scores, "winners" one

    def __init__(
        self,
        *,
        rounds: int = 0,
        prompts: int | None = None,
        answers: int = 8,
        pairing: str = "independent",
        rewards: list[Any] | None = None,
        judge: str | None = None,
        reward_seconds: float = 10.0,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        engine: dict[str, Any] | str = "transformers",
        generation_batch: int = 256,
        **language: Any,
    ) -> None:
        super().__init__(**language)
        self.save_hyperparameters()
        check_round_options(locals(), self)

    def prepare_state(self) -> None:
        super().prepare_state()
        self.round = Round()
        self.problems: Replay = None  # type: ignore[assignment]  # what a round asks
        self.eval_problems: Replay | None = None
        self._judge: Judge | None = None
        self._cap = 0  # steps in all, as the user or the plan says
        self._tables: dict[str, np.ndarray] = {}  # of the texts of the round
        self._known: dict[str, dict[str, Any]] = {}  # the same, and what was scored, as a checkpoint has them

    # -- to be written by a method -------------------------------------------------------------------------------------

    def problems_of(self, problems: Replay) -> Replay:
        """What a round asks, of the problems of the data."""
        return problems

    def texts_of_round(self, store: Replay, iteration: int) -> tuple[Replay | None, list[dict[str, Any]]]:
        """What a round makes of its answers: texts that :meth:`texts_of` takes, None where they teach nothing; and rows
        for the file of the round."""
        written = (self.problems, store, self.tokenizer, self.answering.stops)
        if self.makes == "lists":
            texts = pairs_of.texts_of_lists(self.problems, store)
            return texts, pairs_of.rows_of_round(*written, store.episodes["reward"])
        chosen = self._pairs(store, iteration)
        self.round.facts |= chosen.facts()
        if self._judge is not None:
            self.round.facts["judge/problems"] = float(self._judge.undecided)
        lists = chosen.agreement is None
        lines = (
            pairs_of.rows_of_round(*written, store.episodes["reward"])
            if lists
            else pairs_of.rows_of_pairs(*written, chosen)
        )
        return (pairs_of.texts_of_pairs(self.problems, store, chosen) if len(chosen.better) else None), lines

    def _pairs(self, store: Replay, iteration: int) -> Chosen:
        h, judge = self.hparams, self._judge
        if judge is None:
            return pairs_of.pairs_by_reward(store, h.pairing)
        prompts = pairs_of.prompt_texts(self.problems, store, self.tokenizer)
        preferred = partial(judge.preferred_rows, prompts, self.answering.texts(pairs_of.token_lists(store)))
        soft = bool(h.get("soft_labels"))
        return pairs_of.pairs_by_judge(store, h.pairing, preferred, soft=soft, seed=self.seed or 0, iteration=iteration)

    # -- construction --------------------------------------------------------------------------------------------------

    @classmethod
    def data_class_for(cls, options: Mapping[str, Any]) -> type[DataModule]:
        return ProblemData if str(options.get("rounds") or 0) != "0" else cls.data_class()

    @property
    def in_rounds(self) -> bool:
        """Whether the policy draws what it learns from."""
        return self.hparams.rounds > 0

    @property
    def rows_of_prompt(self) -> int:
        """Rows that a round makes of the answers to one prompt, at most."""
        independent = self.makes == "pairs" and self.hparams.pairing == "independent"
        return self.hparams.answers // 2 if independent else 1

    @property
    def answers_of_row(self) -> int:
        """Answers in a row."""
        return {"pairs": 2, "winners": 1}.get(self.makes, self.hparams.answers)

    def _prompts(self, problems: Replay) -> int:
        """Problems of a round."""
        known = len(problems.tables["problems"])
        return known if self.hparams.prompts is None else self.hparams.prompts

    def _most_steps(self, problems: Replay) -> int:
        """Steps of a round in which every answer teaches something."""
        return self._steps_of(self._prompts(problems) * self.rows_of_prompt)

    def _steps_of(self, rows: int) -> int:
        return max(1, math.ceil(self.hparams.epochs * math.ceil(rows / self.hparams.batch_size)))

    def planned_steps(self, data: DataModule) -> int | None:
        if not self.in_rounds:
            return super().planned_steps(data)
        check_problems(data.load(), type(self).__name__, demonstrations=False)
        return self.hparams.rounds * self._most_steps(self.problems_of(data.load()))

    def take_data(self, data: Any) -> None:
        self.problems, self.answering, self.eval_problems = None, None, None  # type: ignore[assignment]
        self.round = Round()
        if not self.in_rounds:
            super().take_data(data)
            return
        h, name = self.hparams, type(self).__name__
        check_problems(data.replay, name, demonstrations=False)
        self._table, self.eval_table, self._plan = None, None, None
        self.tokenizer = data.tokenizer if self.tokenizer is None else self.tokenizer
        self.problems = self.problems_of(data.replay)
        known = len(self.problems.tables["problems"])
        if self._prompts(self.problems) > known:
            raise UsageError(
                f"`prompts` is {h.prompts} and the data have {known:,} problems; expected as many at most. Leave it "
                "out for all of them."
            )
        options, held_out = answering_options(h), getattr(data, "eval_replay", None)
        if h.judge is not None:
            with speaking(self.words):
                self._judge = Judge(h.judge, seconds=h.reward_seconds)
            if h.rewards is None and not data.replay.tables["problems/answer"].astype(bool).any():
                options.rewards, held_out = [NOTHING], None  # answers can be compared, and not measured
        if held_out is not None and self.run.eval_episodes > 0:
            self.eval_problems = self.problems_of(held_out)
        self.answering = Answering(
            self.problems, self.tokenizer, options, words=self.words, held_out=self.eval_problems
        )

    def expected_tokens(self) -> int:
        if not self.in_rounds:
            return super().expected_tokens()
        return self.answers_of_row * (self.answering.longest_prompt() + self.hparams.max_new_tokens)

    def longest_row(self) -> int:
        if not self.in_rounds:
            return super().longest_row()
        return self.answers_of_row * self.open_engine()

    def workload(self) -> dict[str, Any]:
        known = super().workload()
        if not self.in_rounds:
            return known
        h = self.hparams
        length = self.answering.longest_prompt() + h.max_new_tokens
        again = self.uses_reference and not h.lora_rank and h.reference in ("auto", "precomputed")  # opened each round
        return known | {
            "reference": known["reference"] or ("float32" if again else None),
            "cached_rows": self.cached_rows(),
            "cached_length": length,
        }

    def check_texts(self, replay: Any) -> None:
        if not self.in_rounds:
            super().check_texts(replay)
            return
        check_tokens(self.problems, self.model, self.hparams.policy, "problems")
        if isinstance(self.trainer.strategy, FullySharded):
            raise UsageError(
                "`rounds` is above 0, and the weights are cut by 'fsdp2', for which rounds are not made; expected "
                "whole weights. Pass --trainer.strategy ddp, or draw and train by turns (docs/preference-tuning.md)."
            )

    def plan_steps(self) -> None:
        if self._table is not None:
            super().plan_steps()

    # -- a round -------------------------------------------------------------------------------------------------------

    @property
    def first_step(self) -> int:  # type: ignore[override]
        return self.round.first_step

    def on_train_start(self) -> None:
        super().on_train_start()
        if not self.in_rounds:
            return
        self._cap = self.trainer.max_steps
        if self.uses_reference:
            self._reference = self._made_reference("ref", self.hparams.reference)
        if self.uses_previous:
            self._previous = self._made_reference("previous", "precomputed")
        store = self.trainer.datamodule.rollouts  # type: ignore[attr-defined]
        if store is not None and self.round.steps:  # a checkpoint stopped in this round
            texts, _ = pairs_of.texts_of_answers(self.problems, store)
            texts.tables = {name: column.cpu().numpy() for name, column in self._known["tables"].items()}
            self._lay_out(texts)
            self._table_of().columns = {name: column.cpu().numpy() for name, column in self._known["scored"].items()}
            self._end_at()

    def _made_reference(self, name: str, kind: str) -> Reference:
        kind = "precomputed" if kind == "round" else kind
        made = Reference(self.hparams, self.model, self.tokenizer, self._passes(), name=name, kind=kind)
        if kind == "live":
            made.prepare([], "")
        return made

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        super().on_train_batch_start(batch, batch_idx)
        if not self.in_rounds or not self.round.is_over(self.global_step):
            return None
        if self.round.number >= self.hparams.rounds:
            return self.end_here()
        self.check_finite()  # before answers are drawn
        try:
            self.trainer.datamodule.on_block_start(self)  # type: ignore[attr-defined]
        except Stopped:
            return self.stop_drawing()
        return self.end_early() if self._table is None else None

    def end_early(self) -> int:
        """End the run, as the rounds that are left teach nothing: the last update was the last one, and is judged."""
        self.trainer.fit_loop.epoch_loop.max_steps = self.global_step
        if self.run_log.measurement is not None:
            self.run_log.measurement.make_up(self.trainer, self)
        return self.end_here()

    def roll_out(self, store: Replay | None) -> Replay:
        """The answers of the next round that teaches something.

        Raises:
            Stopped: the user wants to stop; nothing has changed.
            DataError: no two answers of the first round differ in their reward.
        """
        h, seed, before = self.hparams, self.seed or 0, self.round
        stop, prompts = (self.wants_to_stop, self.on_any_process), self._prompts(self.problems)
        for k in range(before.number + 1, h.rounds + 1):
            began = time.perf_counter()
            with evaluating(self.model), self.precision_context():
                self.answering.sync(self.model, k)
                fresh = self.answering.fresh(k, prompts, (k - 1) * prompts, seed, stop)
            fresh.store.version = k
            self.round = Round(k, self.global_step, 0, dict(fresh.facts))
            texts, rows = self.texts_of_round(fresh.store, k)
            self._write(k, rows)
            if texts is not None:
                break
            self._say_empty(k)
        else:
            self._table = None
            return fresh.store
        self.round.facts["perf/rollout_seconds"] = time.perf_counter() - began
        self._lay_out(texts)
        self._score(k)
        self._end_at()
        forget_moments(self.trainer.optimizers[0])
        return fresh.store

    def _say_empty(self, k: int) -> None:
        """A round in which no pair was made is over at once; the first one stops the run."""
        found = f"round {k} has no pair to learn from: the answers to every prompt are equal or have equal rewards"
        if k > 1:
            log.warning("%s.", found.capitalize())
            return
        raise DataError(
            f"{found}; expected some that differ. Pass more --model.answers, a higher --model.temperature, or other "
            "--model.rewards."
        )

    def _lay_out(self, texts: Replay) -> None:
        """Take what a round learns from, and plan its steps."""
        bound, self._tables = self.texts_of(texts), dict(texts.tables)
        self._table = ReferenceTable(bound, np.arange(len(bound)))
        self.plan_steps()
        self.round.steps = self._steps_of(len(bound))
        self._table.needed = self._plan_of().rows_until(self.round.steps)

    def _score(self, k: int) -> None:
        """What the reference and the policy at the start of the round think of its texts."""
        table = self._table_of()
        moved = k > 1 and self.hparams.reference != "round"
        with self.precision_context():
            if self._reference is not None and self._reference.kind != "live":
                self._reference.prepare([table], self._start_digest, kept=False, moved=moved)
            if self._previous is not None:
                self._previous.prepare([table], self._start_digest, kept=False)

    def _end_at(self) -> None:
        """The run ends once the rounds that are left have made their steps, unless that is planned earlier."""
        now, left = self.round, self.hparams.rounds - self.round.number
        last = now.first_step + now.steps + left * self._most_steps(self.problems)
        self.trainer.fit_loop.epoch_loop.max_steps = min(self._cap, last)

    def _write(self, k: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The file of a round in the folder of the run."""
        if self.run_log.files is not None and self.trainer.is_global_zero:
            file = Path(self.trainer.default_root_dir) / "rounds" / f"round{k:04d}.jsonl"
            atomic_write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def rate(self, step: int) -> float:
        if not self.in_rounds:
            return super().rate(step)
        h, now = self.hparams, self.round
        how = {"lr": h.lr, "warmup_ratio": h.warmup_ratio, "lr_schedule": h.lr_schedule}
        return rate_at(step - now.first_step, now.steps, **how)

    # -- metrics, checkpoints, the first screen ------------------------------------------------------------------------

    def progress(self, updates: int) -> dict[str, float]:
        if not self.in_rounds:
            return super().progress(updates)
        now = self.round
        facts = {(name if name.startswith("perf/") else f"train/{name}"): value for name, value in now.facts.items()}
        epoch = (updates - now.first_step) / self._plan_of().steps_per_epoch
        return {"train/round": float(now.number), "train/epoch": epoch, **facts}

    def held_out(self) -> dict[str, float]:
        if not self.in_rounds:
            return super().held_out()
        if self.eval_problems is None:
            return {}
        numbers = {"samples": EVAL_SAMPLES, "limit": self.hparams.eval_rows}
        with evaluating(self.model), self.precision_context():
            return solve(self.eval_problems, self.answering, self.model, self.round.number, **numbers)

    def wants_checkpoint(self) -> bool:
        """Whether the weights should be on disk before what comes next: answers are drawn after this step."""
        return self.in_rounds and self.round.is_over(self.global_step)

    def extra_state(self) -> dict[str, Any]:
        known = super().extra_state()
        if not self.in_rounds:
            return known
        table = self._table
        found = {"tables": {}, "scored": {}} if table is None else {"tables": self._tables, "scored": table.columns}
        kept = {kind: {name: torch.from_numpy(part) for name, part in parts.items()} for kind, parts in found.items()}
        return known | {"round": asdict(self.round), **kept}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state(state)
        if ("round" in state) != self.in_rounds:
            found = "was trained in rounds" if "round" in state else "learned from texts that were given"
            raise UsageError(
                f"the checkpoint {found}, and `rounds` is {self.hparams.rounds}; expected the same kind of run. Pass "
                "its --model.rounds, or start a new run from its weights: --model.policy RUN/hf."
            )
        if self.in_rounds:
            self.round = Round(**state["round"])
            self._known = {name: dict(state[name]) for name in ("tables", "scored")}

    def on_train_end(self) -> None:
        super().on_train_end()
        if self.in_rounds and not self.interrupted_by:
            self.answering.check_rewards()
            if self._judge is not None:
                self._judge.check(processes.gathered(self._judge.tallies), ended=True)

    def describe(self) -> Description:
        if not self.in_rounds:
            return super().describe()
        h, asked = self.hparams, self._prompts(self.problems)
        shown = self.trainer.datamodule.options.get("show", 0)  # type: ignore[attr-defined]
        by = "their rewards" if self._judge is None else f"the judge {h.judge}"
        pairs = f"pairs, {h.pairing.replace('_', ' against ')}, by {by}"
        made = pairs if self.makes == "pairs" else MADE.get(self.makes, self.makes)
        most = self._most_steps(self.problems)
        held_out = self.eval_problems
        return Description(
            facts=[
                *self.answering.facts(),
                ("rounds", f"{h.rounds}, each {asked:,} problems with {h.answers} answers; {made}"),
                *([("reference", reference_words(h))] if self.uses_reference else []),
                self.policy_fact(),
                self.padding_fact(),
                *self.memory_facts(),
            ],
            batch=f"{h.batch_size} rows; a round has up to {most:,} updates, its own rise and fall of the rate",
            evaluates="" if held_out is None else f"{len(held_out.tables['problems']):,} held-out problems",
            notes=self.precision_notes(),
            samples=problem_texts(self.problems, self.tokenizer, shown),
            look="python -m offpolicy.generate {folder}, or offpolicy.export {folder} OUT [--merge]",
        )
