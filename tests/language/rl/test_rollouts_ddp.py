"""Two processes that learn from their own answers against one: the same answers, the same steps."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from made_parts import MANY_PARTS
from tiny_rl import fit, method, told_problems
from toy import differences, run_files

from offpolicy.data.replay import Replay

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("rollouts pair")]  # all need the two processes, which run once

LAST = 6
LOOKS_AT_STEPS = {
    "ratio": "token",
    "trust": {"name": "clip_cov", "share": 0.2, "lb": 0.0, "ub": 60.0},
    "entropy": {"name": "target", "target": 9.0, "start": 0.1},
    "terms": [{"name": "copg", "coef": 0.1}],
    "lr": "ess",
}
# the last micro-batches of a step have no row on one process, groups do not divide evenly
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "GRPO": ("GRPO", {"beta": 0.1, "micro_batch_size": 3, "batch_size": 12}),
    "GRPO-late": ("GRPO", {"lag": 1, "batch_size": 12, "demonstrations": 1, "demonstration_share": 0.5}),
    "filtered": ("GRPO", {"filter": "signal", "rewards": ["tiny_rl.ends_early"], "batch_size": 12}),
    "r3": ("GRPO", {"replay": {"name": "r3", "success": 0.5}, "rewards": ["tiny_rl.ends_early"], "batch_size": 12}),
    "asked": (
        "GRPO",
        {
            "curriculum": {"name": "gain", "deviation": 2.0, "step": 2.0},
            "hints": {"name": "scaffold", "patience": 1, "text": "{prompt} {hint}"},
            "rewards": ["tiny_rl.ends_early"],
            "batch_size": 12,
        },
    ),
    "written": (
        "GRPO",
        {
            "hints": {"name": "written", "tiers": ["a", "b"], "instruction": "{tier}{prompt}{solution}"},
            "rewards": ["tiny_rl.ends_early"],
            "batch_size": 12,
        },
    ),
    "corrected": (
        "GRPO",
        {
            "correction": {"name": "score", "first_stage": 1, "instruction": "again"},
            "objective": {"anchors": [{"name": "turn_kl", "coef": 0.1}], "aggregation": "seq_sum"},
            "micro_batch_size": 3,
            "batch_size": 12,
        },
    ),
    "tempered": (
        "GRPO",
        {
            **{"variant": "aepo", "tempering": {"name": "aepo", "target": 3.5, "share": 0.5}},
            **{"rewards": ["tiny_rl.ends_early"], "batch_size": 12, "micro_batch_size": 3},
        },
    ),
    "windowed": (
        "GRPO",
        {
            **{"variant": "t_ppo", "window": 2, "group_size": 1, "batch_size": 12, "micro_batch_size": 3},
            "objective": {"aggregation": "token_mean"},
        },
    ),
    "HPT": ("HPT", {"success": 0.6, "micro_batch_size": 3}),
    "many-parts": ("GRPO", {"objective": MANY_PARTS, "batch_size": 12, "micro_batch_size": 4}),
    "SPEAR": ("SPEAR", {"capacity": 2, "ramp": 3}),
    "groups": (
        "GRPO",
        {
            "objective": {"advantage": {"name": "risk", "bundle": 2}, "weight": ["empg"], "terms": ["kl_limit"]},
            "batch_size": 12,
        },
    ),
    "steps": ("GRPO", {"objective": LOOKS_AT_STEPS, "lag": 1, "micro_batch_size": 4, "batch_size": 12}),
    "last-layer": (  # norms of gradients of answers, and what the step would do to tokens
        "GRPO",
        {
            "objective": {"advantage": "opob", "trust": {"name": "capo", "least": -1e-3, "kl": None}},
            "micro_batch_size": 4,
            "batch_size": 12,
        },
    ),
    "ReMix": ("ReMix", {"base": "ppo", "group_size": 1, "reincarnation": 2, "micro_batch_size": 3, "kl": "full"}),
    "RLPlus": ("RLPlus", {"aggregation": "token_mean"}),
}


def train(name: str, root: Path, folder: Path, devices: int, **options: Any) -> Any:
    kind, settings = CASES[name]
    strategy = {"strategy": "ddp"} if devices > 1 else {}
    module = method(kind, root / "policy", **settings)
    options["problems"] = told_problems(root / "policy") if {"hints", "correction"} & settings.keys() else None
    return fit(module, LAST, folder, devices=devices, precision="64-true", **strategy, **options)


def main(root: Path) -> None:
    torch.set_num_threads(1)
    logging.disable()
    found = {}
    for name in CASES:
        module = train(name, root, root / name / "whole", 2)
        resumed = root / name / "resumed"
        if module.global_rank == 0:
            shutil.copytree(root / name / "whole", resumed)
        torch.distributed.barrier()
        if name == "ReMix":
            train(name, root, resumed, 2, ckpt_path=resumed / "checkpoints" / "step=00000003.ckpt")
        found[name] = module.eval_row
    (root / f"rank{module.global_rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name: str, pair: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    root, found = pair
    assert found[0][name] == found[1][name]
    two = run_files(root / name / "whole", LAST)
    assert not differences(two, run_files(root / name / "resumed", LAST))
    train(name, root, tmp_path, 1)
    one = run_files(tmp_path, LAST)
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], value, rtol=1e-5, atol=1e-6)
    for part in ("metrics", "evals"):
        assert len(one[part]) == len(two[part])
        for ours, theirs in zip(one[part], two[part]):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    stores = [Replay.load(sorted((folder / "replay").iterdir())[-1]) for folder in (tmp_path, root / name / "whole")]
    more = {"asked": ["asked"], "written": ["asked"], "tempered": ["tempered"]}.get(name, [])
    for column in ("group", "prompt", "policy_version", "source", "digest", "reward", *more):
        assert (stores[0].episodes[column] == stores[1].episodes[column]).all(), column
