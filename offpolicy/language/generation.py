"""Answers drawn from a causal language model, and what is reported of them.

The random number behind a token is a pure function of (seed, prompt, sample, position), so answers do not depend on
how they are batched, up to rounding, and the generators of torch are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from offpolicy.data import sampling
from offpolicy.data.columns import to_numpy
from offpolicy.data.replay import Replay
from offpolicy.data.texts.sequences import token_ids
from offpolicy.data.texts.stops import stop_ids
from offpolicy.errors import UsageError, check_range
from offpolicy.language.reading import Reader, Way, together, way_of

# prompt, answer, right answer → a score, None where it cannot say
TextScore = Callable[[str, str, str | None], float | None]


class Answer(NamedTuple):
    """One drawn answer: its ``token`` ids, int64 (n,), with the stop token if it ``ended`` with one."""

    token: np.ndarray
    ended: bool


class Prompt(NamedTuple):
    """A prompt of a replay: its ``token`` ids, and the ids of an answer that is known to be good, or None."""

    token: np.ndarray
    reference: np.ndarray | None


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    *,
    stop: Iterable[int],
    num_samples: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[Answer]]:
    """Draw answers, with left padding and a cache of keys and values.

    Args:
        model: causal language model of ``transformers``, or one wrapped by ``peft``.
        prompts: token ids, (n,) each, n ≥ 1.
        stop: ids that end an answer; see :func:`stop_ids`.
        num_samples: answers per prompt, ≥ 1.
        max_new_tokens: longest answer, ≥ 1; shorter where the model has no more positions.
        temperature: divides the logits, ≥ 0; 0 takes the most likely token.
        top_k: draw from the k most likely tokens; 0 for all.
        top_p: draw from the smallest set of likely tokens that has this probability, in (0, 1].
        seed: of the draws.
        batch_size: answers drawn at once; prompts of similar length go together.
        on_batch: called with the number of answers done so far.

    Returns:
        For every prompt its ``num_samples`` answers, in the order of the prompts.

    Raises:
        UsageError: an option is out of range, or a prompt leaves the model no position for an answer.
    """
    for name, value in (("num_samples", num_samples), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        check_range(name, value, 1)
    check_range("temperature", temperature, 0.0)
    check_range("top_k", top_k, 0)
    check_range("top_p", top_p, 0.0, 1.0, lower_open=True)
    limit = positions(model) - max((len(prompt) for prompt in prompts), default=0)
    if limit < 1:
        raise UsageError(
            f"the longest prompt leaves no position for an answer; expected prompts shorter than {positions(model)} "
            "tokens. Pass a smaller `--data.max_prompt_length`."
        )
    max_new_tokens = min(max_new_tokens, limit)
    device = next(model.parameters()).device
    stops = torch.tensor(sorted(set(stop)), dtype=torch.int64, device=device)
    rows = [(i, k) for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])) for k in range(num_samples)]
    answers: list[list[Answer]] = [[Answer(np.empty(0, np.int64), False)] * num_samples for _ in prompts]
    key = sampling.keys(seed, "generation", torch.tensor([0], device="cpu"))[0]
    training = model.training
    model.eval()
    try:
        done, way = 0, way_of(model)
        for batch in _batches(rows, [len(prompts[i]) for i, _ in rows], batch_size, way):
            number = torch.tensor([i * num_samples + k for i, k in batch], device=key.device)
            uniform = sampling.uniforms(key, number, (max_new_tokens,)).to(device)

            def next_tokens(logits: Tensor, position: int, uniform: Tensor = uniform) -> Tensor:
                return draw(logits, uniform[:, position], temperature=temperature, top_k=top_k, top_p=top_p)

            drawn = _continue(
                Reader(model, way, max_new_tokens), [prompts[i] for i, _ in batch], stops, max_new_tokens, next_tokens
            )
            for (i, k), answer in zip(batch, drawn):
                answers[i][k] = answer
            if on_batch is not None:
                done += len(batch)
                on_batch(done)
    finally:
        model.train(training)
    return answers


def _batches(rows: list[Any], lengths: list[int], size: int, way: Way) -> Iterator[list[Any]]:
    """Rows of ascending lengths in batches that can be read in this way."""
    for part in together(lengths, way):
        for first in range(0, len(part), size):
            yield [rows[i] for i in part[first : first + size]]


def _continue(
    reader: Reader,
    prompts: list[np.ndarray],
    stops: Tensor,
    max_new_tokens: int,
    next_tokens: Callable[[Tensor, int], Tensor],
) -> list[Answer]:
    """One answer per prompt; ``next_tokens(logits (B, V), position)`` gives the next tokens (B,)."""
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=stops.device)
    length = torch.full((len(prompts),), max_new_tokens, device=stops.device)
    tokens: list[Tensor] = []
    logits = reader.read(prompts, [1] * len(prompts))
    for t in range(max_new_tokens):
        tokens.append(next_tokens(logits, t))
        stopped = torch.isin(tokens[-1], stops) & ~ended
        length = torch.where(stopped, t + 1, length)
        ended |= stopped
        if t + 1 == max_new_tokens or ended.all():
            break
        logits = reader.next(tokens[-1])
    table, lengths = torch.stack(tokens, 1).cpu().numpy(), length.tolist()
    return [Answer(row[:n].copy(), end) for row, n, end in zip(table, lengths, ended.tolist())]


def draw(logits: Tensor, uniform: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """One token per row by inverting the distribution function.

    Args:
        logits: (B, V).
        uniform: (B,), in [0, 1).
        temperature: as in :func:`sample`.
        top_k: as in :func:`sample`.
        top_p: as in :func:`sample`.

    Returns:
        int64 (B,).
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.double() / temperature).softmax(-1)
    if top_k or top_p < 1.0:
        p, order = p.sort(-1, descending=True)
        keep = p.cumsum(-1) - p < top_p
        if top_k:
            keep[:, top_k:] = False
        p = p * keep
    cumulative = p.cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=p.shape[-1] - 1)
    return (order.gather(-1, index) if top_k or top_p < 1.0 else index).squeeze(-1)


