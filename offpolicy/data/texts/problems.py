"""Problems with answers that can be checked: what a language model learns from by trying.

A replay of problems has texts as episodes, as :mod:`offpolicy.data.texts.sequences` does, and the table ``problems``,
(P, 2) int64: the prompt, and the demonstration or −1. Columns: ``problems/answer`` (text of the right answer, for the
reward; several, of which each is right, joined by :data:`offpolicy.data.texts.answers.OR`; empty where there is none),
``problems/row`` (where it stood in the source), ``problems/prompt_hash``, and a bool column per kind of problem.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from importlib.resources import files
from typing import Any

import numpy as np

from offpolicy.data.columns import smallest_type, to_numpy
from offpolicy.data.names import Target, resolve
from offpolicy.data.replay import Replay
from offpolicy.data.texts.answers import alternatives, joined_answers
from offpolicy.data.texts.formats import Faults, Source
from offpolicy.data.texts.formats.values import as_number
from offpolicy.data.texts.hub import read
from offpolicy.data.texts.numbers import MARK
from offpolicy.data.texts.problem_rows import Problem, problem_columns, question_hash, read_problems
from offpolicy.data.texts.rendering import Row
from offpolicy.data.texts.retelling import Telling
from offpolicy.data.texts.rollouts import told_columns
from offpolicy.data.texts.sequences import token_ids
from offpolicy.data.texts.stops import TurnEnd, turn_end
from offpolicy.data.texts.tokenised import TokenisedData
from offpolicy.data.texts.tokens import Limits, encode, fingerprint, load_tokenizer, tokenise
from offpolicy.errors import DataError, UsageError, check_range

THINK = "<think>"
MARKED = "{prompt}\nSolve the problem step by step and end with the number alone after ####.\n"  # put to a policy
BOXED = "{prompt}\nSolve the problem step by step and end with the answer alone in \\boxed{}.\n"


class Problems(Replay):
    """A replay of problems that knows where they came from."""

    reopen: Callable[[], Source] | None = None
    telling: Telling | None = None

    def source_column(self, name: str) -> list[Any]:
        """A column of the source as it stands there, one value per problem; it is read again."""
        assert self.reopen is not None
        values = self.reopen().column(name)
        return [values[row] for row in self.tables["problems/row"]]


class ProblemData(TokenisedData):
    """Problems for the Trainer; ``.replay`` is the training part, ``.eval_replay`` the held-out part or None.

    Args:
        name: "addition" (two-digit sums, made here), "gsm8k", a file (.jsonl[.gz], .json[.gz], .parquet, .arrow), a
            folder written by ``datasets``, or a data set of the Hugging Face hub.
        download: fetch a set of the hub that is not on disk.
        on_bad: "error" stops at rows without a prompt or an answer; "drop" leaves them out and counts them.
        columns: our name → the source's name, where they differ; None leaves a column out. Ours: prompt, answer,
            solution (a demonstration), solution_logps (log-probability of each of its tokens and of EOS under who
            wrote it), system, tools, chat_template_kwargs. Without an answer, what a solution marks by "####" or
            \\boxed{} is the answer; without both there is none, which suits rewards that need none.
        split: part of a set that has several; None takes "train" or the only one.
        tokenizer: folder or hub name; None is the policy's.
        template: what a prompt of plain text is put into, with "{prompt}" in it; None asks for "####" before the
            number, or for \\boxed{}, where right answers were read from solutions that have it.
        chat: put prompts of plain text into the tokenizer's chat template, as a turn of the user.
        chat_template_kwargs: passed to the chat template.
        max_prompt_length: longest prompt in tokens, ≥ 1; longer ones are faulty rows.
        max_bad: largest share of rows that ``on_bad="drop"`` may drop, in [0, 1].
        eval_data: held-out problems, read with the same options; "NAME@SPLIT" takes another split. None is the test
            split of a known set.
        eval_fraction: else, share of the prompts that is held out, in [0, 1); chosen by a hash of the prompt.
        show: problems printed before training.
    """

    content = "problems"

    def __init__(
        self,
        name: str = "addition",
        *,
        download: bool = True,
        on_bad: str = "error",
        columns: dict[str, str | None] | None = None,
        split: str | None = None,
        tokenizer: str | None = None,
        template: str | None = None,
        chat: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        max_prompt_length: int = 512,
        max_bad: float = 0.1,
        eval_data: str | None = None,
        eval_fraction: float = 0.05,
        show: int = 2,
    ) -> None:
        check_range("data.max_prompt_length", max_prompt_length, 1)
        if template is not None and "{prompt}" not in template:
            raise UsageError(f"`template` is '{template}'; expected a text with {{prompt}} in it. Add it.")
        options = {
            "download": download,
            "on_bad": on_bad,
            "columns": columns,
            "split": split,
            "tokenizer": tokenizer,
            "template": template,
            "chat": chat,
            "chat_template_kwargs": chat_template_kwargs,
            "max_prompt_length": max_prompt_length,
            "max_bad": max_bad,
            "eval_data": eval_data,
            "eval_fraction": eval_fraction,
            "show": show,
        }
        super().__init__(name, options)
        self.rollouts: Replay | None = None  # answers of the policy: the part that changes during training

    def load(self) -> Replay:
        """Open, check and tokenise the problems if that has not happened yet, and hold some out."""
        if self.replay is None:
            given = {k: v for k, v in self.options.items() if k not in ("eval_data", "eval_fraction", "show")}
            given["tokenizer"] = self.tokenizer
            held_out = self.options["eval_data"]
            if held_out is None and self.options["split"] is None:
                held_out = _test_split(str(self.name))
            replay: Replay = open_problems(str(self.name), training=True, **given)
            if held_out is not None:
                name, _, part = str(held_out).partition("@")
                self.eval_replay = open_problems(name, **given | {"split": part or None})
                _check_overlap(replay, self.eval_replay)
            elif self.options["eval_fraction"] > 0:
                replay, self.eval_replay = _split(replay, self.options["eval_fraction"])
            self.replay = replay
        return self.replay

    # -- answers of the policy -----------------------------------------------------------------------------------------

    def on_block_start(self, policy: Any) -> None:
        """Let the policy answer the problems of its next iteration."""
        self.rollouts = policy.roll_out(self.rollouts)

    def state_dict(self) -> dict[str, Any]:
        """Version and fingerprint of the answers, which are written beside the checkpoint first."""
        if self.rollouts is None:
            return {"version": 0}
        state = {"version": self.rollouts.version, "fingerprint": self.rollouts.fingerprint()}
        self._keep(self.rollouts, self._version_folder(state))
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.rollouts = None
        if state_dict["version"]:
            self.rollouts = told_columns(self._stored(state_dict))


# -- reading -----------------------------------------------------------------------------------------------------------


def open_problems(
    name: str,
    *,
    tokenizer: Any,
    training: bool = False,
    download: bool = True,
    on_bad: str = "error",
    columns: Mapping[str, str | None] | None = None,
    split: str | None = None,
    template: str | None = None,
    chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_prompt_length: int = 512,
    max_bad: float = 0.1,
) -> Problems:
    """Open, check and tokenise problems; arguments as of :class:`ProblemData`.

    Args:
        training: refuse questions of a known test set.

    Returns:
        The replay with the table ``problems``; ``meta`` says what was found. Without a column of answers or solutions
        there is no right answer, which suits rewards that compare with none.

    Raises:
        UsageError: an unknown name or an impossible option.
        DataError: problems that are absent, damaged or cannot be trained on.
    """
    target, tokenizer = resolve(name, language=True), load_tokenizer(tokenizer)
    if target.kind != "language":
        raise DataError(
            f"{target.name} holds no problems; expected prompts with answers, such as gsm8k or a .jsonl file."
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path} has no EOS token, so no answer of the policy would end; expected "
            "one. Set its eos_token, or take another policy."
        )
    source = read(target, split, download=download)
    named = problem_columns(source, dict(columns or {}))
    read_rows = list(read_problems(source, named))
    faults = Faults(source.where, source.rows, on_bad, max_bad)
    marked = any(p.solution is not None and MARK in p.solution for p in read_rows)
    boxed = "answer" not in named and "solution" in named
    template = template or (MARKED if marked else BOXED if boxed else "{prompt}")
    rows = _put(read_rows, named["prompt"], faults, template, chat, chat_template_kwargs or {}, training)
    prompt_ids = _prompt_tokens(rows, named["prompt"], faults, tokenizer, max_prompt_length)
    faults.check()
    left = list(prompt_ids)
    solutions = [_continued(prompt_ids[i], read_rows[i].solution, tokenizer) for i in left]
    talks = {i for i, row in rows.items() if not isinstance(row.prompt, str)}
    turn = turn_end(tokenizer) if talks else TurnEnd(None, "")
    ends = [turn.token if i in talks else None for i in left]
    demonstrations = _demonstrations(solutions, ends, tokenizer)
    logps: list[np.ndarray] | None = None
    if "solution_logps" in named:
        given_logps = source.column(named["solution_logps"])
        logps = [_logps(given_logps[i], d, i, faults) for i, d in zip(left, demonstrations) if d is not None]
        faults.check()
    replay = _build(list(prompt_ids.values()), demonstrations, logps, len(tokenizer))
    replay.reopen = partial(read, target, split, download=download)
    replay.telling = Telling(
        replay.reopen, named, tokenizer, template, chat, chat_template_kwargs or {}, max_prompt_length
    )
    replay.tables |= _columns(read_rows, left, source, named)
    given = sum(d is not None for d in demonstrations)
    notes = [] if given in (0, len(left)) else [f"problems without a demonstration: {len(left) - given:,}"]
    several = sum(len(read_rows[i].answers) > 1 for i in left)
    notes += [f"problems with several right answers, of which each is right: {several:,}"] if several else []
    warnings = [f"{faults.bad} of {source.rows} rows were dropped: {faults.table()}"] if faults.bad else []
    warnings += [turn.doubt] if turn.doubt else []
    replay.meta |= {
        "name": target.name,
        "source": "problems",
        **source.meta,
        "rows": source.rows,
        "problems": len(left),
        "demonstrations": given,
        "columns": named,
        "source_columns": source.names,
        "template": template,
        "reward": "math" if marked or boxed else "exact",
        "style": "chat" if talks else "text",
        "dropped": faults.counts(),
        "notes": [*source.notes, *notes],
        "warnings": [*warnings, *source.doubts],
        "tokenizer": {"name": str(tokenizer.name_or_path), "fingerprint": fingerprint(tokenizer)},
    }
    return replay


def sketch_problems(
    target: Target, *, columns: Mapping[str, str | None] | None = None, split: str | None = None, download: bool = True
) -> str:
    """What can be said about problems without a tokenizer: counts, and the first two."""
    source = read(target, split, download=download)
    named = problem_columns(source, dict(columns or {}))
    problems = list(read_problems(source, named))
    given = sum(p.solution is not None for p in problems)
    lines = [f"{target.name}: {source.rows:,} problems, {given:,} with a demonstration; columns {named}"]
    lines += [f"  note      {text}" for text in source.notes] + [f"  warning   {text}" for text in source.doubts]
    for problem in problems[:2]:
        answer = " or ".join(map(repr, problem.answers)) or None
        lines.append(f"  {problem.text!r} ▶ {problem.solution!r}, answer {answer}")
    return "\n".join(lines)


@lru_cache(maxsize=1)
def known_test() -> frozenset[str]:
    """Hashes of the questions of GSM8K's test set, which nobody may train on."""
    return frozenset(files("datasets_cfg").joinpath("gsm8k_test.csv").read_text().split()[1:])


