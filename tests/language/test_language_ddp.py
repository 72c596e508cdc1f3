"""Two processes against one with the same steps: DDP and FSDP2 on the CPU."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import fit, method
from toy import differences, run_files

import offpolicy as op
from offpolicy.language.reference import Cache
from offpolicy.report.records import read_margins
from offpolicy.training.checkpoints import read_checkpoint
from offpolicy.training.lightning_private import FullySharded

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("language pair")]  # all need the two processes, which run once

LAST = 5  # 13 rows in steps of 4: a last step of one row, which leaves one process without
# name → (method, options, options of the Trainer)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "DPO": ("DPO", {"micro_batch_size": 1, "gradient_checkpointing": True}, {"strategy": "ddp"}),
    "KTO": ("KTO", {"micro_batch_size": 2, "lora_rank": 2}, {"strategy": "ddp"}),
    "RPO": ("RPO", {"micro_batch_size": 1, "nll_form": "token_mean", "nll_weight": 1.0}, {"strategy": "ddp"}),
    "SFT": ("SFT", {"micro_batch_size": 1}, {"strategy": "ddp"}),
    "SimPO": ("SimPO", {"micro_batch_size": 2}, {"strategy": "ddp"}),
    "RDPO": ("RDPO", {"micro_batch_size": 2, "padding_free": True}, {"strategy": "ddp"}),
    "IPO": ("IPO", {"micro_batch_size": 2}, {"strategy": "ddp"}),
    "INPO": ("INPO", {"micro_batch_size": 2, "eta": 0.3}, {"strategy": "ddp"}),
    "CoPG": ("CoPG", {"micro_batch_size": 1}, {"strategy": "ddp"}),
    "MAPL": ("MAPL", {"micro_batch_size": 2}, {"strategy": "ddp"}),
    "SRPO": ("SRPO", {"micro_batch_size": 2}, {"strategy": "ddp"}),
    "OTR": ("SFT", {"micro_batch_size": 1, "weighting": "otr", "draws": 3}, {"strategy": "ddp"}),
    "CPO": ("CPO", {"micro_batch_size": 2}, {"strategy": "ddp"}),
    "ORPO-FSDP": ("ORPO", {"micro_batch_size": 1}, {"strategy": "fsdp2", "gradient_clip_val": 1.0}),
    "DPO-FSDP": ("DPO", {"micro_batch_size": 2}, {"strategy": "fsdp2"}),
    "SimPO-FSDP": ("SimPO", {"micro_batch_size": 2, "padding_free": True}, {"strategy": "fsdp2"}),
}
RESUMED = ("DPO", "KTO", "RPO", "SFT", "ORPO-FSDP")  # one of every kind of statistic, and of every strategy


def train(name: str, root: Path, folder: Path, devices: int, **options: Any) -> Any:
    kind, settings, trainer = CASES[name]
    trainer = {k: v for k, v in trainer.items() if devices > 1 or k != "strategy"}
    if trainer.get("strategy") == "fsdp2":
        trainer["strategy"] = FullySharded()
    precision = {} if name.endswith("FSDP") else {"precision": "64-true"}
    module = method(kind, root / "policy", ref_cache=str(root / f"references{devices}"), **settings)
    return fit(module, max_steps=LAST, folder=folder, devices=devices, **trainer, **precision, **options)


def main(root: Path) -> None:
    torch.set_num_threads(1)
    logging.disable()
    found, saved = {}, []
    save = Cache.save

    def counted(*args: Any) -> None:
        saved.append(1)
        save(*args)

    Cache.save = counted  # type: ignore[method-assign]
    for name in CASES:
        module = train(name, root, root / name / "whole", 2)
        saved.clear()
        if module.global_rank == 0:
            module.finish_files(root / name / "whole")
        if name in RESUMED:
            resumed = root / name / "resumed"
            if module.global_rank == 0:
                shutil.copytree(root / name / "whole", resumed)
            torch.distributed.barrier()
            train(name, root, resumed, 2, ckpt_path=resumed / "checkpoints" / "step=00000003.ckpt")
        found[name] = {"eval": module.eval_row, "saved": len(saved)}
    (root / f"rank{module.global_rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name: str, pair: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """Weights, every row of metrics and the held-out numbers; and resuming is exact."""
    root, found = pair
    assert found[0][name]["eval"] == found[1][name]["eval"] and found[0][name]["saved"] == 0
    two = run_files(root / name / "whole", LAST)
    if name in RESUMED:
        assert not differences(two, run_files(root / name / "resumed", LAST))
    train(name, root, tmp_path, 1)
    one = run_files(tmp_path, LAST)
    tolerance = 1e-4 if name.endswith("FSDP") else 1e-9
    assert set(one["state_dict"]) == set(two["state_dict"])
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], value, rtol=tolerance, atol=tolerance)
    for part in ("metrics", "evals"):
        assert len(one[part]) == len(two[part])
        for ours, theirs in zip(one[part], two[part]):
            skip = "accuracies" if ours["step"] == 2 else "nothing"  # all rewards are 0 in the first step
            ours, theirs = ({k: v for k, v in row.items() if skip not in k} for row in (ours, theirs))
            assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    margins = read_margins(tmp_path)  # each process has every other pair
    assert read_margins(root / name / "whole") == pytest.approx(margins, rel=1e-5, abs=max(tolerance, 1e-6))
    assert len(margins) == (0 if name in ("KTO", "SFT", "OTR", "CoPG") else 5)


def test_a_run_of_two_processes_opens_and_goes_on_in_one(
    pair: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    root, _ = pair
    for name in ("DPO", "ORPO-FSDP"):
        loaded = op.load(root / name / "whole")
        content = read_checkpoint(root / name / "whole" / "checkpoints" / f"step={LAST:08d}.ckpt")
        assert all(torch.equal(loaded.state_dict()[k], v) for k, v in content["state_dict"].items())
        model = AutoModelForCausalLM.from_pretrained(root / name / "whole" / "hf", dtype="auto")
        written = model.state_dict()  # of the type of the policy's files, which is not that of a 64-bit run
        assert all(torch.equal(written[k], v.to(written[k])) for k, v in loaded.model.state_dict().items())
    path = root / "DPO" / "whole" / "checkpoints" / "step=00000003.ckpt"
    module = train("DPO", root, tmp_path, 1, ckpt_path=path)
    whole = run_files(root / "DPO" / "whole", LAST)["state_dict"]
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, whole[key], rtol=1e-9, atol=1e-9)
