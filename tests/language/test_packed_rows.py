"""Rows without padding: the same scores and gradients as padded rows, in every layout."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layout import make
from test_module import assert_same, train
from torch import Tensor, nn

from offpolicy.data.texts.rollouts import Rollouts
from offpolicy.data.texts.sequences import Pairs, Ragged, Singles
from offpolicy.errors import UsageError
from offpolicy.language.answer_scores import score, score_tokens
from offpolicy.language.attention import PACKED, packs_rows, take_packed
from offpolicy.language.checks import padding_in_words, padding_is_left_out
from offpolicy.language.head_checks import check_packed, packed_fault
from offpolicy.language.layout import Layout, group_layout, pair_layout, single_layout
from offpolicy.language.meters import Pace

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return make("Llama")


def texts(lengths: list[int], first: int = 3) -> Ragged:
    return Ragged((first + torch.arange(sum(lengths))) % 41, torch.tensor(lengths))


def padded_and_packed(kind: str, lengths: list[int], shared: bool) -> tuple[Layout, Layout]:
    """A layout of texts with these lengths and others, with padding and without."""
    prompt, answer, other = texts(lengths), texts(lengths[::-1], 11), texts([10 - n for n in lengths], 19)
    row = torch.arange(len(lengths))
    if kind == "pairs":
        batch: Any = Pairs(prompt, answer, prompt, other, {}, row)
        how = {"shared_prompt": shared, "prompt_too": True}
        padded, packed = (pair_layout(batch, 2, padding_free=free, **how) for free in (False, True))
    elif kind == "singles":
        batch = Singles(prompt, answer, {}, row)
        padded, packed = (single_layout(batch, 2, prompt_too=True, padding_free=free) for free in (False, True))
    else:
        padded, packed = (group_layout(groups(lengths, shared), 2, padding_free=free) for free in (False, True))
    return padded, packed


def groups(lengths: list[int], shared: bool) -> Rollouts:
    """Two answers to each prompt, in one lane where it is shared."""
    n, twice = len(lengths), 1 if shared else 2
    order = torch.arange(2 * n)
    lane = order % n if shared else order
    turn = order // n if shared else 0 * order
    prompt = Ragged(texts(lengths).token.repeat(twice), torch.tensor(lengths * twice))
    empty: dict[str, Any] = dict.fromkeys(Rollouts._fields, None)
    values = {"prompt": prompt, "answer": texts(lengths + lengths[::-1], 7), "lane": lane, "turn": turn, "row": order}
    return Rollouts(**{**empty, **values})


def scores(model: nn.Module, layout: Layout) -> Tensor:
    return score_tokens(model, layout, temperature=0.7).logps


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["pairs", "singles", "groups"])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(lengths=LENGTHS)
def test_packed_rows_give_the_numbers_of_padded_ones(
    kind: str, shared: bool, lengths: list[int], llama: nn.Module
) -> None:
    padded, packed = padded_and_packed(kind, lengths, shared)
    assert packed.packed and not padded.packed
    assert packed.input_ids.shape == (1, padded.real_tokens) and packed.real_tokens == padded.real_tokens
    assert packed.starts is not None and packed.starts[-1] == padded.real_tokens
    weight = torch.linspace(-1, 1, len(padded.target), dtype=torch.float64)
    found, expected = scores(llama, packed), scores(llama, padded)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    parameters = list(llama.parameters())
    ours = torch.autograd.grad(found @ weight, parameters)
    theirs = torch.autograd.grad(expected @ weight, parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["Qwen2", "GPT2"])
def test_other_models_take_packed_rows(name: str) -> None:
    model = make(name)
    before = model.config._attn_implementation
    assert packed_fault(model) == "" and before == "sdpa" and model.config._attn_implementation == PACKED
    padded, packed = padded_and_packed("pairs", [3, 9, 1], True)
    torch.testing.assert_close(score(model, packed).sum_logps, score(model, padded).sum_logps, atol=1e-9, rtol=0)
    assert PACKED not in model.config.to_json_string(use_diff=False)


def test_checkpointed_layers_and_adapters_take_packed_rows() -> None:
    """Layers that are computed again in the backward pass still know where rows lie."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make("Llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = []
    for layout in padded_and_packed("pairs", [2, 7, 4], False):
        gradients.append(torch.autograd.grad(score(model, layout).sum_logps.sum(), trained))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_answers_are_drawn_as_before(llama: nn.Module) -> None:
    """Left padding and a cache, with the attention that also takes packed rows."""
    from offpolicy.language.generation import sample

    prompts, plain = [np.array([5, 6, 7]), np.array([8])], make("Llama")
    packed = make("Llama")
    take_packed(packed)
    drawn = [sample(model, prompts, stop=[1], num_samples=2, max_new_tokens=6) for model in (plain, packed)]
    assert [[a.token.tolist() for a in some] for some in drawn[0]] == [[a.token.tolist() for a in s] for s in drawn[1]]


def test_rows_are_packed_where_much_is_padding() -> None:
    """None packs from a tenth of padding on: rows of 10 and 10 have none, rows of 10 and 2 have two fifths."""
    even = Singles(texts([5, 5]), texts([5, 5]), {}, torch.arange(2))
    uneven = Singles(texts([5, 1]), texts([5, 1]), {}, torch.arange(2))
    assert not single_layout(even, 0, padding_free=None).packed
    assert single_layout(uneven, 0, padding_free=None).packed
    assert not single_layout(uneven, 0, padding_free=False).packed


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("Llama", {"attn_implementation": "eager"}), ("Mistral", {"sliding_window": 4}), ("Gemma2", {"head_dim": 4})],
)
def test_models_that_are_not_exact_keep_their_padding(kind: str, changes: dict[str, Any]) -> None:
    model = make(kind, **changes)
    assert not packs_rows(model.config) and padding_is_left_out(model, None) is False
    assert padding_in_words(model, None).startswith(f"kept: packed rows would change the numbers of {kind}ForCausalLM")
    with pytest.raises(UsageError, match="`padding_free` is true"):
        padding_is_left_out(model, True)


