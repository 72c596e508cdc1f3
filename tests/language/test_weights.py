"""Weights of rows: a weight of 2 is a row that stands twice, in every loss and in what is reported of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import fit, make_policy, method, toy_pairs

from offpolicy.data.replay import Replay
from offpolicy.data.texts.sequences import PairView, SingleView
from offpolicy.errors import DataError
from offpolicy.language.meters import RowMeter
from offpolicy.losses.scores import TokenMean

WEIGHTS = np.array([1, 2, 0, 1, 3])


def repeated(replay: Replay, times: np.ndarray) -> Replay:
    """The same texts with every pair as often as its weight says."""
    tables = {name: np.repeat(table, times, axis=0) for name, table in replay.tables.items() if name != "pairs/weight"}
    return Replay(replay.steps, start=replay.start, length=replay.length, tables=tables, meta=dict(replay.meta))


def trained(name: str, policy: Path, replay: Replay, **options: Any) -> Any:
    """One step over all rows; the loss that is reported, and the weights after it."""
    module = method(name, policy, batch_size=64, export="none", **options)
    module.run.log_every = 1
    fit(module, replay, 1, held_out=False, precision="64-true")
    return module.metric_row, module.state_dict()


@pytest.mark.parametrize(
    "name, options",
    [
        ("SFT", {}),
        ("SFT", {"reduction": "sequence_mean"}),
        ("DPO", {}),
        ("SimPO", {}),
        ("CPO", {}),
        ("ORPO", {}),
        ("RPO", {"nll_form": "token_mean"}),
    ],
)
def test_a_weight_is_a_repetition(name: str, options: dict[str, Any], policy: Path) -> None:
    replay = toy_pairs(5, weight=WEIGHTS.astype(float))
    row, weights = trained(name, policy, replay, **options)
    twice, expected = trained(name, policy, repeated(replay, WEIGHTS), **options)
    assert row["train/loss"] == pytest.approx(twice["train/loss"], rel=1e-9)
    for key in row.keys() & {"train/nll_loss", "train/grad_norm"}:
        assert row[key] == pytest.approx(twice[key], rel=1e-6)
    for key, value in weights.items():  # Adam's first steps are ±lr, however small a gradient
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-3)


def test_the_loss_of_kto_is_weighted(policy: Path) -> None:
    """Weights that are all equal change nothing; others give each answer of a pair the pair's."""
    plain, same = (trained("KTO", policy, toy_pairs(5, **w)) for w in ({}, {"weight": np.full(5, 2.0)}))
    assert plain[0]["train/loss"] == pytest.approx(same[0]["train/loss"], rel=1e-12)
    module, seen = method("KTO", policy, batch_size=64, export="none"), {}
    module.run.log_every, inner = 1, module.loss

    def loss(scores: Any) -> Any:
        found = inner(scores)
        seen.update(loss=found[0].detach(), kl=scores.mismatched_ratio, **scores.facts)
        return found

    module.loss = loss
    fit(module, toy_pairs(5, weight=WEIGHTS.astype(float)), 3, held_out=False, precision="64-true")
    assert sorted(seen["weight"].tolist()) == sorted(np.repeat(WEIGHTS, 2).tolist())
    expected = float((seen["loss"] * seen["weight"]).sum() / seen["weight"].sum())
    assert module.metric_row["train/loss"] == pytest.approx(expected, rel=1e-9)
    assert expected != pytest.approx(float(seen["loss"].mean()), rel=1e-3)


@pytest.mark.parametrize("name", ["SFT", "DPO", "ORPO"])
def test_the_held_out_loss_is_weighted(name: str, policy: Path) -> None:
    from toy import quiet

    from offpolicy.data.texts.module import TextData

    found = []
    held_out = toy_pairs(5, seed=1, weight=WEIGHTS.astype(float))
    for replay in (held_out, repeated(held_out, WEIGHTS)):
        module = method(name, policy, export="none")
        module.run.eval_every = 1
        quiet(1, [], precision="64-true").fit(module, TextData.of(toy_pairs(), replay))
        found.append(module.eval_row["eval/loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("value, message", [(-1.0, "negative"), (np.nan, "not finite"), (np.inf, "not finite")])
@pytest.mark.parametrize("view", [PairView(), SingleView(rejected=True)])
def test_weights_that_cannot_be_used_are_refused(value: float, message: str, view: Any) -> None:
    weight = np.array([1.0, 1.0, value])
    with pytest.raises(DataError, match=message):
        view.bind(toy_pairs(3, weight=weight))
    with pytest.raises(DataError, match="all weights are 0"):
        view.bind(toy_pairs(3, weight=np.zeros(3)))


def test_negative_weights_of_a_file_name_their_row(tmp_path: Path) -> None:
    import json

    from offpolicy.data.texts.opening import open_texts
    from offpolicy.data.texts.tokens import load_tokenizer

    rows = [{"prompt": f"{i} ", "chosen": "a", "rejected": "b", "weight": 1.0 - (i == 3) * 2} for i in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(str(make_policy(tmp_path / "policy")))
    with pytest.raises(DataError, match=r"negative weight .*row 3: -1"):
        open_texts(path, tokenizer=tokenizer)
    assert len(open_texts(path, tokenizer=tokenizer, on_bad="drop").tables["pairs"]) == 19


def test_means_over_tokens_pool_the_rows() -> None:
    meter = RowMeter()
    pooled = {"a": TokenMean(torch.tensor([6.0, 1.0]), torch.tensor([3.0, 1.0])), "b": torch.tensor([2.0, 4.0])}
    meter.add(pooled, torch.ones(2))
    meter.add({"a": TokenMean(torch.tensor([9.0]), torch.tensor([4.0])), "b": torch.tensor([0.0])}, torch.ones(1))
    assert meter.read(lambda x: x) == {"a": 2.0, "b": 2.0}  # 16 over 8 tokens, and 6 over 3 rows


def test_only_parts_of_the_loss_are_weighted() -> None:
    meter = RowMeter()
    values = torch.tensor([1.0, 3.0])
    meter.add_step(values, {"nll_loss": values, "rewards": values}, weight=torch.tensor([3.0, 1.0]), real=torch.ones(2))
    assert meter.read(lambda x: x) == {"loss": 1.5, "nll_loss": 1.5, "rewards": 2.0}


def test_mismatched_answers_never_answer_the_same_prompt(policy: Path) -> None:
    """Pairs put both answers of a prompt side by side, in training and held out."""
    module = method("KTO", policy, export="none")
    fit(module, toy_pairs(6), 3, precision="64-true")
    assert set(module._mismatched) >= {-1, 0}
    for number, table in module._mismatched.items():
        own = module.eval_table if number == -1 else module._table
        prompt_of = {int(answer): int(prompt) for prompt, answer in own.texts.index}
        assert all(prompt_of[int(answer)] != prompt for prompt, answer in table.texts.index)


def test_one_prompt_has_no_other_answers(policy: Path) -> None:
    with pytest.raises(DataError, match="have one prompt; expected two or more"):
        fit(method("KTO", policy), toy_pairs(1), 1, held_out=False)
