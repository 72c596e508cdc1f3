"""Tiny problems and methods that learn from their own answers, for tests and for the scripts they start."""

from __future__ import annotations

import copy
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback
from tiny import make_policy
from toy import quiet

from offpolicy.data.replay import Replay
from offpolicy.data.texts.problems import ProblemData, Problems, open_problems
from offpolicy.language.rl.engines import TransformersEngine
from offpolicy.language.rl.rollouts import RolloutModule
from offpolicy.language.weights import exported
from offpolicy.registry import find_method
from offpolicy.training.run_folder import RunFolder

SMALL: dict[str, Any] = {
    "lr": 1e-2,
    "batch_size": 8,
    "group_size": 4,
    "minibatches": 2,
    "max_new_tokens": 5,
    "eval_samples": 2,
    "rewards": ["tiny_rl.early_letters"],
}


def early_letters(prompt: str, answer: str, reference: str | None) -> float:
    """A reward that random answers get some of: the share of letters before "n"."""
    letters = [c for c in answer if c.isalpha()]
    return round(sum(c < "n" for c in letters) / (len(answer.split()) + 1), 3)


def ends_early(prompt: str, answer: str, reference: str | None) -> float:
    """A reward that is often the same for all answers of a group: whether the last letter is one of the first three."""
    return float(answer.rstrip()[-1:] in tuple("abc"))


class Remembers:
    """A weight of tokens that follows the advantages seen so far: an objective's part with a state."""

    def __init__(self) -> None:
        self.level = 0.0

    def __call__(self, tokens: Any) -> Any:
        self.level = 0.9 * self.level + 0.1 * float(tokens.advantage.abs().mean())
        return tokens.mask * (1.0 + self.level)

    def state_dict(self) -> dict[str, float]:
        return {"level": self.level}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.level = state["level"]