def _test_split(name: str) -> str | None:
    """The held-out part of a known set."""
    target = resolve(name, language=True)
    return f"{target.name}@test" if "hub" in target.info else None


def _is_kind(values: list[Any]) -> bool:
    return all(isinstance(v, (bool, np.bool_)) for v in values)


def _put(
    problems: list[Problem],
    column: str,
    faults: Faults,
    template: str,
    chat: bool,
    chat_template_kwargs: Mapping[str, Any],
    training: bool,
) -> dict[int, Row]:
    """What is put to the policy, by the number of the problem in the source; faulty problems go to ``faults``."""
    test = known_test() if training else frozenset()
    rows = {}
    for i, problem in enumerate(problems):
        if problem.fault is not None:
            faults.add(i, *problem.fault.args)
        elif test.intersection(problem.hashes()):
            faults.add(i, column, "known_test", problem.text)
        else:
            asked = problem.asked(template, chat)
            rows[i] = Row(asked, (), {**chat_template_kwargs, **problem.options})
    return rows


def _prompt_tokens(
    rows: dict[int, Row], column: str, faults: Faults, tokenizer: Any, longest: int
) -> dict[int, np.ndarray]:
    """Tokens of the prompts by the number of the problem; a prompt that is too long goes to ``faults``."""
    found = {}
    for i, one in zip(rows, encode(rows.values(), tokenizer, Limits(1 << 30, truncation="keep_end"))):
        if one.fault or len(one.prompt) > longest:
            what = one.found if one.fault else f"{len(one.prompt)} tokens, and room for {longest}"
            faults.add(i, column, one.fault or "long_prompt", what)
        else:
            found[i] = one.prompt
    return found


