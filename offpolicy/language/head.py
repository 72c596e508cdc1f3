"""The last layer of a language model, applied to the places that are scored.

The logits of a whole row would take more memory than the model, so the output layer is applied to scored places only,
tile by tile. Whether that gives the model's own numbers is tried in :mod:`offpolicy.language.head_checks`; the scores
of answers are in :mod:`offpolicy.language.answer_scores`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from offpolicy.errors import UsageError
from offpolicy.language.attention import attention_inputs
from offpolicy.language.last_layer import gradient_norms, policy_shift
from offpolicy.language.layout import Layout
from offpolicy.language.logprobs import plain_logits, token_divergence, token_logps
from offpolicy.language.nucleus import nucleus_entropy
from offpolicy.language.reading import taken
from offpolicy.moved import names_of

# entries under which models say how their logits are capped
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class FinalStates(NamedTuple):
    """What the last layer of a policy makes the probabilities of n places from, without gradient.

    Attributes:
        hidden: states before the output layer, (n, D).
        weight: of the output layer, (V, D).
        bias: of the output layer, (V,), or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class Route(NamedTuple):
    """How the states before the output layer are got: from the ``decoder``, or at the entrance of the output layer in a
    pass of the whole model. And whether the model is told ``positions``."""

    decoder: bool
    positions: bool


ROUTES = (Route(True, True), Route(False, True), Route(True, False), Route(False, False))
routes: WeakKeyDictionary[nn.Module, Route] = WeakKeyDictionary()


def output_weight(model: nn.Module) -> Tensor:
    """The weight of the output layer, (V, D)."""
    return Head(model).weight


class Head:
    """The last part of a causal language model: decoder, output weight, and what its logits are multiplied with.

    Raises:
        UsageError: the output layer is no plain linear one.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(getattr(c, "is_prompt_learning", False) for c in getattr(model, "peft_config", {}).values()):
            raise UsageError(
                "the adapter is one of learned prompts; expected LoRA or another adapter of layers, since prompts of "
                "its own would not be seen here. Use a LoRA adapter."
            )
        whole: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self.whole, self.layer = whole, whole.get_output_embeddings()
        head = self.layer
        if hasattr(head, "modules_to_save"):  # peft trains a copy; with adapters off the original counts
            off = head.disable_adapters or not head.active_adapters
            head = head.original_module if off else head.modules_to_save[head.active_adapters[0]]
        if "Trainable" in type(head).__name__:
            raise UsageError(
                "the adapter trains single tokens (trainable_token_indices) of embeddings that are the output layer "
                "too; expected embeddings of their own, or modules_to_save. Train an adapter with modules_to_save."
            )
        if hasattr(head, "base_layer"):
            raise UsageError(
                "the output layer (lm_head) carries an adapter; expected a plain layer, since log-probabilities are "
                "computed from its weight. Leave it out of `--model.lora_targets`, the target_modules of an adapter."
            )
        if not isinstance(head, nn.Linear):
            raise UsageError(
                f"the output layer of {type(whole).__name__} is {type(head).__name__}; expected torch.nn.Linear. Use a "
                "causal language model with a linear head."
            )
        self.route = routes.get(whole, ROUTES[0])
        self.weight, self.bias = head.weight, head.bias
        self.config = config = whole.config.get_text_config()
        self.softcap = next((c for c in (getattr(config, name, None) for name in SOFTCAPS) if c), None)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
        self.scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)  # Falcon-H1
        if scaling := getattr(config, "logits_scaling", None):  # Granite and others divide
            self.scale *= scaling if config.model_type == "hyperclovax" else 1 / scaling

    @property
    def decoder(self) -> nn.Module:
        return self.whole.get_decoder()

    def states(self, ids: Tensor, position: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """What enters the output layer at every place, (R, T, D); ``inputs`` as of :func:`attention_inputs`."""
        wanted = {**inputs, "position_ids": position if self.route.positions else None}
        if self.route.decoder:
            decoder = self.decoder
            return decoder(input_ids=ids, use_cache=False, **taken(decoder, wanted)).last_hidden_state
        seen: list[Tensor] = []

        def look(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(inputs[0])
            return inputs[0][:, :1], *inputs[1:]  # logits of one place, which nobody reads

        hook = self.layer.register_forward_pre_hook(look)
        try:
            self.whole(input_ids=ids, **taken(self.whole, {**wanted, "use_cache": False}))
        finally:
            hook.remove()
        return seen[0]

    def logps(
        self,
        hidden: Tensor,
        target: Tensor,
        chunk: int = 256,
        stats: bool = False,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> Any:
        """`token_logps` under this head."""
        return token_logps(
            hidden,
            self.weight,
            target,
            bias=self.bias,
            softcap=self.softcap,
            scale=self.scale,
            temperature=temperature,
            chunk=chunk,
            stats=stats,
            entropy=entropy,
        )

    def gradient_norms(self, hidden: Tensor, layout: Layout, chunk: int = 256, temperature: float = 1.0) -> Tensor:
        """Norms of the gradients of the answers of a layout by the weight of this head, (A,)."""
        return gradient_norms(
            hidden.detach(),
            self.weight.detach(),
            layout.target,
            layout.length,
            bias=self.bias,
            softcap=self.softcap,
            scale=self.scale,
            temperature=temperature,
            chunk=chunk,
        )

    def shift(
        self, hidden: Tensor, target: Tensor, move: Tensor, chunk: int = 256, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """`policy_shift` of this head, (n,) each."""
        return policy_shift(
            hidden.detach(),
            self.weight.detach(),
            move,
            target,
            bias=self.bias,
            softcap=self.softcap,
            scale=self.scale,
            temperature=temperature,
            chunk=chunk,
        )

    def nucleus_entropy(self, hidden: Tensor, share: float, chunk: int = 256, temperature: float = 1.0) -> Tensor:
        """:func:`offpolicy.language.nucleus.nucleus_entropy` under this head."""
        return nucleus_entropy(
            hidden,
            self.weight,
            share,
            bias=self.bias,
            softcap=self.softcap,
            scale=self.scale,
            temperature=temperature,
            chunk=chunk,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of n places over the whole vocabulary, (n, V), as many at once."""
        return plain_logits(hidden, self.weight, self.bias, softcap=self.softcap, scale=self.scale)

    def divergence(self, hidden: Tensor, other: FinalStates, chunk: int = 256, temperature: float = 1.0) -> Tensor:
        """`token_divergence` of this head from another of the same kind."""
        return token_divergence(
            hidden,
            self.weight,
            other.hidden,
            other.weight,
            bias=self.bias,
            other_bias=other.bias,
            softcap=self.softcap,
            scale=self.scale,
            temperature=temperature,
            chunk=chunk,
        )


def hidden_states(head: Head, layout: Layout) -> Tensor:
    """The states that predict the scored tokens, (n, D)."""
    inputs = attention_inputs(layout, head.config, head.weight.dtype)
    return head.states(layout.input_ids, layout.position_ids, inputs).flatten(0, 1).index_select(0, layout.predict)


def answer_sums(values: Tensor, layout: Layout) -> Tensor:
    """Sum over the tokens of each answer, (A,) float32; float64 stays. In a fixed order, on any device."""
    # unsafe: the layout's lengths need no check, for which the host would wait for a GPU
    sums = torch.segment_reduce(values.double(), "sum", lengths=layout.length, unsafe=True, initial=0.0)
    return sums.to(values.dtype)


__getattr__ = names_of("offpolicy.language.head")  # the names that stood here in version 0.1
