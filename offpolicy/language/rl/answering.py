"""How a policy answers the problems of an iteration: the engine is asked, demonstrations are added, all are judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from offpolicy.compute import processes
from offpolicy.data.replay import Replay
from offpolicy.data.texts.answers import alternatives
from offpolicy.data.texts.problems import Problems
from offpolicy.data.texts.rollouts import CONTINUED, DEMONSTRATION, OWN, asked_texts, prompt_lengths
from offpolicy.data.texts.sequences import token_ids
from offpolicy.errors import UsageError
from offpolicy.language import policy as policies
from offpolicy.language.generation import prompt_text, stop_ids, unended
from offpolicy.language.rl.asking import Asked, AskedProblems
from offpolicy.language.rl.correcting import corrected, correction_facts, make_correction
from offpolicy.language.rl.demonstrations import Demonstrations
from offpolicy.language.rl.engine import (
    CONTINUES,
    Completion,
    EngineContext,
    Request,
    Sampling,
    Stop,
    close_engine,
    engine_name,
)
from offpolicy.language.rl.engines import TinyEngine, TransformersEngine, make_engine, room
from offpolicy.language.rl.filtering import Filters
from offpolicy.language.rl.hints import check_hinted_rewards, helped, write_hints
from offpolicy.language.rl.lengths import make_cycle
from offpolicy.language.rl.options import check_right_answers
from offpolicy.language.rl.probing import PROMPTS, probe
from offpolicy.language.rl.rewards import Rewards, Scored
from offpolicy.language.rl.rows import answer_row, rows_stored
from offpolicy.language.rl.tempering import draw_tempered, drawn_entropy, make_tempering
from offpolicy.language.rl.verifiers import final_part
from offpolicy.language.rl.window import gone_on, in_windows, requests_on, unjudged, window_fact, window_facts
from offpolicy.language.sharding import gather
from offpolicy.trust import Words, speaking, trusting

Answers = list[list[Completion]]  # to each request of this process


class Stopped(Exception):
    """The user wants to stop while answers are drawn."""


class Fresh(NamedTuple):
    """New answers of an iteration.

    Attributes:
        store: of those that it learns from.
        facts: for the metrics, over all that were drawn.
        problems: that were asked.
        written: answers of the policy, with those that a filter dropped.
        tempered: right answers at another temperature; None for none.
    """

    store: Replay
    facts: dict[str, float]
    problems: int
    written: int
    tempered: Replay | None = None


class Answering:
    """Answers of the policy to problems, and what they are worth.

    Args:
        problems: what is asked.
        tokenizer: of the policy.
        options: of the method: the engine, the rewards, and how many answers of which length are drawn.
        words: whose word the names in the options are, see :mod:`offpolicy.trust`.
        held_out: problems that are asked in an evaluation, if any.

    Attributes:
        rewards: what judges.
        engine: what answers, once the policy is open.
        length: longest answer in tokens, once the policy is open.
        demonstrations: what is given of them, once the policy is open.
    """

    def __init__(
        self, problems: Replay, tokenizer: Any, options: Any, *, words: Words, held_out: Replay | None = None
    ) -> None:
        h = self.options = options
        self.tokenizer, self.words, self.held_out = tokenizer, words, held_out
        with speaking(words):
            self.asking = AskedProblems(problems, h)
            self.correction = make_correction(getattr(h, "correction", None))
            self.tempering = make_tempering(getattr(h, "tempering", None))
        self.window: int | None = getattr(h, "window", None)
        self.again = np.asarray(self._ids(self.correction.instruction), np.int64) if self.correction else None
        with speaking(words), trusting(in_file=words.in_file or h.rewards is None):
            self.rewards = Rewards(
                [problems.meta.get("reward", "exact")] if h.rewards is None else h.rewards,  # the former: from a file
                columns=problems.meta.get("source_columns", ()),
                seconds=h.reward_seconds,
            )
        check_hinted_rewards(self.asking.hints, self.rewards.comparing)
        with speaking(words):
            self.filters = Filters(h.filter, self.rewards.names)
        self.cycle = make_cycle(h.length_cycle)
        for asked in (problems, held_out):
            if asked is not None:
                check_right_answers(asked, self.rewards.verifiers)
        self._columns: dict[tuple[int, str], list[Any]] = {}  # of the data, that rewards ask for
        self.engine: Any = None
        self.dtype: Any = torch.float32  # that the policy computes in
        self.probed: dict[str, float] = {}  # how far the engine was off at the last sync
        self._drew, self._drew_seconds = 0, 0.0  # tokens, and the time that took, since the last store
        self.length = 0
        self.demonstrations: Demonstrations = None  # type: ignore[assignment]
        self.stops: Sequence[int] = ()  # tokens that end an answer

    @property
    def problems(self) -> Replay:
        """What is asked, with the texts of all words."""
        return self.asking.problems

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @property
    def turns(self) -> int:
        """Turns of an answer, each of which may have the longest length."""
        return 1 if self.again is None else 2

    def before_last(self, length: int) -> int:
        """Tokens of an answer that stand before its last turn, at most, where a turn has so many."""
        return 0 if self.again is None else length + len(self.again)

    def longest_request(self) -> int:
        """Tokens of the longest text that is gone on with, once the policy is open."""
        begun = self.length - 1 if self.window is not None and self.window < self.length else 0
        begun = begun or self.before_last(self.length)
        return max(self.longest_prompt() + begun, self.demonstrations.longest_request())

    def open(self, model: Any, **place: Any) -> int:
        """Get ready for a policy, and make the engine.

        Args:
            model: the policy.
            place: what the trainer knows of :class:`EngineContext`: device, dtype, folder, seed, local_rank.

        Returns:
            The tokens of the longest prompt with its answer.
        """
        h = self.options
        prompts = prompt_lengths(self.problems)
        if self.again is None:
            self.length = room(policies.base_of(model), int(prompts.max()), h.max_new_tokens)
        else:  # two turns
            prompt = int(prompts.max()) + len(self.again) + 1
            self.length = (room(policies.base_of(model), prompt, 2 * h.max_new_tokens) + 1) // 2
        before = self.before_last(self.length)
        self.stops = tuple(stop_ids(model, self.tokenizer))
        self.demonstrations = Demonstrations(
            self.problems, wanted=h.demonstrations > 0, share=float(h.demonstration_share), length=self.length
        )
        context = EngineContext(
            longest_prompt=self.longest_request(),
            longest_answer=self.length,
            longest=self.longest_prompt() + before + self.length,
            answers_at_once=h.generation_batch,
            model=model,
            temperature=h.temperature,
            rank=processes.rank(),
            world=processes.world_size(),
            **place,
        )
        self.dtype = context.dtype
        self.close()
        with speaking(self.words):
            self.engine = make_engine(
                h.engine,
                batch_size=h.generation_batch,
                records=h.records,
                tokenizer=self.tokenizer,
                context=context,
            )
        return int(prompts.max()) + before + self.length

    def longest_prompt(self) -> int:
        """Tokens of the longest prompt, held-out ones included."""
        asked = [self.problems] if self.held_out is None else [self.problems, self.held_out]
        return max(int(prompt_lengths(one).max()) for one in asked)

    def close(self) -> None:
        """End what the engine has started."""
        close_engine(self.engine)

    def sync(self, model: Any, version: int) -> None:
        """Give the engine the weights of the policy, and compare a few of its log-probabilities with the policy's own.

        Args:
            model: the policy, in evaluation and in the precision of training.
            version: number of the iteration the weights belong to.

        Raises:
            UsageError: they differ: :func:`offpolicy.language.rl.probing.probe`.
        """
        self.engine.sync(model, version)
        gather(model)  # where an engine has asked for the weights of a sharded model, which cuts them
        self.asking.look(model)
        is_model = type(self.engine) in (TransformersEngine, TinyEngine)  # nothing is copied, nothing can differ
        if is_model or not getattr(self.engine, "on_policy", True):
            return
        table = self.problems.tables["problems"][:PROMPTS, 0]
        prompts = [token_ids(self.problems, row) for row in table]
        self.probed = probe(self.engine, model, prompts, self.sampling(version), self.dtype)

    def rest(self) -> None:
        """Let an engine that shares the trainer's card leave it until it is asked again."""
        rest = getattr(self.engine, "rest", None)
        if rest is not None:
            rest()

    def evaluation_engine(self) -> Any:
        """What answers held-out problems: the engine, unless it reads answers from a file."""
        h = self.options
        return TransformersEngine(h.generation_batch) if engine_name(h.engine) == "replay" else self.engine

    def facts(self) -> list[tuple[str, str]]:
        """Lines of the first screen: label and text."""
        meta = self.problems.meta
        lengths = ", ".join(f"{role} {'/'.join(map(str, q))}" for role, q in meta.get("lengths", {}).items())
        by = getattr(self.engine, "description", "")
        return [
            ("problems", f"{meta.get('problems', 0):,}, {meta.get('demonstrations', 0):,} with a demonstration"),
            ("tokens", f"{lengths} (median/95 %/largest), answers up to {self.length}"),
            *self.demonstrations.facts(),
            *self.asking.facts(),
            *self.filters.facts(),
            *([] if self.correction is None else [("turns", self.correction.fact())]),
            *([] if self.tempering is None else [("tempered", self.tempering.fact())]),
            *([] if self.window is None else [("window", window_fact(self.window, self.length))]),
            *([] if self.cycle is None else [("lengths", self.cycle.fact(self.length))]),
            ("reward", ", ".join(self.rewards.names)),
            *([("answers", f"by {by}")] if by else []),
        ]

    def fresh(
        self,
        k: int,
        groups: int,
        seen: int,
        seed: int,
        stop: Stop,
        drawn: Sequence[tuple[Asked, Answers]] = (),
        then: Callable[[int], None] | None = None,
        carried: Sequence[dict[str, Any]] = (),
    ) -> Fresh:
        """New answers of the policy, and demonstrations, judged; the same on every process.

        Args:
            k: the iteration.
            groups: problems to be answered now, ≥ 0; a filter may ask for more.
            seen: problems answered before.
            seed: of the run.
            stop: whether the user wants this process to stop, and whether a flag is set on any process.
            drawn: what was asked for the iteration before, with its answers.
            then: called with the number of problems that a filter asked for, once all answers are drawn; before they
                are judged, where nothing is drawn again.
            carried: unfinished answers of the iteration before, with the first numbers of groups.

        Raises:
            Stopped: the user wants to stop.
        """
        drawn, longer = list(drawn), []
        if groups or carried:
            asked = Asked(k, k, seen, groups, first=len(carried) + sum(one.groups for one, _ in drawn))
            mine = carried[processes.rank() :: processes.world_size()]
            answers = self.draw(asked, seed, stop, requests_on(self, mine, self.length))
            drawn.append((asked, answers[: len(answers) - len(mine)]))
            longer = [
                gone_on(row, some[0], k, self.length) for row, some in zip(mine, answers[len(answers) - len(mine) :])
            ]
        wanted, again, then = sum(one.groups for one, _ in drawn), 0, then or (lambda extra: None)
        if not self.filters.redraws:
            then(0)
        alone: list[dict[str, Any]] = []  # what was answered without help
        hinted: list[dict[str, Any]] = []

        def answered(
            parts: Sequence[tuple[Asked, Answers]], more: Sequence[dict[str, Any]] = ()
        ) -> list[dict[str, Any]]:
            made = [*more, *(row for one, answers in parts for row in self._rows(one, answers, seed))]
            made = made if self.window is None else in_windows(made, self.length)
            rows = self.judged(made if self.again is None else corrected(self, made, self.again, k, seed, stop))
            alone.extend(rows)
            return helped(self, rows, hinted, k, seed, stop)

        everyone = answered(drawn, longer)
        for _ in range(self.filters.redraws):
            missing = wanted - self.filters.with_signal(everyone)
            if missing <= 0:
                break
            asked = Asked(k, k, seen + groups + again, missing, first=wanted + again)
            again += missing
            everyone += answered([(asked, self.draw(asked, seed, stop))])
        if self.filters.redraws:
            then(again)
        for rows in (alone, everyone):
            rows.sort(key=lambda row: row["slot"])  # stable: answers of a group keep their order
        self.asking.learn(alone)
        store, facts = rows_stored(everyone, k, self.length_of(k), self.problems, self.dtype)
        own = self.turns * int((store.episodes["source"] != DEMONSTRATION).sum()) + len(hinted) - len(carried)
        facts |= {} if self.window is None else window_facts(store, len(carried))
        if self.filters.redraws:
            store, said = self.filters.chosen(store, wanted)
            facts |= said
        tempered = None
        if self.tempering is not None:
            more, said = draw_tempered(self, store, drawn_entropy(alone), k, seed, stop)
            tempered = rows_stored(more, k, self.length_of(k), self.problems, self.dtype)[0] if more else None
            own, facts = own + int(said["tempered/drawn"]), facts | said
        speeds = [speed for speed in processes.gathered(self._speed()) if speed is not None]
        facts |= {"perf/engine_tokens_per_s": sum(speeds)} if speeds else {}
        facts |= self.asking.metrics(everyone, hinted) | ({} if self.correction is None else correction_facts(store))
        facts |= self.probed | (self.engine.facts() if hasattr(self.engine, "facts") else {})
        return Fresh(store, facts, wanted + again, own, tempered)

    def judged(self, made: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What was drawn on all processes, with its rewards."""
        self.rest()
        self._judge(made)
        parts = processes.gathered((made, self.rewards.tallies))
        self.rewards.check([tallies for _, tallies in parts])
        return [row for rows, _ in parts for row in rows]

    def _problems_of(self, asked: Asked, seed: int) -> Iterator[tuple[int, int, int, int]]:
        """Of each group that this process answers its number, its problem, in which words, and the tokens given."""
        mine = np.arange(processes.rank(), asked.groups, processes.world_size())
        problems, words = (column[mine] for column in self.asking.of(asked, seed))
        columns = asked.first + mine, problems, words, self.demonstrations.given[problems]
        return zip(*(column.tolist() for column in columns))

    def requests(self, asked: Asked, seed: int) -> list[Request]:
        """What this process asks the engine: answers to problems, then what goes on from demonstrations."""
        size = self.options.group_size
        plain, begun = [], []
        for slot, problem, words, given in self._problems_of(asked, seed):
            plain.append(Request(self.prompt(problem, words), slot, size - int(given > 0)))
            if given and self.demonstrations.continued:
                text, left = self.demonstrations.request(problem)
                begun.append(Request(text, slot + CONTINUES, 1, left))
        return [*plain, *begun]

    def prompt(self, problem: int, words: int) -> np.ndarray:
        """Tokens of a problem in its own words (0) or others."""
        return token_ids(self.problems, asked_texts(self.problems, np.asarray([problem]), np.asarray([words]))[0])

    def draw(self, asked: Asked, seed: int, stop: Stop, more: Sequence[Request] = ()) -> Answers:
        """Answers to the requests of this process, and to more, by the weights that the engine has.

        Raises:
            Stopped: the user wants to stop.
        """
        write_hints(self, self.asking.of(asked, seed)[0], asked.iteration, seed, stop)
        return self.generated([*self.requests(asked, seed), *more], asked.iteration, seed, stop)

    def generated(self, requests: list[Request], iteration: int, seed: int, stop: Stop, heat: float = 1.0) -> Answers:
        """Answers to requests of this process, at ``heat`` times the temperature; raises as :meth:`draw`."""
        wants_to_stop, on_any_process = stop
        how, began = self.sampling(iteration, seed), time.perf_counter()
        how = replace(how, temperature=heat * how.temperature)
        answers = self.engine.generate(requests, how, wants_to_stop)
        self.note_drawn(answers, time.perf_counter() - began)
        if on_any_process(wants_to_stop()):
            raise Stopped
        return answers

    def note_drawn(self, answers: Answers, seconds: float) -> None:
        """Count answers that the engine of this process has drawn, and the seconds in which it drew them."""
        self._drew += sum(len(one[0]) for some in answers for one in some)
        self._drew_seconds += seconds

    def _speed(self) -> float | None:
        """Tokens that this process drew in a second since the last call; None where it drew none."""
        tokens, seconds = self._drew, self._drew_seconds
        self._drew, self._drew_seconds = 0, 0.0
        return tokens / seconds if tokens and seconds > 0 else None

    def _rows(self, asked: Asked, answers: Answers, seed: int) -> Iterator[dict[str, Any]]:
        """The answers of this process, and what begins with a demonstration beside them, group by group."""
        groups = list(self._problems_of(asked, seed))
        begun = iter(answers[len(groups) :])
        for (slot, problem, words, given), some in zip(groups, answers):
            for answer in some:
                yield answer_row(slot, problem, OWN, answer, asked.version, asked=words)
            if given and self.demonstrations.continued:
                answer = self.demonstrations.answer(problem, Completion(*next(begun)[0]))
                yield answer_row(slot, problem, CONTINUED, answer, asked.version, given)
            elif given:
                yield answer_row(
                    slot, problem, DEMONSTRATION, self.demonstrations.answer(problem), asked.iteration, given
                )

    def length_of(self, iteration: int) -> int:
        """Longest answer in tokens, in an iteration; of all in evaluations, iteration 0."""
        return self.length if self.cycle is None else self.cycle.length(iteration, self.length)

    def sampling(self, iteration: int, seed: int = 0) -> Sampling:
        """How answers are drawn in an iteration of a run with a seed."""
        return Sampling(
            stop=tuple(self.stops),
            max_new_tokens=min(self.window, self.length) if self.window and iteration else self.length_of(iteration),
            temperature=self.options.temperature,
            seed=seed,
            iteration=iteration,
        )

    def texts(self, answers: Sequence[np.ndarray]) -> list[str]:
        """Answers as texts, without special tokens; equal ones are decoded once."""
        known: dict[bytes, str] = {}
        for token in answers:
            if token.tobytes() not in known:
                known[token.tobytes()] = self.tokenizer.decode(
                    unended(token, self.stops), skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
        return [known[token.tobytes()] for token in answers]

    def finals(self, prompts: Sequence[np.ndarray], answers: Sequence[Completion]) -> list[str]:
        """What counts of answers to these prompts: what they say behind their thinking."""
        texts = zip(self.texts([one.token for one in answers]), prompts, answers)
        return [final_part(text, prompt_text(self.tokenizer, p), ended=one.ended).strip() for text, p, one in texts]

    def judge(
        self,
        problems: Replay,
        rows: Sequence[int],
        answers: Sequence[np.ndarray],
        ended: Sequence[bool],
        groups: Sequence[int] | None = None,
        words: Sequence[int] | None = None,
    ) -> Scored:
        """Rewards of answers to rows of problems.

        Args:
            problems, rows: what was asked.
            answers, ended: what was answered, and whether it came to its end.
            groups: as of :class:`Rewards`; None for one per problem.
            words: in which each was asked; None for its own.
        """
        asked = np.zeros(len(rows), np.int64) if words is None else np.asarray(words, np.int64)
        texts = asked_texts(problems, np.asarray(rows, np.int64), asked).tolist()
        prompts = {text: prompt_text(self.tokenizer, token_ids(problems, text)) for text in set(texts)}
        references = problems.tables["problems/answer"]
        return self.rewards(
            [prompts[text] for text in texts],
            self.texts(answers),
            [_reference(references[row]) for row in rows],
            ended=ended,
            lengths=[len(answer) for answer in answers],
            columns={name: self._column(problems, name, rows) for name in self.rewards.columns},
            groups=rows if groups is None else groups,
        )

    def _column(self, problems: Replay, name: str, rows: Sequence[int]) -> list[Any]:
        """A column of the data, as it stands in the source, of rows of problems."""
        key = id(problems.tables.get("problems/row")), name  # of the data, whatever words were added
        if key not in self._columns:
            if name not in problems.meta.get("source_columns", ()) or not isinstance(problems, Problems):
                raise UsageError(
                    f"a reward asks for the column '{name}', which {problems.meta.get('name', 'the data')} has not; "
                    "expected it in the held-out problems too. Add it, or leave it out of the function."
                )
            self._columns[key] = problems.source_column(name)
        return [self._columns[key][row] for row in rows]

    def check_rewards(self) -> None:
        """Stop at the end of a run in which no reward ever gave a number; called on every process."""
        self.rewards.check(processes.gathered(self.rewards.tallies), ended=True)

    def _judge(self, made: list[dict[str, Any]]) -> None:
        for row in made:
            row |= unjudged(self.rewards.names) if row.get("unfinished") else {}
        made = [row for row in made if not row.get("unfinished")]
        rows = [row["problem"] for row in made]
        answers, ended = [row["token"][row.get("behind", 0) :] for row in made], [row["ended"] for row in made]
        slots, words = [row["slot"] for row in made], [row["asked"] for row in made]
        scored = self.judge(self.problems, rows, answers, ended, slots, words)
        scores, parts, right = scored.scores, scored.parts, self.rewards.solved(scored)
        if self.correction is not None:
            firsts, ended = [row["token"][: row["first"]] for row in made], [row["first_ended"] for row in made]
            for row, reward in zip(made, self.judge(self.problems, rows, firsts, ended, slots, words).scores):
                row["first_reward"] = float(reward)
        for i, row in enumerate(made):
            row["right"] = bool(right[i])
            row["reward"], row["parts"] = float(scores[i]), {name: float(part[i]) for name, part in parts.items()}
            row["problem_with_reward"] = scored.problems / len(made)


def _reference(kept: str) -> str | list[str] | None:
    """The right answer that a table holds, or all of them where there are several."""
    found = alternatives(str(kept)) if kept else []
    return found if len(found) > 1 else found[0] if found else None
