"""Models that do not fit: another kind, code of their own, another vocabulary than the policy's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from tiny import fit, make_policy, method, toy_pairs

from offpolicy.data.texts.rollouts import Rollouts
from offpolicy.data.texts.sequences import Ragged
from offpolicy.errors import UsageError
from offpolicy.language.generation import positions
from offpolicy.language.layout import group_layout
from offpolicy.language.policy import build_model, describe_model, open_model, without_dropout
from offpolicy.language.rl.critic import Critic


@pytest.mark.parametrize("kind", ["t5", "bart", "encoder-decoder"])
def test_an_encoder_with_a_decoder_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "is_encoder_decoder": True}))
    with pytest.raises(UsageError, match="does not open as a causal language model") as told:
        open_model(str(tmp_path))
    assert kind in str(told.value) and "trust_remote_code" not in str(told.value)


def test_code_of_a_model_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "modeling_own.py").write_text("raise SystemExit('run')")
    config = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="needs code of its own"):
        open_model(str(tmp_path))


def test_no_part_drops_out() -> None:
    from transformers import Gemma3Config, OPTConfig

    assert without_dropout(Gemma3Config(text_config={"attention_dropout": 0.5})).text_config.attention_dropout == 0.0
    assert without_dropout(OPTConfig(layerdrop=0.5)).layerdrop == 0.0


def test_positions_wherever_they_are_said() -> None:
    assert positions(families.make("gpt2")) == 128
    assert positions(families.make("mpt", max_seq_len=96, n_heads=4, d_model=32, n_layers=2)) == 96


def test_a_configuration_with_infinite_numbers_is_built_again() -> None:
    model = families.make("mamba2")
    assert build_model(describe_model(model), dtype=torch.float32).config.time_step_limit[1] == float("inf")


# -- the reference -----------------------------------------------------------------------------------------------------


def test_a_reference_reads_the_same_tokens(policy: Path, tmp_path: Path) -> None:
    """Where a token of the texts is another one to it, where it has fewer of them, and where texts are too long."""
    from transformers import AutoTokenizer

    other = make_policy(tmp_path / "other", seed=1)
    module = method("DPO", policy, reference=str(other))
    module.tokenizer = AutoTokenizer.from_pretrained(policy)
    fit(module, toy_pairs(6), 1)
    turned = make_policy(tmp_path / "turned", seed=1)
    file = turned / "tokenizer.json"
    rules = json.loads(file.read_text())
    words = rules["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(rules))
    module = method("DPO", policy, reference=str(turned))
    module.tokenizer = AutoTokenizer.from_pretrained(policy)
    with pytest.raises(UsageError, match=r"whose token \d+ is 'b', the policy's is 'a'"):
        fit(module, toy_pairs(30), 1)
    small = make_policy(tmp_path / "small", vocab_size=48)
    with pytest.raises(UsageError, match="which knows 48 tokens, and the policy 64"):
        fit(method("DPO", policy, reference=str(small)), toy_pairs(6), 1)
    short = make_policy(tmp_path / "short", max_position_embeddings=8)
    with pytest.raises(UsageError, match="which has 8 positions"):
        fit(method("DPO", policy, reference=str(short)), toy_pairs(6), 1)


# -- the critic --------------------------------------------------------------------------------------------------------


def lanes(answers: list[np.ndarray], prompt: np.ndarray, together: bool) -> Rollouts:
    """Answers to one prompt, behind it in one row or in a row each."""
    count = len(answers)
    rows = torch.zeros(count, dtype=torch.int64) if together else torch.arange(count)
    turns = torch.arange(count) if together else torch.zeros(count, dtype=torch.int64)
    prompts = Ragged(torch.from_numpy(np.tile(prompt, count)), torch.full((count,), len(prompt)))
    answer = Ragged(torch.from_numpy(np.concatenate(answers)), torch.tensor([len(a) for a in answers]))
    known: dict[str, Any] = {"prompt": prompts, "answer": answer, "lane": rows, "turn": turns}
    return Rollouts(**{name: known.get(name, {}) for name in Rollouts._fields})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_critic_does_not_look_at_other_answers_behind_the_prompt(attention: str) -> None:
    model = families.make("qwen2_moe" if attention == "sdpa" else "granite", attn_implementation=attention)
    critic = Critic(model)
    torch.nn.init.normal_(critic.head[-1].weight)
    prompt, answers = families.prompts((4,))[0], families.prompts((3, 5, 2), 1)
    values = []
    for together in (True, False):
        layout = group_layout(lanes(answers, prompt, together), 0)
        assert layout.shared == together
        with torch.no_grad():
            values.append(critic(torch.zeros(10, 32), layout))
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-4)


def test_a_critic_of_a_model_without_a_decoder() -> None:
    model = families.make("llama4_text")
    with pytest.raises(UsageError, match=r"--model\.critic head"):
        Critic(model)
    assert Critic(model, "head").decoder is None
