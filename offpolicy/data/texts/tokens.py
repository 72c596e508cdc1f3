"""From texts to tokens: the one place where prompts and answers are rendered, tokenised, ended and cut.

A prompt and its answers are tokenised together, as one text each, and an answer begins where the tokens of the text
with the answer first differ from those of the prompt alone. So they are the tokens that the model would see, whatever a
tokenizer merges across the boundary, and all answers of a row keep the same prompt tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from offpolicy.data.texts.rendering import Row, Text, render
from offpolicy.data.texts.tool_turns import Place
from offpolicy.errors import DataError, UsageError, check_range

CHUNK = 1024  # rows tokenised per call: enough for the tokenizer's threads, little to hold
TRUNCATIONS = ("prompt_first", "keep_start", "keep_end")


@dataclass(frozen=True)
class Limits:
    """How long texts may be and what gives way.

    Args:
        max_length: longest prompt with answer in tokens, ≥ 2.
        max_prompt_length: tokens to which "prompt_first" shortens the prompts of longer texts, in [1, max_length); None
            is half of ``max_length``.
        truncation: "prompt_first" cuts the beginning of the prompt, then the end of the answers; "keep_start" the end
            of the answers; "keep_end" the beginning of the prompt.
    """

    max_length: int = 1024
    max_prompt_length: int | None = None
    truncation: str = "prompt_first"

    def __post_init__(self) -> None:
        check_range("data.max_length", self.max_length, 2)
        if self.truncation not in TRUNCATIONS:
            raise UsageError(f"`truncation` is '{self.truncation}'; expected one of {', '.join(TRUNCATIONS)}.")
        if self.max_prompt_length is None:
            object.__setattr__(self, "max_prompt_length", self.max_length // 2)
        assert self.max_prompt_length is not None
        if self.truncation == "prompt_first" and not 1 <= self.max_prompt_length < self.max_length:
            raise UsageError(
                f"`max_prompt_length` is {self.max_prompt_length} with a `max_length` of {self.max_length}; expected a "
                "value in [1, max_length). Change `--data.max_prompt_length` or `--data.max_length`."
            )


@dataclass
class Encoded:
    """Tokens of a row.

    Attributes:
        prompt, answers: int64 ids; the prompt with BOS if there is one, the answers with EOS unless cut.
        fault: "" or why the row cannot be trained on: "surrogate", "template", "tool_turns", "no_prompt_token",
            "empty", "identical", "truncated", "identical_cut".
        where: what is faulty, "prompt" or "answers".
        found: what was found, for the message about a fault.
        moved: number of prompt tokens that went to the answers because the tokenizer merges across the boundary.
        tail: the text of the moved tokens.
        cut_prompt, cut_answer: whether the prompt or an answer was shortened.
        scored: for each answer which of its tokens are the model's, bool; None where all of the row's are.
    """

    prompt: np.ndarray
    answers: list[np.ndarray]
    fault: str = ""
    where: str = "answers"
    found: str = ""
    moved: int = 0
    tail: str = ""
    cut_prompt: bool = False
    cut_answer: bool = False
    scored: list[np.ndarray] | None = None


# -- tokenizers --------------------------------------------------------------------------------------------------------


def load_tokenizer(name_or_tokenizer: Any) -> Any:
    """A tokenizer of ``transformers`` from a folder or hub name; one at hand is returned as it is.

    Raises:
        DataError: there is none under this name.
    """
    if not isinstance(name_or_tokenizer, str | os.PathLike):
        return name_or_tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name_or_tokenizer, trust_remote_code=False)
    except Exception as error:  # the library raises almost anything here
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"no tokenizer could be loaded from '{name_or_tokenizer}' ({type(error).__name__}: {reason}); expected a "
            "folder with tokenizer.json, or a name on the Hugging Face hub. Pass `--data.tokenizer DIR`."
        ) from None


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 over everything that decides which tokens a text becomes: vocabulary, rules, special ids, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules = {k: v for k, v in rules.items() if k not in ("truncation", "padding")}  # state of the last call
    else:
        rules = {"class": type(tokenizer).__name__, "vocab": sorted(tokenizer.get_vocab().items())}
    parts = [rules, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# -- rendering and tokenisation ----------------------------------------------------------------------------------------


def encode(rows: Iterable[Row], tokenizer: Any, limits: Limits | None = None) -> Iterator[Encoded]:
    """Tokenise rows in order.

    Plain text: BOS is put in front if the tokenizer has one and the text does not begin with it, EOS at the end of
    answers that do not end with it. Messages: the chat template writes everything, and nothing is added. The
    prompt is rendered up to the answer, the answer with the turns before it.

    Args:
        rows: prompts with answers; answers of one row are cut to keep the same prompt.
        tokenizer: of ``transformers``.
        limits: lengths; the defaults of :class:`Limits` when None.

    Raises:
        DataError: messages for a tokenizer without a chat template.
    """
    limits, rows = limits or Limits(), iter(rows)
    while chunk := list(islice(rows, CHUNK)):
        texts = [render(row, tokenizer) for row in chunk]
        good = [row.all() for row in texts if not row.fault]
        ids = tokenise([text for row in good for text in row], tokenizer)
        for row, rendered in zip(chunk, texts):
            if rendered.fault:
                yield Encoded(np.zeros(0, dtype=np.int64), [], rendered.fault, rendered.where, rendered.found)
                continue
            full = [ids[text] for text in rendered.answers]
            split = _split(ids[rendered.prompt], full, tokenizer, plain=isinstance(row.prompt, str))
            if any(rendered.tools):
                split.scored = [
                    _without_tools(ids, text, places)[len(split.prompt) :]
                    for text, places in zip(rendered.answers, rendered.tools)
                ]
            yield _cut(split, limits, tokenizer)


def _without_tools(ids: Mapping[str, np.ndarray], text: str, places: Iterable[Place]) -> np.ndarray:
    """Which tokens of a text stand outside of these places, bool; one that spans the beginning of a place does not."""
    outside = np.ones(len(ids[text]), dtype=bool)
    for begin, end in places:
        first, last = (_common(ids[text], ids[text[:at]]) for at in (begin, end))
        outside[first:last] = False
    return outside


def prompt_ids(prompt: Text, tokenizer: Any, template: Mapping[str, Any] | None = None) -> np.ndarray:
    """The tokens after which the model writes its answer to a prompt, int64 (T,); not cut."""
    rendered = render(Row(prompt, (), template or {}), tokenizer)
    if rendered.fault == "template":
        raise DataError(f"the chat template refuses the prompt: {rendered.found}. Correct the roles of its messages.")
    if rendered.fault:
        raise DataError(
            f"the prompt holds half of a surrogate pair ({rendered.found!r}); expected characters. Write it again."
        )
    ids = tokenise([rendered.prompt], tokenizer)[rendered.prompt]
    return _with_bos(ids, tokenizer) if isinstance(prompt, str) else ids


def tokenise(texts: Sequence[str], tokenizer: Any) -> dict[str, np.ndarray]:
    """Ids of each distinct text, int64; special tokens are there only where the text writes them."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    ids = tokenizer(distinct, **options)["input_ids"]
    return {text: np.asarray(one, dtype=np.int64) for text, one in zip(distinct, ids)}


