"""What is known of a published variant of the policy-gradient objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from offpolicy.registry import Spec


@dataclass(frozen=True)
class Variant:
    """A published method as a choice of parts, and how far it is known.

    Attributes:
        name: what ``--model.variant`` takes, in lower case.
        title: as in the paper.
        paper: its arXiv number, or where it was published.
        formula: what differs from GRPO, in one line.
        parts: slot → component with the published defaults, see :mod:`offpolicy.losses.policy_gradient`.
        options: options of :class:`offpolicy.RolloutModule` and their published values; they hold where a user leaves
            the default.
        method: the method of its own where a choice of parts is not enough, such as "HPT"; empty for GRPO's option.
        differs: where paper and code differ, and which is the default here; empty where they agree or no code is known.
        unverified: what of it was not checked against the paper or its code.
        tested: against what: "hand" for known answers by the formula, "code" for the authors' code.
        off_policy: "yes", or why answers of earlier policies do not fit.
        needs: "", "critic", "base", "demonstrations", "vocabulary", joined by commas.
    """

    name: str
    title: str
    paper: str
    formula: str
    parts: Mapping[str, Spec | tuple[Spec, ...]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    method: str = ""
    differs: str = ""
    unverified: str = ""
    tested: str = "hand"
    off_policy: str = "yes"
    needs: str = ""
