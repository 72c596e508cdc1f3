"""Answers in a file: written by a run, and read again by an engine that draws none.

A line is the answers to one prompt: ``{"prompt": [ids], "completions": [[ids], …], "ended": [true, …], "logps": [[…],
…]}``. Prompt and completions may be texts instead, as :mod:`offpolicy.generate` writes them, and ``logps``, under the
policy that drew them, may be missing: then they count as drawn by the policy that learns. A prompt may have several
lines. Recorded runs also say ``iteration`` and ``request`` (which problem of the iteration), the ``rewards``, the
``versions`` of the weights that drew, and ``sampler_logps``, as the engine had said them (null where it did not).
Where an answer went on from the beginning of a demonstration, this stands behind the prompt, on a line of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from offpolicy.data.guard import faults
from offpolicy.data.replay import Replay
from offpolicy.data.texts.problems import step_column
from offpolicy.data.texts.rollouts import CONTINUED, OWN, asked_texts, group_rows, iteration_of
from offpolicy.data.texts.sequences import token_ids
from offpolicy.data.texts.tokens import prompt_ids
from offpolicy.errors import DataError, UsageError
from offpolicy.files import atomic_write
from offpolicy.language.rl.engine import CONTINUES, Completion, Request, Sampling
from offpolicy.language.rl.hints import BEHIND_HINT


class ReplayEngine:
    """Answers from a file, for learning from what was drawn before and for tests; weights are never looked at.

    A request takes the answers that were recorded for it, the same iteration and number. Where there are none it takes
    the next answers to its prompt, from the start again after the last.

    Args:
        path: the file, JSON lines.
        tokenizer: for texts.

    Raises:
        UsageError: no such file.
        DataError: a line is no such record.
    """

    on_policy = False  # others drew the answers

    def __init__(self, path: str | Path, tokenizer: Any = None) -> None:
        self.path, self.tokenizer = Path(path), tokenizer
        if not self.path.is_file():
            raise UsageError(f"`records` is {self.path}, which is no file; expected JSON lines. Check the path.")
        self.records: dict[tuple[Any, ...], list[Completion]] = {}  # by prompt; by iteration, number and prompt
        with faults(self.path):
            text = self.path.read_text("utf-8")
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                self._read(line, f"{self.path}, line {number}")

    def _read(self, line: str, where: str) -> None:
        try:
            row = json.loads(line)
            texts = [self._ids(text, end) for text, end in zip(row["completions"], row["ended"], strict=True)]
            logps = row.get("logps") or [[np.nan] * len(text) for text in texts]
            said = row.get("sampler_logps") or [None] * len(texts)
            versions = [v if v is None else int(v) for v in row.get("versions") or [None] * len(texts)]
            prompt = prompt_ids(row["prompt"], self.tokenizer) if isinstance(row["prompt"], str) else row["prompt"]
            answers = [recorded(*one) for one in zip(texts, logps, row["ended"], versions, said, strict=True)]
            key = tuple(int(i) for i in prompt)
        except Exception as error:  # a record can be wrong in many ways
            raise DataError(
                f"{where} is no record ({type(error).__name__}: {error}); expected prompt, completions and ended, and "
                "logps of equal length if any."
            ) from None
        shapes = [{one.shape for one in (a.token, a.logp, a.sampler_logp) if one is not None} for a in answers]
        if any(not len(a.token) or len(shape) > 1 for a, shape in zip(answers, shapes)):
            raise DataError(f"{where}: an answer has no token, or another number of logps. Correct the record.")
        self.records.setdefault(key, []).extend(answers)
        if "iteration" in row and "request" in row:
            self.records[row["iteration"], row["request"], key] = answers

    def _ids(self, text: Any, ended: bool) -> list[int]:
        if not isinstance(text, str):
            return text
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id] if ended else ids

    def sync(self, model: nn.Module, version: int) -> None:
        self.version = version

    def generate(
        self, requests: Sequence[Request], how: Sampling, stopped: Callable[[], bool] | None = None
    ) -> list[list[Completion]]:
        found = []
        for request in requests:
            prompt = tuple(request.prompt.tolist())
            known = self.records.get((how.iteration, request.number, prompt), [])
            first = 0
            if len(known) < request.samples:
                known, first = self.records.get(prompt, []), how.iteration * request.samples
            if not known and request.samples:
                raise DataError(
                    f"{self.path} has no answer to the prompt {request.prompt.tolist()[:20]}; expected one for every "
                    "prompt. Record them, or train on the prompts of the file."
                )
            found.append(
                [cut_answer(known[(first + k) % len(known)], request.most(how)) for k in range(request.samples)]
            )
        return found


def recorded(token: Any, logp: Any, ended: Any, version: int | None, said: Any) -> Completion:
    """An answer as a record has it.

    Args:
        token, logp, ended: ids, log-probabilities in training, and whether it stopped by itself.
        version: of the weights that drew it; None where the record does not say.
        said: log-probabilities as the engine that drew it reported them; None where the record does not say.
    """
    ids = np.asarray(token, dtype=np.int64)
    drew = None if version is None else np.full(len(ids), version, np.int64)
    sampler_logp = None if said is None else np.asarray(said, dtype=np.float64)
    return Completion(ids, np.asarray(logp, dtype=np.float64), bool(ended), drew, sampler_logp)


def cut_answer(answer: Completion, longest: int) -> Completion:
    """An answer of at most so many tokens."""
    if len(answer.token) <= longest:
        return answer
    cut = {name: part[:longest] for name, part in answer._asdict().items() if isinstance(part, np.ndarray)}
    return answer._replace(**cut, ended=False)


class Recorder:
    """Writes what a run draws, iteration by iteration.

    Args:
        path: the file; lines of iterations after ``iteration``, and one that a kill tore, are removed from it.
        iteration: the last one that counts.
    """

    def __init__(self, path: Path, iteration: int) -> None:
        self.path = path
        if path.is_file():
            with faults(path):
                whole = [line for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]
                kept = "".join(line for line in whole if json.loads(line)["iteration"] <= iteration)
            atomic_write(path, kept)

    def write(self, problems: Replay, store: Replay, iteration: int) -> None:
        """Add the policy's answers of an iteration, once their log-probabilities are known."""
        fresh, source = iteration_of(store) == iteration, store.episodes["source"]
        lines = []
        words = store.episodes.get("asked", np.zeros_like(store.length))
        for group, rows in group_rows(store).items():
            slot, rows = group & 0xFFFFFFFF, rows[fresh[rows]]
            for kind, number in ((OWN, slot), (CONTINUED, slot + CONTINUES)):
                drawn = rows[source[rows] == kind]
                first = words[drawn].min(initial=len(words))
                for asked in np.unique(words[drawn]).tolist():
                    some = drawn[words[drawn] == asked]
                    number_of = number + (asked - int(first)) * BEHIND_HINT
                    line = {**_line(problems, store, some), "iteration": iteration, "request": number_of}
                    lines.append(json.dumps(line) + "\n")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))


def _line(problems: Replay, store: Replay, rows: np.ndarray) -> dict[str, Any]:
    """What was drawn behind one prompt, with as many tokens of a demonstration behind it as were given."""
    facts, given = store.episodes, int(store.episodes["given"][rows[0]])
    asked = facts["asked"][rows[:1]] if "asked" in facts else None
    prompt = token_ids(problems, asked_texts(problems, facts["prompt"][rows[:1]], asked)[0])
    return {
        "prompt": [*prompt.tolist(), *token_ids(store, rows[0])[:given].tolist()],
        "completions": [token_ids(store, row)[given:].tolist() for row in rows],
        "ended": facts["ended"][rows].tolist(),
        "logps": [step_column(store, row, "logp")[given:].tolist() for row in rows],
        "sampler_logps": [without_nan(step_column(store, row, "sampler_logp")[given:]) for row in rows],
        "rewards": facts["reward"][rows].tolist(),
        "versions": facts["policy_version"][rows].tolist(),
    }


def without_nan(values: np.ndarray) -> list[float | None]:
    """Numbers as JSON has them, which has no NaN."""
    return [None if np.isnan(one) else one for one in values.tolist()]
