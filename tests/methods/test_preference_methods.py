"""Methods for language models as functions of scores: known answers, options, gradients, metrics."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offpolicy.data.replay import Replay
from offpolicy.errors import DataError, UsageError
from offpolicy.language.module import LanguageModule
from offpolicy.losses.scores import PairScores, Scores, SingleScores
from offpolicy.registry import find_method

PAIRED = ("DPO", "CDPO", "RDPO", "RPO", "IPO", "INPO", "SimPO", "CPO", "ORPO")
SINGLE = ("KTO", "SFT")


def make(name: str, **options: Any) -> LanguageModule:
    return find_method(name)(policy="tiny", **options)


def rows(generator: torch.Generator, size: int, **more: Any) -> Scores:
    length = torch.randint(2, 9, (size,), generator=generator).double()
    sums = -length * (0.2 + torch.rand(size, generator=generator, dtype=torch.float64))
    ref = sums + torch.randn(size, generator=generator, dtype=torch.float64)
    previous = ref - torch.randn(size, generator=generator, dtype=torch.float64)
    return Scores(sums.requires_grad_(), length, ref, previous_logps=previous, **more)


def pair_scores(size: int = 6, seed: int = 0) -> PairScores:
    g = torch.Generator().manual_seed(seed)
    prompt = {"prompt_logps": -3 * torch.rand(size, generator=g).double(), "prompt_length": torch.full((size,), 3.0)}
    chosen, rejected = rows(g, size, **prompt), rows(g, size)
    total = chosen.length + prompt["prompt_length"]
    return PairScores(chosen, rejected, {}, chosen.length.mean(), total.mean())


def single_scores(size: int = 6, seed: int = 0) -> SingleScores:
    g = torch.Generator().manual_seed(seed)
    answer, divergence = rows(g, size), torch.rand((), generator=g).double()
    label = torch.rand(size, generator=g) < 0.5
    return SingleScores(answer, {"label": label}, answer.length.mean(), divergence)


def scores_of(name: str, seed: int = 0) -> Any:
    return pair_scores(seed=seed) if name in PAIRED else single_scores(seed=seed)


def equal_to_reference(scores: PairScores) -> PairScores:
    same = [
        s._replace(ref_logps=s.sum_logps.detach(), previous_logps=s.sum_logps.detach())
        for s in (scores.chosen, scores.rejected)
    ]
    return scores._replace(chosen=same[0], rejected=same[1])


def log_sigmoid(u: Tensor) -> Tensor:
    return torch.sigmoid(u).log()


def part(scores: Scores, keep: slice) -> Scores:
    return Scores(*(x[keep] if isinstance(x, Tensor) else x for x in scores))


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("DPO", {}, math.log(2)),
        ("CDPO", {"label_smoothing": 0.2}, math.log(2)),
        ("RDPO", {"label_smoothing": 0.4}, math.log(2)),
        ("RPO", {"eta": 0.0}, math.log(2)),
        ("IPO", {"length_average": True}, 25.0),
        ("IPO", {"length_average": False}, 25.0),
        ("INPO", {}, 100 / 9),
    ],
)
def test_first_step(name: str, options: dict[str, Any], expected: float) -> None:
    """With the policy at its reference no logistic loss depends on its options; IPO is 1/(4·0.1²), INPO 1/(4·0.15²)."""
    scale = {"eta": 0.15} if name == "INPO" else {"beta": 0.1}
    loss, metrics = make(name, **scale, **options).loss(equal_to_reference(pair_scores()))
    torch.testing.assert_close(loss, torch.full_like(loss, expected))
    assert not metrics["rewards/margins"].any() and not metrics["rewards/accuracies"].any()


def test_values_against_the_formulas() -> None:
    """Every loss written out once more, from the sums S, lengths n and references R."""
    s = pair_scores()
    w, x = s.chosen, s.rejected
    assert w.ref_logps is not None and x.ref_logps is not None and w.prompt_logps is not None
    sw, sl, nw, nl = w.sum_logps, x.sum_logps, w.length, x.length
    pw, pl = w.previous_logps, x.previous_logps
    assert pw is not None and pl is not None
    u = 0.3 * (sw - w.ref_logps - sl + x.ref_logps)
    dpo, odds = -log_sigmoid(u), [(s / n).exp() / (1 - (s / n).exp()) for s, n in ((sw, nw), (sl, nl))]
    ratio = -log_sigmoid((odds[0] / odds[1]).log())
    expected = {
        ("DPO", ()): dpo,
        ("DPO", (("reference_weight", 0.0),)): -log_sigmoid(0.3 * (sw - sl)),
        ("DPO", (("reference_weight", 0.4),)): -log_sigmoid(0.3 * (sw - sl - 0.4 * (w.ref_logps - x.ref_logps))),
        ("CDPO", (("label_smoothing", 0.2),)): 0.8 * dpo - 0.2 * log_sigmoid(-u),
        ("RDPO", (("label_smoothing", 0.2),)): (0.8 * dpo + 0.2 * log_sigmoid(-u)) / 0.6,
        ("RPO", ()): dpo - 0.005 * 0.3 * sw,
        ("RPO", (("eta", 0.1),)): dpo - 0.1 * 0.3 * sw,
        ("RPO", (("nll_form", "sequence_mean"),)): dpo - 0.2 * sw / nw,
        ("RPO", (("nll_form", "token_mean"), ("nll_weight", 1.0))): dpo - sw / nw.mean(),
        ("IPO", (("length_average", False),)): (u / 0.3 - 1 / 0.6) ** 2,
        ("IPO", ()): ((sw - w.ref_logps) / nw - (sl - x.ref_logps) / nl - 1 / 0.6) ** 2,
        ("INPO", (("eta", 0.3),)): (u / 0.3 + (pw - pl) * -2 / 3 + (w.ref_logps - x.ref_logps) * 2 / 3 - 1 / 0.6) ** 2,
        ("INPO", (("eta", 0.3), ("tau", 0.3))): (u / 0.3 - 1 / 0.6) ** 2,
        ("INPO", (("eta", 0.3), ("tau", 0.0))): (sw - sl - pw + pl - 1 / 0.6) ** 2,
        ("SimPO", ()): -log_sigmoid(0.3 * (sw / nw - sl / nl - 0.5)),
        ("SimPO", (("gamma", 0.6), ("nll_weight", 0.1))): -log_sigmoid(0.3 * (sw / nw - sl / nl) - 0.6)
        - 0.1 * sw / nw.mean(),
        ("CPO", ()): -log_sigmoid(0.3 * (sw - sl)) - sw / nw.mean(),
        ("ORPO", ()): -(sw + w.prompt_logps) / (nw + 3).mean() + 0.1 * ratio,
        ("ORPO", (("nll_on_prompt", False), ("lambda_", 0.5))): -sw / nw.mean() + 0.5 * ratio,
    }
    for (name, options), value in expected.items():
        beta = {} if name in ("ORPO", "INPO") else {"beta": 0.3}
        loss, _ = make(name, **beta, **dict(options)).loss(s)
        torch.testing.assert_close(loss, value, msg=lambda m, n=name, o=options: f"{n} {o}: {m}")


def test_sft_and_kto_against_the_formulas() -> None:
    s = single_scores()
    a, label = s.answer, s.facts["label"]
    for reduction, divisor in (("sum", 1.0), ("sequence_mean", a.length), ("token_mean", a.length.mean())):
        torch.testing.assert_close(make("SFT", reduction=reduction).loss(s)[0], -a.sum_logps / divisor)
    z0 = s.mismatched_ratio
    assert z0 is not None and z0 > 0
    good, bad = 2 * (1 - torch.sigmoid(0.3 * (a.log_ratio - z0))), 1 - torch.sigmoid(0.3 * (z0 - a.log_ratio))
    kto = make("KTO", beta=0.3, desirable_weight=2.0)
    torch.testing.assert_close(kto.loss(s)[0], torch.where(label, good, bad))
    below = s._replace(mismatched_ratio=-z0)  # clamped at 0
    good = 2 * (1 - torch.sigmoid(0.3 * a.log_ratio))
    torch.testing.assert_close(kto.loss(below)[0][label], good[label])


def test_cpo_without_cloning_is_dpo_without_reference() -> None:
    s = pair_scores()
    zero = [x._replace(ref_logps=torch.zeros_like(x.length)) for x in (s.chosen, s.rejected)]
    dpo, _ = make("DPO", beta=0.3).loss(s._replace(chosen=zero[0], rejected=zero[1]))
    torch.testing.assert_close(make("CPO", beta=0.3, nll_weight=0.0).loss(s)[0], dpo)


def test_simpo_knows_no_reference() -> None:
    """The same bits of loss and gradient with any reference or none; γ enters by β·ρ alone."""
    results = []
    for ref in (None, 0.0, 5.0):
        s = pair_scores()
        parts = [
            x._replace(ref_logps=None if ref is None else torch.full_like(x.length, ref))
            for x in (s.chosen, s.rejected)
        ]
        loss, _ = make("SimPO", gamma_beta_ratio=0.5).loss(s._replace(chosen=parts[0], rejected=parts[1]))
        results.append((loss, *torch.autograd.grad(loss.sum(), (s.chosen.sum_logps, s.rejected.sum_logps))))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
    assert torch.equal(make("SimPO", beta=2.0, gamma=1.0).loss(pair_scores())[0], results[0][0])


def test_inpo_takes_the_probability_of_a_judge() -> None:
    """The target (p − ½)/η: 0 where the judge is undecided, 1/(2η) at p = 1, negative where it prefers the other."""
    s, p = pair_scores(), torch.tensor([0.5, 1.0, 0.75, 0.25, 0.0, 0.9], dtype=torch.float64)
    hard, soft = (make("INPO", eta=0.2, tau=0.0, soft_labels=some) for some in (False, True))
    found, _ = soft.loss(s._replace(facts={"agreement": p}))
    assert s.chosen.previous_logps is not None and s.rejected.previous_logps is not None
    drift = (s.chosen.sum_logps - s.chosen.previous_logps) - (s.rejected.sum_logps - s.rejected.previous_logps)
    torch.testing.assert_close(found, (drift - (p - 0.5) / 0.2) ** 2)
    torch.testing.assert_close(found[1], hard.loss(s)[0][1])
    steps = {"token": np.arange(6, dtype=np.uint8)}
    replay = Replay(steps, start=np.arange(3) * 2, length=np.full(3, 2), tables={"pairs": np.array([[0, 1, 0, 2]])})
    with pytest.raises(DataError, match="no column `agreement`"):
        soft.texts_of(replay)


def test_rpo_adds_to_the_chosen_answer_only() -> None:
    s = pair_scores()
    answers = (s.chosen.sum_logps, s.rejected.sum_logps)
    with_nll, _ = make("RPO", beta=0.3, eta=0.1).loss(s)
    without, _ = make("DPO", beta=0.3).loss(s)
    torch.testing.assert_close(with_nll - without, -0.03 * answers[0])
    (chosen, rejected), (chosen_dpo, rejected_dpo) = (
        torch.autograd.grad(loss.sum(), answers) for loss in (with_nll, without)
    )
    assert torch.equal(rejected, rejected_dpo)
    torch.testing.assert_close(chosen, chosen_dpo - 0.03)


@pytest.mark.parametrize("name", [*PAIRED, *SINGLE])
def test_the_mean_of_a_step_does_not_depend_on_its_micro_batches(name: str) -> None:
    """Rows 0 to 1 and 2 to 5 apart, with the lengths and the divergence of the whole step."""
    method, whole = make(name), scores_of(name)
    total, metrics = method.loss(whole)
    for keep in (slice(0, 2), slice(2, 6)):
        if isinstance(whole, PairScores):
            piece: Any = whole._replace(chosen=part(whole.chosen, keep), rejected=part(whole.rejected, keep))
        else:
            piece = whole._replace(answer=part(whole.answer, keep), facts={"label": whole.facts["label"][keep]})
        loss, some = method.loss(piece)
        torch.testing.assert_close(loss, total[keep])
        torch.testing.assert_close(some, {k: v[keep] for k, v in metrics.items()}, equal_nan=True)


@pytest.mark.parametrize("name", [*PAIRED, *SINGLE])
def test_gradients(name: str) -> None:
    method, s = make(name), scores_of(name)
    if isinstance(s, PairScores):
        answers: tuple[Tensor, ...] = (s.chosen.sum_logps, s.rejected.sum_logps)

        def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
            return method.loss(
                s._replace(chosen=s.chosen._replace(sum_logps=chosen), rejected=s.rejected._replace(sum_logps=rejected))
            )[0]
    else:
        answers = (s.answer.sum_logps,)

        def loss(answer: Tensor) -> Tensor:  # type: ignore[misc]
            return method.loss(s._replace(answer=s.answer._replace(sum_logps=answer)))[0]

    assert torch.autograd.gradcheck(loss, answers)


# -- metrics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PAIRED, *SINGLE])
def test_metrics_are_detached_and_one_per_row(name: str) -> None:
    loss, metrics = make(name).loss(scores_of(name))
    assert loss.shape == (6,) and loss.requires_grad
    assert all(value.shape == (6,) and not value.requires_grad for value in metrics.values())
    if name in PAIRED:
        wanted = {f"rewards/{x}" for x in ("chosen", "rejected", "accuracies", "margins")}
        assert wanted | {"logps/chosen", "logps/rejected", "ranking_accuracy"} <= set(metrics)
        torch.testing.assert_close(
            metrics["rewards/margins"], metrics["rewards/chosen"] - metrics["rewards/rejected"], rtol=1e-9, atol=1e-12
        )
    if name in ("RPO", "CPO", "ORPO"):
        assert "nll_loss" in metrics


def test_a_ranking_is_mended_or_broken() -> None:
    """Against the reference's ranking by mean log-probabilities: wrong → right, right → wrong, right → right."""
    length = torch.full((3,), 2.0).double()
    policy, ref = ([torch.tensor(x).double() for x in pair] for pair in (
        ([-1.0, -3.0, -1.0], [-2.0, -2.0, -2.0]), ([-3.0, -1.0, -1.0], [-2.0, -2.0, -2.0])))  # fmt: skip
    s = PairScores(*(Scores(p.requires_grad_(), length, r) for p, r in zip(policy, ref)))
    _, metrics = make("DPO").loss(s)
    assert metrics["ranking_mended"].tolist() == [1, 0, 0] and metrics["ranking_broken"].tolist() == [0, 1, 0]
    h = torch.tensor([2.0, 0.0]).double().softmax(0)
    torch.testing.assert_close(metrics["candidate_entropy"][0], -(h * h.log()).sum() / math.log(2))
    assert metrics["candidate_entropy"][2] == 1.0


