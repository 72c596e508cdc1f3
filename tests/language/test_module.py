"""What `LanguageModule` promises: how a step is cut has no influence, nor has how a number is computed."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from tiny import fit, make_policy, method, toy_pairs, write_pairs

import offpolicy as op
from offpolicy.data.module import DataModule
from offpolicy.data.texts.module import TextData
from offpolicy.data.texts.sequences import token_ids as texts_of
from offpolicy.errors import DataError, UsageError
from offpolicy.language.meters import RowMeter
from offpolicy.language.module import LanguageModule
from offpolicy.language.plan import RowPlan


class Rows(Callback):
    """The rows of metrics, without speeds."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.step_ended and pl_module.metric_row.get("step") == trainer.global_step:
            self.rows.append({k: v for k, v in pl_module.metric_row.items() if not k.startswith("perf/")})


def train(name: str, policy: Path, replay: Any = None, **options: Any) -> tuple[LanguageModule, list[dict[str, Any]]]:
    trainer = {k: options.pop(k) for k in ("precision", "gradient_clip_val", "held_out", "max_steps") if k in options}
    rows = Rows()
    return fit(method(name, policy, **options), replay, callbacks=[rows], **trainer), rows.rows


def assert_same(first: Any, second: Any, tolerance: float) -> None:
    """The same weights and the same metrics, but for comparisons of rewards that are all 0 in the first step."""
    for (name, a), b in zip(first[0].state_dict().items(), second[0].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    for ours, theirs in zip(first[1], second[1], strict=True):
        ours, theirs = ({k: v for k, v in row.items() if k != "train/rewards/accuracies"} for row in (ours, theirs))
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    assert first[0].eval_row == pytest.approx(second[0].eval_row, rel=tolerance, abs=tolerance)


# -- how a step is cut -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DPO", "KTO", "ORPO", "CPO", "SFT", "CoPG"])
def test_micro_batches_do_not_change_the_result(name: str, policy: Path) -> None:
    """Losses with terms over all tokens of a step (ORPO, CPO, SFT) or all answers (KTO) included; 13 rows make a last
    step of one row, which leaves micro-batches empty."""
    runs = [train(name, policy, precision="64-true", micro_batch_size=size) for size in (None, 1, 3)]
    assert [row["step"] for row in runs[0][1]] == [2, 4, 6]
    assert runs[1][0].trainer.accumulate_grad_batches == 4 and runs[2][0].trainer.accumulate_grad_batches == 2
    assert_same(runs[0], runs[1], 1e-9)
    assert_same(runs[0], runs[2], 1e-9)


@pytest.fixture(scope="module")
def plain(policy: Path) -> Any:
    return train("DPO", policy, precision="64-true")


@pytest.mark.parametrize(
    "options",
    [
        {"shared_prompt": False},
        {"group_by_length": False},
        {"chunk": 1},
        {"gradient_checkpointing": True},
        {"reference": "live"},
        {"attn_implementation": "eager"},
    ],
    ids=str,
)
def test_ways_of_computing_do_not_change_the_result(options: dict[str, Any], plain: Any, policy: Path) -> None:
    assert_same(plain, train("DPO", policy, precision="64-true", **options), 1e-5)  # norms and softmax are float32


def test_a_step_is_the_mean_over_its_rows(policy: Path) -> None:
    """The gradient of one step by hand: plain logits, a loop over the pairs, AdamW with the rate of the first step."""
    from transformers import AutoModelForCausalLM

    weight = np.array([1.0, 3.0, 0.5, 2.0])
    replay = toy_pairs(4, weight=weight)
    trained = train("DPO", policy, replay, precision="64-true", max_steps=1, micro_batch_size=1, beta=0.7)[0]
    model = AutoModelForCausalLM.from_pretrained(policy).double()
    texts = [replay.steps["token"][s : s + n].tolist() for s, n in zip(replay.start, replay.length)]

    def logp(prompt: list[int], answer: list[int]) -> torch.Tensor:
        ids = torch.tensor([prompt + answer])
        return model(ids).logits[0].log_softmax(-1)[range(len(prompt) - 1, ids.numel() - 1), answer].sum()

    with torch.no_grad():
        start = [(logp(texts[a], texts[b]), logp(texts[c], texts[d])) for a, b, c, d in replay.tables["pairs"]]
    total = torch.zeros((), dtype=torch.float64)
    for (a, b, c, d), (ref_b, ref_d), w in zip(replay.tables["pairs"], start, weight):
        u = 0.7 * (logp(texts[a], texts[b]) - ref_b - logp(texts[c], texts[d]) + ref_d)
        total = total - w / weight.sum() * torch.nn.functional.logsigmoid(u)
    assert total.item() == pytest.approx(math.log(2.0), rel=1e-12)
    total.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0).step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[f"model.{name}"], value, rtol=1e-5, atol=1e-7)