def positions(model: nn.Module) -> int:
    """How many tokens the model can look at; a very large number when it does not say."""
    parts = (model.config, model.config.get_text_config())  # type: ignore[union-attr, operator]
    said = [getattr(part, name, None) for part in parts for name in ("max_position_embeddings", "max_seq_len")]
    return min((int(one) for one in said if isinstance(one, int) and one > 0), default=1 << 30)


def prompts_of(replay: Replay, limit: int = 0) -> list[Prompt]:
    """The distinct prompts of a replay of texts in their order, each with a good answer where the data have one.

    Args:
        replay: with pairs or singles, where the chosen answer, or the first desirable one, is the reference, of scored
            ones the best, and none of those with several scores; or with problems, where the demonstration is.
        limit: how many at most; 0 for all.
    """
    if "problems" in replay.tables:
        table = replay.tables["problems"]
        good = table[:, 1] >= 0
    elif "pairs" in replay.tables:
        table, good = replay.tables["pairs"][:, :2], np.ones(len(replay.tables["pairs"]), dtype=bool)
    else:
        table = replay.tables["singles"]
        good = replay.tables.get("singles/label", np.ones(len(table), dtype=bool))
        if "singles/score" in replay.tables:
            good = _is_best(table[:, 0], to_numpy(replay.tables["singles/score"]))
    references: dict[int, int | None] = {}
    for (prompt, answer), fine in zip(table.tolist(), good.tolist()):
        if references.get(prompt) is None:
            references[prompt] = answer if fine else None
    chosen = list(references.items())[: limit or None]
    return [
        Prompt(token_ids(replay, prompt), None if answer is None else token_ids(replay, answer))
        for prompt, answer in chosen
    ]


