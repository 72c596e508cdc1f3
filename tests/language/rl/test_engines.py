"""Engines: what they draw, with which log-probabilities, in whatever batches; answers from a file."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny_rl
import torch
from tiny import make_policy, make_tokenizer

from offpolicy.data import sampling
from offpolicy.errors import DataError, UsageError
from offpolicy.language.rl.engine import Completion, EngineContext, Request, Sampling
from offpolicy.language.rl.engines import TinyEngine, TransformersEngine, draw_scored, make_engine, room

HOW = Sampling(stop=(2, 5, 6), max_new_tokens=7, temperature=0.8, seed=3, iteration=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    folder = make_policy(tmp_path_factory.mktemp("engines") / "policy")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def requests(count: int = 5, samples: int = 3) -> list[Request]:
    rng = np.random.default_rng(0)
    return [Request(rng.integers(4, 40, rng.integers(1, 6)), i, samples) for i in range(count)]


@torch.no_grad()
def slow(model: Any, asked: list[Request], how: Sampling) -> list[list[tuple[list[int], list[float], bool]]]:
    """One token at a time from the whole text, by the definition."""
    key = sampling.keys(how.seed, "rollout", torch.tensor([how.iteration]))[0]
    found = []
    for request in asked:
        found.append([])
        for k in range(request.samples):
            row = torch.tensor([request.number * 2**20 + k])
            uniform = sampling.uniforms(key, row, (how.max_new_tokens,))[0]
            ids, logps, ended = request.prompt.tolist(), [], False
            while len(logps) < request.most(how) and not ended:
                logits = model(torch.tensor([ids])).logits[0, -1]
                p = (logits / (how.temperature or 1.0)).softmax(-1)
                likely = int(logits.argmax())
                token = int((p.cumsum(0) <= uniform[len(logps)]).sum()) if how.temperature else likely
                ids.append(token)
                logps.append(float(p[token].log()))
                ended = token in how.stop
            found[-1].append((ids[len(request.prompt) :], logps, ended))
    return found


@pytest.mark.parametrize("engine", [TransformersEngine(1), TransformersEngine(7), TransformersEngine(), TinyEngine(4)])
@pytest.mark.parametrize("temperature", [0.8, 0.0])
def test_answers_are_those_of_the_definition(engine: Any, temperature: float, model: Any) -> None:
    how = Sampling(HOW.stop, HOW.max_new_tokens, temperature, HOW.seed, HOW.iteration)
    asked = [*requests(), Request(np.array([7, 8]), 77, 4, room=2), Request(np.array([9]), 78, 0)]
    engine.sync(model, 1)
    expected, found = slow(model, asked, how), engine.generate(asked, how)
    lengths = {len(answer.token) for some in found for answer in some}
    assert [len(some) for some in found] == [3] * 5 + [4, 0] and (temperature == 0 or len(lengths) > 2)
    assert max(len(answer.token) for answer in found[5]) <= 2 < max(lengths)
    for ours, theirs in zip(found, expected):
        for answer, (ids, logps, ended) in zip(ours, theirs):
            assert answer.token.tolist() == ids and answer.ended == ended
            np.testing.assert_allclose(answer.logp, logps, rtol=1e-5, atol=1e-6)
            assert answer.logp.dtype == np.float32


def test_iterations_seeds_and_requests_draw_other_numbers(model: Any) -> None:
    engine = TransformersEngine()
    engine.sync(model, 1)
    asked = [Request(np.array([7, 8, 9]), i, 4) for i in range(3)]
    drawn = [
        tuple(tuple(a.token.tolist()) for some in engine.generate(asked, Sampling((2,), 6, 1.0, *place)) for a in some)
        for place in ((0, 1), (0, 2), (1, 1))
    ]
    assert len(set(drawn)) == 3 and len(set(drawn[0])) > 6
    alone = engine.generate(asked[1:2], Sampling((2,), 6, 1.0, 0, 1))[0]
    assert tuple(tuple(a.token.tolist()) for a in alone) == drawn[0][4:8]


def test_engines_stop_when_they_are_told(model: Any) -> None:
    engine, asked = TransformersEngine(3), requests()
    engine.sync(model, 1)
    calls = []
    found = engine.generate(asked, HOW, lambda: bool(calls.append(1)) or len(calls) > 2)
    assert sum(len(some) > 0 for some in found) == 2


def test_answers_from_a_file(tmp_path: Path, model: Any) -> None:
    """Answers of one engine, written down, are what the other gives; every iteration takes the next ones."""
    make_tokenizer(tmp_path.parent / "tokens")
    drawing = TransformersEngine()
    drawing.sync(model, 1)
    asked = requests(2, 4)
    drawn = drawing.generate(asked, HOW)
    path = tmp_path / "records.jsonl"
    lines = [
        {
            "prompt": request.prompt.tolist(),
            "completions": [a.token.tolist() for a in some],
            "logps": [a.logp.tolist() for a in some],
            "ended": [a.ended for a in some],
        }
        for request, some in zip(asked, drawn)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    engine = make_engine("replay", records=str(path))
    engine.sync(model, 1)
    wanted = [request._replace(samples=2) for request in asked]
    for iteration, part in ((0, slice(0, 2)), (1, slice(2, 4)), (2, slice(0, 2))):
        found = engine.generate(wanted, Sampling((2,), 7, 1.0, 0, iteration))
        for ours, theirs in zip(found, drawn):
            assert [a.token.tolist() for a in ours] == [a.token.tolist() for a in theirs[part]]
            np.testing.assert_array_equal(ours[0].logp, theirs[part][0].logp)
    longest = max(len(a.token) for some in drawn for a in some)
    short = engine.generate(wanted, Sampling((2,), longest - 1, 1.0, 0, 0))
    assert all(len(a.token) < longest for some in short for a in some)
    with pytest.raises(DataError, match="has no answer to the prompt"):
        engine.generate([Request(np.array([1]), 0, 1)], HOW)
    path.write_text('{"prompt": "ab", "completions": ["c", "de"], "ended": [true, false]}')
    from transformers import AutoTokenizer

    texts = make_engine(
        "replay", records=str(path), tokenizer=AutoTokenizer.from_pretrained(tmp_path.parent / "tokens")
    )
    first, second = texts.generate([Request(np.array([1, 4, 5]), 0, 2)], HOW)[0]
    assert first.token.tolist() == [6, 2] and second.token.tolist() == [7, 8] and first.ended and not second.ended
    assert np.isnan(first.logp).all()
    path.write_text('{"prompt": [1], "completions": [[3]], "logps": [[], []], "ended": [true]}')
    with pytest.raises(DataError, match="line 1 is no record"):
        make_engine("replay", records=str(path))
    path.write_text('{"prompt": [1], "completions": [[]], "logps": [[]], "ended": [true]}')
    with pytest.raises(DataError, match="an answer has no token"):
        make_engine("replay", records=str(path))


class Own:
    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size


def test_engines_by_name(model: Any) -> None:
    assert isinstance(make_engine("tiny", batch_size=3), TinyEngine)
    assert make_engine("test_engines.Own", batch_size=5).batch_size == 5
    with pytest.raises(UsageError, match="Did you mean 'transformers'"):
        make_engine("transformer")
    with pytest.raises(UsageError, match=r"`engine` is 'no_such_engines.Fast', but there is no module"):
        make_engine("no_such_engines.Fast")
    with pytest.raises(UsageError, match="without `records`"):
        make_engine("replay")
    with pytest.raises(UsageError, match="is no file"):
        make_engine("replay", records="nothing.jsonl")
    assert room(model, 120, 50) == 8 and room(model, 20, 50) == 50
    with pytest.raises(UsageError, match="leaves none for an answer"):
        room(model, 128, 50)


class Placed(TransformersEngine):
    """An engine with an option of its own that asks where it is, and counts how often it is ended."""

    made: ClassVar[list[Any]] = []

    def __init__(self, context: EngineContext, *, fails: bool = False) -> None:
        super().__init__(context.answers_at_once)
        self.context, self.fails, self.closed, self.synced = context, fails, 0, 0
        self.made.append(self)

    def sync(self, model: Any, version: int) -> None:
        super().sync(model, version)
        self.synced += 1
        if self.fails:
            raise OSError("the engine is gone")

    def close(self) -> None:
        self.closed += 1


def test_an_engine_may_ask_where_it_is(model: Any) -> None:
    context = EngineContext(8, 4, answers_at_once=3)
    made = make_engine({"name": "test_engines.Placed", "fails": True}, context=context)
    assert made.context is context and made.fails and made.batch_size == 3
    assert make_engine({"name": "tiny", "batch_size": 2}, batch_size=9).batch_size == 2
    with pytest.raises(UsageError, match=r"takes no `fail`; expected .*Did you mean 'fails'"):
        make_engine({"name": "test_engines.Placed", "fail": True}, context=context)
    with pytest.raises(UsageError, match="expected one of transformers"):
        make_engine({"fails": True})


@pytest.mark.parametrize("fate", ["ends", "fails", "refused"])
def test_engines_are_ended(fate: str, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the run, by an error in training, and where training is refused after the engine was made."""
    engine = {"name": "test_engines.Placed", "fails": fate == "fails"}
    method = tiny_rl.method("GRPO", policy, engine=engine)
    if fate == "refused":
        monkeypatch.setattr(method, "plan_steps", lambda: (_ for _ in ()).throw(UsageError("refused")))
    Placed.made.clear()
    outcome: Any = contextlib.nullcontext() if fate == "ends" else pytest.raises((OSError, UsageError))
    with outcome:
        tiny_rl.fit(method, 2, tmp_path / "run")
    (made,) = Placed.made
    assert made.closed and made.context.folder == tmp_path / "run"
    assert made.context.longest_answer == method.answering.length and made.context.world == 1