def test_a_model_that_does_not_pass_rows_on_is_found_out() -> None:
    model = make("Llama")
    forward = model.model.forward

    def without_rows(**inputs: Any) -> Any:
        inputs.pop("packed_rows", None)
        return forward(**inputs)

    model.model.forward = without_rows  # type: ignore[method-assign]
    assert packed_fault(model) and model.config._attn_implementation == "sdpa"
    assert padding_is_left_out(model, None) is False
    with pytest.raises(UsageError, match=r"padding_free=false"):
        check_packed(model)


def test_flash_attention_is_told_the_lengths(monkeypatch: pytest.MonkeyPatch, llama: nn.Module) -> None:
    """FlashAttention itself needs a GPU; what ``transformers`` hands to it is computed here by plain products."""

    def varlen(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        starts = how["cu_seqlens_q"].tolist()
        assert how["cu_seqlens_k"].tolist() == starts and how["is_causal"]
        assert how["max_seqlen_q"] == max(np.diff(starts)) and isinstance(how["max_seqlen_q"], int)
        rows = []
        for a, b in pairwise(starts):
            one = (x[a:b].transpose(0, 1).repeat_interleave(4 // x.shape[1], 0) for x in (q, k, v))
            rows.append(nn.functional.scaled_dot_product_attention(*one, is_causal=True).transpose(0, 1))
        return torch.cat(rows)

    from transformers import modeling_flash_attention_utils as utils

    functions = (None, varlen, None, None, None), (dict, None)
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda *_: functions)
    model = make("Llama")
    model.config._attn_implementation = "flash_attention_2"
    padded, packed = padded_and_packed("pairs", [3, 9, 1], False)
    found = score_of_packed(model, packed)
    torch.testing.assert_close(found, score(llama, padded).sum_logps, atol=1e-9, rtol=0)


def score_of_packed(model: nn.Module, layout: Layout) -> Tensor:
    """Scores without the trials of a model, which need plain attention."""
    from offpolicy.language.answer_scores import _score

    return _score(model, layout, 256, False).sum_logps


@pytest.mark.parametrize("name", ["DPO", "SFT"])
def test_training_without_padding_is_the_same(name: str, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[int, int]] = []
    monkeypatch.setattr(Pace, "add_pass", lambda self, filled, places: passes.append((filled, places)))
    options: dict[str, Any] = {"precision": "64-true", "micro_batch_size": 3}
    padded = train(name, policy, padding_free=False, **options)
    assert any(filled < places for filled, places in passes)
    passes.clear()
    packed = train(name, policy, padding_free=True, **options)
    assert all(filled == places for filled, places in passes)
    assert_same(padded, packed, 1e-5)  # norms are float32


def test_values_of_packed_rows(llama: nn.Module) -> None:
    """A critic's decoder was copied before the policy took packed rows; its own rows with padding are right before and
    after it takes packed ones itself."""
    from offpolicy.language.rl.critic import Critic

    policy = make("Llama")
    critic = Critic(policy)
    assert packed_fault(policy) == ""
    nn.init.normal_(critic.head[-1].weight)
    padded, packed = padded_and_packed("groups", [3, 9, 1], True)
    hidden = torch.zeros(len(padded.target), 16, dtype=torch.float64)
    for rows, free in zip(padded_and_packed("groups", [3, 9, 1], False), (False, True), strict=True):
        assert rows.packed == free
        expected = critic(hidden, padded)
        torch.testing.assert_close(critic(hidden, rows), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(critic(hidden, packed), expected, atol=1e-9, rtol=0)


def test_a_sharded_model_takes_packed_rows(llama: nn.Module, tmp_path: Path) -> None:
    """FSDP2 in one process, with the trial made before."""
    from torch.distributed import FileStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    padded, packed = padded_and_packed("pairs", [2, 9, 4], True)
    expected = score(llama, padded).sum_logps
    wanted = torch.autograd.grad(expected.sum(), list(llama.parameters()))
    init_process_group("gloo", store=FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model, mesh = make("Llama"), init_device_mesh("cpu", (1,))
        check_packed(model)
        for layer in [*model.model.layers, model]:
            fully_shard(layer, mesh=mesh)
        found = score(model, packed).sum_logps
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
        found.sum().backward()
        for p, right in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), right, atol=1e-8, rtol=1e-8)
    finally:
        destroy_process_group()


def test_last_tokens_of_answers_are_scored_and_not_read(llama: nn.Module) -> None:
    """Two prompts of 3 and 2 tokens with two answers each, of 3, 2, 2 and 3: four tokens fewer than all; scores as by
    plain passes."""
    layout, _ = padded_and_packed("groups", [3, 2], True)
    assert layout.real_tokens == 5 + 10 - 4 and len(layout.target) == 10
    whole = groups([3, 2], False)
    prompts, answers = (x.token.split(x.length.tolist()) for x in (whole.prompt, whole.answer))
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logp = (llama(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        expected.append(logp.gather(1, answer[:, None])[:, 0])
    torch.testing.assert_close(scores(llama, layout), torch.cat(expected), atol=1e-9, rtol=0)
