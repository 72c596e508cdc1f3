"""What the loss sees of a batch of answers: columns of the store and scores of the policy, a row per answer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from offpolicy.compute.devices import send
from offpolicy.data import sampling
from offpolicy.data.texts.rollouts import Rollouts
from offpolicy.data.texts.sequences import spread
from offpolicy.errors import UsageError, nearest, resembles
from offpolicy.language.answer_scores import TokenScores
from offpolicy.losses.tokens import Tokens

OF_ANSWERS = (
    "group",
    "prompt",
    "reward",
    "length",
    "ended",
    "iteration",
    "policy_version",
    "source",
    "given",
    "advantage",
)


def check_columns(columns: Collection[str], rewards: Collection[str], given: Collection[str] = ()) -> None:
    """Raise :class:`UsageError` for a column that an objective asks for and no answer will have.

    Args:
        columns: that the objective asks for. Of answers: ``OF_ANSWERS``, or ``reward/NAME``. Of tokens: ``turn``
            and ``stage``, from 0, and −1 outside of the answer; and ``token``, its number in the vocabulary.
        rewards: names of the rewards.
        given: columns that the advantage gives.
    """
    known = [*OF_ANSWERS, "turn", "stage", "token", *(f"reward/{name}" for name in rewards), *sorted(given)]
    for name in sorted(set(columns) - set(known)):
        alike = [other for other in known if resembles(name, other)]  # the others may be of stores elsewhere
        raise UsageError(
            f"a component of `objective` asks for the column `{name}`, which answers do not have here; expected "
            f"{', '.join(known)}.{nearest(name, alike)} Choose another component."
        )


def batch_tokens(
    batch: Rollouts,
    scores: TokenScores,
    value: Tensor | None,
    *,
    iteration: int,
    first: bool,
    real: bool,
    demonstrations: bool,
    columns: Collection[str] = (),
    uniform: tuple[int, int] | None = None,
) -> Tokens:
    """The tokens of B answers, padded to (B, T).

    Their advantage stands in the store (:mod:`offpolicy.language.rl.advantages`): one number for all tokens of an
    answer, or from a critic one for each token.

    Args:
        batch: the answers.
        scores: of the policy, which has the gradient.
        value: what the critic says before each token, (n,); None without a critic.
        iteration: k.
        first: whether this is the first step of the iteration, so that the policy is still π_k.
        real: false where the batch only fills up; then all of it is padding.
        demonstrations: whether some tokens may be of demonstrations.
        columns: of the store that the objective asks for, see :func:`check_columns`.
        uniform: seed and step, of which the random numbers of the tokens are a function; None for none.
    """
    device, length = scores.logps.device, batch.answer.length
    size, width = len(length), int(length.max())
    owner, column = spread(length)
    place = send(owner * width + column, device)

    def padded(flat: Tensor) -> Tensor:
        return flat.new_zeros(size * width).index_put((place,), flat).view(size, width)

    steps = {name: padded(send(values.to(scores.logps.dtype), device)) for name, values in batch.steps.items()}
    facts = {name: send(values, device) for name, values in batch.facts.items()}
    said = steps["turn"] >= 0 if "turn" in steps else True  # the rest is what the policy was told between two turns
    mask, whole = padded(torch.full_like(scores.logps, float(real)).detach()), None
    if "window" in steps:
        said = steps["window"] == facts["windows"][:, None] - 1
        whole = mask * ~facts["unfinished"][:, None]
    external = torch.arange(width, device=device) < facts["given"][:, None]
    advantage = steps["advantage"] if "advantage" in steps else facts["advantage"].to(scores.logps)
    behavior, previous, logp = steps["logp"], steps["previous_logp"], padded(scores.logps)
    if first:  # the policy still is π_k, whose log-probabilities nobody may have asked for before
        behavior = torch.where(behavior.isnan() & ~external, logp.detach(), behavior)
        previous = torch.where(previous.isnan(), logp.detach(), previous)

    def asked(name: str) -> Tensor:
        if name == "length":
            return send(length, device)
        if name in facts:
            return facts[name]
        if name == "token":
            return padded(send(batch.answer.token, device) + 1) - 1  # −1 outside of the answer
        ids = padded(send(batch.steps[name], device).long() + 1) - 1 if name in batch.steps else None
        if ids is None:  # an answer of one turn
            return padded(torch.ones_like(scores.logps, dtype=torch.int64)) - 1
        return ids

    of_places = ("top_logp", "nucleus_entropy", "shift", "shift_variance")
    vocabulary: dict[str, Any] = {name: getattr(scores, name) for name in of_places}
    if "previous_mean_logp" in steps and scores.mean_logp is not None:
        vocabulary["mean_log_ratio"] = scores.mean_logp - send(batch.steps["previous_mean_logp"], device)
    known: dict[str, Any] = {name: padded(values) for name, values in vocabulary.items() if values is not None}
    known |= {} if value is None else {"value": padded(value)}
    known |= {f"{name}_kl": padded(apart) for name, apart in scores.divergence.items()}
    known |= {name: steps[name] for name in ("old_value", "returns") if name in steps}
    return Tokens(
        logp=logp,
        mask=mask * said,
        whole_mask=whole,
        advantage=advantage,
        behavior_logp=behavior,
        previous_logp=previous,
        base_logp=steps.get("base_logp"),
        sampler_logp=torch.where(steps["sampler_logp"].isnan(), behavior.detach(), steps["sampler_logp"]),
        external=external if demonstrations else None,
        entropy=None if scores.entropy is None else padded(scores.entropy),
        lag=iteration - facts["policy_version"],
        columns={name: asked(name) for name in columns} if columns else None,
        uniform=None if uniform is None else send(numbers(*uniform, batch.row, width), device).to(logp.dtype),
        **known,
    )


def numbers(seed: int, step: int, row: Tensor, width: int) -> Tensor:
    """Numbers in [0, 1) of answers (B,) and places, (B, width) float64, whatever micro-batch an answer is in."""
    key = sampling.keys(seed, "objective", torch.tensor([step], device="cpu"))[0]
    place = row[:, None] * 2**32 + torch.arange(width, device="cpu")
    return sampling.unit(sampling.bits(key, place)).clamp(max=1.0 - 2.0**-24)  # below 1 in float32 too
