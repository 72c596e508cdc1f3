"""The reference: computed once, found again, the same however it is obtained; LoRA."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import fit, make_policy, method, toy_pairs

import offpolicy as op
from offpolicy.data.texts.sequences import PairView
from offpolicy.errors import UsageError
from offpolicy.language.module import LanguageModule
from offpolicy.language.reference import Cache, Reference, columns_of, texts_digest
from offpolicy.training.checkpoints import newest_checkpoint, read_checkpoint


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return make_policy(tmp_path / "policy")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows for which a reference was run."""
    found: list[int] = []
    original = Reference.compute

    def counted(self: Any, model: Any, texts: Any, rows: Any) -> Any:
        found.append(len(rows))
        return original(self, model, texts, rows)

    monkeypatch.setattr(Reference, "compute", counted)
    return found


@pytest.mark.slow
def test_a_second_run_does_not_run_the_reference(policy: Path, calls: list[int]) -> None:
    first = fit(method("DPO", policy))
    assert calls == [13, 5]  # training and held-out pairs
    second = fit(method("IPO", policy, micro_batch_size=1, beta=0.3))  # another method, other cuts: the same reference
    assert calls == [13, 5] and "found" in second._reference.words
    if importlib.util.find_spec("peft"):
        fit(method("DPO", policy, **LORA))  # which is the model below new adapters
        assert calls == [13, 5]
    np.testing.assert_array_equal(first._table.columns["ref_chosen_logps"], second._table.columns["ref_chosen_logps"])
    entries = list((policy.parent / "references").iterdir())
    assert len(entries) == 2
    manifest = json.loads((entries[0] / "manifest.json").read_text())
    assert {"weights", "config", "texts", "precision", "attention", "versions"} <= set(manifest)


@pytest.mark.parametrize("what", ["weights", "texts", "precision"])
def test_what_the_numbers_depend_on_makes_another_entry(what: str, policy: Path, calls: list[int]) -> None:
    fit(method("DPO", policy), max_steps=1, held_out=False)
    other = make_policy(policy.parent / "other", seed=1) if what == "weights" else policy
    options = {"ref_cache": str(policy.parent / "references")}
    texts = toy_pairs(seed=3) if what == "texts" else None
    precision = {"precision": "64-true"} if what == "precision" else {}
    fit(method("DPO", other, **options), texts, max_steps=1, held_out=False, **precision)
    assert calls == [4, 4]  # one step of four rows needs no more


def test_only_rows_that_are_needed_are_computed(policy: Path, calls: list[int]) -> None:
    fit(method("DPO", policy), max_steps=2, held_out=False)
    fit(method("DPO", policy), max_steps=3, held_out=False)
    fit(method("DPO", policy), max_steps=9, held_out=False)
    assert calls == [8, 4, 1]


def test_the_cache_survives_what_a_kill_leaves(tmp_path: Path) -> None:
    bound = PairView().bind(toy_pairs(6))
    cache, computed = Cache(tmp_path, {"texts": texts_digest(bound)}), []

    def compute(rows: np.ndarray) -> dict[str, np.ndarray]:
        computed.extend(rows.tolist())
        return {"ref_chosen_logps": rows.astype(np.float32), "ref_rejected_logps": -rows.astype(np.float32)}

    columns, now = columns_of(bound, np.array([1, 4]), cache, compute)
    assert now == 2 and columns["ref_chosen_logps"][[1, 4]].tolist() == [1.0, 4.0]
    assert np.isnan(columns["ref_chosen_logps"][0])
    columns, now = columns_of(bound, np.arange(6), cache, compute)
    assert now == 4 and sorted(computed) == [0, 1, 2, 3, 4, 5]
    assert cache.path is not None
    file = cache.path / "columns.npz"
    file.write_bytes(file.read_bytes()[:100])
    assert columns_of(bound, np.arange(6), cache, compute)[1] == 6
    assert columns_of(bound, np.arange(6), Cache(None, {}), compute)[1] == 6  # nothing is kept


def test_a_wrong_cache_is_noticed_in_the_first_step(policy: Path) -> None:
    fit(method("DPO", policy), max_steps=1)
    for file in (policy.parent / "references").glob("*/columns.npz"):
        with np.load(file) as columns:
            changed = {name: value + 1.0 for name, value in columns.items()}
        np.savez(file, **changed)
    with pytest.raises(UsageError, match="its own reference, but their log-probabilities differ by 1 nats"):
        fit(method("DPO", policy), max_steps=1)


def test_another_model_as_reference(policy: Path, calls: list[int]) -> None:
    other = make_policy(policy.parent / "other", seed=1)
    module = fit(method("DPO", policy, reference=str(other)), max_steps=1)
    same = fit(method("DPO", other), max_steps=1)
    np.testing.assert_allclose(
        module._table.columns["ref_chosen_logps"][:13], same._table.columns["ref_chosen_logps"][:13], rtol=1e-6
    )
    assert calls == [4, 5]  # the numbers of the one served the other
    assert module.metric_row.get("step") == 1 and abs(module.metric_row["train/loss"] - math.log(2.0)) > 1e-3


def test_a_resumed_run_knows_the_model_it_started_from(policy: Path, tmp_path: Path) -> None:
    fit(method("DPO", policy), max_steps=3, folder=tmp_path / "run")
    make_policy(policy, seed=5)
    with pytest.raises(UsageError, match="the run did not start from"):
        fit(method("DPO", policy), max_steps=4, folder=tmp_path / "run", ckpt_path=newest_checkpoint(tmp_path / "run"))


