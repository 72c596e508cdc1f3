"""One objective for policy gradients of language models, composed of named parts.

loss = −Agg[w · S(ρ, A)] + Σ Agg[anchor] + Agg[entropy term] + Agg[value term] + Σ term

with importance ratios ρ, advantages A, the surrogate S of a trust region, weights w and a mean Agg over the tokens of
the step. Each part is a component in a slot: a name, or ``{"name": …, **parameters}``, where the name may be an import
path ``package.module.callable`` of one's own. A callable that is a class is made with the parameters; a function gets
them at every call. Tensors are (B, T) unless said otherwise.

===============  =======================================================================================================
``advantage``    (rewards (B,), group (B,), own (B,) bool) → (B,); with ``takes_answers = True`` (:class:`Answers`) →
                 (B,) or :class:`Judged`
``ratio``        (tokens) → :class:`Ratio`
``trust``        (ratio, advantage, tokens) → :class:`Surrogate`; demonstrations always have ρA
``aggregation``  (values, mask, totals) → 0-d, the micro-batch's share
``anchors``      any number of (tokens, *, iteration) → penalty per token, its coefficient included
``entropy``      as an anchor
``weight``       any number of (tokens) → factor per token, without gradient
``value``        as an anchor
``terms``        any number of (tokens, totals, *, iteration) → 0-d, the micro-batch's share of a loss with its own mean
``lr``           (tokens of the whole step, *, iteration) → 0-d factor ≥ 0 on the learning rate of the step; 0 skips it
===============  =======================================================================================================

Anchors, ``entropy`` and ``value`` also take ``aggregation``, for a mean of their own. A component is given one
micro-batch of one process. What else it needs it says in attributes:

- ``reads``: names of optional fields of :class:`Tokens`; of an advantage, those of :class:`Answers` (``OF_POLICY`` in
  :mod:`offpolicy.losses.answers`), or with a critic ``ended`` and ``learned`` (:meth:`Objective.critic_advantages`).
  ``reads_values``: the same of fields that it wants without gradient.
- ``columns``: names of columns of the store, which :func:`offpolicy.losses.tokens.column` gives.
- ``whole_groups = True``: a micro-batch holds whole groups.
- ``step_facts(step)`` → name → (B, T), (B,) or 0-d: what it wants to know of all answers of the step. It is called once
  before the first gradient, with the detached tokens of all micro-batches and processes; at its call the component
  finds in ``tokens.step`` the rows of its micro-batch.
- ``check_answers(rewards, size)`` of an advantage: raises UsageError before training where it cannot do with rewards
  of these names, or with groups of this size.
- ``state_dict()`` and ``load_state_dict(state)``: what it remembers, so that a resumed run goes on with it. That may
  change in ``step_facts`` and in the call of an advantage alone, which every process makes alike.

One whose values for an answer depend on the other answers in another way is refused where a step has several
micro-batches (:mod:`offpolicy.losses.parts`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offpolicy.errors import UsageError, check_range
from offpolicy.losses import advantages as adv
from offpolicy.losses.answers import Answers, Judged
from offpolicy.losses.components import COMPONENTS
from offpolicy.losses.health import measure
from offpolicy.losses.parts import OwnParts, told
from offpolicy.losses.policy import means
from offpolicy.losses.tokens import Ratio, Surrogate, Tokens, Totals, detached, of_critic, per_token
from offpolicy.registry import Spec, make

__all__ = ["COMPONENTS", "Answers", "Judged", "Objective", "Ratio", "Spec", "Surrogate", "Tokens", "Totals"]

Facts = Mapping[str, Mapping[str, Tensor]]  # slot of a component → what it wanted to know of the step

MANY = ("anchors", "weight", "terms")
OPTIONAL = ("entropy", "value", "lr")  # "none" leaves them out
MEANS_OF_THEIR_OWN = ("anchors", "entropy", "value")


class Term(NamedTuple):
    """A term of the loss beside the policy's: its values per token, and how they are averaged."""

    values: Callable[..., Tensor]
    aggregation: Callable[..., Tensor]


