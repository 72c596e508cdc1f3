"""The last layer of a language model: the score of each answer of a layout, and whether a model can be scored so.

The logits of a whole row would take more memory than the model, so the output layer is applied to scored places only,
tile by tile. Whether that gives the model's own numbers is tried on a few tokens before anything is learned from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from offpolicy.data.texts.sequences import Pairs, Ragged, Singles
from offpolicy.errors import UsageError
from offpolicy.language.attention import attention_inputs, shares_prompt, take_packed
from offpolicy.language.last_layer import gradient_norms, policy_shift
from offpolicy.language.layout import Layout, pair_layout, single_layout
from offpolicy.language.logprobs import plain_logits, token_divergence, token_logps
from offpolicy.language.nucleus import nucleus_entropy
from offpolicy.language.reading import call, in_eval, taken

# entries under which models say how their logits are capped
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class Answers(NamedTuple):
    """Scores of A answers: ``sum_logps (A,)`` nats, ``length (A,)`` scored tokens, both float32; ``stats``: sums over
    the tokens of each answer by name, each (A,), without gradient; ``sum_values (A,)``: of a value per token."""

    sum_logps: Tensor
    length: Tensor
    stats: dict[str, Tensor]
    sum_values: Tensor | None = None


# head, states (n, D), targets (n,), their log-probabilities (n,) → a value of each, (n,)
TokenValue = Callable[["Head", Tensor, Tensor, Tensor], Tensor]


def score(
    model: nn.Module, layout: Layout, *, chunk: int = 256, stats: bool = False, value: TokenValue | None = None
) -> Answers:
    """Log-probability of every answer under a causal language model, differentiable in its parameters.

    The head is applied to scored positions only, in tiles (`token_logps`).

    Args:
        model: a causal language model of `transformers`, or one wrapped by `peft`, or sharded by FSDP2.
        layout: the rows, on the model's device.
        chunk: at most ``chunk * V`` logits exist at a time.
        stats: also sum ``logits``, ``entropy`` and ``hits`` (see `token_logps`) over each answer.
        value: also sum this value of every scored token over each answer.

    Raises:
        UsageError: `token_logps` cannot compute the model's head.
    """
    return _in_forward(_score, model, layout, chunk, stats, value)


def _in_forward(call: Callable[..., Any], model: nn.Module, layout: Layout, *args: Any) -> Any:
    """``call(model, layout, …)``; of a model sharded by FSDP2, whose parameters are whole only inside its forward
    hooks, as if it were its forward pass."""
    if not hasattr(model, "set_requires_gradient_sync"):
        _check_exact(model, layout)
        return call(model, layout, *args)
    from torch.distributed.fsdp import register_fsdp_forward_method

    name = f"_fsdp{call.__name__}"
    if not hasattr(model, name):
        setattr(model, name, partial(call, model))
        register_fsdp_forward_method(model, name)
    return getattr(model, name)(layout, *args)


def _check_exact(model: nn.Module, layout: Layout) -> None:
    """Raise :class:`UsageError` where a model gives other numbers in this layout."""
    check_head(model)
    if layout.shared:
        check_shared(model)
    if layout.packed:
        check_packed(model)


def _score(model: nn.Module, layout: Layout, chunk: int, stats: bool, value: TokenValue | None = None) -> Answers:
    head = Head(model)
    hidden = _hidden(head, layout)
    found = head.logps(hidden, layout.target, chunk, stats)
    logps, facts = found if stats else (found, {})
    return Answers(
        _per_answer(logps, layout),
        layout.length.float(),
        {k: _per_answer(v, layout) for k, v in facts.items()},
        None if value is None else _per_answer(value(head, hidden, layout.target, logps), layout),
    )


def _hidden(head: Head, layout: Layout) -> Tensor:
    """The states that predict the scored tokens, (n, D)."""
    inputs = attention_inputs(layout, head.config, head.weight.dtype)
    return head.states(layout.input_ids, layout.position_ids, inputs).flatten(0, 1).index_select(0, layout.predict)


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


@torch.no_grad()
def final_states(model: nn.Module, layout: Layout) -> FinalStates:
    """The states that predict the scored tokens of a layout under the present weights, for a later comparison."""
    return _in_forward(_final_states, model, layout)


def _final_states(model: nn.Module, layout: Layout) -> FinalStates:
    head = Head(model)
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2 takes the memory back
        weight, bias = weight.clone(), None if bias is None else bias.clone()
    return FinalStates(_hidden(head, layout), weight, bias)


class TokenScores(NamedTuple):
    """Scores of the n scored tokens of a layout, in its order.

    Attributes:
        logps: log-probabilities, nats, (n,).
        entropy: of the policy at each place, nats, (n,); None unless asked for.
        hidden: the states that predict the tokens, (n, D).
        divergence: KL(policy ‖ other) at each place, nats, (n,), by the name of the other; with gradient.
        top_logp: log-probability of the likeliest token, (n,), without gradient; None unless asked for.
        mean_logp: mean log-probability over the vocabulary, (n,), likewise.
        nucleus_entropy: of the likeliest tokens of a share, (n,), with gradient; None unless asked for.
        shift: what a move of the output layer does to the log-probabilities to first order, (n,), without gradient;
            None unless asked for.
        shift_variance: twice the divergence that it makes at each place to second order, (n,), likewise.
        head_norm: norm of the gradient of each answer's log-probability by the output layer, (A,), without gradient;
            None unless asked for.
    """

    logps: Tensor
    entropy: Tensor | None
    hidden: Tensor
    divergence: dict[str, Tensor]
    top_logp: Tensor | None = None
    mean_logp: Tensor | None = None
    nucleus_entropy: Tensor | None = None
    head_norm: Tensor | None = None
    shift: Tensor | None = None
    shift_variance: Tensor | None = None


def score_tokens(
    model: nn.Module,
    layout: Layout,
    *,
    chunk: int = 256,
    temperature: float = 1.0,
    entropy: bool = False,
    entropy_gradient: bool = False,
    others: Mapping[str, FinalStates] | None = None,
    vocabulary: bool = False,
    nucleus: float | None = None,
    norms: bool = False,
    move: Tensor | None = None,
) -> TokenScores:
    """Log-probability of every scored token at a temperature, differentiable in the model's parameters.

    Args:
        model: as in `score`.
        layout: the rows, on the model's device.
        chunk: as in `score`.
        temperature: τ > 0 that divides the logits.
        entropy: also give the entropy.
        entropy_gradient: give the entropy with its gradient.
        others: name → the policy to which the exact divergence is wanted, by `final_states` of the same layout.
        vocabulary: also give ``top_logp`` and ``mean_logp``.
        nucleus: also give the entropy of the likeliest tokens of this share.
        norms: also give ``head_norm``.
        move: of the output layer's weight, (V, D), by which ``shift`` and ``shift_variance`` are wanted.
    """
    given = (chunk, temperature, entropy, entropy_gradient, others or {}, vocabulary, nucleus, norms, move)
    return _in_forward(_score_tokens, model, layout, *given)


def _score_tokens(
    model: nn.Module,
    layout: Layout,
    chunk: int,
    temperature: float,
    entropy: bool,
    entropy_gradient: bool,
    others: Mapping[str, FinalStates],
    vocabulary: bool,
    nucleus: float | None,
    norms: bool,
    move: Tensor | None,
) -> TokenScores:
    head = Head(model)
    hidden = _hidden(head, layout)
    found = head.logps(
        hidden,
        layout.target,
        chunk,
        vocabulary or (entropy and not entropy_gradient),
        temperature=temperature,
        entropy=entropy_gradient,
    )
    logps, facts = found if isinstance(found, tuple) else (found, {})
    apart = {name: head.divergence(hidden, other, chunk, temperature) for name, other in others.items()}
    top, mean = (facts[name] if vocabulary else None for name in ("top_logp", "mean_logp"))
    few = None if nucleus is None else head.nucleus_entropy(hidden, nucleus, chunk, temperature)
    norm = head.gradient_norms(hidden, layout, chunk, temperature) if norms else None
    moved = (None, None) if move is None else head.shift(hidden, layout.target, move, chunk, temperature)
    return TokenScores(logps, facts.get("entropy"), hidden, apart, top, mean, few, norm, *moved)


class Route(NamedTuple):
    """How the states before the output layer are got: from the ``decoder``, or at the entrance of the output layer in a
    pass of the whole model. And whether the model is told ``positions``."""

    decoder: bool
    positions: bool


ROUTES = (Route(True, True), Route(False, True), Route(True, False), Route(False, False))
_routes: WeakKeyDictionary[nn.Module, Route] = WeakKeyDictionary()


def output_weight(model: nn.Module) -> Tensor:
    """The weight of the output layer, (V, D)."""
    return Head(model).weight


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The part of a model, without adapters, that gives the states before the output layer; None where no part does."""
    check_head(model)
    return Head(model).decoder if _routes.get(model, ROUTES[0]).decoder else None


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
        self.route = _routes.get(whole, ROUTES[0])
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


