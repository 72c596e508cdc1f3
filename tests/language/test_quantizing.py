"""Adapters above weights of four bits: what is trained and kept, what goes on, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import fit, method
from toy import differences, run_files

import offpolicy as op
from offpolicy.errors import UsageError
from offpolicy.language import policy as policies
from offpolicy.language.export import export_model
from offpolicy.language.quantizing import numbers, quantizable
from offpolicy.language.weights import exported
from offpolicy.training.checkpoints import newest_checkpoint, read_checkpoint

OPTIONS: dict[str, Any] = {
    "lora_rank": 2,
    "quantize": "4bit",
    "lr": 1e-2,
    "lr_schedule": "constant",
    "warmup_ratio": 0.0,
}


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


def test_what_four_bits_cannot_do(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="cannot be trained; expected adapters"):
        method("DPO", policy, quantize="4bit")
    with pytest.raises(UsageError, match="`quantize` is '8bit'"):
        method("DPO", policy, quantize="8bit", lora_rank=2)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match="needs the package bitsandbytes"):
        method("DPO", policy, **OPTIONS)
