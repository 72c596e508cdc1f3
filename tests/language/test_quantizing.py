"""Adapters above weights of four bits: what is trained and kept, what goes on, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import fit, make_policy, method
from toy import differences, run_files

import offpolicy as op
from offpolicy.errors import UsageError
from offpolicy.language import policy as policies
from offpolicy.language.export import export_model
from offpolicy.language.quantizing import comes_back, numbers, quantizable
from offpolicy.language.weights import exported
from offpolicy.training.checkpoints import newest_checkpoint, read_checkpoint

OPTIONS: dict[str, Any] = {
    "lora_rank": 2,
    "quantize": "4bit",
    "lr": 1e-2,
    "lr_schedule": "constant",
    "warmup_ratio": 0.0,
}


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """Layers of whole blocks, which every processor reads."""
    return make_policy(tmp_path / "policy", hidden_size=64, intermediate_size=64)


def test_adapters_learn_above_four_bits_and_go_on_bit_for_bit(policy: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    whole = fit(method("DPO", policy, **OPTIONS), max_steps=6, folder=tmp_path / "whole")
    base = policies.base_of(whole.model)
    plain = policies.open_model(str(policy))
    packed = [p for p in base.parameters() if p.dtype == torch.uint8]
    assert len(packed) == len(quantizable(plain)) > 0
    assert sum(map(numbers, base.parameters())) - sum(p.numel() for p in plain.parameters()) == sum(
        p.numel() for name, p in base.named_parameters() if "lora_" in name
    )
    assert "four bits" in whole.policy_fact()[1]
    read = dict(exported(whole.model, adapter="keep"))
    for name, value in plain.state_dict().items():  # the frozen weights are those of the folder, up to rounding
        assert torch.nn.functional.cosine_similarity(read[name].flatten(), value.flatten(), dim=0) > 0.98, name
    moved = [p.abs().max() for name, p in whole.model.named_parameters() if "lora_B" in name]
    assert min(moved) > 0
    fit(method("DPO", policy, **OPTIONS), max_steps=3, folder=tmp_path / "cut")
    path = newest_checkpoint(tmp_path / "cut")
    assert path is not None
    kept = read_checkpoint(path)["state_dict"]
    assert kept and all("lora_" in name for name in kept)
    fit(method("DPO", policy, **OPTIONS), max_steps=6, folder=tmp_path / "cut", ckpt_path=path)
    found, expected = (run_files(tmp_path / name, 6) for name in ("cut", "whole"))
    assert not differences(found["state_dict"], expected["state_dict"])
    loaded = op.load(tmp_path / "whole")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        answers = [one.model.eval()(input_ids=ids).logits for one in (loaded, whole)]
    assert torch.equal(*answers) and np.isfinite(answers[0].numpy()).all()
    assert (export_model(loaded.model, None, tmp_path / "adapters") / "adapter_model.safetensors").is_file()


def test_weights_stay_as_they_were_read_on_every_processor(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bits.nn.modules, "has_avx512bf16", lambda: True)
    model = policies.open_model(str(policy), quantize="4bit").eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model(input_ids=torch.arange(3, 9)[None])
    packed = {name: p for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert packed and all(torch.equal(p, before[name]) and p.quant_state.nested for name, p in packed.items())


def test_a_layer_whose_numbers_do_not_come_back_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    narrow, plain = make_policy(tmp_path / "narrow", hidden_size=48), functional.dequantize_4bit
    assert comes_back(64) and comes_back(128)
    for factor in (1.0, 2.0):
        comes_back.cache_clear()
        monkeypatch.setattr(functional, "dequantize_4bit", lambda *given, by=factor: plain(*given).view(64, -1) * by)
        if not comes_back(48):  # with a factor of 1 on some processors alone
            with pytest.raises(UsageError, match=r"has 48 inputs, no multiple of 64.*`quantize` out"):
                policies.open_model(str(narrow), quantize="4bit")
    assert not comes_back(48)
    comes_back.cache_clear()


def test_what_four_bits_cannot_do(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="cannot be trained; expected adapters"):
        method("DPO", policy, quantize="4bit")
    with pytest.raises(UsageError, match="`quantize` is '8bit'"):
        method("DPO", policy, quantize="8bit", lora_rank=2)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match="needs the package bitsandbytes"):
        method("DPO", policy, **OPTIONS)
