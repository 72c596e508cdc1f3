"""Every family of models: scores are those of one plain pass, answers those of reading each text anew."""

from __future__ import annotations

from typing import Any

import families
import numpy as np
import pytest
import torch

from offpolicy.data.texts.sequences import Pairs, Ragged
from offpolicy.errors import UsageError
from offpolicy.language.answer_scores import score
from offpolicy.language.attention import shares_prompt
from offpolicy.language.generation import sample
from offpolicy.language.head_checks import shared_fault
from offpolicy.language.layout import pair_layout
from offpolicy.language.noise import without_noise
from offpolicy.language.reading import way_of
from offpolicy.language.rl.engine import Request, Sampling
from offpolicy.language.rl.engines import make_engine

STEPS = 5


def ragged(texts: list[np.ndarray]) -> Ragged:
    return Ragged(torch.from_numpy(np.concatenate(texts)), torch.tensor([len(text) for text in texts]))


def check_scores(model: Any, prompts: list[np.ndarray]) -> None:
    chosen, rejected = families.prompts((5, 2, 8, 4), 1), families.prompts((3, 9, 4, 6), 2)
    right = [families.alone(model, p, a) for p, a in zip(prompts * 2, chosen + rejected)]
    pairs = Pairs(ragged(prompts), ragged(chosen), ragged(prompts), ragged(rejected), {}, torch.arange(len(prompts)))
    ways = [False, True] if shares_prompt(model.config) and not shared_fault(model) else [False]
    for shared in ways:
        with torch.no_grad():
            found = score(model, pair_layout(pairs, 0, shared_prompt=shared)).sum_logps
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", families.OWN)
def test_scores_and_answers(kind: str) -> None:
    """Prompts of four lengths in one batch: padding, packing and a shared beginning leak nothing, nor does a cache."""
    model, prompts = families.make(kind), families.prompts()
    check_scores(model, prompts)
    right = [families.greedy(model, prompt, STEPS) for prompt in prompts]
    drawn = sample(model, prompts, stop=[], max_new_tokens=STEPS, temperature=0)
    assert [answers[0].token.tolist() for answers in drawn] == right
    engine = make_engine("transformers")
    engine.sync(model, 1)
    stop = right[1][1]  # an answer that ends early, so that the others go on without it
    asked = [Request(prompt, i, 2) for i, prompt in enumerate(prompts)]
    answers = engine.generate(asked, Sampling(stop=(stop,), max_new_tokens=STEPS, temperature=0.0))
    for some, whole in zip(answers, right):
        until = whole[: whole.index(stop) + 1] if stop in whole else whole
        assert [answer.token.tolist() for answer in some] == [until, until]


def test_the_quick_way_stays_quick() -> None:
    for kind in ("gpt2", "granite", "mixtral", "qwen3_5_text", "jamba"):
        assert way_of(families.make(kind)).keeps == "shared", kind


def test_the_quick_way_stays_quick_in_low_precision() -> None:
    """What follows a token may change nothing of it there, and yet other shapes are rounded otherwise."""
    for kind in ("phi", "cohere", "modernbert-decoder", "jamba"):
        assert way_of(families.make(kind).bfloat16()).keeps == "shared", kind
    assert way_of(families.make("mamba").bfloat16()) == ("shared", False)  # which counts padding


def test_what_is_said_of_another_way(caplog: pytest.LogCaptureFixture) -> None:
    model = families.make("openai-gpt")  # keeps nothing
    way_of(model), way_of(model)
    assert caplog.text.count("OpenAIGPTLMHeadModel reads every text anew") == 1


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_models_that_look_ahead_are_refused(kind: str) -> None:
    model = families.make(kind)
    with pytest.raises(UsageError, match="looks back only"):
        check_scores(model, families.prompts())
    with pytest.raises(UsageError, match="looks back only"):
        sample(model, families.prompts(), stop=[], max_new_tokens=2)


@pytest.mark.parametrize("kind", ["mixtral", "phimoe", "qwen2_moe", "gpt2"])
def test_training_draws_no_noise(kind: str) -> None:
    """In training the logits are those of evaluation, twice, and every weight still gets a gradient."""
    model, ids = families.make(kind), torch.from_numpy(families.prompts((20,))[0])[None]
    expected = model(input_ids=ids, use_cache=False).logits
    state = torch.random.get_rng_state()
    assert without_noise(model) == (kind in ("mixtral", "phimoe"))
    assert torch.equal(state, torch.random.get_rng_state())
    model.train()
    assert model.training
    for _ in range(2):
        found = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