def _with_bos(ids: np.ndarray, tokenizer: Any) -> np.ndarray:
    """Exactly one BOS in front, where the tokenizer has one."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    return np.append(bos, ids[_count_leading(ids, bos) :])


def _split(prompt: np.ndarray, full: list[np.ndarray], tokenizer: Any, *, plain: bool) -> Encoded:
    """The tokens of a row, before they are cut."""
    if plain:
        prompt, full = _with_bos(prompt, tokenizer), [_with_eos(_with_bos(f, tokenizer), tokenizer) for f in full]
    boundary = min([len(prompt), *(_common(prompt, f) for f in full)])
    moved = prompt[boundary:]
    tail = tokenizer.decode(moved) if len(moved) else ""
    return Encoded(prompt[:boundary], [f[boundary:] for f in full], moved=len(moved), tail=tail)


def _with_eos(ids: np.ndarray, tokenizer: Any) -> np.ndarray:
    """Exactly one EOS at the end, where the tokenizer has one."""
    eos = tokenizer.eos_token_id
    if eos is None:
        return ids
    return np.append(ids[: len(ids) - _count_leading(ids[::-1], eos)], eos)


def _count_leading(ids: np.ndarray, value: int) -> int:
    other = np.flatnonzero(ids != value)
    return int(other[0]) if len(other) else len(ids)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    other = np.flatnonzero(a[:n] != b[:n])
    return int(other[0]) if len(other) else n


def _cut(row: Encoded, limits: Limits, tokenizer: Any) -> Encoded:
    """Shorten a row to the limits, deciding from its longest answer, and find the faults that only tokens show."""
    if not len(row.prompt):
        row.fault = "no_prompt_token"
        return row
    if any((answer == tokenizer.eos_token_id).all() for answer in row.answers):  # true of no tokens at all
        row.fault, row.found = "empty", "no token but the end of the text"
        return row
    if _identical(row.answers):
        row.fault = "identical"
        return row
    longest = max((len(answer) for answer in row.answers), default=0)
    if len(row.prompt) + longest <= limits.max_length:
        return row
    before = len(row.prompt)
    if limits.truncation == "prompt_first":
        row.prompt = shortened(row.prompt, limits.max_prompt_length or 1, tokenizer)
    elif limits.truncation == "keep_end":
        row.prompt = shortened(row.prompt, max(0, limits.max_length - longest), tokenizer)
    room = limits.max_length - len(row.prompt)
    row.cut_prompt = len(row.prompt) < before
    row.cut_answer = longest > room
    if not len(row.prompt) or room <= 0 or (limits.truncation == "keep_end" and row.cut_answer):
        row.fault, row.found = "truncated", f"{before} tokens of prompt and {longest} of answer"
        return row
    row.answers = [answer[:room] for answer in row.answers]
    row.scored = None if row.scored is None else [scored[:room] for scored in row.scored]
    if _identical(row.answers):
        row.fault, row.found = "identical_cut", f"the same first {room} tokens"
    if row.scored is not None and not all(map(np.any, row.scored)):
        row.fault, row.found = "truncated", f"{room} tokens of answer, all of them of tools"
    return row


def shortened(prompt: np.ndarray, keep: int, tokenizer: Any) -> np.ndarray:
    """The last ``keep`` tokens of a prompt, the first of them BOS where it begins with BOS."""
    if len(prompt) <= keep:
        return prompt
    if prompt[0] == tokenizer.bos_token_id and keep > 1:
        return np.append(prompt[:1], prompt[len(prompt) - keep + 1 :])
    return prompt[len(prompt) - keep :]


def _identical(answers: Sequence[np.ndarray]) -> bool:
    return len(answers) > 1 and all(np.array_equal(answers[0], other) for other in answers[1:])