def test_cut_distributions_of_evaluations(model: Any) -> None:
    """Tokens come from the likeliest alone, with the log-probability of what is left: 0.5 0.3 0.15 0.05."""
    p = torch.tensor([[0.15, 0.5, 0.05, 0.3]], dtype=torch.float64).repeat(4, 1)
    uniform = torch.tensor([0.0, 0.5, 0.7, 0.999], dtype=torch.float64)
    for cut, kept in (({"top_k": 2}, {1: 0.5, 3: 0.3}), ({"top_p": 0.85}, {1: 0.5, 3: 0.3, 0: 0.15})):
        token, logp = draw_scored(p.log(), uniform, 1.0, **cut)
        total = sum(kept.values())
        assert set(token.tolist()) <= set(kept)
        assert logp.tolist() == pytest.approx([np.log(kept[t] / total) for t in token.tolist()], abs=1e-6)
    for engine in (TransformersEngine(), TinyEngine()):
        engine.sync(model, 1)
        found = engine.generate(requests(), Sampling((2,), 6, 1.0, 0, 1, top_k=1))
        likely = engine.generate(requests(), Sampling((2,), 6, 0.0, 0, 1))
        for one, other in zip(found, likely):
            assert [a.token.tolist() for a in one] == [a.token.tolist() for a in other]
            assert all(not a.logp.any() for a in one)