# -- rates, clipping, precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 1])
def test_tokens_that_are_not_scored_are_not_learned(size: int | None, policy: Path) -> None:
    """L = −Σ log π / n over the scored tokens of the step, however it is cut."""
    replay = toy_pairs(4)
    replay.steps["scored"] = np.arange(replay.num_steps) % 3 > 0
    options = {"lr": 0.0, "batch_size": 4, "micro_batch_size": size, "max_steps": 2, "held_out": False}
    module, rows = train("SFT", policy, replay, precision="64-true", **options)
    total, count = 0.0, 0
    for prompt, answer in module._table.texts.index:
        ids, n = np.append(texts_of(replay, prompt), texts_of(replay, answer)), int(replay.length[prompt])
        logp = module.model(torch.from_numpy(ids)[None]).logits[0, n - 1 : -1].log_softmax(-1)
        scored = np.flatnonzero(replay.steps["scored"][replay.start[answer] :][: replay.length[answer]])
        total -= float(sum(logp[i, ids[n + i]] for i in scored))
        count += len(scored)
    assert rows[0]["train/loss"] == pytest.approx(total / count, rel=1e-9)
    assert rows[0]["train/lengths/answer"] == pytest.approx(count / 4)


def test_rates_are_a_function_of_the_step() -> None:
    rates = {}
    for schedule in ("cosine", "linear", "constant"):
        one = op.DPO(policy="p", lr=2.0, warmup_ratio=0.2, lr_schedule=schedule)
        one._horizon = 10
        rates[schedule] = [one.rate(t) for t in range(11)]
    assert all(r[:3] == [1.0, 2.0, 2.0] for r in rates.values())
    assert rates["linear"][6] == rates["cosine"][6] == pytest.approx(1.0)  # half of the way down
    assert rates["linear"][10] == rates["cosine"][10] == pytest.approx(0.0)
    assert rates["linear"][9] == pytest.approx(0.25) and rates["constant"][10] == 2.0


def test_the_rate_reaches_the_optimiser(policy: Path) -> None:
    module, rows = train("DPO", policy, warmup_ratio=0.5)
    assert [row["train/learning_rate"] for row in rows] == pytest.approx([module.rate(t) for t in (1, 3, 5)])


def test_clipping_is_lightnings(policy: Path, plain: Any) -> None:
    """Adam does not see the scale of gradients that are all clipped alike, so look at the second moments."""
    clipped = train("DPO", policy, precision="64-true", gradient_clip_val=1e-3)[0]
    moments = clipped.trainer.optimizers[0].state
    total = sum(state["exp_avg_sq"].sum().item() for state in moments.values())
    assert 0 < total <= 1e-6


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_stays_near_float32(precision: str, policy: Path) -> None:
    losses = [train("DPO", policy, precision=p, lr=1e-3)[1][0]["train/loss"] for p in ("32-true", precision)]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)


def test_dropout_is_off(tmp_path: Path) -> None:
    dropping = make_policy(tmp_path / "policy", attention_dropout=0.5)
    module, rows = train("DPO", dropping, lr=0.0)
    assert rows[-1]["train/loss"] == pytest.approx(math.log(2.0), abs=1e-6)
    assert module.model.training


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_are_means_over_rows() -> None:
    meter = RowMeter()
    meter.add({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1.0, torch.nan])}, torch.ones(2))
    meter.add({"a": torch.tensor([6.0]), "b": torch.tensor([torch.nan])}, torch.ones(1))
    meter.add({"a": torch.tensor([100.0]), "b": torch.tensor([5.0])}, torch.zeros(1))  # the filler of an empty slot
    state = [meter.state_dict(), meter.state_dict()]
    assert meter.read(lambda x: x) == {"a": 3.0, "b": 1.0}
    assert meter.read(lambda x: x) == {}
    meter.load_state_dict(state, rank=0, world_size=1)  # two processes become one
    assert meter.read(lambda x: x) == {"a": 3.0, "b": 1.0}