def test_kto_reports_by_label() -> None:
    s = single_scores()
    label = s.facts["label"]
    _, metrics = make("KTO", beta=0.5).loss(s)
    torch.testing.assert_close(metrics["rewards/chosen"][label], 0.5 * s.answer.log_ratio.detach()[label])
    assert metrics["rewards/chosen"][~label].isnan().all() and metrics["rewards/rejected"][label].isnan().all()
    assert s.mismatched_ratio is not None and torch.equal(metrics["kl"], s.mismatched_ratio.expand(6))


def test_kto_with_one_label_stays_finite() -> None:
    s = single_scores()
    for label in (True, False):
        loss, _ = make("KTO").loss(s._replace(facts={"label": torch.full((6,), label)}))
        (gradient,) = torch.autograd.grad(loss.sum(), s.answer.sum_logps)
        assert loss.isfinite().all() and gradient.isfinite().all()


# -- what methods ask for, and mistakes --------------------------------------------------------------------------------


def test_what_methods_need() -> None:
    reference = {name for name in (*PAIRED, *SINGLE) if make(name).uses_reference}
    assert reference == {"DPO", "CDPO", "RDPO", "RPO", "IPO", "INPO", "KTO"}
    assert {name for name in (*PAIRED, *SINGLE) if make(name).uses_previous} == {"INPO"}
    assert not make("DPO", reference_weight=0.0).uses_reference and make("DPO", reference_weight=0.1).uses_reference
    assert {name for name in (*PAIRED, *SINGLE) if make(name).scores_prompt} == {"ORPO"}
    assert not make("ORPO", nll_on_prompt=False).scores_prompt
    assert {name for name in (*PAIRED, *SINGLE) if make(name).uses_mismatched} == {"KTO"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DPO", {"beta": 0.0}, "beta"),
        ("DPO", {"reference_weight": -0.5}, "reference_weight"),
        ("RDPO", {"label_smoothing": 0.5}, "label_smoothing"),
        ("CDPO", {"label_smoothing": -0.1}, "label_smoothing"),
        ("SimPO", {"gamma": 1.0, "gamma_beta_ratio": 0.5}, "Leave one out"),
        ("RPO", {"nll_weight": 1.0}, "model.eta"),
        ("RPO", {"eta": 1.0, "nll_form": "token_mean"}, "model.nll_weight"),
        ("RPO", {"nll_form": "mean"}, "sequence_mean"),
        ("SFT", {"reduction": "mean"}, "token_mean"),
        ("KTO", {"batch_size": 1}, "batch_size"),
        ("ORPO", {"lambda_": -1.0}, "lambda_"),
        ("CPO", {"nll_weight": -1.0}, "nll_weight"),
        ("INPO", {"eta": 0.1, "tau": 0.2}, "tau"),
    ],
)
def test_impossible_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(name, **options)