class Forgets:
    """A part that changes, and has no way to keep that."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tokens: Any) -> Any:
        self.calls += 1
        return tokens.mask


class LateEngine(TransformersEngine):
    """Answers every second request with the weights of the iteration before, and says so."""

    def __init__(self, batch_size: int = 256) -> None:
        super().__init__(batch_size)
        self.old: Any = None
        self.number = 0

    def sync(self, model: Any, version: int) -> None:
        if self.model is not None and version > self.number:
            self.old = copy.deepcopy(self.now), self.number
        self.model, self.number = model, version
        self.now = copy.deepcopy(model).eval()

    def generate(self, requests: Any, how: Any, stopped: Any = None) -> Any:
        found, old = super().generate(requests, how, stopped), self.old
        if old is None:
            return found
        late = TransformersEngine(self.batch_size)
        late.sync(*old)
        for i, some in enumerate(late.generate(requests, how, stopped)):
            if i % 2:
                found[i] = [one._replace(version=np.full(len(one.token), old[1])) for one in some]
        return found


class PlainEngine(TransformersEngine):
    """Draws answers that are letters and digits and end, so that as texts they are the same tokens again."""

    def generate(self, requests: Any, how: Any, stopped: Any = None) -> Any:
        def plain(one: Any) -> Any:
            token = one.token % 36 + 4
            token[-1] = 2
            token = token if len(token) > 1 else np.array([5, 2])
            return one._replace(token=token, logp=np.full(len(token), np.nan), ended=True)

        return [[plain(one) for one in some] for some in super().generate(requests, how, stopped)]


class InexactEngine(TransformersEngine):
    """Says log-probabilities that are a little off, as an engine of another arithmetic does."""

    def generate(self, requests: Any, how: Any, stopped: Any = None) -> Any:
        found = super().generate(requests, how, stopped)
        off = np.float32(5e-4) * np.cos(np.arange(64, dtype=np.float32))
        return [[one._replace(logp=one.logp + off[: len(one.token)]) for one in some] for some in found]


class ThreadEngine(TransformersEngine):
    """Draws in a thread, from a copy of the weights, as an engine beside the trainer does."""

    def __init__(self, batch_size: int = 256) -> None:
        super().__init__(batch_size)
        self.open: dict[int, Any] = {}
        self.most_open, self.drawing_seconds = 0, 0.0

    def sync(self, model: Any, version: int) -> None:
        for thread, _ in self.open.values():
            thread.join()
        super().sync(copy.deepcopy(model).eval(), version)

    def submit(self, ticket: int, requests: Any, how: Any) -> None:
        found: list[Any] = []
        thread = threading.Thread(target=self._draw, args=(self.model, requests, how, found))
        self.open[ticket] = thread, found
        self.most_open = max(self.most_open, len(self.open))
        thread.start()

    def _draw(self, model: Any, requests: Any, how: Any, found: list[Any]) -> None:
        began, engine = time.perf_counter(), TransformersEngine(self.batch_size)
        engine.sync(model, 0)
        found += engine.generate(requests, how)
        self.drawing_seconds += time.perf_counter() - began

    def collect(self, ticket: int, stopped: Any = None) -> Any:
        thread, found = self.open.pop(ticket)
        while thread.is_alive():
            thread.join(0.01)
            if stopped is not None and stopped():
                return found
        return found


class SharingEngine(ThreadEngine):
    """Draws beside the trainer on its device."""

    shares_card = True


class OwnWeightsEngine(TransformersEngine):
    """Answers with a model of its own, which gets the weights of the policy as plain tensors."""

    def __init__(self, batch_size: int = 256, context: Any = None) -> None:
        super().__init__(batch_size)
        self.own = copy.deepcopy(context.model).eval()

    def sync(self, model: Any, version: int) -> None:
        self.own.load_state_dict(dict(exported(model)))
        self.model = self.own


def toy_problems(count: int = 12, seed: int = 0, demonstrations: bool = True) -> Replay:
    """Random prompts of different lengths, each with a demonstration that ends, for any model of 64 tokens."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(4, 30, rng.integers(2, 7)) for _ in range(count)]
    texts += [np.append(rng.integers(4, 30, rng.integers(1, 5)), 2) for _ in range(count)]
    length = np.array([len(text) for text in texts])
    second = count + np.arange(count) if demonstrations else np.full(count, -1)
    tables = {
        "problems": np.stack([np.arange(count), second], 1),
        "problems/answer": np.array([str(i) for i in range(count)]),
        "problems/odd": np.arange(count) % 2 == 1,
    }
    steps = {"token": np.concatenate(texts).astype(np.uint8)}
    meta = {"name": "toy-problems", "source": "problems"}
    return Replay(steps, start=np.cumsum(length) - length, length=length, tables=tables, meta=meta)


def method(name: str, policy: Path, **options: Any) -> Any:
    """A small method, with seed 0, rows every 2 steps and an evaluation every 3."""
    module = find_method(name)(**{"policy": str(policy), **SMALL, **options})
    module.seed, module.run.threads, module.run.matmul = 0, None, "mkl"
    module.run.log_every, module.run.eval_every = 2, 3
    return module


def fit(
    module: RolloutModule,
    max_steps: int = 6,
    folder: Path | None = None,
    ckpt_path: Path | None = None,
    callbacks: Sequence[Callback] = (),
    problems: Replay | None = None,
    held_out: bool = True,
    **options: Any,
) -> Any:
    """Train to ``max_steps``, in a run folder when one is given."""
    data = ProblemData.of(problems or toy_problems(), toy_problems(5, seed=1) if held_out else None)
    if folder:
        options |= {"default_root_dir": str(folder), "enable_checkpointing": True}
        callbacks = [*callbacks, RunFolder(folder)]
    quiet(max_steps, callbacks, **options).fit(module, data, ckpt_path=ckpt_path)
    return module


def write_problems(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def told_problems(policy: Path, count: int = 8) -> Problems:
    """Sums with a solution of four words, whose texts are known, as this process has written them beside the policy."""
    rows = [{"prompt": f"{i}+1=", "solution": f"we add one now ####{i + 1}"} for i in range(count)]
    path = write_problems(policy.parent / f"sums-{os.getpid()}.jsonl", rows)
    return open_problems(str(path), tokenizer=str(policy), template="{prompt}.", max_prompt_length=40)


__all__ = ["fit", "make_policy", "method", "told_problems", "toy_problems", "write_problems"]
