"""Stands in for vLLM where it is not installed: the part that the worker uses, around a Llama in numpy.

The variable FAKE_VLLM_FAULT names what goes wrong, as often as the file FAKE_VLLM_TIMES says: "die", "hang" (both when
a third answer is due), "load" (weights cannot be loaded), "start" (the model is refused), "slow" (an answer takes a
second). "lie" makes every log-probability wrong.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from safetensors.numpy import load_file

Arrays = dict[str, np.ndarray]


class SamplingParams:
    def __init__(self, **given: Any) -> None:
        assert given["flat_logprobs"] and given["logprobs"] == 0 and given["ignore_eos"] and not given["detokenize"]
        self.__dict__.update(given)


def fault(name: str) -> bool:
    """Whether this goes wrong now; counts down."""
    if os.environ.get("FAKE_VLLM_FAULT") != name:
        return False
    file = Path(os.environ["FAKE_VLLM_TIMES"])
    left = int(file.read_text())
    file.write_text(str(max(0, left - 1)))
    return left > 0


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def turned(x: np.ndarray, base: float) -> np.ndarray:
    """Rotary positions of (heads, T, size)."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] / base ** (np.arange(half) / half)
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def logits_of(w: Arrays, c: dict[str, Any], ids: list[int]) -> np.ndarray:
    """Logits behind the last token of a text, in float64."""
    heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
    size, eps = c.get("head_dim") or c["hidden_size"] // heads, c["rms_norm_eps"]
    base = (c.get("rope_parameters") or c)["rope_theta"]
    x, count = w["model.embed_tokens.weight"][ids], len(ids)
    for i in range(c["num_hidden_layers"]):
        own = {n.removeprefix(f"model.layers.{i}."): t for n, t in w.items() if n.startswith(f"model.layers.{i}.")}
        y = norm(x, own["input_layernorm.weight"], eps)
        q, k, v = ((y @ own[f"self_attn.{n}_proj.weight"].T).reshape(count, -1, size).transpose(1, 0, 2) for n in "qkv")
        q, k, v = turned(q, base), turned(k, base).repeat(heads // groups, 0), v.repeat(heads // groups, 0)
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(size) + np.triu(np.full((count, count), -1e30), 1)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + (p @ v).transpose(1, 0, 2).reshape(count, -1) @ own["self_attn.o_proj.weight"].T
        y = norm(x, own["post_attention_layernorm.weight"], eps)
        gate = y @ own["mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ own["mlp.up_proj.weight"].T)) @ own["mlp.down_proj.weight"].T
    return norm(x[-1], w["model.norm.weight"], eps) @ w["lm_head.weight"].T


class LLM:
    def __init__(self, **options: Any) -> None:
        assert options["logprobs_mode"] == "processed_logprobs" and options["skip_tokenizer_init"]
        if fault("start"):
            raise ValueError("Model architectures ['Odd'] are not supported for now.")
        self.config = json.loads(Path(options["model"], "config.json").read_text())
        self.reload(options["model"])
        self.llm_engine, self.asked, self.answered = self, {}, 0

    def reload(self, folder: str) -> None:
        files = sorted(Path(folder).glob("*.safetensors"))
        assert files, f"no weights in {folder}"
        self.weights = {n: t.astype(np.float64) for f in files for n, t in load_file(f).items()}

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        assert method == "reload_weights"
        if fault("load"):
            raise AssertionError("wrong shape")
        self.reload(kwargs["weights_path"])

    def reset_prefix_cache(self) -> bool:
        return True

    def add_request(self, name: str, prompt: Any, params: Any, lora_request: Any = None) -> None:
        self.asked[name] = prompt["prompt_token_ids"], params

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            del self.asked[name]

    def step(self) -> list[Any]:
        """One whole answer."""
        self.answered += 1
        if self.answered % 3 == 0 and fault("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.answered % 3 == 0 and fault("hang"):
            time.sleep(1000)
        if os.environ.get("FAKE_VLLM_FAULT") == "slow":
            time.sleep(1)
        name = next(iter(self.asked))
        prompt, how = self.asked.pop(name)
        tokens, logps = self.drawn(prompt, how)
        reason = "stop" if tokens[-1] in how.stop_token_ids else "length"
        return [SimpleNamespace(request_id=name, finished=True, outputs=[self.output(tokens, logps, reason)])]

    def output(self, tokens: list[int], logps: list[float], reason: str) -> Any:
        wrong = 0.5 if os.environ.get("FAKE_VLLM_FAULT") == "lie" else 0.0
        flat = SimpleNamespace(logprobs=[logp - wrong for logp in logps])
        return SimpleNamespace(token_ids=tokens, logprobs=flat, finish_reason=reason)

    def drawn(self, prompt: list[int], how: Any) -> tuple[list[int], list[float]]:
        random, tokens, logps = np.random.default_rng(how.seed), [], []
        while len(tokens) < how.max_tokens and not (tokens and tokens[-1] in how.stop_token_ids):
            z = logits_of(self.weights, self.config, prompt + tokens) / (how.temperature or 1.0)
            logp = z - z.max() - np.log(np.exp(z - z.max()).sum())
            u = random.random()
            place = int(z.argmax()) if how.temperature == 0 else int((np.exp(logp).cumsum() <= u).sum())
            tokens.append(min(place, len(z) - 1))
            logps.append(float(logp[tokens[-1]]))
        return tokens, logps


for _name in ("vllm.sampling_params", "vllm.lora", "vllm.lora.request"):
    sys.modules[_name] = ModuleType(_name)
sys.modules["vllm.sampling_params"].RequestOutputKind = SimpleNamespace(FINAL_ONLY=2)  # type: ignore[attr-defined]
