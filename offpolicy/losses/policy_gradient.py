"""One objective for policy gradients of language models, composed of named parts.

loss = −Agg[w · S(ρ, A)] + Σ Agg[anchor] + Agg[entropy term] + Agg[value term]

with importance ratios ρ, advantages A, the surrogate S of a trust region, weights w and a mean Agg over the tokens of
the step. Each part is a component in a slot: a name, or ``{"name": …, **parameters}``, where the name may be an import
path ``package.module.callable`` of one's own. A callable that is a class is made with the parameters; a function gets
them at every call. Tensors are (B, T) unless said otherwise.

===============  =======================================================================================================
``advantage``    (rewards (B,), group (B,), own (B,) bool) → (B,)
``ratio``        (tokens) → :class:`Ratio`
``trust``        (ratio, advantage, tokens) → :class:`Surrogate`; demonstrations always have ρA
``aggregation``  (values, mask, totals) → 0-d, the micro-batch's share
``anchors``      any number of (tokens, *, iteration) → penalty per token, its coefficient included
``entropy``      as an anchor
``weight``       any number of (tokens) → factor per token, without gradient
``value``        as an anchor
===============  =======================================================================================================

Anchors, ``entropy`` and ``value`` also take ``aggregation``, for a mean of their own. A component says which optional
fields of :class:`Tokens` it needs in an attribute ``reads``, a set of names. One that remembers something from call to
call has ``state_dict()`` and ``load_state_dict(state)``, so that a resumed run goes on with it. A component is given
one micro-batch of one process; one whose values for an answer depend on the other answers is refused where a step has
several (:mod:`offpolicy.losses.parts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offpolicy.errors import UsageError
from offpolicy.losses import advantages as adv
from offpolicy.losses.health import measure
from offpolicy.losses.parts import OwnParts
from offpolicy.losses.policy import anchors, means, ratios, trust, weights
from offpolicy.losses.tokens import Ratio, Surrogate, Tokens, Totals, per_token
from offpolicy.registry import Spec, make

__all__ = ["COMPONENTS", "Objective", "Ratio", "Spec", "Surrogate", "Tokens", "Totals"]

COMPONENTS: dict[str, dict[str, Callable[..., Any]]] = {
    "advantage": {
        "grpo": adv.GRPO,
        "dr_grpo": adv.DrGRPO,
        "rloo": adv.RLOO,
        "batch_std": adv.BatchStd,
        "gae": adv.GAE,
    },
    "ratio": {
        "token": ratios.TokenRatio,
        "decoupled": ratios.DecoupledRatio,
        "mix": ratios.MixRatio,
        "sequence": ratios.SequenceRatio,
        "mis": ratios.MISRatio,
        "none": ratios.NoRatio,
    },
    "trust": {"ppo": trust.PPO, "dual": trust.DualPPO, "centred": trust.Centred, "none": trust.NoTrust},
    "aggregation": {
        "seq_mean_token_mean": means.SeqMeanTokenMean,
        "token_mean": means.StepTokenMean,
        "token_mean_local": means.TokenMeanLocal,
        "dr_grpo": means.DrGRPOSum,
        "sum_over_T": means.SumOverT,
        "seq_sum": means.SeqSum,
    },
    "anchors": {
        "k1": anchors.K1,
        "k2": anchors.K2,
        "k3": anchors.K3,
        "full": anchors.FullKL,
        "convex": anchors.ConvexKL,
    },
    "entropy": {"bonus": anchors.EntropyBonus},
    "weight": {
        "engine": weights.EngineWeight,
        "age": weights.AgeWeight,
        "focal": weights.FocalWeight,
        "source": weights.SourceWeight,
    },
    "value": {"squared": anchors.SquaredValue},
}
MANY = ("anchors", "weight")
OPTIONAL = ("entropy", "value")  # "none" leaves them out
MEANS_OF_THEIR_OWN = ("anchors", "entropy", "value")


class Term(NamedTuple):
    """A term of the loss beside the policy's: its values per token, and how they are averaged."""

    values: Callable[..., Tensor]
    aggregation: Callable[..., Tensor]