@dataclass(frozen=True)
class Objective:
    """A choice of one component per slot, of any number for ``anchors``, ``weight`` and ``terms``; data, equal when
    they say the same. ``python -m offpolicy.fit --model.help objective`` lists all components.

    Args:
        advantage: grpo, dr_grpo, rloo, batch_std; gae, with a critic.
        ratio: token, decoupled, mix, sequence, mis, none.
        trust: ppo, dual, centred, none.
        aggregation: seq_mean_token_mean, token_mean, token_mean_local, dr_grpo, sum_over_T, seq_sum.
        anchors: k1, k2, k3, full, convex.
        entropy: bonus, none.
        weight: engine, age, focal, source.
        value: squared, none.
        terms: none of its own.
        lr: none.

    Raises:
        UsageError: a name, a parameter or a combination is not known.
    """

    advantage: Spec = "grpo"
    ratio: Spec = "token"
    trust: Spec = "ppo"
    aggregation: Spec = "seq_mean_token_mean"
    anchors: tuple[Spec, ...] = ()
    entropy: Spec = "none"
    weight: tuple[Spec, ...] = ()
    value: Spec = "none"
    terms: tuple[Spec, ...] = ()
    lr: Spec = "none"

    def __post_init__(self) -> None:
        for slot in MANY:
            given = getattr(self, slot)
            listed = () if given in ("none", None) else (given,) if isinstance(given, (str, Mapping)) else tuple(given)
            object.__setattr__(self, slot, listed)
        parts, _ = self._parts, self.own  # made here, so that what parts remember is known from their beginning
        mean = parts["aggregation"]
        if getattr(parts["ratio"], "counts_rows", False) and not isinstance(mean, means.SeqMeanTokenMean):
            raise UsageError(
                f"`ratio` gives one number per answer and `aggregation` is {self.aggregation!r}, by which long answers "
                "would count more often; expected 'seq_mean_token_mean'."
            )
        if self.uses_critic and not self._terms("value"):
            raise UsageError("`advantage` comes from a critic and `value` is 'none'; expected 'squared', to train it.")
        if self.uses_critic and self.whole_groups:
            raise UsageError(
                "`advantage` comes from a critic, whose answers stand alone, and another part compares the answers of "
                "a group; expected an advantage from groups, such as 'grpo', or no such part."
            )
        self._check_facts()

    def _check_facts(self) -> None:
        """Raise :class:`UsageError` for facts of the step that nobody could be given."""
        for name, part in self._named.items():
            if told(part, "step_facts") and (name == "advantage" or name.endswith("aggregation")):
                raise UsageError(
                    f"the part of `objective` in {name} has `step_facts`, and is not given the tokens of a step; "
                    "expected them of a ratio, a trust region, a weight, a term, an anchor or an entropy term."
                )
        if len(self._nuclei) > 1:
            raise UsageError(
                f"parts of `objective` read `nucleus_entropy` of different shares, {sorted(self._nuclei)}; expected "
                "one `nucleus`, as it is computed once."
            )
        for share in self._nuclei:
            check_range("nucleus", share, 0.0, 1.0, lower_open=True)

    @cached_property
    def _parts(self) -> dict[str, Any]:
        """Slot → component, or a list of components or terms."""
        parts: dict[str, Any] = {}
        for one in fields(self):
            slot, given = one.name, getattr(self, one.name)
            if slot not in MANY and isinstance(given, list | tuple):
                raise UsageError(
                    f"`{slot}` is {list(given)!r}, several at once; expected one part, as each decides alone over the "
                    f"same tokens. Several may stand in {', '.join(MANY)}."
                )
            listed = given if slot in MANY else () if slot in OPTIONAL and given in ("none", None) else (given,)
            part = self._term if slot in MEANS_OF_THEIR_OWN else component
            made = [part(slot, spec) for spec in listed]
            parts[slot] = made if slot in (*MANY, *OPTIONAL) else made[0]
        return parts

    def _term(self, slot: str, spec: Spec) -> Term:
        given = {"name": spec} if isinstance(spec, str) else dict(spec)
        mean = given.pop("aggregation", self.aggregation)
        return Term(component(slot, given), component("aggregation", mean))

    def _terms(self, *slots: str) -> list[Term]:
        return [term for slot in slots or MEANS_OF_THEIR_OWN for term in self._parts[slot]]

    @cached_property
    def _named(self) -> dict[str, Any]:
        """``slot`` or ``slot/number`` → component; with ``/aggregation`` behind it, the mean of a term."""
        named: dict[str, Any] = {}
        for slot, part in self._parts.items():
            for i, one in enumerate(part if isinstance(part, list) else [part]):
                name = f"{slot}/{i}" if slot in MANY else slot
                values, mean = one if isinstance(one, Term) else (one, None)
                named |= {name: values} | ({} if mean is None else {f"{name}/aggregation": mean})
        return named

    @cached_property
    def own(self) -> OwnParts:
        """What is asked of parts that come from outside of this library, and what all parts remember."""
        return OwnParts(self._named)

    # -- what the components need --------------------------------------------------------------------------------------

    def _told(self, attribute: str, *, of_tokens: bool = True) -> frozenset[str]:
        """The names in an attribute of the components; of those that see tokens, or of the advantage."""
        found = [part for name, part in self._named.items() if (name != "advantage") == of_tokens]
        return frozenset().union(*(told(part, attribute) or () for part in found))

    @property
    def reads(self) -> frozenset[str]:
        """Optional fields of :class:`Tokens` that the components need, such as ``base_logp``."""
        return self._told("reads") | self._told("reads_values")

    @property
    def reads_of_answers(self) -> frozenset[str]:
        """Optional fields of :class:`Answers` that the advantage needs."""
        return self._told("reads", of_tokens=False)

    @property
    def gives(self) -> frozenset[str]:
        """Columns that the advantage gives the other components, such as ``weight``."""
        return self._told("gives", of_tokens=False)

    @property
    def columns(self) -> frozenset[str]:
        """Columns of the store that the components need on tokens."""
        return self._told("columns")

    @property
    def of_demonstrations(self) -> frozenset[str]:
        """Columns of demonstrations without which a component would say nothing."""
        return self._told("of_demonstrations")

    @property
    def whole_groups(self) -> bool:
        """Whether a micro-batch must hold whole groups."""
        return any(told(part, "whole_groups") for part in self._named.values())

    @property
    def sees_step(self) -> bool:
        """Whether something must be known of all answers of a step before its first gradient."""
        return any(told(part, "step_facts") for part in self._named.values()) or bool(self._parts["lr"])

    @property
    def _nuclei(self) -> set[float]:
        parts = [part for part in self._named.values() if "nucleus_entropy" in (told(part, "reads") or ())]
        return {float(told(part, "nucleus") or 0.0) for part in parts}

    @property
    def nucleus(self) -> float | None:
        """The share of ``nucleus_entropy``; None where nobody reads it."""
        return next(iter(self._nuclei), None)

    @property
    def uses_critic(self) -> bool:
        """Whether advantages come from a critic: :meth:`critic_advantages` in place of :meth:`advantages`."""
        return bool(told(self._parts["advantage"], "critic"))

    @property
    def takes_answers(self) -> bool:
        """Whether the advantage sees the record of the answers: :meth:`judged` in place of :meth:`advantages`."""
        return bool(told(self._parts["advantage"], "takes_answers"))

    @property
    def compares_answers(self) -> bool:
        """Whether advantages are 0 where a group has one answer."""
        return isinstance(self._parts["advantage"], adv.GroupAdvantage)

    @property
    def entropy_gradient(self) -> bool:
        """Whether ``Tokens.entropy`` needs a gradient."""
        return "entropy" in self._told("reads")

    # -- what they say -------------------------------------------------------------------------------------------------

    def advantages(self, rewards: Tensor, group: Tensor, own: Tensor) -> Tensor:
        """Advantages (B,) of answers, without gradient.

        Over whole groups, once per rollout batch, over the rows of all processes.

        Args:
            rewards: (B,).
            group: (B,) int64, answers with equal numbers belong together.
            own: (B,) bool, false for demonstrations.
        """
        if self.uses_critic:
            raise UsageError("`advantage` comes from a critic; expected values of tokens. Use `critic_advantages`.")
        if self.takes_answers:
            raise UsageError("`advantage` sees more of the answers than rewards. Use `judged`.")
        return self._parts["advantage"](rewards, group, own)

    def check_answers(self, rewards: Collection[str], size: int) -> None:
        """Raise :class:`UsageError` where the advantage cannot do with these rewards, or groups of this size."""
        check = told(self._parts["advantage"], "check_answers")
        if check:
            check(rewards, size)

    def judged(self, answers: Answers) -> Judged:
        """Advantages of answers, without gradient, and which of the answers count; as :meth:`advantages`."""
        if not self.takes_answers:
            found = self.advantages(answers.reward, answers.group, answers.own)
        else:
            found = self._parts["advantage"](answers)
        return found if isinstance(found, Judged) else Judged(found, torch.ones_like(answers.own))

    def critic_advantages(
        self,
        rewards: Tensor,
        value: Tensor,
        mask: Tensor,
        ended: Tensor | None = None,
        learned: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Advantages and returns, (B, T) each, without gradient.

        Args:
            rewards: of whole answers, (B,).
            value: of the critic before each token, (B, T).
            mask: (B, T), 1 on tokens of the answers.
            ended: (B,) bool, false for answers that were cut; for components that list it in ``reads``. None for all.
            learned: (B, T), 1 on the tokens that the policy learns from, likewise. None for the mask.
        """
        if not self.uses_critic:
            raise UsageError("`advantage` needs no critic; expected 'gae'. Use `advantages`.")
        known = {
            "ended": torch.ones_like(rewards, dtype=torch.bool) if ended is None else ended,
            "learned": mask if learned is None else learned,
        }
        said = {name: known[name] for name in known if name in self.reads_of_answers}
        return self._parts["advantage"](rewards, value.detach(), mask, **said)

    def step_facts(self, step: Tokens) -> Facts:
        """What the components want to know of a step: name of the slot → name → (B, T), (B,) or 0-d.

        Args:
            step: the tokens of all answers of the step, in its order.
        """
        asked = {name: told(part, "step_facts") for name, part in self._named.items()}
        whole = detached(step)
        return {name: find(whole) for name, find in asked.items() if find}

    def rate_factor(self, step: Tokens, *, iteration: int) -> Tensor | None:
        """The factor ≥ 0 on the learning rate of a step, 0-d; None where no component has a say.

        Args:
            step: as of :meth:`step_facts`.
            iteration: from 1.
        """
        whole = detached(step)
        return next((factor(whole, iteration=iteration) for factor in self._parts["lr"]), None)

    def loss(
        self,
        tokens: Tokens,
        totals: Totals,
        *,
        iteration: int,
        health: bool = True,
        facts: Facts | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the loss, 0-d, and sums for the health metrics.

        Shares add up over micro-batches and processes to the loss of the step. So do the sums, name → vector; of their
        totals :func:`offpolicy.losses.health.summarise` makes the metrics.

        Args:
            tokens: the micro-batch.
            totals: of the whole step.
            iteration: from 1, for schedules.
            health: False leaves the dict empty.
            facts: of the whole step, by :meth:`step_facts`, the rows of this micro-batch; None where it is the step.
        """
        facts = self.step_facts(tokens) if facts is None else facts
        parts, advantage = self._parts, per_token(tokens.advantage)

        def seen(name: str, of: Tokens = tokens) -> Tokens:
            return self._seen(name, of, facts)

        ratio = parts["ratio"](seen("ratio"))
        surrogate = parts["trust"](ratio, advantage, seen("trust"))
        gain = surrogate.value
        if tokens.external is not None:  # demonstrations are never clipped
            gain = torch.where(tokens.external, ratio.value * advantage, gain)
        factors = (weight(seen(f"weight/{i}")) for i, weight in enumerate(parts["weight"]))
        for factor in (ratio.factor, *factors):
            gain = gain if factor is None else gain * factor
        loss = parts["aggregation"](-gain, tokens.mask, totals)
        for slot in MEANS_OF_THEIR_OWN:
            of, counted = of_critic(tokens, totals) if slot == "value" else (tokens, totals)
            for i, term in enumerate(parts[slot]):
                values = term.values(seen(f"{slot}/{i}" if slot in MANY else slot, of), iteration=iteration)
                loss = loss + term.aggregation(values, of.mask, counted)
        for i, share in enumerate(parts["terms"]):
            loss = loss + share(seen(f"terms/{i}"), totals, iteration=iteration)
        return loss, measure(tokens, ratio, surrogate, -gain) if health else {}

    def _seen(self, name: str, tokens: Tokens, facts: Facts) -> Tokens:
        """The tokens as a component sees them: with its own facts, and without gradients that it does not want."""
        part = self._named[name]
        values = frozenset(told(part, "reads_values") or ()) - frozenset(told(part, "reads") or ())
        found: dict[str, Any] = {field: v.detach() for field in values if (v := getattr(tokens, field)) is not None}
        if name in facts:
            found["step"] = facts[name]
        return tokens._replace(**found) if found else tokens


def component(slot: str, spec: Spec) -> Any:
    """A component of a slot, ready to be called.

    Raises:
        UsageError: there is none of that name, or it does not take a parameter.
    """
    return make(slot, spec, COMPONENTS[slot], at_call=("iteration",))
