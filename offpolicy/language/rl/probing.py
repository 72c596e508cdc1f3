"""Whether an engine draws from the weights it was given: a few answers are scored by the trainer too.

Weights that did not arrive (a tied head, half of a fused layer, an adapter), another temperature or another precision
leave no other trace than a run that learns badly.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from offpolicy.compute import processes
from offpolicy.errors import UsageError
from offpolicy.language.policy import base_of
from offpolicy.language.rl.engine import Completion, Request, Sampling

PROMPTS, LONGEST = 4, 16  # answers drawn after a sync, and their length
FIRST = 1 << 40  # number of the first request, so that no answer of training has its random numbers
BOUNDS = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the mean gap, nats; rounding makes 1e-6
HALF_BOUND = 0.1  # in bfloat16 rounding makes 0.02


def probe(engine: Any, model: nn.Module, prompts: Sequence[np.ndarray], how: Sampling, dtype: Any) -> dict[str, float]:
    """Compare log-probabilities of a few answers by engine and trainer; all processes call it together.

    Args:
        engine: right behind a ``sync`` of the model.
        model: the policy, in evaluation and in the precision of training.
        prompts: token ids; the first few are answered.
        how: answers are drawn in training; they are shorter here.
        dtype: that the policy computes in, unless the engine has a ``dtype`` of its own.

    Returns:
        ``engine/gap``, the mean of |ℓ_engine − ℓ_trainer| over tokens in nats, the largest of all processes, and
        ``engine/outside``, the share of tokens whose ratio is outside of [0.9, 1.1]. Nothing where the engine knows no
        log-probabilities (they are not finite).

    Raises:
        UsageError: the gap is above the bound, on every process.
    """
    requests = [Request(prompt, FIRST + i, 1) for i, prompt in enumerate(prompts[:PROMPTS])]
    how = replace(how, max_new_tokens=min(LONGEST, how.max_new_tokens))
    drawn = [(r.prompt, a) for r, some in zip(requests, engine.generate(requests, how)) for a in some if is_now(a, how)]
    # every process makes the same number of passes, as weights may be cut over them
    gaps = [a.logp - trainer_logps(model, prompt, a, how.temperature) for prompt, a in drawn]
    gap = np.concatenate(gaps) if gaps else np.zeros(0)
    gap = gap[np.isfinite(gap)]
    mine = (float(np.abs(gap).mean()), float((np.abs(np.expm1(gap)) > 0.1).mean())) if len(gap) else None
    known = [one for one in processes.gathered(mine) if one is not None]
    if not known:
        return {}
    dtype = getattr(engine, "dtype", dtype)
    largest, bound = max(one[0] for one in known), BOUNDS.get(dtype, HALF_BOUND)
    if not largest <= bound:
        error = UsageError(
            f"the engine's log-probabilities of {PROMPTS} answers are {largest:.3g} nats from the trainer's, after it "
            f"was given the weights; expected {bound:g} at most in {str(dtype).removeprefix('torch.')}. It draws from "
            "another policy than is trained, or reports another distribution. Look at the weights that it loads (a "
            "tied head, adapters, fused layers), its precision and temperature, or pass --model.engine transformers."
        )
        error.together = True
        raise error
    return {"engine/gap": largest, "engine/outside": max(one[1] for one in known)}


def is_now(answer: Completion, how: Sampling) -> bool:
    """Whether an answer was drawn by the weights of the last sync."""
    return answer.version is None or bool((np.asarray(answer.version) == how.iteration).all())


@torch.no_grad()
def trainer_logps(model: nn.Module, prompt: np.ndarray, answer: Completion, temperature: float) -> np.ndarray:
    """Log-probabilities of an answer's tokens by the model, at a temperature (0 counts as 1), float64 (n,)."""
    device, count = next(model.parameters()).device, len(answer.token)
    ids = torch.from_numpy(np.concatenate([prompt, answer.token]).astype(np.int64)).to(device)
    shorter = "logits_to_keep" in inspect.signature(base_of(model).forward).parameters
    logits = model(input_ids=ids[None], use_cache=False, **({"logits_to_keep": count + 1} if shorter else {})).logits
    scaled = logits[0, -count - 1 : -1].double() / (temperature or 1.0)
    return scaled.log_softmax(-1).gather(-1, ids[-count:, None])[:, 0].cpu().numpy()