def test_rows_have_the_usual_names(plain: Any) -> None:
    module, rows = plain
    names = {"rewards/chosen", "rewards/accuracies", "rewards/margins", "logps/chosen", "logits/chosen", "entropy"}
    more = {"loss", "ranking_accuracy", "ref_ranking_accuracy", "lengths/chosen", "logps/chosen_drift"}
    assert {f"train/{n}" for n in names | more | {"grad_norm", "learning_rate", "epoch"}} <= set(rows[0])
    assert {f"eval/{n}" for n in names | more | {"idealised_ranking_accuracy", "rewards/accuracies_best"}} <= set(
        module.eval_row
    )
    assert {"perf/tokens_per_s", "perf/peak_memory_mb"} <= set(module.metric_row)
    assert rows[-1]["train/epoch"] == 1.5


def test_evaluation_is_the_mean_over_all_held_out_rows(plain: Any, policy: Path) -> None:
    odd = train("DPO", policy, precision="64-true", micro_batch_size=3)[0]  # 5 rows in passes of 3
    assert odd.eval_row == pytest.approx(plain[0].eval_row, rel=1e-9)


def test_no_evaluation_without_held_out_rows(policy: Path) -> None:
    module, _ = train("SFT", policy, held_out=False, max_steps=2)
    assert module.eval_row == {}


# -- data, steps, messages ---------------------------------------------------------------------------------------------


def test_epochs_decide_the_number_of_steps(policy: Path) -> None:
    module = fit(method("DPO", policy, epochs=0.5), max_steps=-1)
    assert module.trainer.global_step == 2  # ⌈0.5 · 13 / 4⌉


