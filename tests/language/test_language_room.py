"""Memory of a run: counted parts, what is chosen by the room there is, what is refused before weights are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import make
from tiny_rl import fit, method
from transformers import Lfm2Config, LlamaConfig, LlamaForCausalLM

from lightning_modules.dpo import DPO
from offpolicy.compute.room import NO_LIMIT
from offpolicy.errors import UsageError
from offpolicy.language import room
from offpolicy.language.memory import Workload, estimate_memory
from offpolicy.language.room import base_dtype, look_for_room, numbers_of

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
CARD = 80 * 10**9


def llama(width: int = 64, layers: int = 2, vocabulary: int = 128, **more: Any) -> LlamaConfig:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "vocab_size": vocabulary}
    return LlamaConfig(**sizes, **{"intermediate_size": 2 * width, "num_attention_heads": 2, **more})


EIGHT_BILLION = llama(4096, 32, 128256, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)


def test_lasting_parts_are_counted() -> None:
    """Weights, gradients and two moments of every number: 4, 4 and 8 bytes in float32, half of each in bfloat16."""
    config = llama()
    numbers = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        parts = estimate_memory(config, Workload(dtype=dtype)).parts
        assert parts["weights"] == parts["gradients"] == numbers * width
        assert parts["optimizer"] == 2 * numbers * width
    assert estimate_memory(config, Workload(reference="bfloat16")).parts["reference"] == 2 * numbers
    adapters = 4 * 2 * sum(sum(shape) for shape in ((64, 64), (64, 64), (64, 64), (64, 64), *[(64, 128)] * 3))
    parts = estimate_memory(config, Workload(adapter=LORA)).parts
    assert parts["weights"] == 4 * (numbers + adapters) and parts["gradients"] == 4 * adapters
    offload = Workload(offload=True, dtype="bfloat16", device="cuda")
    host = estimate_memory(config, offload)
    assert host.parts["optimizer"] == 0 and host.host == 16 * numbers  # master, two moments, a gradient
    alike = estimate_memory(config, replace(offload, device="cpu"))  # its memory is that of the host
    assert alike.parts["optimizer"] == 16 * numbers and alike.host == 0 and alike.total > host.total
    halves = estimate_memory(config, Workload(processes=2, sharded=True)).parts
    assert halves["weights"] == 2 * numbers and halves["gathered"] > 0
    critic = Workload(critic="model")
    cut = estimate_memory(config, replace(critic, processes=2, sharded=True)).parts
    assert cut["critic"] == estimate_memory(config, critic).parts["critic"] // 2
    assert cut["gathered"] > halves["gathered"]  # it is whole while answers are drawn and scored


def test_adapters_of_layers_that_come_late_are_followed() -> None:
    config = Lfm2Config(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, full_attn_idxs=[5],
    )  # fmt: skip
    work = Workload(adapter=LORA | {"target_modules": ["q_proj"]}, rows=2, length=32)
    found = estimate_memory(config, work)
    assert found.parts["activations"] > 0 and not found.fault


def test_activations_grow_as_they_do() -> None:
    config = llama(layers=8)
    work = Workload(rows=4, length=256)
    one = estimate_memory(config, work).parts["activations"]
    assert estimate_memory(config, replace(work, rows=8)).parts["activations"] == pytest.approx(2 * one, rel=0.05)
    assert estimate_memory(config, replace(work, checkpointing=True)).parts["activations"] < 0.5 * one
    deep = estimate_memory(llama(layers=16), work).parts["activations"]
    assert 1.8 * one < deep < 2.05 * one


def test_adapters_of_a_folder_are_counted_by_their_own_settings(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = llama(layers=4)
    for extra in ({}, {"layers_to_transform": [3]}, {"target_modules": r".*layers\.2\..*_proj"}):
        settings = {"r": 3, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "inference_mode": True} | extra
        model = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(**settings | {"inference_mode": False}))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        peft.LoraConfig(**settings).save_pretrained(tmp_path)
        work = Workload(adapter=room._adapter(DPO(policy="x", adapter=str(tmp_path)).hparams))
        found = estimate_memory(config, work)
        assert found.parts["gradients"] == 4 * trained and found.known and found.parts["activations"] > 0
    (tmp_path / "adapter_config.json").write_text("{")
    assert room._adapter(DPO(policy="x", adapter=str(tmp_path)).hparams) is None  # opening says what is wrong


def test_a_model_that_cannot_be_followed_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = make("mixtral").config
    known = estimate_memory(experts, Workload(rows=2, length=16))  # whose kernels know bfloat16 alone without numbers
    half = estimate_memory(experts, Workload(rows=2, length=16, dtype="bfloat16"))
    assert known.known and known.parts["activations"] == 2 * half.parts["activations"]
    other = estimate_memory(make("modernbert-decoder").config, Workload(rows=2, length=16))
    assert not other.known and "cannot be followed (TypeError: Linear.forward() got an unex" in other.words()

    def broken(*_: Any) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("offpolicy.language.memory._pass", broken)
    with pytest.raises(ZeroDivisionError):  # a fault of ours is none of the model's
        estimate_memory(llama(layers=3), Workload(rows=3))


def test_processes_share_a_machine_and_decide_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [("one", 90, 60), ("one", 80, 50), ("two", 70, 90)]
    monkeypatch.setattr(room, "gathered", lambda own: found)
    assert room.shared_room(torch.device("cuda")) == (70, 25)
    monkeypatch.setattr(room, "gathered", lambda own: [(node, host, host) for node, _, host in found])
    assert room.shared_room(torch.device("cpu")) == (25, 25)


def on_card(free: int, precision: str = "bf16-mixed", host: int = NO_LIMIT, **options: Any) -> Any:
    """What DPO of a model with eight billion weights finds on a card with so much memory."""
    found = DPO(policy="8B", **options)
    strategy = SimpleNamespace(root_device=torch.device("cuda", 0))
    trainer = SimpleNamespace(strategy=strategy, world_size=1, precision=precision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room.policies, "peek_config", lambda name: EIGHT_BILLION)
        patch.setattr(room, "free_memory", lambda device: free)
        patch.setattr(room, "available_memory", lambda: host)
        return look_for_room(found, trainer, 1024, layers=None, own_mask=True)


def test_eight_billion_weights_with_lora_fit_on_a_card_by_default() -> None:
    """DPO of pairs of 1,024 tokens, without any option but the rank of the adapters."""
    for precision in ("32-true", "bf16-mixed"):
        found = on_card(CARD, precision, lora_rank=16)
        assert found.work.dtype == "bfloat16" and found.estimate.known
        assert found.estimate.total < 0.9 * CARD, found.words
        assert found.estimate.parts["weights"] == pytest.approx(16.1e9, rel=0.02)
    assert not on_card(CARD * 4, lora_rank=16).work.checkpointing
    tight = on_card(40 * 10**9, lora_rank=16)
    assert tight.work.checkpointing and "computed again in the backward pass" in tight.words


def test_all_of_eight_billion_weights_do_not_fit_and_what_would_is_said() -> None:
    with pytest.raises(UsageError) as error:
        on_card(CARD)
    text = str(error.value)
    assert "training needs about" in text and "cuda:0 has 72 GB free" in text
    for option in ("--model.lora_rank 16", "--model.dtype bfloat16", "--model.optimizer adamw_8bit"):
        assert option in text, text
    assert on_card(CARD, check_memory=False).estimate.total > CARD
    with pytest.raises(UsageError, match="`offload_optimizer` needs 128 GB on the host for each process, and 90 GB"):
        on_card(CARD, offload_optimizer=True, dtype="bfloat16", host=10**11)
    assert on_card(CARD, offload_optimizer=True, dtype="bfloat16", host=2 * 10**11).estimate.host > 10**11
    assert on_card(NO_LIMIT).words.endswith("does not tell how much is free")


def test_frozen_weights_are_bfloat16_on_a_gpu_by_default() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    adapted, whole = (DPO(policy="x", lora_rank=rank).hparams for rank in (2, 0))
    assert [base_dtype(adapted, device) for device in (cuda, cpu, None)] == ["bfloat16", "float32", "float32"]
    assert base_dtype(whole, cuda) == "float32"
    assert base_dtype(DPO(policy="x", lora_rank=2, dtype="float32").hparams, cuda) == "float32"


def test_a_run_that_cannot_fit_is_refused_before_its_weights_are_read(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(room, "SMALL", 0)
    monkeypatch.setattr(room, "free_memory", lambda device: 10_000)
    monkeypatch.setattr("offpolicy.language.policy.open_model", opened)
    with pytest.raises(UsageError, match=r"training needs about .* cpu has 9 kB free.*check_memory false"):
        fit(method("GRPO", policy), 1)


def test_layers_are_computed_again_where_room_is_short_and_nothing_else_changes(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "SMALL", 0)
    plain = fit(method("GRPO", policy), 2, held_out=False)
    facts = dict(plain.describe().facts)
    assert "weights" in facts["memory"] and "free" in facts["memory"] and not plain._room.work.checkpointing
    monkeypatch.setattr(room, "free_memory", lambda device: int(plain._room.estimate.total / 0.9) - 10)
    again = fit(method("GRPO", policy, check_memory=False), 2, held_out=False)
    assert again._room.work.checkpointing and again.model.is_gradient_checkpointing
    for ours, theirs in zip(plain.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_models_without_the_usual_sizes_are_not_looked_at() -> None:
    assert numbers_of(LlamaConfig()) > 6e9 and numbers_of(llama()) < room.SMALL
    with pytest.raises(UsageError, match="gradient_checkpointing"):
        DPO(policy="x", gradient_checkpointing="sometimes")
