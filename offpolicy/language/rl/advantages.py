"""How the tokens of an iteration get their advantage.

From the rewards of a group, an answer gets one number when it is drawn. All of its tokens share this number, and it
stays with the answer as long as the answer is replayed. An answer that the advantage leaves out stays in the store and
in no step. From a critic, every token gets a number of its own, anew in
every iteration, as the critic learns. The formulas are in :mod:`offpolicy.losses.advantages`; a step takes what stands
in the store, see :mod:`offpolicy.language.rl.tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from offpolicy.data.replay import Replay
from offpolicy.data.texts.rollouts import OWN, newest_tokens
from offpolicy.data.texts.sequences import spans
from offpolicy.errors import UsageError
from offpolicy.language.rl.filtering import Filters
from offpolicy.losses.answers import Answers
from offpolicy.losses.policy_gradient import Objective

PART = "reward/"  # before the name of a reward in the store


def from_groups(
    objective: Objective, fresh: Replay, k: int, told: Mapping[str, np.ndarray], filters: Filters
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The advantage of each of the new answers of an iteration, and which are left out of every step; (E,) each.

    And for the metrics, how many each filter leaves out.

    Args:
        objective: with an advantage from groups.
        fresh: the new answers, whole groups of all processes.
        k: the iteration.
        told: what the advantage reads of ``OF_POLICY``, by name, (E,) each.
        filters: that look at the answers once they have advantages.

    Raises:
        UsageError: the advantage gave something else.
    """
    facts = {name: torch.from_numpy(values) for name, values in fresh.episodes.items()}
    answers = Answers(
        reward=facts["reward"],
        group=facts["group"],
        own=facts["source"] == OWN,
        length=torch.from_numpy(fresh.length),
        ended=facts["ended"],
        prompt=facts["prompt"],
        parts={name.removeprefix(PART): v.double() for name, v in facts.items() if name.startswith(PART)},
        iteration=k,
        **{name: torch.from_numpy(values) for name, values in told.items()},
    )
    judged = objective.judged(answers)
    kept, said = filters.kept(answers, judged.advantage)
    found = {"advantage": judged.advantage}
    found |= {"left_out": ~(judged.kept & kept)} if objective.takes_answers or filters.masks else {}
    found |= {} if judged.weight is None else {"weight": judged.weight}
    for name, values in found.items():
        if values.shape != answers.reward.shape:
            raise UsageError(
                f"the advantage of `objective` gave `{name}` of shape {tuple(values.shape)} for {len(answers.reward)} "
                "answers; expected one for each answer."
            )
    return {name: values.numpy() for name, values in found.items()}, said


def left_out_facts(fresh: Replay) -> dict[str, float]:
    """The share of the new answers that the advantage leaves out, for the metrics, where it may leave some out."""
    found = fresh.episodes.get("left_out")
    return {} if found is None else {"answers/left_out": float(found.mean())}


def from_critic(objective: Objective, store: Replay, rows: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    """The columns ``advantage`` and ``returns`` of the tokens of these answers, stale ones too.

    Args:
        objective: with a critic.
        store: of the answers.
        rows: of the store, ascending, (m,).
        values: of the critic as it is now before each token of these answers, end to end.
    """
    length = torch.from_numpy(store.length[rows])
    mask = torch.arange(int(length.max()), device="cpu") < length[:, None]
    value = torch.zeros(mask.shape, dtype=torch.from_numpy(values).dtype, device="cpu")
    value[mask] = torch.from_numpy(values)
    rewards = torch.from_numpy(store.episodes["reward"][rows]).to(value)
    ended = torch.from_numpy(store.episodes["ended"][rows])
    learned = torch.zeros_like(value)
    learned[mask] = torch.from_numpy(newest_tokens(store)[spans(store, rows)]).to(value)
    found = objective.critic_advantages(rewards, value, mask.to(value), ended, learned)
    return {name: part[mask].numpy() for name, part in zip(("advantage", "returns"), found)}
