"""Engines that draw with vLLM, or with what stands in for it, and a policy whose heads vLLM knows."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_policy

from offpolicy.language.rl.engine import Completion, EngineContext, Request
from offpolicy.language.rl.vllm import VllmEngine

PYTHON = os.environ.get("OFFPOLICY_VLLM_PYTHON", "")
WITHOUT = "vLLM was not tried: OFFPOLICY_VLLM_PYTHON names no interpreter that has it"
needs_vllm = [pytest.mark.vllm, pytest.mark.skipif(not PYTHON, reason=WITHOUT)]


def fake(folder: Path, patch: pytest.MonkeyPatch, fault: str = "", times: int = 1, version: str = "0.32.0") -> str:
    """Let interpreters of this test find what stands in for vLLM; gives the path of one."""
    home = Path(__file__).parent / "fake_vllm" / "vllm.py"
    about = folder / "fake" / f"vllm-{version}.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    shutil.copy(home, folder / "fake" / "vllm.py")
    (folder / "times").write_text(str(times))
    patch.setenv("PYTHONPATH", os.pathsep.join([str(folder / "fake"), os.environ.get("PYTHONPATH", "")]))
    patch.setenv("FAKE_VLLM_FAULT", fault)
    patch.setenv("FAKE_VLLM_TIMES", str(folder / "times"))
    return sys.executable


def policy_of(folder: Path, **config: Any) -> Path:
    """A Llama with two heads of 32 numbers."""
    return (
        folder / "policy" if (folder / "policy").exists() else make_policy(folder / "policy", hidden_size=64, **config)
    )


def model_of(folder: Path, **config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(policy_of(folder, **config), dtype=torch.float32).eval()


def context(model: Any, folder: Path | None = None, **given: Any) -> EngineContext:
    return EngineContext(
        **{"longest_prompt": 12, "longest_answer": 20, "answers_at_once": 64, "model": model, "folder": folder, **given}
    )


def engine_of(model: Any, folder: Path, python: str, **options: Any) -> VllmEngine:
    return VllmEngine(context(model, folder), python=python, **options)


def requests(count: int = 5, samples: int = 3, first: int = 0) -> list[Request]:
    rng = np.random.default_rng(0)
    return [Request(rng.integers(4, 40, rng.integers(1, 6)), first + i, samples) for i in range(count)]


@torch.no_grad()
def largest_gap(
    model: Any, asked: list[Request], found: list[list[Completion]], temperature: float, cut: Any = None
) -> float:
    """Of the log-probabilities of all tokens, from the model's; `cut` changes (n, V) log-probabilities."""
    gaps = []
    for request, some in zip(asked, found, strict=True):
        for answer in some:
            ids = torch.from_numpy(np.concatenate([request.prompt, answer.token]))[None]
            z = model(ids).logits[0, len(request.prompt) - 1 : -1].double() / (temperature or 1.0)
            logp = z.log_softmax(-1) if cut is None else cut(z.log_softmax(-1))
            said = logp.gather(1, torch.from_numpy(answer.token)[:, None])[:, 0]
            gaps.append(float((said - torch.from_numpy(answer.logp)).abs().max()))
    return max(gaps)


def texts(found: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[tuple(answer.token.tolist()) for answer in some] for some in found]
