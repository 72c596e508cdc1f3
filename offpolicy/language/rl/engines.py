"""The engines that draw answers from the model in training itself, and how an engine is found by its name.

The random number behind a token is a pure function of (seed, iteration, request, sample, position), so answers do not
depend on how they are batched or which process draws them, up to rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offpolicy.compute.casts import kept_casts
from offpolicy.data import sampling
from offpolicy.errors import UsageError
from offpolicy.language.generation import draw, positions
from offpolicy.language.reading import Reader, read_anew, way_of
from offpolicy.language.rl.engine import CONTINUES, Completion, EngineContext, Request, Sampling
from offpolicy.language.rl.records import ReplayEngine
from offpolicy.language.rl.vllm import VllmEngine
from offpolicy.registry import Spec, import_callable, make, named_spec


class LocalEngine:
    """An engine that draws from the model in training itself.

    Args:
        batch_size: how much is computed at once, ≥ 1.
    """

    def __init__(self, batch_size: int = 256) -> None:
        self.batch_size = batch_size
        self.model: Any = None

    def sync(self, model: nn.Module, version: int) -> None:
        self.model = model

    def generate(
        self, requests: Sequence[Request], how: Sampling, stopped: Callable[[], bool] | None = None
    ) -> list[list[Completion]]:
        with kept_casts(self.model), torch.no_grad():
            return self._generate(requests, how, stopped)

    def _generate(
        self, requests: Sequence[Request], how: Sampling, stopped: Callable[[], bool] | None
    ) -> list[list[Completion]]:
        raise NotImplementedError(f"{type(self).__name__} must define generate.")


class TransformersEngine(LocalEngine):
    """Generation with a cache of keys and values: a prompt is read once for all answers to it.

    A model that keeps something else, or nothing that works, is read in the way that is right for it, see
    :mod:`offpolicy.language.reading`.

    Args:
        batch_size: answers drawn at once, ≥ 1.
    """

    def _generate(
        self, requests: Sequence[Request], how: Sampling, stopped: Callable[[], bool] | None
    ) -> list[list[Completion]]:
        if not way_of(self.model).keeps:
            anew = TinyEngine(self.batch_size)
            anew.sync(self.model, how.iteration)
            return anew.generate(requests, how, stopped)
        found: list[list[Completion]] = [[] for _ in requests]
        for part in self._batches(requests):
            if stopped is not None and stopped():
                break
            for i, some in zip(part, self._answers([requests[i] for i in part], how)):
                found[i] = some
        return found

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Requests of similar length together, whole requests only."""
        part: list[int] = []
        answers = 0
        for i in sorted(range(len(requests)), key=lambda i: len(requests[i].prompt)):
            length = len(requests[i].prompt)
            alone = not way_of(self.model).padded and part and len(requests[part[0]].prompt) != length
            if part and (alone or answers + requests[i].samples > self.batch_size):
                yield part
                part, answers = [], 0
            part.append(i)
            answers += requests[i].samples
        if part:
            yield part

    def _answers(self, requests: list[Request], how: Sampling) -> list[list[Completion]]:
        samples = [r.samples for r in requests]
        if not sum(samples):
            return [[] for _ in requests]
        reader = Reader(self.model, way_of(self.model), how.max_new_tokens)
        logits = reader.read([r.prompt for r in requests], samples)
        rows, device = len(logits), logits.device
        uniform = answer_uniforms(requests, how).to(device)
        stops = torch.tensor(sorted(set(how.stop)), dtype=torch.int64, device=device)
        most = [r.most(how) for r in requests for _ in range(r.samples)]
        limit, limits = torch.tensor(most, device=device), set(most)
        alive = torch.arange(rows, device=device)  # answers that are not finished
        table = torch.zeros(rows, how.max_new_tokens, dtype=torch.int64, device=device)
        logps = torch.zeros(rows, how.max_new_tokens, dtype=torch.float32, device=device)
        length = limit.clone()
        for t in range(max(limits)):
            token, logp = draw_scored(logits, uniform[alive, t], how.temperature, how.top_k, how.top_p)
            table[alive, t], logps[alive, t] = token, logp
            ended = torch.isin(token, stops)
            length[alive[ended]] = t + 1
            if t + 1 == max(limits):
                break
            if t + 1 in limits:
                ended = ended | (limit[alive] == t + 1)
            going = (~ended).nonzero()[:, 0]
            if not len(going):
                break
            keep = going if len(going) < len(alive) else None
            alive = alive[going]
            logits = reader.next(token[going], keep)
        return completions(table, logps, length, stops, samples)


