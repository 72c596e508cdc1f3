"""Rows of one forward pass: what is scored, and that neither padding, order, neighbours nor sharing change a score."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import FileStore

from offpolicy.data.texts.sequences import Pairs, Ragged, Singles
from offpolicy.errors import UsageError
from offpolicy.language.answer_scores import score
from offpolicy.language.attention import shares_prompt
from offpolicy.language.layout import pair_layout, single_layout

V = 41
SPECIAL = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LAYERS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def make(kind: str, **changes: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    if kind == "GPT2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
        config = transformers.GPT2Config(**{**SPECIAL, **sizes, **changes})
        name = "GPT2LMHeadModel"
    else:
        config = getattr(transformers, f"{kind}Config")(**{**SPECIAL, **LAYERS, **HEADS, **changes})
        name = f"{kind}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide faults
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model.double()


@pytest.fixture(scope="module", params=["Llama", "Qwen2", "GPT2"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return make(request.param)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return make("Llama")


def ragged(*texts: list[int]) -> Ragged:
    return Ragged(torch.tensor([t for text in texts for t in text]), torch.tensor([len(text) for text in texts]))


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
CHOSEN = [[13, 14, 1], [15, 1], [16, 17, 18, 19, 1]]
REJECTED = [[20, 1], [21, 22, 23, 24, 25, 1], [26, 1]]


def pairs(
    prompts: list[list[int]] = PROMPTS,
    chosen: list[list[int]] = CHOSEN,
    rejected: list[list[int]] = REJECTED,
    other: list[list[int]] | None = None,
) -> Pairs:
    texts = (ragged(*x) for x in (prompts, chosen, other or prompts, rejected))
    return Pairs(*texts, facts={}, row=torch.arange(len(prompts)))


def one_by_one(model: nn.Module, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
    """The obvious loop: one text, no padding, all logits."""
    sums = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logp = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        sums.append(sum(logp[len(prompt) + i - 1, token] for i, token in enumerate(answer)))
    return torch.stack(sums)


@pytest.mark.parametrize("shared", [False, True])
def test_equals_one_by_one(model: nn.Module, shared: bool) -> None:
    """C16 for whole answers, values and gradients of every parameter, and shared = plain."""
    assert shares_prompt(model.config)
    layout = pair_layout(pairs(), 2, shared_prompt=shared)
    assert layout.shared == shared and layout.num_answers == 6 and len(layout.input_ids) == (3 if shared else 6)
    found = score(model, layout)
    expected = one_by_one(model, PROMPTS * 2, CHOSEN + REJECTED)
    torch.testing.assert_close(found.sum_logps, expected, atol=1e-9, rtol=0)
    assert found.length.tolist() == [3, 2, 5, 2, 6, 2] and found.length.dtype == torch.float32
    weight = torch.linspace(-1, 1, 6, dtype=torch.float64)
    parameters = list(model.parameters())
    a = torch.autograd.grad(found.sum_logps @ weight, parameters)
    b = torch.autograd.grad(expected @ weight, parameters)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)  # norms compute in float32


def test_eager_attention_takes_the_shared_mask(llama: nn.Module) -> None:
    eager = make("Llama", attn_implementation="eager")
    layout = pair_layout(pairs(), 2, shared_prompt=True)
    found, expected = score(eager, layout).sum_logps, score(llama, layout).sum_logps
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # its softmax is float32


@pytest.mark.parametrize("shared", [False, True])
def test_padding_and_order_have_no_influence(llama: nn.Module, shared: bool) -> None:
    """C10: other padding token, wider rows, permuted and split batches."""
    reference = score(llama, pair_layout(pairs(), 2, shared_prompt=shared)).sum_logps
    wider = pair_layout(pairs(), 33, shared_prompt=shared, pad_to_multiple_of=16)
    assert wider.input_ids.shape[1] == 16
    torch.testing.assert_close(score(llama, wider).sum_logps, reference, atol=1e-9, rtol=0)
    order = [2, 0, 1]
    permuted = pairs(*([texts[i] for i in order] for texts in (PROMPTS, CHOSEN, REJECTED)))
    found = score(llama, pair_layout(permuted, 2, shared_prompt=shared)).sum_logps
    torch.testing.assert_close(found, reference[order + [3 + i for i in order]], atol=1e-9, rtol=0)
    single = [
        score(llama, pair_layout(pairs([p], [c], [r]), 2, shared_prompt=shared)).sum_logps
        for p, c, r in zip(PROMPTS, CHOSEN, REJECTED)
    ]
    torch.testing.assert_close(torch.stack(single, 1).flatten(), reference, atol=1e-9, rtol=0)


@pytest.mark.parametrize("shared", [False, True])
def test_answers_do_not_see_each_other(model: nn.Module, shared: bool) -> None:
    """Changing rejected answers, length included, leaves the chosen ones' scores, and the other way round."""
    new = [[30], [31, 32, 1], [33] * 7]
    before = score(model, pair_layout(pairs(), 2, shared_prompt=shared)).sum_logps
    changed = score(model, pair_layout(pairs(rejected=new), 2, shared_prompt=shared)).sum_logps
    torch.testing.assert_close(changed[:3], before[:3], atol=1e-9, rtol=0)
    changed = score(model, pair_layout(pairs(chosen=new), 2, shared_prompt=shared)).sum_logps
    torch.testing.assert_close(changed[3:], before[3:], atol=1e-9, rtol=0)