def test_kto_needs_labels() -> None:
    with pytest.raises(DataError, match="label"):
        make("KTO").loss(single_scores()._replace(facts={}))
    steps, singles = {"token": np.arange(6, dtype=np.uint8)}, {"singles": np.array([[0, 1]])}
    with pytest.raises(DataError, match="do not say which answers are desirable"):  # before training
        make("KTO").view.bind(Replay(steps, start=np.array([0, 3]), length=np.array([3, 3]), tables=singles))


def test_sft_leaves_undesirable_answers_out() -> None:
    length, singles = np.arange(1, 5), np.array([[0, 1], [0, 2], [3, 1]])

    def index(name: str, **facts: np.ndarray) -> list[list[int]]:
        steps = {"token": np.repeat(np.arange(4), length)}
        tables = {"singles": singles, **{f"singles/{key}": value for key, value in facts.items()}}
        replay = Replay(steps, start=np.cumsum(length) - length, length=length, tables=tables)
        return make(name).view.bind(replay).index.tolist()

    label = np.array([True, False, True])
    assert index("SFT", label=label) == [[0, 1], [3, 1]]
    assert index("SFT") == index("KTO", label=label) == singles.tolist()


def test_options_of_the_base_are_kept() -> None:
    method = make("SimPO", lr=3e-7, lora_rank=4, gamma=1.0)
    assert (method.hparams.lr, method.hparams.lora_rank, method.hparams.gamma) == (3e-7, 4, 1.0)
    assert method.hparams.gamma_beta_ratio is None and method.hparams.policy == "tiny"
