"""Learning from own answers under FSDP2: two processes that share weights against two that each have all of them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_rl import fit, method
from toy import differences, run_files

import offpolicy as op
from offpolicy.data.replay import Replay
from offpolicy.training.lightning_private import FullySharded

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sharded rollouts pair")]

LAST = 6
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "GRPO": ("GRPO", {"beta": 0.1, "micro_batch_size": 3, "batch_size": 12}),
    "GRPO-LoRA": ("GRPO", {"beta": 0.1, "lora_rank": 2, "engine": "tiny"}),
    "GRPO-steps": (  # facts of the whole step, and norms of gradients of answers
        "GRPO",
        {
            "objective": {"advantage": "opob", "trust": {"name": "clip_cov", "share": 0.2, "lb": 0.0, "ub": 60.0}},
            "micro_batch_size": 3,
            "batch_size": 12,
        },
    ),
    "GRPO-lag": ("GRPO", {"lag": 1}),
    "GRPO-engine": ("GRPO", {"engine": "tiny_rl.OwnWeightsEngine"}),
    "ReMix": ("ReMix", {"reincarnation": 2, "micro_batch_size": 3, "kl": "full"}),
    "ReMix-critic": ("ReMix", {"base": "ppo", "group_size": 1, "reincarnation": 2, "micro_batch_size": 3}),
    "RLPlus": ("RLPlus", {"aggregation": "token_mean"}),
}


def train(name: str, root: Path, folder: Path, strategy: str, **options: Any) -> Any:
    kind, settings = CASES[name]
    given = {"strategy": FullySharded() if strategy == "fsdp2" else strategy, "devices": 2} if strategy else {}
    module = method(kind, root / "policy", **settings)
    return fit(module, LAST, folder, **({"devices": 1} | given), **options)


def main(root: Path) -> None:
    torch.set_num_threads(1)
    logging.disable()
    found: dict[str, Any] = {}
    for name in CASES:
        train(name, root, root / name / "ddp", "ddp")
        module = train(name, root, root / name / "whole", "fsdp2")
        resumed = root / name / "resumed"
        if module.global_rank == 0:
            shutil.copytree(root / name / "whole", resumed, symlinks=True)
        torch.distributed.barrier()
        train(name, root, resumed, "fsdp2", ckpt_path=resumed / "checkpoints" / "step=00000003.ckpt")
        found[name] = module.eval_row
    (root / f"rank{module.global_rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("name", CASES)
def test_sharded_equals_whole(name: str, pair: tuple[Path, list[dict[str, Any]]]) -> None:
    """The same answers, the same steps, the same numbers on held-out problems; and resuming is exact."""
    root, found = pair
    assert found[0][name] == found[1][name]
    ours, theirs = (run_files(root / name / folder, LAST) for folder in ("whole", "ddp"))
    assert not differences(ours, run_files(root / name / "resumed", LAST))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for key, value in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][key], value, rtol=1e-5, atol=1e-5)
    for part in ("metrics", "evals"):
        assert len(ours[part]) == len(theirs[part])
        for own, other in zip(ours[part], theirs[part]):
            assert own == pytest.approx(other, rel=1e-3, abs=1e-4)
    stores = [Replay.load(sorted((root / name / run / "replay").iterdir())[-1]) for run in ("whole", "ddp")]
    for column in ("group", "prompt", "policy_version", "source", "digest", "reward"):
        assert (stores[0].episodes[column] == stores[1].episodes[column]).all(), column


def test_it_goes_on_in_one_process(pair: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    root, _ = pair
    shutil.copytree(root / "ReMix" / "whole", tmp_path / "run")
    module = train(
        "ReMix", root, tmp_path / "run", "", ckpt_path=tmp_path / "run" / "checkpoints" / "step=00000003.ckpt"
    )
    whole = op.load(root / "ReMix" / "whole").state_dict()
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, whole[key], rtol=1e-4, atol=1e-4)