@pytest.mark.parametrize("shared", [False, True])
def test_prompts_are_not_scored(shared: bool) -> None:
    """C11: of the prompt only the last position is scored from, and no target is a prompt token."""
    layout = pair_layout(pairs(), 2, shared_prompt=shared)
    assert layout.target.tolist() == [t for text in CHOSEN + REJECTED for t in text]
    ids = layout.input_ids.flatten()
    seen = ids[layout.predict].tolist()
    expected = [t for p, a in zip(PROMPTS * 2, CHOSEN + REJECTED) for t in [p[-1], *a[:-1]]]
    assert seen == expected
    assert layout.real_tokens == sum(map(len, PROMPTS + CHOSEN + REJECTED + ([] if shared else PROMPTS)))


def test_prompts_that_differ_keep_their_own_row(llama: nn.Module) -> None:
    other = [[5, 6, 7], [30, 31, 32], [9, 10, 11, 30]]
    plain = pair_layout(pairs(other=other), 2, shared_prompt=False)
    shared = pair_layout(pairs(other=other), 2, shared_prompt=True)
    assert len(shared.input_ids) == 5
    expected = one_by_one(llama, PROMPTS + other, CHOSEN + REJECTED)
    for layout in (plain, shared):
        torch.testing.assert_close(score(llama, layout).sum_logps, expected, atol=1e-9, rtol=0)


def test_prompts_scored_on_request(llama: nn.Module) -> None:
    layout = pair_layout(pairs(), 2, shared_prompt=True, prompt_too=True)
    found = score(llama, layout)
    expected = one_by_one(llama, [p[:1] for p in PROMPTS], [p[1:] or [0] for p in PROMPTS])
    assert layout.num_answers == 9 and found.length.tolist()[6:] == [2, 0, 3]
    assert found.sum_logps[7].item() == 0  # a prompt of one token: nothing to score
    torch.testing.assert_close(found.sum_logps[[6, 8]], expected[[0, 2]], atol=1e-9, rtol=0)


def test_empty_prompt_loses_the_first_token(llama: nn.Module) -> None:
    layout = pair_layout(pairs([[], [8]], CHOSEN[:2], REJECTED[:2]), 2, shared_prompt=True)
    assert layout.length.tolist() == [2, 2, 1, 6]
    expected = one_by_one(llama, [[13], [8], [20], [8]], [[14, 1], [15, 1], [1], REJECTED[1]])
    torch.testing.assert_close(score(llama, layout).sum_logps, expected, atol=1e-9, rtol=0)


