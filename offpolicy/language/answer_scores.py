"""Scores of the answers of a layout under a language model: log-probabilities of answers and of their tokens, and what
else the last layer says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from offpolicy.language.head import FinalStates, Head, answer_sums, hidden_states
from offpolicy.language.head_checks import check_exact
from offpolicy.language.layout import Layout


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
        check_exact(model, layout)
        return call(model, layout, *args)
    from torch.distributed.fsdp import register_fsdp_forward_method

    name = f"_fsdp{call.__name__}"
    if not hasattr(model, name):
        setattr(model, name, partial(call, model))
        register_fsdp_forward_method(model, name)
    return getattr(model, name)(layout, *args)


def _score(model: nn.Module, layout: Layout, chunk: int, stats: bool, value: TokenValue | None = None) -> Answers:
    head = Head(model)
    hidden = hidden_states(head, layout)
    found = head.logps(hidden, layout.target, chunk, stats)
    logps, facts = found if stats else (found, {})
    return Answers(
        answer_sums(logps, layout),
        layout.length.float(),
        {k: answer_sums(v, layout) for k, v in facts.items()},
        None if value is None else answer_sums(value(head, hidden, layout.target, logps), layout),
    )


@torch.no_grad()
def final_states(model: nn.Module, layout: Layout) -> FinalStates:
    """The states that predict the scored tokens of a layout under the present weights, for a later comparison."""
    return _in_forward(_final_states, model, layout)


def _final_states(model: nn.Module, layout: Layout) -> FinalStates:
    head = Head(model)
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2 takes the memory back
        weight, bias = weight.clone(), None if bias is None else bias.clone()
    return FinalStates(hidden_states(head, layout), weight, bias)


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
    hidden = hidden_states(head, layout)
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