def test_two_references_of_a_later_round(policy: Path, calls: list[int]) -> None:
    """INPO: π_ref is another model, π_t the policy at its start; where both are one model its numbers serve both."""
    first = make_policy(policy.parent / "first", seed=1)
    later = fit(method("INPO", policy, reference=str(first), eta=0.3), max_steps=1)
    start = fit(method("INPO", policy, eta=0.3), max_steps=1)
    assert calls == [4, 5, 4, 5]  # of both models in the first run, of none in the second
    of_later, of_start = later._table.columns, start._table.columns
    np.testing.assert_array_equal(of_start["ref_chosen_logps"], of_start["previous_chosen_logps"])
    np.testing.assert_array_equal(of_later["previous_chosen_logps"], of_start["previous_chosen_logps"])
    known = ~np.isnan(of_later["ref_chosen_logps"])
    assert known.sum() == 4 and (of_later["ref_chosen_logps"] != of_later["previous_chosen_logps"])[known].all()
    assert [name for name, _ in later.describe().facts if name in ("reference", "previous")] == [
        "reference",
        "previous",
    ]


# -- LoRA --------------------------------------------------------------------------------------------------------------

LORA = {"lora_rank": 2, "lr": 0.05}


def test_a_new_adapter_starts_at_its_reference(policy: Path) -> None:
    """Adapters add nothing at first, so δ = 0 and the loss is ln 2; in the end only they have changed."""
    pytest.importorskip("peft")
    module = method("DPO", policy, reference="adapter_off", **LORA)
    module.run.log_every = 1
    losses = []
    original = module.loss
    module.loss = lambda scores: losses.append((scores, original(scores)[0])) or original(scores)
    fit(module)
    scores, loss = losses[0]
    assert torch.equal(scores.chosen.sum_logps, scores.chosen.ref_logps)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2.0)))
    assert all(p.any() for p in module.model.parameters() if p.requires_grad)  # of each product, one factor began as 0
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    for name, value in module.model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(before[name.replace(".base_layer", "")], value)


def test_references_of_an_adapter_agree(policy: Path) -> None:
    pytest.importorskip("peft")
    rows = []
    for reference in ("adapter_off", "auto", "live"):
        module = fit(method("DPO", policy, reference=reference, **LORA))
        rows.append(module.eval_row)
    assert rows[0] == pytest.approx(rows[1], abs=1e-4) and rows[0] == pytest.approx(rows[2], abs=1e-4)


def test_checkpoints_of_adapters(policy: Path, tmp_path: Path) -> None:
    """They hold the adapters only, open without data, resume exactly, and name the settings that do not fit."""
    pytest.importorskip("peft")
    from toy import differences, run_files

    whole = fit(method("DPO", policy, **LORA, lora_dropout=0.3), folder=tmp_path / "whole")
    path = newest_checkpoint(tmp_path / "whole")
    assert path is not None
    state = read_checkpoint(path)["state_dict"]
    assert state and all("lora_" in name for name in state)
    loaded = op.load(path)
    theirs = loaded.state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in whole.state_dict().items())
    assert isinstance(loaded, LanguageModule) and not loaded.model.training

    half = tmp_path / "half"
    fit(method("DPO", policy, **LORA, lora_dropout=0.3), folder=half)
    fit(method("DPO", policy, **LORA, lora_dropout=0.3), folder=half, ckpt_path=half / "checkpoints/step=00000003.ckpt")
    assert not differences(run_files(tmp_path / "whole", 6), run_files(half, 6))
    with pytest.raises(UsageError, match="other adapters"):
        fit(method("DPO", policy, lora_rank=2, lora_targets=["q_proj"]), max_steps=9, ckpt_path=path)


def test_going_on_with_a_trained_adapter(policy: Path, tmp_path: Path) -> None:
    """Its starting point is the reference, not the base model below it."""
    pytest.importorskip("peft")
    first = fit(method("DPO", policy, **LORA), max_steps=4)
    first.model.save_pretrained(tmp_path / "adapter")
    second = method("DPO", policy, adapter=str(tmp_path / "adapter"))
    second.run.log_every = 1
    fit(second, max_steps=1)
    assert second.metric_row["train/loss"] == pytest.approx(math.log(2.0), abs=1e-5)
    live = fit(method("DPO", policy, adapter=str(tmp_path / "adapter"), reference="live"), max_steps=1)
    assert live.metric_row["train/loss"] == pytest.approx(math.log(2.0), abs=1e-5)


def test_targets_that_do_not_exist(policy: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises(UsageError, match="q_proj"):
        fit(method("DPO", policy, lora_rank=2, lora_targets=["query"]))
    with pytest.raises(UsageError, match="lm_head"):
        fit(method("DPO", policy, lora_rank=2, lora_targets=["lm_head"]))


def test_what_was_computed_before_an_interruption_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offpolicy.language.reference_cache.TOGETHER", 2)
    monkeypatch.setattr("offpolicy.language.reference_cache.PATIENCE", 0.0)
    bound, cache = PairView().bind(toy_pairs(6)), Cache(tmp_path, {})

    def compute(rows: np.ndarray) -> dict[str, np.ndarray]:
        if compute.calls == 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        compute.calls += 1  # type: ignore[attr-defined]
        return {name: np.ones(len(rows), dtype=np.float32) for name in ("ref_chosen_logps", "ref_rejected_logps")}

    compute.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        columns_of(bound, np.arange(6), cache, compute)
    assert int(np.isnan(cache.load(["ref_chosen_logps"], 6)["ref_chosen_logps"]).sum()) == 2
