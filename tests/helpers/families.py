"""Tiny models of many families with random weights, built from the configurations that transformers has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

VOCABULARY = 64
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "state_size": 4, "n_embd": 32, "n_layer": 2},
    **{"n_head": 4, "n_positions": 128, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_experts_per_tok": 2},
    **{"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
}
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
MIXER: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
MIXER |= {"mamba_chunk_size": 8}
OWN: dict[str, dict[str, Any]] = {
    "mamba": {},
    "falcon_mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "falcon_h1": {**MIXER, "mamba_d_ssm": 64},
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False, "num_experts": 2},
    },
    "bamba": {**MIXER, "attn_layer_indices": [1]},
    "nemotron_h": {
        **{"hybrid_override_pattern": "M*", "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8},
        **{"n_groups": 1, "chunk_size": 8},
    },
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "zamba2": {
        **{"num_hidden_layers": 3, "mamba_d_state": 8, "mamba_headdim": 16, "mamba_ngroups": 1, "chunk_size": 8},
        **{"hybrid_layer_ids": [1], "num_mem_blocks": 1, "adapter_rank": 4, "n_mamba_heads": 4},
        **{"use_mem_eff_path": False, "layers_block_type": ["mamba", "hybrid", "mamba"]},
    },
    "granitemoehybrid": {**MIXER, "layer_types": ["mamba", "attention"], "logits_scaling": 3.0},
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 6, "lru_width": 32},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "xlstm": {"num_heads": 2, "num_blocks": 2, "chunk_size": 8, "qk_dim_factor": 1.0, "mode": "inference"},
    "llama4_text": {"attention_chunk_size": 16, "intermediate_size_mlp": 48, "num_local_experts": 2},
    "modernbert-decoder": {"local_attention": 6},
    "openai-gpt": {},
    "gpt2": {},
    "opt": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "gemma2": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, "sliding_window": 6},
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 4.0},
    "phi": {},  # its output layer has a bias
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6},
    "mixtral": {"router_jitter_noise": 0.3},
    "phimoe": {"router_jitter_noise": 0.1, "input_jitter_noise": 0.3},
    "qwen2_moe": {},
    "roberta": {"is_decoder": True, "max_position_embeddings": 130},  # positions begin behind the padding's id
}
RECURRENT = [*list(OWN)[: list(OWN).index("llama4_text")]]


def make(kind: str, **more: Any) -> Any:
    """A model of this kind, in evaluation; the test is skipped where transformers has none."""
    transformers = pytest.importorskip("transformers")
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    from offpolicy.language.policy import without_dropout

    cls = transformers.CONFIG_MAPPING[kind]
    known = {*dir(cls), *getattr(cls, "attribute_map", {}), *cls().to_dict()}
    sizes = {name: value for name, value in SIZES.items() if name in known} | OWN.get(kind, {}) | more
    try:
        config = without_dropout(transformers.AutoConfig.for_model(kind, **sizes))
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    except (AttributeError, ValueError, ImportError) as error:
        pytest.skip(f"no tiny {kind}: {error}")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # weights of a size at which a wrong state is seen
        for name, p in model.named_parameters():
            if p.dim() > 1 and "A_log" not in name:
                p.normal_(0, 0.2, generator=generator)
    return model


def prompts(lengths: tuple[int, ...] = (3, 7, 12, 1), seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, n) for n in lengths]


@torch.no_grad()
def alone(model: Any, prompt: np.ndarray, answer: np.ndarray) -> float:
    """Log-probability of an answer by one plain pass over the text."""
    ids = torch.from_numpy(np.concatenate([prompt, answer]))[None]
    logps = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    return float(logps[len(prompt) - 1 : -1].gather(1, torch.from_numpy(answer)[:, None]).sum())


@torch.no_grad()
def greedy(model: Any, prompt: np.ndarray, count: int) -> list[int]:
    """The most likely tokens, each by reading the whole text anew."""
    ids = prompt.tolist()
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]