def _is_best(prompt: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Whether each answer is the best to its prompt, the first of equal ones, (n,) bool; none with several scores."""
    best = np.zeros(len(prompt), dtype=bool)
    if score.ndim == 1:
        order = np.lexsort((-score, prompt))  # stable
        best[order[np.unique(prompt[order], return_index=True)[1]]] = True
    return best


def statistics(answers: Sequence[Sequence[Answer]]) -> dict[str, float]:
    """Numbers about drawn answers.

    Returns:
        ``length_mean`` (tokens, the stop token included), ``ended`` (share that stopped by itself), ``distinct_1``,
        ``distinct_2`` (share of one- and two-token sequences that are different ones, over all answers; small when
        a model repeats itself).
    """
    flat = [answer for some in answers for answer in some]
    numbers = {
        "length_mean": float(np.mean([len(answer.token) for answer in flat])),
        "ended": float(np.mean([answer.ended for answer in flat])),
    }
    for n in (1, 2):
        grams = [tuple(a.token[i : i + n].tolist()) for a in flat for i in range(len(a.token) - n + 1)]
        numbers[f"distinct_{n}"] = len(set(grams)) / len(grams) if grams else 0.0
    return numbers


def answer_prompts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    verifier: TextScore | None = None,
    revisions: int = 0,
    revise: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    **options: Any,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Draw answers to prompts, as texts, and score them.

    Args:
        model: as in :func:`sample`.
        tokenizer: of ``transformers``.
        prompts: see :func:`prompts_of`.
        verifier: see :mod:`offpolicy.language.rl.verifiers`; None for no scores.
        revisions: how often the model revises its answers; the last ones are the row's.
        revise: tokens of a prompt and of an answer, without its stop token → tokens that ask for a revision.
        options: further arguments of :func:`sample`.

    Returns:
        One row per prompt with ``prompt``, ``completions``, with a verifier ``scores`` (a row whose answers it could
        not judge has none), ``lengths``, ``ended`` and ``reference``: a scored list, which is data to train on. And the
        :func:`statistics`, with a verifier also ``score`` and ``best_score`` (mean over prompts of the best answer).
        With revisions rows have ``drafts``, the completions before each of them, and ``score_0`` … say the score of
        the first draft and of those that follow.
    """
    options.setdefault("stop", stop_ids(model, tokenizer))
    drawn = sample(model, [prompt.token for prompt in prompts], **options)
    drafts: list[Any] = []
    before: dict[str, float] = {}
    for k in range(revisions):
        assert revise is not None
        rows, numbers = _told(tokenizer, prompts, drawn, verifier, options["stop"])
        drafts.append([row["completions"] for row in rows])
        before |= {f"score_{k}": numbers["score"]} if "score" in numbers else {}
        asked = [
            revise(prompt.token, unended(answer.token, options["stop"]))
            for prompt, answers in zip(prompts, drawn)
            for answer in answers
        ]
        more = {**options, "num_samples": 1, "seed": options.get("seed", 0) + k + 1}
        revised, size = sample(model, asked, **more), len(drawn[0])
        drawn = [[one[0] for one in revised[i : i + size]] for i in range(0, len(revised), size)]
    rows, numbers = _told(tokenizer, prompts, drawn, verifier, options["stop"])
    for i, row in enumerate(rows if revisions else []):
        row["drafts"] = [draft[i] for draft in drafts]
    return rows, numbers | before


def _told(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    drawn: Sequence[Sequence[Answer]],
    verifier: TextScore | None,
    stop: Iterable[int],
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Answers as texts with their scores, a row per prompt, and numbers about them."""
    rows, scores = [], []
    for prompt, answers in zip(prompts, drawn):
        text = prompt_text(tokenizer, prompt.token)
        good = None if prompt.reference is None else unended(prompt.reference, stop)
        reference = None if good is None else answer_text(tokenizer, prompt.token, good)
        drawn_tokens = [unended(answer.token, stop) for answer in answers]
        completions = [answer_text(tokenizer, prompt.token, token) for token in drawn_tokens]
        row: dict[str, Any] = {"prompt": text, "completions": completions}
        if verifier is not None:
            judged = [verifier(text, completion, reference) for completion in completions]
            if all(score is not None for score in judged):
                row["scores"] = judged
                scores.append([float(score) for score in judged if score is not None])
        row |= {"lengths": [len(a.token) for a in answers], "ended": [a.ended for a in answers]}
        rows.append(row | {"reference": reference})
    numbers = statistics(drawn)
    if scores:
        numbers["score"] = float(np.mean([value for some in scores for value in some]))
        numbers["best_score"] = float(np.mean([max(some) for some in scores]))
    return rows, numbers


def prompt_text(tokenizer: Any, prompt: np.ndarray) -> str:
    """The text of a prompt, with the marks of a chat but without BOS."""
    ids = prompt[1:] if len(prompt) and prompt[0] == tokenizer.bos_token_id else prompt
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def unended(answer: np.ndarray, stop: Iterable[int]) -> np.ndarray:
    """An answer without the stop token at its end, which a tokenizer may not count as special."""
    return answer[:-1] if len(answer) and int(answer[-1]) in set(stop) else answer


def answer_text(tokenizer: Any, prompt: np.ndarray, answer: np.ndarray) -> str:
    """The text of an answer without special tokens, as it goes on from its prompt (some tokenizers drop a space)."""

    def text(ids: np.ndarray) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    before, whole = text(prompt), text(np.concatenate([prompt, answer]))
    return whole[len(before) :] if whole.startswith(before) else text(answer)
