"""Whether log-probabilities from the last layer of a language model are the model's own, tried on a few tokens before
anything is learned from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from offpolicy.data.texts.sequences import Pairs, Ragged, Singles
from offpolicy.errors import UsageError
from offpolicy.language.attention import shares_prompt, take_packed
from offpolicy.language.head import ROUTES, Head, answer_sums, hidden_states, routes
from offpolicy.language.layout import Layout, pair_layout, single_layout
from offpolicy.language.reading import call, in_eval

_checked: WeakSet[nn.Module] = WeakSet()
_shared: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # what is wrong with a shared prompt
_packed: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # what is wrong with packed rows


def check_exact(model: nn.Module, layout: Layout) -> None:
    """Raise :class:`UsageError` where a model gives other numbers in this layout."""
    check_head(model)
    if layout.shared:
        check_shared(model)
    if layout.packed:
        check_packed(model)


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The part of a model, without adapters, that gives the states before the output layer; None where no part does."""
    check_head(model)
    return Head(model).decoder if routes.get(model, ROUTES[0]).decoder else None


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
            routes[head.whole] = route
            try:
                head = Head(model)
                found.append(head.logps(hidden_states(head, layout), layout.target).float())
            except Exception as error:  # a decoder of another kind: any error of the model
                found.append(error)
                continue
            if torch.allclose(found[-1], expected, atol=tolerance, rtol=tolerance):
                _checked.add(model)
                return
    del routes[head.whole]
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


def _sums(model: nn.Module, layout: Layout) -> Tensor:
    """The log-probability of each answer, (A,)."""
    head = Head(model)
    return answer_sums(head.logps(hidden_states(head, layout), layout.target), layout)


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
        plain = _sums(model, layout(False))
        try:
            found = _sums(model, layout(True))
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