@dataclass(frozen=True)
class Objective:
    """A choice of one component per slot, of any number for ``anchors`` and ``weight``; data, equal when they say the
    same.

    Args:
        advantage: grpo, dr_grpo, rloo, batch_std; gae, with a critic.
        ratio: token, decoupled, mix, sequence, mis, none.
        trust: ppo, dual, centred, none.
        aggregation: seq_mean_token_mean, token_mean, token_mean_local, dr_grpo, sum_over_T, seq_sum.
        anchors: k1, k2, k3, full, convex.
        entropy: bonus, none.
        weight: engine, age, focal, source.
        value: squared, none.

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

    @cached_property
    def _parts(self) -> dict[str, Any]:
        """Slot → component, or a list of components or terms."""
        parts: dict[str, Any] = {}
        for one in fields(self):
            slot, given = one.name, getattr(self, one.name)
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
    def own(self) -> OwnParts:
        """The parts that come from outside of this library."""
        named: dict[str, Any] = {}
        for slot, part in self._parts.items():
            for i, one in enumerate(part if isinstance(part, list) else [part]):
                name = f"{slot}/{i}" if slot in MANY else slot
                values, mean = one if isinstance(one, Term) else (one, None)
                named |= {name: values} | ({} if mean is None else {f"{name}/aggregation": mean})
        return OwnParts(named)

    @property
    def reads(self) -> frozenset[str]:
        """Optional fields of :class:`Tokens` that the components need, such as ``base_logp``."""
        found: Iterable[Any] = [
            *(term.values for term in self._terms()),
            *self._parts["weight"],
            self._parts["ratio"],
            self._parts["trust"],
        ]
        # a function with parameters is a partial, which does not show the attributes of the function
        return frozenset().union(*(getattr(getattr(part, "func", part), "reads", ()) for part in found))

    @property
    def uses_critic(self) -> bool:
        """Whether advantages come from a critic: :meth:`critic_advantages` in place of :meth:`advantages`."""
        return bool(getattr(self._parts["advantage"], "critic", False))

    @property
    def compares_answers(self) -> bool:
        """Whether advantages are 0 where a group has one answer."""
        return isinstance(self._parts["advantage"], adv.GroupAdvantage)

    @property
    def entropy_gradient(self) -> bool:
        """Whether ``Tokens.entropy`` needs a gradient."""
        return "entropy" in self.reads

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
        return self._parts["advantage"](rewards, group, own)

    def critic_advantages(self, rewards: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and returns, (B, T) each, without gradient.

        Args:
            rewards: of whole answers, (B,).
            value: of the critic before each token, (B, T).
            mask: (B, T), 1 on tokens of the answers.
        """
        if not self.uses_critic:
            raise UsageError("`advantage` needs no critic; expected 'gae'. Use `advantages`.")
        return self._parts["advantage"](rewards, value.detach(), mask)

    def loss(
        self, tokens: Tokens, totals: Totals, *, iteration: int, health: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the loss, 0-d, and sums for the health metrics.

        Shares add up over micro-batches and processes to the loss of the step. So do the sums, name → vector; of their
        totals :func:`offpolicy.losses.health.summarise` makes the metrics.

        Args:
            tokens: the micro-batch.
            totals: of the whole step.
            iteration: from 1, for schedules.
            health: False leaves the dict empty.
        """
        parts, advantage = self._parts, per_token(tokens.advantage)
        ratio = parts["ratio"](tokens)
        surrogate = parts["trust"](ratio, advantage, tokens)
        gain = surrogate.value
        if tokens.external is not None:  # demonstrations are never clipped
            gain = torch.where(tokens.external, ratio.value * advantage, gain)
        for factor in (ratio.factor, *(weight(tokens) for weight in parts["weight"])):
            gain = gain if factor is None else gain * factor
        loss = parts["aggregation"](-gain, tokens.mask, totals)
        for term in self._terms():
            loss = loss + term.aggregation(term.values(tokens, iteration=iteration), tokens.mask, totals)
        return loss, measure(tokens, ratio, surrogate, -gain) if health else {}


def component(slot: str, spec: Spec) -> Any:
    """A component of a slot, ready to be called.

    Raises:
        UsageError: there is none of that name, or it does not take a parameter.
    """
    return make(slot, spec, COMPONENTS[slot], at_call=("iteration",))
