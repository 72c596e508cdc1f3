"""Problems with answers that can be checked: what a language model learns from by trying.

A replay of problems has texts as episodes, as :mod:`offpolicy.data.sequences` does, and the table ``problems``, (P, 2)
int64: the prompt, and the demonstration or −1. Columns: ``problems/answer`` (text of the right answer, for the reward),
``problems/row`` (where it stood in the source), ``problems/prompt_hash``, and a bool column per kind of problem.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

import numpy as np

from offpolicy.data.names import Target, resolve
from offpolicy.data.replay import Replay, _numpy
from offpolicy.data.sampling import permutation
from offpolicy.data.sources.formats import Faults, Source
from offpolicy.data.tokenised import TokenisedData
from offpolicy.errors import DataError, UsageError, check_range, nearest
from offpolicy.language.tokens import Limits, Row, encode, fingerprint, load_tokenizer, tokenise

PROMPTS = ("prompt", "question", "problem")
ANSWERS = ("answer", "ground_truth", "reward_model")
SOLUTIONS = ("solution", "target", "completion")
MARK = "####"  # of GSM8K, before the final answer
THINK = "<think>"
MARKED = "{prompt}\nSolve the problem step by step and end with the number alone after ####.\n"  # put to a policy


class ProblemData(TokenisedData):
    """Problems for the Trainer; ``.replay`` is the training part, ``.eval_replay`` the held-out part or None.

    Args:
        name: "addition" (two-digit sums, made here), "gsm8k", a file (.jsonl[.gz], .json[.gz], .parquet, .arrow), a
            folder written by ``datasets``, or a data set of the Hugging Face hub.
        download: fetch a set of the hub that is not on disk.
        on_bad: "error" stops at rows without a prompt or an answer; "drop" leaves them out and counts them.
        columns: our name → the source's name, where they differ; None leaves a column out. Ours: prompt, answer,
            solution (a demonstration), solution_logps (log-probability of each of its tokens and of EOS under who
            wrote it). Without an answer, a solution's text after "####" is the answer.
        split: part of a set that has several; None takes "train" or the only one.
        tokenizer: folder or hub name; None is the policy's.
        template: what a prompt of plain text is put into, with "{prompt}" in it; None asks for "####" before the
            number where solutions have it.
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
            replay = open_problems(str(self.name), training=True, **given)
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
            self.rollouts = self._stored(state_dict)


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
) -> Replay:
    """Open, check and tokenise problems; arguments as of :class:`ProblemData`.

    Args:
        training: refuse questions of a known test set.

    Returns:
        The replay with the table ``problems``; ``meta`` says what was found.

    Raises:
        UsageError: an unknown name or an impossible option.
        DataError: problems that are absent, damaged or cannot be trained on.
    """
    from offpolicy.data.sources.hf import read

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
    named, prompts, answers, solutions = _contents(source, columns)
    faults = Faults(source.where, source.rows, on_bad, max_bad)
    marked = any(s is not None and MARK in s for s in solutions)
    template = template or (MARKED if marked else "{prompt}")
    test = known_test() if training else frozenset()
    kept, rows = [], []
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        text = _text_of(prompt)
        if text is None or not text.strip():
            faults.add(i, named["prompt"], "no_prompt")
        elif answer is None or not answer.strip():
            faults.add(i, named.get("answer", named.get("solution", "answer")), "none" if answer is None else "empty")
        elif question_hash(text) in test:
            faults.add(i, named["prompt"], "known_test", text)
        else:
            put = template.replace("{prompt}", prompt) if isinstance(prompt, str) else prompt
            asked = [{"role": "user", "content": put}] if chat and isinstance(put, str) else put
            rows.append(Row(asked, (), dict(chat_template_kwargs or {})))
            kept.append(i)
    prompt_ids, left = [], []
    for i, one in zip(kept, encode(rows, tokenizer, Limits(1 << 30, truncation="keep_end"))):
        if one.fault or len(one.prompt) > max_prompt_length:
            found = one.found if one.fault else f"{len(one.prompt)} tokens, and room for {max_prompt_length}"
            faults.add(i, named["prompt"], one.fault or "long_prompt", found)
            continue
        prompt_ids.append(one.prompt)
        left.append(i)
    faults.check()
    pairs = zip(prompt_ids, (solutions[i] for i in left))
    demonstrations = _demonstrations([_continued(ids, s, tokenizer) for ids, s in pairs], tokenizer)
    logps: list[np.ndarray] | None = None
    if "solution_logps" in named:
        given_logps = source.column(named["solution_logps"])
        logps = [_logps(given_logps[i], d, i, faults) for i, d in zip(left, demonstrations) if d is not None]
        faults.check()
    kinds = {k: v for k in source.names if k not in named.values() for v in [source.column(k)] if _is_kind(v)}
    replay = _build(prompt_ids, demonstrations, logps, len(tokenizer))
    replay.tables |= {
        "problems/answer": np.asarray([str(answers[i]).strip() for i in left]),
        "problems/row": np.asarray(left, dtype=np.int64),
        "problems/prompt_hash": np.asarray([int(question_hash(_text_of(prompts[i]) or ""), 16) for i in left]),
        **{f"problems/{kind}": np.asarray(values, dtype=bool)[left] for kind, values in kinds.items()},
    }
    given = sum(d is not None for d in demonstrations)
    replay.meta |= {
        "name": target.name,
        "source": "problems",
        **source.meta,
        "rows": source.rows,
        "problems": len(left),
        "demonstrations": given,
        "columns": named,
        "template": template,
        "reward": "math" if marked else "exact",
        "dropped": faults.counts(),
        "notes": [] if given in (0, len(left)) else [f"problems without a demonstration: {len(left) - given:,}"],
        "warnings": [f"{faults.bad} of {source.rows} rows were dropped: {faults.table()}"] if faults.bad else [],
        "tokenizer": {"name": str(tokenizer.name_or_path), "fingerprint": fingerprint(tokenizer)},
    }
    return replay


