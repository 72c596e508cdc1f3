"""Adapters that people bring: every field survives training, checkpoint, export and merging, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from tiny import fit, make_policy, method, toy_pairs

import offpolicy as op
from offpolicy.errors import UsageError
from offpolicy.export import export
from offpolicy.language.adapters import FUSED, new_adapter
from offpolicy.language.policy import open_adapter, open_model

peft = pytest.importorskip("peft")
IDS = torch.tensor([[1, 5, 9, 7, 30, 12]])
COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM"}


def lora(**options: Any) -> Callable[[], Any]:
    given = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **COMMON, **options}
    return lambda: peft.LoraConfig(**given)


KEPT: dict[str, Callable[[], Any]] = {
    "alpha_pattern": lora(alpha_pattern={"q_proj": 64}),
    "rank_pattern": lora(rank_pattern={"q_proj": 4}),
    "use_rslora": lora(use_rslora=True),
    "use_dora": lora(use_dora=True),
    "layers_to_transform": lora(layers_to_transform=[1]),
    "exclude_modules": lora(target_modules="all-linear", exclude_modules=["down_proj"]),
    "a pattern": lora(target_modules=r".*\.1\..*(q|k)_proj"),
    "modules_to_save": lora(modules_to_save=["lm_head", "embed_tokens"]),
    "embeddings": lora(target_modules=["q_proj", "embed_tokens"]),
    "trainable_token_indices": lora(trainable_token_indices=[9, 30]),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **COMMON
    ),
    "LoKr": lambda: peft.LoKrConfig(r=2, target_modules=["q_proj"], **COMMON),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], **COMMON),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], **COMMON),
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "learned prompts": (lambda: peft.PromptTuningConfig(num_virtual_tokens=2, **COMMON), "peft_type is PROMPT_TUNING"),
    "AdaLoRA": (lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9, **COMMON), "peft_type is ADALORA"),
    "activated": (lora(alora_invocation_tokens=[5, 6]), r"`alora_invocation_tokens` is \[5, 6\]"),
    "pissa": (lora(init_lora_weights="pissa"), "`init_lora_weights` is 'pissa'"),
}


def trained(policy: Path, folder: Path, config: Any) -> Path:
    """An adapter of this configuration with weights that matter."""
    model = peft.get_peft_model(open_model(str(policy)), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def opened(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", KEPT)
def test_an_adapter_survives(kind: str, policy: Path, tmp_path: Path) -> None:
    adapter = trained(policy, tmp_path / "adapter", KEPT[kind]())
    module = fit(method("SimPO", policy, adapter=str(adapter), lr=1e-3), toy_pairs(8), 1, tmp_path / "run")
    expected = logits(module.model)
    assert not torch.allclose(expected, logits(opened(policy)), atol=1e-2)
    beside = peft.PeftModel.from_pretrained(opened(policy), export(module, tmp_path / "beside"))
    loaded = op.load(tmp_path / "run").model
    merged = export(tmp_path / "run", tmp_path / "merged", merge=True)
    for found in (beside, loaded, opened(merged)):
        torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_kept_is_refused_by_name(kind: str, policy: Path, tmp_path: Path) -> None:
    config, message = REFUSED[kind]
    model = peft.get_peft_model(open_model(str(policy)), config())
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UsageError, match=message):
        open_adapter(open_model(str(policy)), str(tmp_path / "adapter"))


def test_an_adapter_that_cannot_be_merged_is_said_so(policy: Path, tmp_path: Path) -> None:
    """Biases of LoRA, where layers have none."""
    adapter = trained(policy, tmp_path / "adapter", lora(lora_bias=True)())
    module = fit(method("SimPO", policy, adapter=str(adapter)), toy_pairs(8), 1, tmp_path / "run")
    torch.testing.assert_close(logits(op.load(tmp_path / "run").model), logits(module.model), rtol=0, atol=0)
    with pytest.raises(UsageError, match=r"LORA cannot be merged.*lora_bias"):
        export(tmp_path / "run", tmp_path / "merged", merge=True)


@pytest.mark.parametrize("options", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}])
def test_tied_embeddings_that_one_side_of_changes_are_written_as_two(options: dict[str, Any], tmp_path: Path) -> None:
    tied = make_policy(tmp_path / "tied", tie_word_embeddings=True)
    adapter = trained(tied, tmp_path / "adapter", lora(**options)())
    module = fit(method("SimPO", tied, adapter=str(adapter), lr=1e-3), toy_pairs(8), 1, tmp_path / "run")
    merged = export(tmp_path / "run", tmp_path / "merged", merge=True)
    torch.testing.assert_close(logits(opened(merged)), logits(module.model), rtol=1e-4, atol=1e-4)


def test_single_tokens_of_tied_embeddings_are_refused_by_name(tmp_path: Path) -> None:
    tied = make_policy(tmp_path / "tied", tie_word_embeddings=True)
    adapter = trained(tied, tmp_path / "adapter", lora(trainable_token_indices=[9])())
    with pytest.raises(UsageError, match="trainable_token_indices"):
        fit(method("SimPO", tied, adapter=str(adapter)), toy_pairs(8), 1)


def test_checkpoints_of_former_versions(policy: Path, tmp_path: Path) -> None:
    """They noted eight fields of LoRA, and are still opened."""
    from offpolicy.language.adapters import adapter_settings, same_adapter, same_settings

    former = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False}
    former |= {"target_modules": ["q_proj"], "modules_to_save": None}
    model = same_adapter(open_model(str(policy)), former)
    assert same_settings(adapter_settings(model), former)
    assert not same_settings(adapter_settings(model), {**former, "r": 4})


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "jamba", "nemotron_h"])
def test_new_adapters_on_state_space_models(kind: str) -> None:
    """By default on every linear layer that is called, so that each adapter learns."""
    model = new_adapter(families.make(kind), {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"})
    mixers = [name for name, module in model.named_modules() if hasattr(module, "A_log")]
    assert mixers
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any(name.startswith(tuple(mixers)) for name in names)
    assert not any(name.startswith(f"{mixer}.{layer}.") for name in names for mixer in mixers for layer in FUSED)
    model(input_ids=IDS).logits.sum().backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not [name for name in idle if "expert" not in name]


def test_targets_that_cannot_be_used() -> None:
    with pytest.raises(UsageError, match=r"lora_targets.*out_proj.*layers are .*in_proj.*x_proj\.$") as told:
        new_adapter(families.make("mamba"), {"r": 2, "lora_alpha": 4, "target_modules": ["out_proj"]})
    assert "base_layer" not in str(told.value) and "lm_head" not in str(told.value)
