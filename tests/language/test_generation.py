"""Drawing answers: padding, caches and batches change nothing; the draws follow the model; what is reported."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from offpolicy.data.replay import Replay
from offpolicy.errors import UsageError
from offpolicy.language.generation import Answer, draw, prompts_of, sample, statistics, stop_ids

V = 24


def tiny(kind: str = "llama") -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "gpt2":
        sizes = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 2}
    elif kind not in ("gpt_neox", "mamba"):
        sizes |= {"intermediate_size": 48, "num_key_value_heads": 1}
    config = AutoConfig.for_model(kind, **sizes, initializer_range=0.5, max_position_embeddings=64)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def prompts(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, V, n) for n in lengths]


@torch.no_grad()
def slow(model: Any, prompt: np.ndarray, stop: list[int], new: int) -> list[int]:
    """The most likely tokens, with the whole text read anew for each."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gpt_neox", "mamba"])
def test_the_most_likely_tokens_whatever_the_padding(kind: str) -> None:
    """Prompts of different lengths in one batch, against one text at a time without a cache."""
    model, texts = tiny(kind), prompts(9, 2, 5)
    likely = slow(model, texts[1], [], 12)
    stop = [likely[4]]  # so that some answers end early
    found = sample(model, texts, stop=stop, max_new_tokens=12, temperature=0, batch_size=3)
    for text, (answer,) in zip(texts, found):
        expected = slow(model, text, stop, 12)
        assert answer.token.tolist() == expected
        assert answer.ended == (expected[-1] in stop)
    assert found[1][0].ended and not all(answer.ended and len(answer.token) == 12 for (answer,) in found)


def test_answers_do_not_depend_on_the_batch_or_on_torch() -> None:
    model, texts = tiny(), prompts(4, 7, 2, 5)
    options: dict[str, Any] = {"stop": [0], "num_samples": 3, "max_new_tokens": 8, "seed": 5}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    together = sample(model, texts, batch_size=12, **options)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    apart = sample(model, texts, batch_size=2, **options)
    first = sample(model, texts[:2], batch_size=4, **options)
    lists = [[[a.token.tolist() for a in some] for some in found] for found in (together, apart, first)]
    assert lists[0] == lists[1] and lists[0][:2] == lists[2]
    assert len({tuple(a) for some in lists[0] for a in some}) > 6
    other = sample(model, texts, batch_size=12, **options | {"seed": 6})
    assert lists[0] != [[a.token.tolist() for a in some] for some in other]


def test_mode_of_the_model_is_kept() -> None:
    model = tiny()
    for training in (True, False):
        model.train(training)
        sample(model, prompts(3), stop=[], max_new_tokens=2)
        assert model.training is training


def test_draws_follow_the_probabilities() -> None:
    """20,000 evenly spread numbers give each token its share to 1e-4; at temperature 2 that of half the logits."""
    logits = torch.tensor([1.0, -2.0, 0.5, 3.0])
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for temperature in (1.0, 2.0):
        token = draw(logits.expand(20_000, -1), uniform, temperature=temperature)
        share = torch.bincount(token, minlength=4) / 20_000
        torch.testing.assert_close(share, (logits / temperature).softmax(0), rtol=0, atol=1e-4)


def test_only_likely_tokens() -> None:
    """Shares 0.5, 0.3, 0.15, 0.05: the two largest by k, and by p up to 0.8; p = 0.85 needs three."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(1000, -1)
    uniform = torch.arange(1000, dtype=torch.float64) / 1000

    def drawn(**options: Any) -> list[int]:
        return sorted(set(draw(logits, uniform, **options).tolist()))

    assert drawn(top_k=2) == [1, 3] and drawn(top_k=1) == [1]
    assert drawn(top_p=0.79) == [1, 3] and drawn(top_p=0.85) == [0, 1, 3] and drawn(top_p=0.01) == [1]
    assert drawn(top_p=0.85, top_k=2) == [1, 3]
    counts = torch.bincount(draw(logits, uniform, top_k=2), minlength=4)
    torch.testing.assert_close(counts / 1000, torch.tensor([0, 0.625, 0, 0.375]), rtol=0, atol=2e-3)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    assert draw(logits, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 3, 3]


def test_answers_stop_where_the_positions_end() -> None:
    model = tiny("gpt2")
    ((answer,),) = sample(model, prompts(60), stop=[], max_new_tokens=50)
    assert len(answer.token) == 4 and not answer.ended
    with pytest.raises(UsageError, match="max_prompt_length"):
        sample(model, prompts(64), stop=[])
    with pytest.raises(UsageError, match="top_p"):
        sample(model, prompts(3), stop=[], top_p=0.0)
    assert sample(model, [], stop=[]) == []


def test_stop_ids_are_of_tokenizer_and_model() -> None:
    class Tokenizer:
        eos_token_id = 2

    model = tiny()
    model.generation_config.eos_token_id = [5, 2]
    assert stop_ids(model, Tokenizer()) == [2, 5]
    model.generation_config.eos_token_id = None
    assert stop_ids(model, Tokenizer()) == [2]


def texts_replay(tables: dict[str, np.ndarray]) -> Replay:
    """Five texts; text i is i + 1 times the token i."""
    length = np.arange(1, 6)
    token = np.repeat(np.arange(5), length).astype(np.uint8)
    return Replay({"token": token}, start=np.cumsum(length) - length, length=length, tables=tables)


def test_prompts_of_pairs() -> None:
    replay = texts_replay({"pairs": np.array([[3, 0, 3, 1], [2, 1, 2, 4], [3, 4, 3, 1]])})
    found = prompts_of(replay)
    assert [(p.token[0], p.reference[0] if p.reference is not None else None) for p in found] == [(3, 0), (2, 1)]
    assert [len(p.token) for p in found] == [4, 3]
    assert len(prompts_of(replay, 1)) == 1


def test_prompts_of_singles_take_a_desirable_answer() -> None:
    singles = np.array([[0, 1], [0, 2], [3, 4]])
    replay = texts_replay({"singles": singles, "singles/label": np.array([False, True, False])})
    first, second = prompts_of(replay)
    assert first.reference is not None and first.reference[0] == 2 and second.reference is None


def test_statistics() -> None:
    """Answers 1 1 1 and 1 2: 2 of 5 tokens and 2 of 3 pairs of tokens are different ones."""
    answers = [[Answer(np.array([1, 1, 1]), False)], [Answer(np.array([1, 2]), True)]]
    numbers = statistics(answers)
    assert numbers == {"length_mean": 2.5, "ended": 0.5, "distinct_1": 0.4, "distinct_2": pytest.approx(2 / 3)}