def sketch(
    target: Target, *, columns: Mapping[str, str | None] | None = None, split: str | None = None, download: bool = True
) -> str:
    """What can be said about problems without a tokenizer: counts, and the first two."""
    from offpolicy.data.sources.hf import read

    source = read(target, split, download=download)
    named, prompts, answers, solutions = _contents(source, columns)
    given = sum(s is not None for s in solutions)
    lines = [f"{target.name}: {source.rows:,} problems, {given:,} with a demonstration; columns {named}"]
    for prompt, answer, solution in list(zip(prompts, answers, solutions))[:2]:
        lines.append(f"  {_text_of(prompt)!r} ▶ {solution!r}, answer {answer!r}")
    return "\n".join(lines)


def addition(split: str | None = None) -> Source:
    """All two-digit sums ``ab+cd=`` with three-digit answers; those whose units carry are marked.

    Args:
        split: "train" (9,600 sums; None is the same) or "test" (the other 400, the same always).
    """
    if split not in (None, "train", "test"):
        raise UsageError(f"`split` is '{split}'; expected 'train' or 'test'. Pass one of them.")
    order = permutation(0, 0, 10_000).numpy()
    chosen = np.sort(order[:400] if split == "test" else order[400:])
    a, b = np.divmod(chosen, 100)
    answer = [f"{total:03d}" for total in a + b]
    columns = {
        "prompt": [f"{x:02d}+{y:02d}=" for x, y in zip(a, b)],
        "answer": answer,
        "solution": answer,
        "carry": (a % 10 + b % 10 >= 10).tolist(),
    }
    return Source("addition", len(chosen), list(columns), columns.__getitem__, {"file": "made here"})


@lru_cache(maxsize=1)
def known_test() -> frozenset[str]:
    """Hashes of the questions of GSM8K's test set, which nobody may train on."""
    return frozenset(files("datasets_cfg").joinpath("gsm8k_test.csv").read_text().split()[1:])


def question_hash(text: str) -> str:
    """12 hexadecimal digits of the SHA-256 of a question, white space aside."""
    return sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def without_annotations(solution: str) -> str:
    """A GSM8K solution without its calculator annotations ``<<…>>``."""
    return re.sub(r"<<[^<>]*>>", "", solution)


def _test_split(name: str) -> str | None:
    """The held-out part of a known set."""
    target = resolve(name, language=True)
    return f"{target.name}@test" if "hub" in target.info else None


def _contents(
    source: Source, columns: Mapping[str, str | None] | None
) -> tuple[dict[str, str], list[Any], list[str | None], list[str | None]]:
    """Our name → the source's, and the prompts, answers and demonstrations in its rows."""
    named = _columns(source, dict(columns or {}))
    solutions: list[str | None] = [None] * source.rows
    if "solution" in named:
        solutions = [_solution(value) for value in source.column(named["solution"])]
    return named, source.column(named["prompt"]), _answers(source, named, solutions), solutions


def _columns(source: Source, given: dict[str, str | None]) -> dict[str, str]:
    """Our name → the source's."""
    wanted = {"prompt": PROMPTS, "answer": ANSWERS, "solution": SOLUTIONS, "solution_logps": ("solution_logps",)}
    for ours, theirs in given.items():
        if ours not in wanted:
            raise UsageError(f"`columns` names '{ours}'; expected {', '.join(wanted)}.{nearest(ours, wanted)}")
        if theirs is not None and theirs not in source.names:
            raise UsageError(
                f"`columns` says that {ours} is '{theirs}', but {source.where} has {', '.join(source.names)}."
                f"{nearest(theirs, source.names)}"
            )
    found = {k: next((n for n in names if n in source.names), None) for k, names in wanted.items()} | given
    named = {k: v for k, v in found.items() if v is not None}
    if "prompt" not in named or not {"answer", "solution"} & named.keys():
        raise DataError(
            f"{source.where} has the columns {', '.join(source.names)}; expected a prompt ({', '.join(PROMPTS)}) and "
            f'an answer ({", ".join(ANSWERS)}). Say which they are: --data.columns \'{{"answer": "…"}}\'.'
        )
    return named


