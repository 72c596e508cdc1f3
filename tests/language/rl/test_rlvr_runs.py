"""Runs on named problems from the command line and from Python: GSM8K on a tiny random model, the example of sums."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripts import ROOT
from tiny import make_policy

from offpolicy import evaluate, fit, generate, load
from offpolicy.data.replay import Replay
from offpolicy.files import Table

SMALL = ["--model.batch_size", "8", "--model.group_size", "4", "--model.max_new_tokens", "6"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    make_policy(folder / "policy", max_position_embeddings=1024)
    with gzip.open(ROOT / "examples" / "preference" / "data" / "gsm8k_train.jsonl.gz", "rt") as file:
        lines = [json.loads(next(file)) for _ in range(30)]
    rows = [{"question": line["prompt"], "answer": line["completion"]} for line in lines]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def in_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


@pytest.mark.slow
@pytest.mark.parametrize("name, rows", [("ReMix", 8), ("RLPlus", 8)])
def test_gsm8k_on_a_random_model(name: str, rows: int, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rewards computed, store filled, loss finite; continued, evaluated and answered."""
    given = ["--data", "gsm8k.jsonl", "--data.max_prompt_length", "600", "--data.eval_fraction", "0.2"]
    given += ["--model.policy", "policy", "--model.rewards", "[math, {name: format, weight: 0.1}]"]
    given += ["--run.log_every", "1", "--run.eval_every", "0"]
    assert fit.main(["--model", name, *given, *SMALL, "--model.iterations", "2", "--folder", name]) == 0
    said = capsys.readouterr().out
    for words in (f"{name} on gsm8k", "24, 24 with a demonstration", "math, format", "answers up to 6", "▶"):
        assert words in said
    metrics = Table(home / name / "metrics.csv").rows()
    assert all(np.isfinite(row["train/loss"]) and row.get("train/reward/problems", 0) == 0 for row in metrics)
    assert {"train/reward/math", "train/reward/format", "train/kl/base", "train/entropy"} <= metrics[0].keys()
    store = Replay.load(sorted((home / name / "replay").iterdir())[-1])
    assert store.num_episodes >= rows and {"logp", "sampler_logp"} <= store.steps.keys()
    assert {"reward/math", "reward/format", "source", "group"} <= store.episodes.keys()
    if name == "RLPlus":
        assert metrics[0]["train/reward/external"] == 0.0  # cut before its end, so it earns nothing
        return
    assert fit.main(["--ckpt_path", name, "--model.iterations", "3"]) == 0
    assert "continuing at update" in capsys.readouterr().out
    assert evaluate.main([name]) == 0 and "pass@4" in capsys.readouterr().out
    loaded: Any = load(name)
    assert loaded.tokenizer is not None and loaded.iteration == 3
    assert generate.main([name, "--prompts", "2", "--num_samples", "1", "--max_new_tokens", "4"]) == 0
    assert "2 prompts, 1 answers each" in capsys.readouterr().out


@pytest.mark.slow
def test_example_of_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "rlvr"))
    import addition

    addition.make_policy(tmp_path / "policy", 0, width=16, layers=1)
    data = addition.warm_up_data(tmp_path / "sums.jsonl", 0, count=50)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    carry = [int(row["prompt"][1]) + int(row["prompt"][4]) > 9 for row in rows]
    assert len(rows) == 50 and sum(carry) == 5
    assert all(int(r["prompt"][:2]) + int(r["prompt"][3:5]) == int(r["completion"]) for r in rows)
    for label, steps in (("GRPO", 2), ("ReMix", 2), ("RL-PLUS, U = 1/V", 4)):
        method = addition.make_method(label, tmp_path / "policy", 256)
        assert addition.steps_for(method, 256) == steps, label
    assert addition.make_method("ReMix", tmp_path / "policy", 40_960).hparams.reincarnation == 77
    found = addition.one_run("GRPO", tmp_path, tmp_path / "policy", 0, [256])
    assert [row["answers"] for row in found] == [256]
    start = {**found[0], "method": "warm-up", "answers": 0}
    assert "| GRPO | 256 |" in addition.table([start, *found], 1)
    addition.draw([start, *found], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    sys.modules.pop("addition")