def _columns(
    problems: list[Problem], left: list[int], source: Source, named: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Columns of the table of problems, for the problems that are left."""
    others = [name for name in source.names if name not in named.values()]
    kinds = {name: v for name in others for v in [source.column(name)] if _is_kind(v)}
    return {
        "problems/answer": np.asarray([joined_answers(problems[i].answers) for i in left]),
        "problems/row": np.asarray(left, dtype=np.int64),
        "problems/prompt_hash": np.asarray([int(question_hash(problems[i].text), 16) for i in left]),
        **{f"problems/{kind}": np.asarray(values, dtype=bool)[left] for kind, values in kinds.items()},
    }


def _continued(prompt: np.ndarray, solution: str | None, tokenizer: Any) -> str | None:
    """A solution without the ``<think>`` that its prompt ends with already, as some chat templates have it."""
    opened = solution is not None and solution.lstrip().startswith(THINK)
    if solution is None or not opened or not tokenizer.decode(prompt).rstrip().endswith(THINK):
        return solution
    return solution.lstrip().removeprefix(THINK)


def _demonstrations(solutions: list[str | None], ends: list[int | None], tokenizer: Any) -> list[np.ndarray | None]:
    """Tokens of each demonstration with what ends an answer to its prompt, EOS where ``ends`` has None."""
    ids = tokenise([s for s in solutions if s is not None], tokenizer)
    eos = tokenizer.eos_token_id
    return [
        None if s is None else np.append(ids[s], eos if end is None else end).astype(np.int64)
        for s, end in zip(solutions, ends)
    ]


def _logps(value: Any, demonstration: np.ndarray, row: int, faults: Faults) -> np.ndarray:
    """Log-probabilities of the demonstrator, one per token and one for its end; NaN where a row has none."""
    if value is None:
        return np.full(len(demonstration), np.nan, np.float32)
    given = value if isinstance(value, list) else [value]
    numbers = [as_number(one) for one in given]
    wrong = [one for one, number in zip(given, numbers) if number is None or number > 0]
    if wrong or len(numbers) != len(demonstration):
        shown = f"{len(numbers)} numbers for {len(demonstration)} tokens"
        faults.add(row, "solution_logps", "logps", f"{shown}, of which one is {wrong[0]!r}" if wrong else shown)
        return np.full(len(demonstration), np.nan, np.float32)
    return np.asarray(numbers, dtype=np.float32)


def _build(
    prompts: list[np.ndarray],
    demonstrations: list[np.ndarray | None],
    logps: list[np.ndarray] | None,
    vocabulary: int,
) -> Problems:
    given = [d for d in demonstrations if d is not None]
    parts = [*prompts, *given]
    length = np.asarray([len(part) for part in parts], dtype=np.int64)
    second = np.full(len(prompts), -1, dtype=np.int64)
    second[[d is not None for d in demonstrations]] = len(prompts) + np.arange(len(given))
    levels = [0.5, 0.95, 1.0]
    roles = {"prompt": length[: len(prompts)], "demonstration": length[len(prompts) :]}
    steps: dict[str, Any] = {"token": np.concatenate(parts).astype(smallest_type(vocabulary))}
    if logps is not None:
        unknown = np.full(int(length[: len(prompts)].sum()), np.nan, np.float32)
        steps["logp"] = np.concatenate([unknown, *logps])
    return Problems(
        steps,
        start=np.cumsum(length) - length,
        length=length,
        tables={"problems": np.stack([np.arange(len(prompts)), second], axis=1)},
        meta={
            "lengths": {
                role: [int(q) for q in np.quantile(one, levels, method="higher")]
                for role, one in roles.items()
                if len(one)
            }
        },
    )


def _split(replay: Replay, fraction: float) -> tuple[Replay, Replay | None]:
    """Hold out the problems whose prompts have the lowest hashes, so that a prompt is never on both sides."""
    key = replay.tables["problems/prompt_hash"]
    distinct = np.unique(key)
    if len(distinct) < 2:
        return replay, None
    held = key <= distinct[min(len(distinct) - 1, max(1, round(fraction * len(distinct)))) - 1]
    return select_problems(replay, ~held), select_problems(replay, held)


def select_problems(replay: Replay, keep: np.ndarray) -> Replay:
    """The problems that a mask (P,) keeps; texts are shared."""
    tables = {name: column[keep] for name, column in replay.tables.items()}
    part = type(replay)(replay.steps, start=replay.start, length=replay.length, tables=tables, meta=dict(replay.meta))
    if isinstance(part, Problems) and isinstance(replay, Problems):
        part.reopen, part.telling = replay.reopen, replay.telling
    part.meta["problems"] = int(keep.sum())
    part.meta["demonstrations"] = int((tables["problems"][:, 1] >= 0).sum())
    return part


def _check_overlap(training: Replay, held_out: Replay) -> None:
    """Stop where a held-out question is also trained on."""
    asked, known = (one.tables["problems/prompt_hash"] for one in (held_out, training))
    seen = int(np.isin(asked, known).sum())
    if seen:
        raise DataError(
            f"{seen:,} of the {len(asked):,} held-out problems are in the training data too, so they would measure "
            "memory; expected none. Remove them from one side, or pass other `--data.eval_data`."
        )


def problem_texts(problems: Replay, tokenizer: Any, number: int) -> str:
    """The first problems, with their demonstrations and right answers, for a person to read."""
    lines = []
    for i in range(min(number, len(problems.tables["problems"]))):
        prompt, demonstration = problems.tables["problems"][i].tolist()
        text = tokenizer.decode(token_ids(problems, prompt)) + " ▶ "
        if demonstration >= 0:
            text += tokenizer.decode(token_ids(problems, demonstration))
        answers = " or ".join(alternatives(str(problems.tables["problems/answer"][i])))
        lines.append(f"problem {i}\n  {text}" + (f"\n  answer {answers}" if answers else ""))
    return "\n".join(lines)


def step_column(replay: Replay, episode: int, name: str) -> np.ndarray:
    """A float column of one text; NaN where the replay has no such column."""
    start, length = replay.start[episode], replay.length[episode]
    if name not in replay.steps:
        return np.full(length, np.nan, np.float32)
    return to_numpy(replay.steps[name])[start : start + length]


__all__ = ["ProblemData", "Problems", "open_problems", "question_hash"]