class Liar(TransformersEngine):
    """Reports log-probabilities at another temperature; those of the first sync are right."""

    def sync(self, model: Any, version: int) -> None:
        super().sync(model, version)
        self.version = version

    def generate(self, asked: Any, how: Sampling, stopped: Any = None) -> list[list[Completion]]:
        found = super().generate(asked, how, stopped)
        off = 0.0 if self.version < self.late else 0.01
        return [[answer._replace(logp=answer.logp - np.float32(off)) for answer in some] for some in found]

    late = 2


class Silent(TransformersEngine):
    """Knows no log-probabilities."""

    def generate(self, asked: Any, how: Sampling, stopped: Any = None) -> list[list[Completion]]:
        found = super().generate(asked, how, stopped)
        return [[answer._replace(logp=np.full_like(answer.logp, np.nan)) for answer in some] for some in found]


def test_an_engine_of_ones_own_that_lies_is_caught(policy: Path, tmp_path: Path) -> None:
    """At the sync after which it lies, and not before."""
    told = tiny_rl.method("GRPO", policy, engine="test_engines.Liar")
    with pytest.raises(UsageError, match=r"0.01 nats from the trainer's.*expected 0.001 at most in float32"):
        tiny_rl.fit(told, 4, tmp_path / "run")
    assert told.iteration == 1 and told.answering.probed["engine/gap"] < 1e-5
    silent = tiny_rl.method("GRPO", policy, engine="test_engines.Silent")
    tiny_rl.fit(silent, 2)
    assert silent.answering.probed == {}
