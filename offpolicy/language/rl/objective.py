"""The objective of a method that learns from its own answers; a part that the user names replaces the method's."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from offpolicy.errors import UsageError, nearest
from offpolicy.language.rl.trial import wants_trial
from offpolicy.losses.answers import OF_POLICY
from offpolicy.losses.policy_gradient import COMPONENTS, Objective
from offpolicy.losses.tokens import Tokens
from offpolicy.trust import names_in, speaking, trusting

log = logging.getLogger(__name__)
OF_A_CRITIC = {"value", "old_value", "returns"}


def composed(parts: Mapping[str, Any], own: Mapping[str, Any], *, group_size: int, words: Any) -> Objective:
    """The objective of these parts; a part that the user names replaces the method's.

    Args:
        parts: slot → component of the method.
        own: slot → component that the user names.
        group_size: answers of a group.
        words: whose word the names in ``own`` are, see :mod:`offpolicy.trust`.

    Raises:
        UsageError: a slot or component is not known, or they do not go together.
    """
    for slot in own:
        if slot not in COMPONENTS:
            raise UsageError(
                f"`objective` has the slot '{slot}'; expected {', '.join(COMPONENTS)}.{nearest(slot, COMPONENTS)}"
            )
    with speaking(words), trusting(names=names_in(parts)):  # what the class itself names is its code
        found = Objective(**{**parts, **own})
    _check(found, group_size)
    return found


AGES = {  # name of the ratio → what it does with answers of an earlier policy
    "decoupled": "the ratio to the policy of now is clipped, and multiplied by the importance weight of the token{cap}",
    "mix": "the ratio to the policy that drew a token is clipped around that of the policy of now",
    "token": "the ratio is to the policy that drew a token",
    "mis": "the ratio is to the policy that drew a token",
    "sequence": "the ratio is to the policy of now{weight}",
    "none": "nothing",
}


def age_fact(objective: Objective) -> str:
    """What of an objective corrects for answers that are older than the policy."""

    def named(spec: Any) -> dict[str, Any]:
        return {"name": spec} if isinstance(spec, str) else dict(spec)

    ratio, weights = named(objective.ratio), [named(one)["name"] for one in objective.weight]
    text = AGES.get(ratio["name"], f"the ratio {ratio['name']}")
    cap, weight = ratio.get("cap"), ", times the importance weight of the answer" if "age" in weights else ""
    return "corrected: " + text.format(cap="" if cap is None else f", at most {cap:g}", weight=weight)


def objective_facts(objective: Objective, micro_batches: int, turns: int = 1) -> list[tuple[str, str]]:
    """The lines on what the parts of an objective ask for beyond their micro-batch.

    Args:
        objective: of the run.
        micro_batches: of a step, over all processes.
        turns: of an answer.
    """
    lines = []
    if objective.sees_step and micro_batches > 1:
        words = "a part asks for facts of the whole step: every micro-batch goes through the policy once more, first"
        lines.append(("step", words))
    if objective.reads_of_answers & OF_POLICY:
        lines.append(("answers", "the advantage asks what the policy thinks of them: all new ones are scored at once"))
    if wants_trial(objective):
        words = "a part asks how it would move the output layer: all of it goes through the policy once more, first, "
        lines.append(("step", words + "for the gradient of that layer"))
    if "turn" in objective.columns and turns == 1:
        lines.append(("turns", "answers have one turn each, so a part that looks at turns looks at whole answers"))
    return lines


def load_parts(objective: Objective, states: Sequence[Any] | None, rank: int) -> None:
    """Give the user's own parts of an objective their states back, and say which have none.

    Args:
        objective: of this process.
        states: of each process, as a checkpoint has them; None in checkpoints of version 0.1.
        rank: of this process.
    """
    states = states or [{}]
    without = objective.own.load_state_dict(states[rank if rank < len(states) else 0])
    if without:
        log.warning("The checkpoint has no state of the objective's %s, which begins anew.", ", ".join(without))


def _check(objective: Objective, group_size: int) -> None:
    unknown = objective.reads - set(Tokens._fields)
    if unknown:
        raise UsageError(
            f"a component of `objective` reads {', '.join(sorted(unknown))}; expected fields of the tokens: "
            f"{', '.join(Tokens._fields)}.{nearest(min(unknown), Tokens._fields)}"
        )
    if objective.reads & OF_A_CRITIC and not objective.uses_critic:
        raise UsageError(
            f"a component of `objective` reads {', '.join(sorted(objective.reads & OF_A_CRITIC))} of a critic, and the "
            "advantages come from none; expected 'gae' for `advantage`, or no such component."
        )
    if objective.compares_answers and group_size < 2:
        raise UsageError(
            "`group_size` is 1, and the advantage compares the answers of a group, so it would always be 0; "
            "expected ≥ 2. Pass --model.group_size 8."
        )
