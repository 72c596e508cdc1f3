"""Folders of models, tokenizers and adapters of strangers: no code in them runs."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from made_data import Bomb
from tiny import make_policy

from offpolicy.data.texts.tokens import load_tokenizer
from offpolicy.errors import DataError, UsageError
from offpolicy.language.policy import build_model, describe_model, dtype_of, open_adapter, open_model, plain_attention
from offpolicy.trust import trusting

EVIL = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer
"""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


@pytest.fixture
def policy(tmp_path: Path, marker: Path) -> Path:
    """A model with code of its own beside it."""
    folder = make_policy(tmp_path / "policy")
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    return folder


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("kind", ["llama", "evil", None])
def test_code_beside_a_model_is_not_run(kind: str | None, policy: Path, marker: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked"))
    maps = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
        "AutoTokenizer": ["evil.Tokenizer", None],
    }
    change(policy / "config.json", auto_map=maps, model_type=kind)
    change(policy / "tokenizer_config.json", auto_map=maps, tokenizer_class="EvilTokenizer")
    for opened in (lambda: open_model(str(policy)), lambda: load_tokenizer(str(policy))):
        with contextlib.suppress(UsageError, DataError):
            opened()
    assert not marker.exists()


def test_code_that_a_checkpoint_names_is_not_run(policy: Path, marker: Path) -> None:
    config = json.loads(describe_model(open_model(str(policy))))
    maps = {"AutoConfig": f"{policy}--evil.Config", "AutoModelForCausalLM": f"{policy}--evil.Model"}
    build_model(json.dumps(config | {"auto_map": maps}), dtype=torch.float32)
    assert not marker.exists()


def test_pickled_weights_are_read_as_weights_only(policy: Path, marker: Path, tmp_path: Path) -> None:
    model = open_model(str(policy))
    (policy / "model.safetensors").unlink()
    torch.save(model.state_dict(), policy / "pytorch_model.bin")
    assert open_model(str(policy)).config.vocab_size == model.config.vocab_size  # without anything else they open
    torch.save({**model.state_dict(), "bomb": Bomb(marker)}, policy / "pytorch_model.bin")
    with pytest.raises(UsageError):
        open_model(str(policy))
    assert not marker.exists()


def adapter(tmp_path: Path, model: Any, **fields: Any) -> str:
    peft = pytest.importorskip("peft")
    made = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    made.save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter" / "adapter_config.json", **fields)
    return str(tmp_path / "adapter")


@pytest.mark.parametrize(
    "fields",
    [
        {"megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": "evil"},
        {"megatron_core": "evil"},
        {"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}, "num_virtual_tokens": 2,
         "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a", "tokenizer_name_or_path": "policy"},
    ],
    ids=["megatron", "megatron alone", "tokenizer"],
)  # fmt: skip
def test_adapters_that_name_code(
    fields: dict[str, Any], policy: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(policy))
    folder = adapter(tmp_path, open_model(str(policy)), **fields)
    with pytest.raises(UsageError, match="`adapter` is "):
        open_adapter(open_model(str(policy)), folder)
    assert not marker.exists()


def test_pickled_adapters(policy: Path, marker: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path, open_model(str(policy)))
    Path(folder, "adapter_model.safetensors").unlink()
    torch.save({"bomb": Bomb(marker)}, Path(folder, "adapter_model.bin"))
    with pytest.raises(UsageError):
        open_adapter(open_model(str(policy)), folder)
    assert not marker.exists()


def test_attention_from_the_hub_is_code(policy: Path) -> None:
    change(policy / "config.json", attn_implementation="evil/kernel")
    assert "/" not in str(open_model(str(policy)).config._attn_implementation)
    config = open_model(str(policy)).config
    with trusting(in_file=True), pytest.raises(UsageError, match="would fetch and run code"):
        plain_attention(config, "evil/kernel")
    plain_attention(config, "evil/kernel")  # the user's own word
    with trusting(in_file=True, names=["evil/kernel"]):
        plain_attention(config, "evil/kernel")


@pytest.mark.parametrize("name", ["load", "hub", "nothing", "nn"])
def test_types_of_weights(name: str) -> None:
    with pytest.raises(UsageError, match="expected one of torch's"):
        dtype_of(name)


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\x00"])
def test_damaged_folders(file: str, text: str, policy: Path) -> None:
    (policy / "config.json").unlink()
    (policy / file).write_text(text)
    with pytest.raises(UsageError):
        open_model(str(policy))