def test_a_control_run_still_needs_max_steps(data: DataModule) -> None:
    assert op.BC().planned_steps(data) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "`lr`"),
        ({"dtype": "float16"}, "float32, bfloat16, auto"),
        ({"lr_schedule": "cosin"}, "cosine, linear, constant"),
        ({"reference": "adapter_off"}, "lora_rank"),
        ({"adapter": "x", "lora_rank": 2}, "expected one"),
        ({"lora_dropout": 1.0}, "`lora_dropout`"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        op.DPO(policy="p", **options)


def test_a_policy_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="given no policy"):
        fit(op.DPO())
    with pytest.raises(UsageError, match="is no folder"):
        fit(op.DPO(policy=str(tmp_path / "nothing" / "here")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="does not open as a causal language model"):
        fit(op.DPO(policy=str(tmp_path / "empty")))


def test_accumulation_is_not_the_users(policy: Path) -> None:
    with pytest.raises(UsageError, match="micro_batch_size"):
        fit(method("DPO", policy), accumulate_grad_batches=2)


def test_texts_of_a_larger_vocabulary(policy: Path) -> None:
    replay = toy_pairs()
    replay.steps["token"][3] = 200
    with pytest.raises(DataError, match="token id 200"):
        fit(method("DPO", policy), replay)


@pytest.mark.parametrize("name", ["SimPO", "KTO"])
def test_texts_longer_than_the_model_has_positions(name: str, tmp_path: Path) -> None:
    """For KTO also the longest prompt with the longest answer, as it scores them together."""
    replay, held_out = toy_pairs(), toy_pairs(5, seed=1)
    sizes = np.concatenate([r.length[r.tables["pairs"]].reshape(-1, 2, 2) for r in (replay, held_out)])
    apart = [r.length[r.tables["pairs"]].reshape(-1, 2, 2).max((0, 1)).sum() for r in (replay, held_out)]
    longest = int(max(apart) if name == "KTO" else sizes.sum(-1).max())
    fits = make_policy(tmp_path / "fits", max_position_embeddings=longest)
    fit(method(name, fits), replay, 1)
    short = make_policy(tmp_path / "short", max_position_embeddings=longest - 1)
    with pytest.raises(DataError, match=f"{longest} tokens.* {longest - 1} positions.*--data.max_length"):
        fit(method(name, short), replay, 1)


def test_data_of_the_other_world(policy: Path, replay: Any) -> None:
    with pytest.raises(UsageError, match="trains on texts"):
        op.fit(method("DPO", policy), op.DataModule.of(replay), max_steps=1)
    with pytest.raises(UsageError, match="plays no episodes"):
        op.evaluate(method("DPO", policy))


def test_pairs_from_a_file_through_fit(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The Python interface: planned steps, held-out rows, run folder, and opening the run without its data."""
    data = TextData(str(write_pairs(tmp_path / "pairs.jsonl", 60)), eval_fraction=0.2)
    module = method("DPO", policy, batch_size=16)
    result = op.fit(module, data, root=tmp_path / "runs", eval_every=2)
    said = capsys.readouterr().out
    assert result.updates == 3 and result.folder == tmp_path / "runs" / "pairs" / "DPO" / "seed0-1"
    assert (
        "policy" in said and "▶" in said and "reference the policy at its start" in said and "offpolicy.export" in said
    )
    assert 0.0 <= result.scores["rewards/accuracies"] <= 1.0
    loaded = op.load(result.folder)
    assert loaded.tokenizer is not None and loaded.model.config.model_type == "llama"
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_the_order_of_training_is_the_plans(policy: Path) -> None:
    module = train("SFT", policy, max_steps=1)[0]
    assert isinstance(module._plan, RowPlan) and module._plan.seed == 0


def test_a_forward_pass_has_a_bound_where_nobody_says(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offpolicy.language.stepping.FORWARD_TOKENS", 70)  # the longest of these rows has 28
    module = train("DPO", policy, max_steps=1, batch_size=8)[0]
    assert module.micro.rows == 70 // int(module._table.texts.lengths.sum(1).max())
    assert module.trainer.accumulate_grad_batches == math.ceil(8 / module.micro.rows)


def test_control_methods_are_not_sharded(replay: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.strategies import ModelParallelStrategy
    from toy import quiet

    trainer = quiet(2)
    monkeypatch.setattr(type(trainer), "strategy", ModelParallelStrategy())
    module = op.BC()
    module.trainer = trainer
    with pytest.raises(UsageError, match="Use ddp"):
        module.configure_callbacks()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True, "lora_rank": 2, "reference": "adapter_off"}])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_gpu_computes_what_a_cpu_does(options: dict[str, Any], precision: str, policy: Path) -> None:
    losses = []
    for accelerator in ("cpu", "gpu"):
        rows = Rows()
        fit(method("DPO", policy, micro_batch_size=2, **options), callbacks=[rows], accelerator=accelerator,
            precision=precision)  # fmt: skip
        losses.append([row["train/loss"] for row in rows.rows])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3 if precision == "32-true" else 0.1)


class Hinge(op.LanguageModule):
    """A preference method of somebody who knows one base class."""

    uses_reference = False

    def __init__(self, *, margin: float = 1.0, **language: Any) -> None:
        super().__init__(**language)
        self.save_hyperparameters()

    def loss(self, scores: Any) -> Any:
        return (self.hparams.margin - scores.chosen.mean_logps + scores.rejected.mean_logps).clamp(min=0.0), {}


def test_preferences_and_rollouts_are_siblings() -> None:
    assert issubclass(op.DPO, op.PreferenceModule) and issubclass(op.GRPO, op.RolloutModule)
    assert issubclass(op.PreferenceModule, op.LanguageModule) and issubclass(op.RolloutModule, op.LanguageModule)
    assert not issubclass(op.GRPO, op.PreferenceModule) and not issubclass(op.DPO, op.RolloutModule)


def test_a_method_of_ones_own_may_extend_what_all_language_methods_do(policy: Path) -> None:
    """Preference methods had the base that rollout methods have too."""
    assert Hinge.__mro__[1:3] == (op.PreferenceModule, op.LanguageModule)

    class Softer(Hinge):
        pass

    assert Softer.__bases__ == (Hinge,)

    class Plain(op.LanguageModule):
        uses_reference, loss = False, Hinge.loss

    assert "lora_rank" in inspect.signature(Plain).parameters  # its options are those of the base
    assert Plain(policy="x", lr=np.float64(0.5)).hparams.lr == 0.5
    trained = []
    for kind in (Hinge, Softer, Hinge):
        module = kind(policy=str(policy), lr=1e-2, batch_size=4, margin=2.0)
        module.seed, module.run.log_every = 0, 2
        fit(module, max_steps=3)
        assert module.hparams.margin == 2.0 and module.metric_row["train/loss"] > 0
        trained.append(module.state_dict())
    assert all(torch.equal(trained[0][name], other[name]) for other in trained[1:] for name in other)