def test_singles(llama: nn.Module) -> None:
    singles = Singles(ragged(*PROMPTS), ragged(*CHOSEN), {}, torch.arange(3))
    layout = single_layout(singles, 2, prompt_too=True)
    found = score(llama, layout, stats=True)
    torch.testing.assert_close(found.sum_logps[:3], one_by_one(llama, PROMPTS, CHOSEN), atol=1e-9, rtol=0)
    assert found.length.tolist() == [3, 2, 5, 2, 0, 3]
    logp = llama(input_ids=torch.tensor([PROMPTS[0] + CHOSEN[0]])).logits[0, 2:5].log_softmax(-1)
    torch.testing.assert_close(found.stats["entropy"][0], -(logp.exp() * logp).sum(), atol=1e-9, rtol=0)
    assert {"logits", "entropy", "hits"} <= set(found.stats)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 4}),
        ("Cohere", {"logit_scale": 0.2}),
        ("Granite", {"logits_scaling": 3.0}),
    ],
)
def test_heads_with_scale_or_cap(kind: str, changes: dict[str, Any]) -> None:
    model = make(kind, **changes)
    found = score(model, pair_layout(pairs(), 2, shared_prompt=False))
    torch.testing.assert_close(
        found.sum_logps, one_by_one(model, PROMPTS * 2, CHOSEN + REJECTED), atol=1e-4, rtol=1e-5
    )  # some of these models round to float32 on the way


def test_windows_and_recurrence_do_not_share() -> None:
    from transformers import FalconMambaConfig, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

    def answer(config: Any) -> bool:
        config._attn_implementation = "sdpa"
        return shares_prompt(config)

    assert answer(LlamaConfig()) and answer(GPT2Config()) and answer(Qwen2Config())
    assert answer(MistralConfig(sliding_window=None)) and not answer(MistralConfig(sliding_window=64))
    assert not answer(Gemma2Config()) and not answer(FalconMambaConfig())
    config = LlamaConfig()
    config._attn_implementation = "flash_attention_2"
    assert not shares_prompt(config)


def test_unknown_head_is_refused() -> None:
    model = make("Llama")
    forward = model.forward

    def changed(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.logits = output.logits * 1.5
        return output

    model.forward = changed  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="changes its logits"):
        score(model, pair_layout(pairs(), 2, shared_prompt=True))


def test_models_that_cannot_share_are_found_out() -> None:
    """A model that ignores its mask."""
    model = make("Llama")
    decoder = model.model
    forward = decoder.forward
    decoder.forward = lambda **inputs: forward(**{**inputs, "attention_mask": None})  # type: ignore[method-assign]
    model.train()
    score(model, pair_layout(pairs(), 2, shared_prompt=False))
    with pytest.raises(UsageError, match=r"shared_prompt=false"):
        score(model, pair_layout(pairs(), 2, shared_prompt=True))
    assert all(module.training for module in model.modules())


def test_sharded_model(llama: nn.Module, tmp_path: Path) -> None:
    """FSDP2 in one process: parameters exist whole only inside its hooks; scores and gradients as without."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layout = pair_layout(pairs(), 2, shared_prompt=True)
    expected = score(llama, layout).sum_logps
    upstream = torch.linspace(-1, 1, 6, dtype=torch.float64)
    wanted = torch.autograd.grad(expected @ upstream, list(llama.parameters()))
    init_process_group("gloo", store=FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model, mesh = make("Llama"), init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for _ in range(2):
            model.zero_grad()
            found = score(model, layout).sum_logps
            torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
            (found @ upstream).backward()
            for p, right in zip(model.parameters(), wanted, strict=True):
                torch.testing.assert_close(p.grad.full_tensor(), right, atol=1e-8, rtol=1e-8)
    finally:
        destroy_process_group()


def test_lora(llama: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    layout = pair_layout(pairs(), 2, shared_prompt=True)
    expected = score(llama, layout).sum_logps
    tuned = peft.get_peft_model(make("Llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    torch.testing.assert_close(score(tuned, layout).sum_logps, expected, atol=1e-9, rtol=0)
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    assert (score(tuned, layout).sum_logps - expected).abs().min() > 1e-3
    with tuned.disable_adapter():
        torch.testing.assert_close(score(tuned, layout).sum_logps, expected, atol=1e-9, rtol=0)
    refused = peft.get_peft_model(make("Llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(UsageError, match="lm_head"):
        score(refused, layout)