_checked: WeakSet[nn.Module] = WeakSet()
_shared: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # what is wrong with a shared prompt
_packed: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # what is wrong with packed rows


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare scores of a small padded batch with the model's own logits of each text alone, once per model.

    The states before the output layer are taken from the decoder. Where something else feeds the output layer, they are
    the layer's input in a pass of the whole model.

    Raises:
        UsageError: they differ both ways, or the model looks at tokens that follow.
    """
    if model in _checked:
        return
    head = Head(model)
    size, device = len(head.weight), head.weight.device
    text = torch.arange(3, 12, device="cpu") % size
    texts, length = [text, text[:5]], torch.tensor([9, 5], device="cpu")
    prompt = Ragged(torch.cat([t[:2] for t in texts]), torch.full_like(length, 2))
    rows = Singles(prompt, Ragged(torch.cat([t[2:] for t in texts]), length - 2), {}, torch.zeros_like(length))
    layout = single_layout(rows, 0).to(device)
    with in_eval(model):
        logps = [call(model, t[None].to(device), use_cache=False)[0][0].float().log_softmax(-1) for t in texts]
        tolerance = _tolerance(head.weight)
        if not torch.allclose(logps[0][:5].exp(), logps[1].exp(), atol=tolerance, rtol=0):
            raise UsageError(
                f"{type(head.whole).__name__} gives a token other probabilities once other tokens follow it; expected "
                "a model that looks back only. Use a decoder, or set is_decoder in its config.json."
            )
        expected = torch.cat([p[1:-1].gather(1, t[2:, None].to(device))[:, 0] for p, t in zip(logps, texts)])
        found: list[Any] = []
        for route in ROUTES:
            _routes[head.whole] = route
            try:
                head = Head(model)
                found.append(head.logps(_hidden(head, layout), layout.target).float())
            except Exception as error:  # a decoder of another kind: any error of the model
                found.append(error)
                continue
            if torch.allclose(found[-1], expected, atol=tolerance, rtol=tolerance):
                _checked.add(model)
                return
    del _routes[head.whole]
    numbers = [one for one in found if isinstance(one, Tensor)]
    if not numbers:
        raise UsageError(
            f"{type(head.whole).__name__} gives no states from which log-probabilities can be computed "
            f"({' '.join(str(found[0]).split())[:200]}). Use another model, or report it."
        )
    raise UsageError(
        f"{type(head.whole).__name__} changes its logits in a way that is not known here: log-probabilities from its "
        f"output layer are {numbers[0][:3].tolist()}, its own are {expected[:3].tolist()}. Use another model, or "
        "report it."
    )


def check_shared(model: nn.Module) -> None:
    """Compare the scores of one small pair with and without a shared prompt, once per model.

    Raises:
        UsageError: they differ, though `shares_prompt` may hold: attention or positions are of a kind not known here.
    """
    if fault := shared_fault(model):
        raise UsageError(
            f"{type(model).__name__} gives other log-probabilities when two answers share a prompt: {fault}. Pass "
            "`--model.shared_prompt=false`."
        )


def check_packed(model: nn.Module) -> None:
    """Compare the scores of a few small texts with and without padding, once per model.

    Raises:
        UsageError: they differ, though `packs_rows` may hold: attention or positions are of a kind not known here.
    """
    if fault := packed_fault(model):
        raise UsageError(
            f"{type(model).__name__} gives other log-probabilities when rows are packed without padding: {fault}. Pass "
            "`--model.padding_free=false`."
        )


@torch.no_grad()
def shared_fault(model: nn.Module) -> str:
    """What is wrong with the scores of a small pair that shares its prompt; "" where they are right."""
    if model not in _shared:
        _shared[model] = _fault(model, lambda shared: _pair(model, shared_prompt=shared))
    return _shared[model]


@torch.no_grad()
def packed_fault(model: nn.Module) -> str:
    """What is wrong with the scores of packed rows, of which one is short; "" where they are right.

    A model that passes takes packed rows from then on.
    """
    if model not in _packed:
        check_head(model)
        whole = Head(model).whole
        before = whole.config.get_text_config()._attn_implementation
        shared = shares_prompt(whole.config) and not shared_fault(model)

        def layout(packed: bool) -> Layout:
            if packed:
                take_packed(whole)
            return _pair(model, shared_prompt=shared, padding_free=packed)

        _packed[model] = _fault(model, layout)
        if _packed[model]:
            whole.config.get_text_config()._attn_implementation = before
    return _packed[model]


def _pair(model: nn.Module, **how: Any) -> Layout:
    """Two small pairs in a layout; their answers are of different lengths."""
    weight = Head(model).weight
    prompt, chosen, rejected = (
        Ragged(torch.arange(first, first + sum(length), device="cpu") % len(weight), torch.tensor(length, device="cpu"))
        for first, length in ((0, (3, 2)), (5, (3, 1)), (9, (2, 4)))
    )
    pairs = Pairs(prompt, chosen, prompt, rejected, {}, torch.arange(2, device="cpu"))
    return pair_layout(pairs, 0, **how).to(weight.device)


def _fault(model: nn.Module, layout: Callable[[bool], Layout]) -> str:
    """How the scores of ``layout(True)`` differ from those of ``layout(False)``; "" where they do not."""
    check_head(model)
    head = Head(model)
    tolerance, fault = _tolerance(head.weight), ""
    with in_eval(model):  # dropout would make them differ
        plain = _score(model, layout(False), 256, False).sum_logps
        try:
            found = _score(model, layout(True), 256, False).sum_logps
        except Exception as error:  # attention that takes no such mask or rows: any error of the model
            fault = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        else:
            if not torch.allclose(plain, found, atol=tolerance, rtol=tolerance):
                fault = f"{found.tolist()} instead of {plain.tolist()}"
    if not fault and not head.route.positions:
        fault = "it has positions of its own"
    return fault


def _tolerance(x: Tensor) -> float:
    """Allowed difference of log-probabilities, which low precision rounds at different places."""
    return 1e-3 if x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type) else 0.25


def _per_answer(values: Tensor, layout: Layout) -> Tensor:
    """Sum over the tokens of each answer, (A,) float32; float64 stays. In a fixed order, on any device."""
    # unsafe: the layout's lengths need no check, for which the host would wait for a GPU
    sums = torch.segment_reduce(values.double(), "sum", lengths=layout.length, unsafe=True, initial=0.0)
    return sums.to(values.dtype)