class TinyEngine(LocalEngine):
    """Whole forward passes without a cache, over the distinct beginnings of answers; for small models and any kind.

    Args:
        batch_size: beginnings computed at once, ≥ 1.
    """

    def _generate(
        self, requests: Sequence[Request], how: Sampling, stopped: Callable[[], bool] | None
    ) -> list[list[Completion]]:
        device = next(self.model.parameters()).device
        samples = [r.samples for r in requests]
        if not sum(samples):
            return [[] for _ in requests]
        texts = [tuple(r.prompt.tolist()) for r in requests for _ in range(r.samples)]
        uniform = answer_uniforms(requests, how).to(device)
        stops = torch.tensor(sorted(set(how.stop)), dtype=torch.int64, device=device)
        alive, way = list(range(len(texts))), way_of(self.model, keeps=False)
        table = torch.zeros(len(texts), how.max_new_tokens, dtype=torch.int64, device=device)
        logps = torch.zeros(len(texts), how.max_new_tokens, dtype=torch.float32, device=device)
        most = [r.most(how) for r in requests for _ in range(r.samples)]
        length = torch.tensor(most, device=device)
        for t in range(max(most)):
            if not alive or (stopped is not None and stopped()):
                break
            distinct = {text: i for i, text in enumerate(dict.fromkeys(texts[i] for i in alive))}
            chunks = _chunks([np.asarray(text) for text in distinct], self.batch_size)
            logits = torch.cat([read_anew(self.model, part, way) for part in chunks])
            rows = torch.tensor(alive, device=device)
            token, logp = draw_scored(
                logits[torch.tensor([distinct[texts[i]] for i in alive], device=device)],
                uniform[rows, t],
                how.temperature,
                how.top_k,
                how.top_p,
            )
            table[rows, t], logps[rows, t] = token, logp
            ended = torch.isin(token, stops)
            length[rows[ended]] = t + 1
            going = []
            for i, one, end in zip(alive, token.tolist(), ended.tolist()):
                texts[i] += (one,)
                going += [] if end or t + 1 == most[i] else [i]
            alive = going
        return completions(table, logps, length, stops, samples)


ENGINES: dict[str, Any] = {
    "transformers": TransformersEngine,
    "tiny": TinyEngine,
    "vllm": VllmEngine,
    "replay": ReplayEngine,
}


def make_engine(
    spec: Spec,
    *,
    batch_size: int = 256,
    records: str | None = None,
    tokenizer: Any = None,
    context: EngineContext | None = None,
) -> Any:
    """An engine by name, by import path ``package.module.Class`` of your own, or ``{"name": …, option: value}``.

    A class is called with its options, and with ``batch_size``, ``context`` and ``tokenizer`` as far as it takes them.

    Args:
        spec: which engine.
        batch_size: answers drawn at once, ≥ 1.
        records: file of the engine "replay".
        tokenizer: of the policy.
        context: what else the engine may know.

    Raises:
        UsageError: there is none of that name, or it does not take an option.
    """
    given = named_spec("engine", spec)
    name = given.get("name")
    if name == "replay":
        given.setdefault("path", records)
        if given["path"] is None:
            raise UsageError("`engine` is 'replay' without `records`; expected a file. Pass --model.records FILE.")
    found = ENGINES.get(str(name))
    if found is None and isinstance(name, str) and ("." in name or ":" in name):
        found = import_callable(name, "engine", lambda one: one in ENGINES.values())
    takes = {} if found is None else inspect.signature(found).parameters
    offered = {"batch_size": batch_size, "tokenizer": tokenizer, "context": context}
    given = {key: value for key, value in offered.items() if key in takes} | given
    made = make("engine", given, ENGINES)
    return made if found is None or isinstance(found, type) else made()


def room(model: nn.Module, longest_prompt: int, max_new_tokens: int) -> int:
    """How long answers may become: ``max_new_tokens``, or what the model's positions leave.

    Raises:
        UsageError: they leave nothing.
    """
    left = positions(model) - longest_prompt
    if left < 1:
        raise UsageError(
            f"the longest prompt has {longest_prompt} tokens and the model {positions(model)} positions, which leaves "
            "none for an answer; expected shorter prompts. Pass a smaller `--data.max_prompt_length` with "
            "`--data.on_bad drop`."
        )
    return min(max_new_tokens, left)


def draw_scored(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One token per row of logits (B, V), and its log-probability, float32 (B,), under what it was drawn from."""
    token = draw(logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p)
    scaled = logits.float() / (temperature or 1.0)
    if top_k or top_p < 1.0:
        p, order = scaled.softmax(-1).sort(-1, descending=True)
        out = p.cumsum(-1) - p >= top_p  # as `draw` leaves tokens out
        if top_k:
            out[:, top_k:] = True
        scaled = scaled.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -torch.inf)
    return token, scaled.gather(-1, token[:, None])[:, 0] - scaled.logsumexp(-1)


def answer_uniforms(requests: Sequence[Request], how: Sampling) -> Tensor:
    """The random number of every place of every answer, (answers, max_new_tokens), on the host."""
    key = sampling.keys(how.seed, "rollout", torch.tensor([how.iteration], device="cpu"))[0]
    stride = 1 << 20  # samples of one request
    # 2³¹ · 2²⁰ · length is 0 modulo 2⁶⁴ then, so what goes on from a demonstration would get the numbers of its group
    less = CONTINUES - (1 << 25) if how.max_new_tokens % (1 << 13) == 0 else 0
    begins = [r.number - less * (r.number >= CONTINUES) for r in requests]
    numbers = [first * stride + k for first, r in zip(begins, requests) for k in range(r.samples)]
    rows = torch.tensor(numbers, dtype=torch.int64, device=key.device)
    return sampling.uniforms(key, rows, (how.max_new_tokens,))


def completions(
    table: Tensor, logps: Tensor, length: Tensor, stops: Tensor, samples: Sequence[int]
) -> list[list[Completion]]:
    """Answers laid out as rows, (n, T) each, by request."""
    last = table.gather(1, (length - 1)[:, None])[:, 0]
    ended = torch.isin(last, stops).tolist()
    tokens, values, lengths = table.cpu().numpy(), logps.cpu().numpy(), length.tolist()
    rows = iter([Completion(t[:n].copy(), v[:n].copy(), e) for t, v, n, e in zip(tokens, values, lengths, ended)])
    return [[next(rows) for _ in range(count)] for count in samples]


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
