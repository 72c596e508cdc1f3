"""Weights of supervised tokens: dynamic fine-tuning, and roll-outs of one token with draws and in the limit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import fit, method
from torch import Tensor

from offpolicy.errors import UsageError
from offpolicy.language.logprobs import plain_logits
from offpolicy.language.one_token import drawn_value
from offpolicy.losses.scores import Scores, SingleScores


def head_of(weight: Tensor) -> Any:
    return SimpleNamespace(logits=lambda hidden: plain_logits(hidden, weight, None))


@pytest.fixture
def places() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(3, 4, generator=g, dtype=torch.float64),
        torch.randn(6, 4, generator=g, dtype=torch.float64),
        torch.tensor([0, 5, 2]),
    )


def test_draws_are_rewarded_by_the_label(places: tuple[Tensor, Tensor, Tensor]) -> None:
    """K = 1: r·log p(a) of the one token drawn, r = 1 for the label, −0.1 else; in any blocks the same."""
    hidden, weight, target = places
    logp, keys = (hidden @ weight.T).log_softmax(-1), torch.tensor([3, 14, 15])
    found = drawn_value(head_of(weight), hidden, target, keys, draws=1, miss=-0.1, temperature=1.0)
    for row in range(3):
        possible = [(1.0 if a == target[row] else -0.1) * logp[row, a] for a in range(6)]
        assert min(abs(found[row] - one) for one in possible) < 1e-12
    cut = drawn_value(head_of(weight), hidden, target, keys, draws=1, miss=-0.1, temperature=1.0, chunk=4)
    torch.testing.assert_close(found, cut)
    other = drawn_value(head_of(weight), hidden, target, keys + 1, draws=64, miss=-0.1, temperature=1.0)
    assert not torch.allclose(other, drawn_value(head_of(weight), hidden, target, keys, draws=64, miss=-0.1,
                                                 temperature=1.0))  # fmt: skip


def test_many_draws_come_to_the_limit(places: tuple[Tensor, Tensor, Tensor]) -> None:
    """The gradient of the limit is (1 − miss)·p(label)·∇log p(label): 200,000 draws within 2 % of the longest."""
    hidden, weight, target = places
    keys = torch.tensor([3, 14, 15])
    gradients = []
    for limit in (False, True):
        w = weight.clone().requires_grad_()
        if limit:
            logp = (hidden @ w.T).log_softmax(-1)[torch.arange(3), target]
            value = 1.1 * logp.detach().exp() * logp
        else:
            value = drawn_value(head_of(w), hidden, target, keys, draws=200_000, miss=-0.1, temperature=1.0)
        gradients.append(torch.autograd.grad(value.sum(), w)[0])
    assert (gradients[0] - gradients[1]).abs().max() < 0.02 * gradients[1].abs().max()


def test_draws_with_a_gradient(places: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, target = places
    keys = torch.tensor([3, 14, 15])

    def value(h: Tensor, w: Tensor) -> Tensor:
        return drawn_value(head_of(w), h, target, keys, draws=8, miss=-0.1, temperature=0.7)

    assert torch.autograd.gradcheck(value, (hidden.requires_grad_(), weight.requires_grad_()))


def test_sft_takes_the_values_of_tokens() -> None:
    """The sum of the values in every reduction, with the likelihood beside it."""
    from offpolicy.registry import find_method

    length = torch.tensor([2.0, 3.0]).double()
    sums, values = torch.tensor([-3.0, -6.0]).double(), torch.tensor([-0.5, -1.5]).double()
    scores = SingleScores(Scores(sums, length, sum_values=values), {}, 2.5)
    for reduction, divisor in (("sum", 1.0), ("sequence_mean", length), ("token_mean", 2.5)):
        loss, metrics = find_method("SFT")(policy="tiny", weighting="dft", reduction=reduction).loss(scores)
        torch.testing.assert_close(loss, -values / divisor)
        torch.testing.assert_close(metrics["nll_loss"], -sums / divisor)


def test_draws_without_end_may_be_a_number() -> None:
    from offpolicy.registry import find_method

    assert find_method("SFT")(policy="tiny", weighting="otr", draws=float("inf")).hparams.draws == "inf"
    for draws in (True, 0, 2.5, float("nan")):
        with pytest.raises(UsageError, match="draws"):
            find_method("SFT")(policy="tiny", weighting="otr", draws=draws)


def test_weights_of_a_step(policy: Path) -> None:
    """One step: with "dft" every token's gradient is its probability times that of SFT; the limit of "otr" is 1.1 times
    as much; values are summed over the answers of the batch."""
    found = {}
    for name, options in {"dft": {}, "otr": {}, "other": {"weighting": "otr", "miss": 0.0}}.items():
        module = method("SFT", policy, **{"weighting": name, "lr": 0.0} | options)
        module = fit(module, max_steps=1, held_out=False, precision="64-true")
        rows = module._plan.rows(0)
        scores = module.scores(module._table, rows, module.step_means(module._table, rows))
        found[name] = scores.answer.sum_values.detach()
        layout = module.layout(module._table.texts.gather(rows))
        from offpolicy.language.answer_scores import score_tokens

        with torch.no_grad():
            logps = score_tokens(module.model, layout).logps.double()
        expected = torch.zeros(4, dtype=torch.float64).index_add(0, layout.answer, logps.exp() * logps)
        torch.testing.assert_close(found["dft"], expected.to(found["dft"]))
    torch.testing.assert_close(found["otr"], 1.1 * found["dft"])
    torch.testing.assert_close(found["other"], found["dft"])


@pytest.mark.slow
def test_draws_do_not_depend_on_how_a_step_is_cut(policy: Path) -> None:
    whole, cut = (
        fit(method("SFT", policy, weighting="otr", draws=4, micro_batch_size=size), precision="64-true")
        for size in (None, 1)
    )
    for ours, theirs in zip(whole.state_dict().values(), cut.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "ofr"}, "otr"),
        ({"draws": 4}, "weighting"),
        ({"weighting": "dft", "miss": 0.0}, "weighting"),
        ({"weighting": "otr", "draws": 2.5}, "whole number"),
        ({"weighting": "otr", "draws": 0}, "draws"),
        ({"weighting": "otr", "draw_temperature": 1.0}, "draws nothing"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options: dict[str, Any], message: str) -> None:
    from offpolicy.registry import find_method

    with pytest.raises(UsageError, match=message):
        find_method("SFT")(policy="tiny", **options)
    assert find_method("SFT")(policy="tiny", weighting="otr", draws=3).hparams.draws == 3