def _answers(source: Source, named: dict[str, str], solutions: list[Any]) -> list[str | None]:
    """The right answers; a column of solutions that end with "####" holds both."""
    if "answer" not in named:
        return [None if s is None else _after_mark(s) for s in solutions]
    raw = [a.get("ground_truth") if isinstance(a, Mapping) else a for a in source.column(named["answer"])]
    texts = [None if a is None or a != a else str(a) for a in raw]
    marked = [MARK in t for t in texts if t]
    if not marked or sum(marked) < 0.9 * len(marked):
        return texts
    solutions[:] = [s if t is None or s is not None else without_annotations(t) for s, t in zip(solutions, texts)]
    return [None if t is None else _after_mark(t) for t in texts]


def _after_mark(text: str) -> str | None:
    return text.rpartition(MARK)[2].strip() if MARK in text else None


def _solution(value: Any) -> str | None:
    """The text of a demonstration: plain, or the turn of the assistant."""
    text = value if isinstance(value, str) or value is None else _text_of(value)
    return without_annotations(text) if text and text.strip() else None


def _text_of(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value and all(isinstance(m, Mapping) for m in value):
        return "\n".join(str(m.get("content", "")) for m in value)
    return None


def _is_kind(values: list[Any]) -> bool:
    return all(isinstance(v, (bool, np.bool_)) for v in values)


def _continued(prompt: np.ndarray, solution: str | None, tokenizer: Any) -> str | None:
    """A solution without the ``<think>`` that its prompt ends with already, as some chat templates have it."""
    opened = solution is not None and solution.lstrip().startswith(THINK)
    if solution is None or not opened or not tokenizer.decode(prompt).rstrip().endswith(THINK):
        return solution
    return solution.lstrip().removeprefix(THINK)


def _demonstrations(solutions: list[str | None], tokenizer: Any) -> list[np.ndarray | None]:
    """Tokens of each demonstration with EOS."""
    ids = tokenise([s for s in solutions if s is not None], tokenizer)
    return [None if s is None else np.append(ids[s], tokenizer.eos_token_id).astype(np.int64) for s in solutions]


def _logps(value: Any, demonstration: np.ndarray, row: int, faults: Faults) -> np.ndarray:
    """Log-probabilities of the demonstrator, one per token and one for EOS; NaN where a row has none."""
    if value is None:
        return np.full(len(demonstration), np.nan, np.float32)
    found = np.asarray(value, dtype=np.float32)
    if found.shape != demonstration.shape or not (found <= 0).all():
        faults.add(row, "solution_logps", "logps", f"{found.size} numbers for {len(demonstration)} tokens")
    return found


def _build(
    prompts: list[np.ndarray],
    demonstrations: list[np.ndarray | None],
    logps: list[np.ndarray] | None,
    vocabulary: int,
) -> Replay:
    from offpolicy.data.sources.hf import _smallest

    given = [d for d in demonstrations if d is not None]
    parts = [*prompts, *given]
    length = np.asarray([len(part) for part in parts], dtype=np.int64)
    second = np.full(len(prompts), -1, dtype=np.int64)
    second[[d is not None for d in demonstrations]] = len(prompts) + np.arange(len(given))
    levels = [0.5, 0.95, 1.0]
    roles = {"prompt": length[: len(prompts)], "demonstration": length[len(prompts) :]}
    steps: dict[str, Any] = {"token": np.concatenate(parts).astype(_smallest(vocabulary))}
    if logps is not None:
        unknown = np.full(int(length[: len(prompts)].sum()), np.nan, np.float32)
        steps["logp"] = np.concatenate([unknown, *logps])
    return Replay(
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
    return select(replay, ~held), select(replay, held)


def select(replay: Replay, keep: np.ndarray) -> Replay:
    """The problems that a mask (P,) keeps; texts are shared."""
    tables = {name: column[keep] for name, column in replay.tables.items()}
    part = Replay(replay.steps, start=replay.start, length=replay.length, tables=tables, meta=dict(replay.meta))
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


def step_column(replay: Replay, episode: int, name: str) -> np.ndarray:
    """A float column of one text; NaN where the replay has no such column."""
    start, length = replay.start[episode], replay.length[episode]
    if name not in replay.steps:
        return np.full(length, np.nan, np.float32)
    return _numpy(replay.steps[name])[start : start + length]


__all__ = ["ProblemData", "addition", "open_problems"]
