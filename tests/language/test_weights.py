"""The weights of a policy under the names that it has without adapters, for engines with weights of their own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import pair_of
from tiny import make_policy
from torch import nn

from offpolicy.language.adapters import merged
from offpolicy.language.weights import adapter_state, exported


def opened(folder: Path, **config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    policy = folder / "policy"
    if not policy.exists():
        make_policy(policy, **config)
    return AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_without_adapters(tied: bool, tmp_path: Path) -> None:
    model = opened(tmp_path, tie_word_embeddings=tied)
    found = dict(exported(model))
    assert found.keys() == model.state_dict().keys() and "lm_head.weight" in found
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    assert not any(value.requires_grad for value in found.values())
    assert {value.dtype for value in dict(exported(model, dtype=torch.bfloat16)).values()} == {torch.bfloat16}


KINDS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 4, "target_modules": ["q_proj", "down_proj"], "lora_alpha": 8},
    "dora": {"r": 4, "target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "saved": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding": {"r": 2, "target_modules": ["embed_tokens", "q_proj"]},
    "tokens": {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "IA3Config": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LoHaConfig": {"r": 2, "target_modules": ["q_proj"]},
    "OFTConfig": {"r": 4, "oft_block_size": 0, "target_modules": ["q_proj"]},
}


def adapted(model: Any, kind: str, seed: int = 1) -> Any:
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind) if kind.endswith("Config") else peft.LoraConfig
    wrapped = peft.get_peft_model(model, config(task_type="CAUSAL_LM", **KINDS[kind]))
    torch.manual_seed(seed)
    for p in wrapped.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    return wrapped.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_merged_as_peft_does_it(kind: str, tmp_path: Path) -> None:
    model = adapted(opened(tmp_path), kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = opened(tmp_path).state_dict()
    expected = merged(copy.deepcopy(model), 64).state_dict()
    found, bare = dict(exported(model)), dict(exported(model, "keep"))
    assert found.keys() == bare.keys() == plain.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
        if not (kind == "saved" and name == "lm_head.weight"):  # the trained copy has no other form
            assert torch.equal(bare[name], plain[name]), name
    assert any(not torch.equal(found[name], plain[name]) for name in plain)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_merged_weights_are_rounded_once(tmp_path: Path) -> None:
    """W + s·BA in float32, then bfloat16; not a bfloat16 product added to bfloat16 weights."""
    model = adapted(opened(tmp_path), "LoraConfig")
    model.base_model.model.to(torch.bfloat16)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = (part["default"].weight.float() for part in (layer.lora_A, layer.lora_B))
    expected = (layer.base_layer.weight.float() + 2.0 * b @ a).to(torch.bfloat16)
    assert torch.equal(dict(exported(model))["model.layers.0.self_attn.q_proj.weight"], expected)


def check_sharded(kind: str, folder: Path) -> None:
    """In each of two processes: the model cut over both gives what it gives whole."""
    from torch.distributed.device_mesh import init_device_mesh

    from offpolicy.language.policy import base_of
    from offpolicy.language.sharding import shard

    model = opened(folder)
    model = adapted(model, kind) if kind else model
    expected = dict(exported(model)) | (adapter_state(model) if kind else {})
    expected = {name: value.clone() for name, value in expected.items()}
    shard(base_of(model), init_device_mesh("cpu", (2,)))
    found = dict(exported(model)) | (adapter_state(model) if kind else {})
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_weights_cut_over_processes(tmp_path: Path) -> None:
    import torch.distributed as dist

    opened(tmp_path)

    def main() -> None:
        dist.init_process_group("gloo")
        for kind in ("", "LoraConfig", "dora"):
            check_sharded(kind, tmp_path)
        dist.destroy_process_group()

    copies = pair_of(main)
    assert [copy.returncode for copy in copies] == [0, 0], "\n".join(copy.output[-3000:] for copy in copies)
