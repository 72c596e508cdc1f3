"""GRPO, ReMix and RL-PLUS: whole updates against obvious ones, what an iteration takes, the base, demonstrations."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from tiny_rl import SMALL, fit, method, toy_problems

from offpolicy.data.texts.rollouts import CONTINUED, DEMONSTRATION, OWN
from offpolicy.data.texts.sequences import token_ids
from offpolicy.errors import DataError, UsageError, fold
from offpolicy.files import Table
from offpolicy.language.rl.engine import CONTINUES, Request
from offpolicy.language.rl.engines import TransformersEngine
from offpolicy.losses.variants import VARIANTS, Variant
from offpolicy.losses.variants.absent import ABSENT
from offpolicy.training.checkpoints import newest_checkpoint


class Stores(Callback):
    """Keeps the store of answers, and what the steps take, of every iteration."""

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}
        self.taken: dict[int, list[np.ndarray]] = {}
        self.begins: dict[int, int] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        k = pl_module.iteration
        self.seen[k], self.taken[k] = trainer.datamodule.rollouts, list(pl_module.course.steps)
        self.begins[k] = pl_module.course.first_step


class Weights(Callback):
    """Keeps the policy at the start of every iteration."""

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.course.is_over(pl_module.global_step):
            self.seen[pl_module.iteration + 1] = copy.deepcopy(pl_module.model).eval()


def reference_policy(policy: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float64).train()


def whole_of(model: Any, prompt: np.ndarray, token: np.ndarray, temperature: float) -> Any:
    """Log-probabilities of the whole vocabulary at every token of an answer, from the model's own logits."""
    ids = torch.from_numpy(np.concatenate([prompt, token]))[None]
    return (model(ids).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def kl_of(estimator: str, whole: Any, other: Any, token: np.ndarray) -> Any:
    """KL(π ‖ other) at every token: from the one that was drawn, or exactly."""
    if estimator == "full":
        return (whole.exp() * (whole - other)).sum(-1)
    delta = chosen(other - whole, token)
    return delta.exp() - delta - 1


def chosen(whole: Any, token: np.ndarray) -> Any:
    return whole.gather(1, torch.from_numpy(token)[:, None])[:, 0]


def obvious_loss(name: str, model: Any, start: Any, module: Any, stores: Stores, rows: np.ndarray, k: int) -> Any:
    """The loss of a step written out answer by answer, with π_k given by ``start``."""
    store, problems = stores.seen[k], module.problems
    total: Any = torch.zeros((), dtype=torch.float64)
    for row in rows:
        span = slice(store.start[row], store.start[row] + store.length[row])
        token = store.steps["token"][span].astype(np.int64)
        prompt = token_ids(problems, problems.tables["problems"][store.episodes["prompt"][row], 0])
        whole = whole_of(model, prompt, token, module.hparams.temperature)
        logp, entropy, kl = chosen(whole, token), -(whole.exp() * whole).sum(-1), module.hparams.get("kl", "k3")
        with torch.no_grad():
            old = whole_of(start[k], prompt, token, module.hparams.temperature)
            base = whole_of(start[1], prompt, token, module.hparams.temperature)
            drawn = whole_of(start[store.episodes["policy_version"][row]], prompt, token, 1.0)
        previous, behavior = chosen(old, token), chosen(drawn, token)
        external = torch.arange(len(token)) < int(store.episodes["given"][row])
        group = store.episodes["group"] == store.episodes["group"][row]
        rewards = store.episodes["reward"][group]
        centred = store.episodes["reward"][row] - rewards.mean()
        if name == "GRPO":
            a, ratio = centred / (rewards.std(ddof=1) + 1e-4), (logp - previous).exp()
            gain = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
            gain = gain * ((previous - behavior).exp().clamp(max=3.0) if module.hparams.lag else 1.0)
            gain = torch.where(external, (logp - logp.detach()).exp() * a, gain)
            total = total - (gain - 0.1 * kl_of(kl, whole, base, token)).mean() / len(rows)
        elif name == "ReMix":
            a, ratio = centred / (rewards.std(ddof=1) + 1e-4), (logp - behavior).exp()
            c = (previous - behavior).exp()
            clipped = torch.minimum(torch.maximum(ratio, (c - 0.2).clamp(min=0)), c + 0.2)
            gain = torch.minimum(ratio * a, clipped * a)
            share = max(1 - 0.1 * max(k - 1, 0), 0.5)  # start 1, every 1
            convex = share * kl_of(kl, whole, base, token) + (1 - share) * kl_of(kl, whole, old, token)
            total = total - (gain - module.hparams.beta * convex + 1e-3 * entropy).mean() / len(rows)
        elif name == "HPT":  # three own answers and a demonstration; one right answer opens the gate
            mine = group & (store.episodes["source"] == 0)
            shows = (store.episodes["reward"][mine] >= module.hparams.success).sum() == 0
            assert bool(external.all()) == shows
            centred = store.episodes["reward"][row] - store.episodes["reward"][mine].mean()
            shown = store.episodes["source"][rows] == 1
            if shows:
                total = total - 0.3 * logp.sum() / store.length[rows][shown].sum()
            else:
                total = total - ((logp - previous).exp() * centred).sum() / (len(rows) * module.hparams.max_new_tokens)
            total = total - 1e-3 * entropy.sum() / store.length[rows].sum()
        else:
            mixed = 2 * logp.exp() / (1.5 * previous.exp() + 0.5 / 64) * (1 - logp.detach().exp()) ** 0.5
            ratio = torch.where(external, mixed, (logp - previous).exp())
            longest = module.hparams.max_new_tokens
            total = total - (ratio * centred).sum() / (len(rows) * longest)
            total = total - 1e-3 * entropy.sum() / store.length[rows].sum()
    return total


CASES: list[tuple[str, dict[str, Any]]] = [
    ("GRPO", {"beta": 0.1, "temperature": 0.7}),
    ("GRPO", {"beta": 0.1, "temperature": 0.7, "kl": "full"}),
    ("GRPO", {"beta": 0.1, "lag": 1, "demonstrations": 1, "demonstration_share": 0.5}),
    ("ReMix", {"kl_start": 1, "kl_every": 1, "beta": 1e-3}),
    ("ReMix", {"kl_start": 1, "kl_every": 1, "beta": 1e-3, "lag": 2}),
    ("ReMix", {"kl_start": 1, "kl_every": 1, "beta": 0.3, "kl": "full", "chunk": 9}),
    ("RLPlus", {}),
    ("RLPlus", {"demonstration_share": 0.5}),
    ("HPT", {"success": 0.6, "sft": 0.3}),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, options", CASES)
def test_updates_equal_obvious_ones(name: str, options: dict[str, Any], policy: Path) -> None:
    """A few iterations in float64, replayed by hand from the answers that were drawn, with plain AdamW."""
    stores = Stores()
    module = method(name, policy, micro_batch_size=3, **options)
    steps = 6 if name != "ReMix" else 10
    module = fit(module, steps, callbacks=[stores], precision="64-true", held_out=False)
    model, start, done = reference_policy(policy), {}, 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=SMALL["lr"], weight_decay=0.0)
    for k in sorted(stores.seen):
        start[k] = reference_policy(policy)
        start[k].load_state_dict(model.state_dict())
        for rows in stores.taken[k][: steps - stores.begins[k]]:
            optimizer.zero_grad()
            obvious_loss(name, model, start, module, stores, rows, k).backward()
            optimizer.step()
            done += 1
    assert done == steps
    for ours, theirs in zip(module.model.state_dict().values(), model.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6)  # norms are float32 in any case; Adam moves by 1e-1


@pytest.mark.slow
def test_how_a_step_is_split_does_not_matter(policy: Path) -> None:
    whole, split = (
        fit(method("ReMix", policy, micro_batch_size=size), 6, precision="64-true", held_out=False) for size in (8, 1)
    )
    for ours, theirs in zip(whole.state_dict().values(), split.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_iterations_of_remix(policy: Path, tmp_path: Path) -> None:
    """B = 40, p = 0.4, G = 4: 6 fresh groups and 4 of the two versions before, over which it goes twice; from T on
    fresh ones alone, once, around a base that is the policy of that time."""
    stores = Stores()
    module = method("ReMix", policy, batch_size=20, reincarnation=4, kl_start=1, save_seconds=1e9)
    module.run.log_every = 1
    module = fit(module, 19, tmp_path, callbacks=[stores])
    assert [stores.begins[k] for k in range(1, 8)] == [0, 2, 6, 10, 14, 16, 18]
    assert [steps for steps, _ in zip((s for s, _ in module.schedule()), range(6))] == [2, 6, 10, 14, 16, 18]
    for k, store in stores.seen.items():
        version, group = store.episodes["policy_version"], store.episodes["group"]
        fresh = len(np.unique(group[version == k]))
        assert fresh == (6 if 2 <= k <= 4 else 10)
        assert version.min() >= (max(1, k - 2) if k <= 4 else k)
        for rows in stores.taken[k]:
            assert len(rows) == 20
            assert {int(v) for v in version[rows]} <= set(range(max(1, k - 2), k + 1))
        sweeps = [np.concatenate(stores.taken[k][i : i + 2]) for i in range(0, len(stores.taken[k]), 2)]
        assert all(len(np.unique(rows)) == 40 for rows in sweeps)
    rows = Table(tmp_path / "metrics.csv").rows()
    by_step = {int(row["step"]): row for row in rows}
    assert by_step[15]["train/kl/base"] < 1e-9 < 1e-6 < by_step[14]["train/kl/base"]
    assert by_step[15]["train/iteration"] == 5 and by_step[19]["train/answers"] == 40 + 3 * 24 + 3 * 40
    clipped = [by_step[s]["train/ratio/clipped"] for s in (1, 3, 7, 11)]
    assert clipped == [0.0] * 4  # at the start of an iteration no token is clipped, whatever its age
    assert by_step[7]["train/ratio/mean_lag1"] != 1.0 and by_step[7]["train/kl/previous"] < 1e-9


def test_iterations_that_want_more_than_is_kept(policy: Path) -> None:
    """Of 4 groups 3 are to be old, from the iteration before alone: 4 fresh ones, 1, and 3 where only 1 is there."""
    stores = Stores()
    module = fit(method("ReMix", policy, replay_fraction=0.75, replay_window=1), 14, callbacks=[stores], held_out=False)
    fresh = [len(np.unique(s.episodes["group"][s.episodes["policy_version"] == k])) for k, s in stores.seen.items()]
    assert fresh == [4, 1, 3, 1]
    assert [problems for _, problems in zip(range(4), (p for _, p in module.schedule()))] == np.cumsum(fresh).tolist()


def test_answers_far_from_the_policy_are_forgotten(policy: Path) -> None:
    stores = Stores()
    module = method("ReMix", policy, min_ess=1.0, replay_window=3)
    fit(module, 6, callbacks=[stores], held_out=False)
    for k, store in stores.seen.items():
        assert (store.episodes["policy_version"] == k).all() and len(stores.taken[k]) == 2
        assert store.num_episodes == 16


def test_groups_of_rl_plus(policy: Path) -> None:
    """One demonstration per group where there is one, judged like the others, never kept, never counted as written."""
    problems, stores = toy_problems(), Stores()
    problems.tables["problems"][:3, 1] = -1
    module = method("RLPlus", policy, max_new_tokens=3)
    module = fit(module, 8, callbacks=[stores], problems=problems)
    whole = cut = 0
    for store in stores.seen.values():
        for group in np.unique(store.episodes["group"]):
            rows = store.episodes["group"] == group
            prompt = store.episodes["prompt"][rows][0]
            shown = store.episodes["source"][rows] == DEMONSTRATION
            assert rows.sum() == 4 and shown.sum() == (problems.tables["problems"][prompt, 1] >= 0)
            rewards = store.episodes["reward"][rows]
            np.testing.assert_allclose(store.episodes["advantage"][rows], rewards - rewards.mean(), atol=1e-6)
            if shown.any():
                row = np.flatnonzero(rows)[shown][0]
                text = token_ids(problems, problems.tables["problems"][prompt, 1])
                token = store.steps["token"][store.start[row] :][: store.length[row]]
                assert token.tolist() == text[:3].tolist()
                whole, cut = whole + (len(text) <= 3), cut + (len(text) > 3)
                assert store.episodes["ended"][row] == (len(text) <= 3)
    assert whole and cut
    written = sum(int((s.episodes["source"] == OWN).sum()) for s in stores.seen.values())
    assert module.generated == written < 16 * len(stores.seen)


def test_groups_that_go_on_from_a_beginning(policy: Path, tmp_path: Path) -> None:
    """Half of a demonstration, rounded down, is given: ⌊n/2⌋ tokens, at least 1 and at most one less than there are and
    than an answer may have. What follows is what π_v says to prompt and beginning, never longer than an answer."""
    problems, stores, weights = toy_problems(), Stores(), Weights()
    table = problems.tables["problems"]
    table[0, 1] = -1
    problems.length[table[1:4, 1]] = 1, 2, 3
    module = method("RLPlus", policy, max_new_tokens=3, demonstration_share=0.5, lag=1, micro_batch_size=5)
    module = fit(module, 8, tmp_path, callbacks=[stores, weights], problems=problems, held_out=False)
    engine, seen = TransformersEngine(), set()
    for k, store in stores.seen.items():
        facts = store.episodes
        assert set(facts["source"].tolist()) <= {OWN, CONTINUED} and (facts["policy_version"] == max(1, k - 1)).all()
        for group in np.unique(facts["group"]):
            rows = np.flatnonzero(facts["group"] == group)
            prompt, solution = (token_ids(problems, i) if i >= 0 else [] for i in table[facts["prompt"][rows[0]]])
            begun = rows[facts["source"][rows] == CONTINUED]
            m = 0 if len(solution) < 2 else min(max(1, len(solution) // 2), 2)
            assert len(rows) == 4 and len(begun) == (m > 0)
            assert facts["given"][rows].tolist() == [0] * 3 + [m]
            np.testing.assert_allclose(
                facts["advantage"][rows], facts["reward"][rows] - facts["reward"][rows].mean(), atol=1e-6
            )
            seen.add((len(solution), m))
            if not m:
                continue
            token = token_ids(store, begun[0])
            engine.sync(weights.seen[max(1, k - 1)], k)
            asked = Request(np.append(prompt, solution[:m]), (group & 0xFFFFFFFF) + CONTINUES, 1, room=3 - m)
            ((drawn,),) = engine.generate([asked], module.answering.sampling(k, 0))
            assert token.tolist() == [*solution[:m].tolist(), *drawn.token.tolist()] and len(token) <= 3
            logp = store.steps["sampler_logp"][store.start[begun[0]] :][: len(token)]
            assert np.isnan(logp[:m]).all() and np.allclose(logp[m:], drawn.logp, atol=1e-6)
            assert facts["ended"][begun[0]] == drawn.ended
    assert seen >= {(0, 0), (1, 0), (2, 1), (3, 1), (4, 2)}
    assert module.generated == 16 * len(stores.seen)
    fact = dict(module.describe().facts)["share"]
    assert "from the first 50 % of a demonstration" in fact and "1 are too short" in fact
    row = Table(tmp_path / "metrics.csv").rows()[-1]
    assert 1 <= row["train/answers/length"] <= 3 and row["train/reward/external"] >= 0
    assert 1 <= row["train/length/lag1"] <= 3  # of answers that are the policy's from their first token
    with pytest.raises(
        UsageError, match=r"asked for with another `group_size`, `demonstrations`, `demonstration_share` or"
    ):
        changed = method("RLPlus", policy, max_new_tokens=3, lag=1, micro_batch_size=5)
        fit(changed, 9, ckpt_path=newest_checkpoint(tmp_path), problems=problems, held_out=False)


def test_shares_of_demonstrations_that_cannot_be(policy: Path) -> None:
    for share in (0, -0.5, 1.5):
        with pytest.raises(UsageError, match="`demonstration_share`"):
            method("RLPlus", policy, demonstration_share=share)
    with pytest.raises(UsageError, match=r"`demonstrations` 0.*demonstrations 1"):
        method("GRPO", policy, demonstration_share=0.5)
    with pytest.raises(DataError, match=r"5 token\(s\) and answers have 1 at most.*max_new_tokens"):
        fit(method("RLPlus", policy, demonstration_share=0.5, max_new_tokens=1), 1)
    with pytest.raises(DataError, match="learns from demonstrations"):
        fit(
            method("ReMix", policy, demonstrations=1, demonstration_share=0.5),
            1,
            problems=toy_problems(demonstrations=False),
        )


def test_a_lone_right_demonstration() -> None:
    """Rewards 1 and seven times 0: A = 7/8 and −1/8, and 2.475 and −0.354 with the deviation."""
    from lightning_modules.rl_plus import RLPlus

    rewards, group = torch.tensor([1.0] + [0.0] * 7, dtype=torch.float64), torch.zeros(8, dtype=torch.int64)
    own = torch.arange(8) > 0
    plain, divided = (RLPlus(policy="x", advantage_std=std).objective.advantages(rewards, group, own) for std in (0, 1))
    assert plain.tolist() == pytest.approx([0.875] + [-0.125] * 7)
    assert divided.tolist() == pytest.approx([2.475] + [-0.3536] * 7, abs=1e-3)


@pytest.mark.slow
def test_rewards_of_random_answers_rise(policy: Path, tmp_path: Path) -> None:
    """On-policy, and on old answers with a critic."""
    for name, options in (("GRPO", {}), ("ReMix", {"base": "ppo", "group_size": 1})):
        module = method(name, policy, batch_size=32, minibatches=1, **options, critic_lr=1e-2, lr=5e-3)
        module.run.eval_every = 0
        folder = tmp_path / f"{name}{len(options)}{'base' in options}"
        fit(module, 20, folder, held_out=False)
        rewards = [row["train/reward/own"] for row in Table(folder / "metrics.csv").rows() if "train/reward/own" in row]
        rewards = [r for r in rewards if isinstance(r, float)]
        assert rewards[-1] > rewards[0] + 0.1, (name, rewards)


def test_held_out_numbers(policy: Path, tmp_path: Path) -> None:
    module = method("GRPO", policy, eval_samples=3, rewards=["test_rlvr_methods.odd_small"])
    fit(module, 3, tmp_path)
    row = Table(tmp_path / "evals.csv").rows()[-1]
    # problems 0 … 4, of which 1 and 3 are odd; the reward says that those are solved
    assert row["eval/accuracy"] == row["eval/mean@3"] == row["eval/pass@3"] == 0.4
    assert row["eval/odd/accuracy"] == 1.0 and row["eval/accuracy_best"] == 0.4


def odd_small(prompt: str, answer: str, reference: str | None) -> float:
    return float(reference in ("1", "3"))


def broken(prompt: str, answer: str, reference: str | None) -> float:
    if reference == "1":
        raise KeyError("gone")
    return float("nan") if reference == "2" else 1.0


def test_rewards_that_fail_are_counted_and_shown(policy: Path, tmp_path: Path) -> None:
    module = method("GRPO", policy, rewards=["test_rlvr_methods.broken"], batch_size=48, minibatches=1)
    with pytest.warns(UserWarning, match="reward 'broken'"):
        fit(module, 2, tmp_path, held_out=False)
    row = Table(tmp_path / "metrics.csv").rows()[-1]
    assert row["train/reward/problems"] == pytest.approx(8)  # two of twelve problems, four answers each
    assert row["train/reward/own"] == pytest.approx(10 / 12)


def test_the_base_is_looked_at_without_a_second_model(policy: Path) -> None:
    module = fit(method("GRPO", policy), 2, held_out=False)
    before = {name: p.clone() for name, p in module.model.named_parameters()}
    original = dict(reference_policy(policy).float().named_parameters())
    with pytest.raises(ZeroDivisionError), module.scoring.under(module.scoring.base):
        assert all(torch.equal(p, original[name]) for name, p in module.model.named_parameters())
        raise ZeroDivisionError
    assert all(torch.equal(p, before[name]) for name, p in module.model.named_parameters())


def test_answers_of_others_keep_the_log_probabilities_they_were_drawn_with(policy: Path, tmp_path: Path) -> None:
    problems, stores = toy_problems(4), Stores()
    lines = []
    for row in range(4):
        prompt = token_ids(problems, problems.tables["problems"][row, 0]).tolist()
        answers = [[5 + k, 6, 2] for k in range(4)]
        logps = [[-1.0 - k, -2.0, -0.5] for k in range(4)] if row else None
        lines.append({"prompt": prompt, "completions": answers, "ended": [True] * 4, "logps": logps})
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"engine": "replay", "records": str(tmp_path / "records.jsonl"), "minibatches": 1, "batch_size": 16}
    module = method("GRPO", policy, **options)
    module.run.log_every = 1
    fit(module, 1, tmp_path, callbacks=[stores], problems=problems, held_out=False)
    store = stores.seen[1]
    for row in range(store.num_episodes):
        span = slice(store.start[row], store.start[row] + 3)
        unknown = store.episodes["prompt"][row] == 0
        first = store.steps["token"][store.start[row]] - 5
        expected = store.steps["previous_logp"][span] if unknown else [-1.0 - first, -2.0, -0.5]
        assert store.steps["logp"][span].tolist() == list(expected)
    metrics = Table(tmp_path / "metrics.csv").rows()[0]
    assert np.isfinite(metrics["train/loss"]) and metrics["train/ratio/ess"] < 1.0


@pytest.mark.slow
def test_adapters(policy: Path, tmp_path: Path) -> None:
    """The base is the policy with its adapters as they began; answers come from the adapted model."""
    pytest.importorskip("peft")
    module = method("ReMix", policy, lora_rank=2, reincarnation=2)
    module.run.log_every = 1
    module = fit(module, 8, tmp_path, held_out=False)
    rows = Table(tmp_path / "metrics.csv").rows()
    assert rows[0]["train/kl/base"] < 1e-9 < rows[5]["train/kl/base"] and rows[6]["train/kl/base"] < 1e-9
    assert set(module.scoring.base) == {name for name, p in module.model.named_parameters() if p.requires_grad}


def test_dropout_is_no_part_of_what_the_policy_thought(policy: Path) -> None:
    """Log-probabilities of the behaviour are those of the whole policy, which drew the answers."""
    pytest.importorskip("peft")
    module = fit(method("GRPO", policy, lora_rank=2, lora_dropout=0.5, lr=0.1), 3, held_out=False)
    steps = module.course.rollouts.store.steps
    assert module.iteration == 2
    np.testing.assert_allclose(steps["logp"], steps["sampler_logp"], atol=1e-4)


@pytest.mark.parametrize("lag", [0, 1])
def test_variants_beside_other_options(lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A divergence is added to a variant's own; an entropy bonus beside its own term is refused; its options hold where
    a user leaves the default; each is an objective with a lag too."""
    from lightning_modules.grpo import GRPO

    for name, row in VARIANTS.items():
        assert row.method or GRPO(policy="x", variant=name, lag=lag).objective
    parts = {"anchors": ({"name": "k2", "coef": 0.1},), "entropy": {"name": "bonus", "coef": 0.2}}
    made = Variant("made", "Made", "0000.00000", "nothing", parts, {"sweeps": 3, "group_size": 6, "beta": 0.5})
    monkeypatch.setitem(VARIANTS, "made", made)
    found = GRPO(policy="x", variant="made", group_size=4, lag=lag)
    assert (found.hparams.sweeps, found.hparams.group_size, found.hparams.beta) == (3, 4, 0.5)
    assert [one["name"] for one in found.objective.anchors] == ["k2", "k3"]  # type: ignore[index]
    assert found.of_variant == {"sweeps": 3, "beta": 0.5}
    again = GRPO(**found.hparams)
    assert again.hparams == found.hparams and again.of_variant == found.of_variant
    assert dict(found.objective_facts())["not the variant's"] == "--model.group_size 4"
    with pytest.raises(UsageError, match="has an entropy term of its own"):
        GRPO(policy="x", variant="made", group_size=4, entropy=0.1)
    monkeypatch.setitem(VARIANTS, "made", Variant("made", "Made", "", "", method="HPT"))
    with pytest.raises(UsageError, match="Pass --model HPT"):
        GRPO(policy="x", variant="made")
    with pytest.raises(UsageError, match=r"Pass --model SFT --model\.weighting otr"):
        GRPO(policy="x", variant="otr")
    with pytest.raises(UsageError, match="which is not here: answers branch"):
        GRPO(policy="x", variant="ARPO")
    with pytest.raises(UsageError, match=r"Did you mean 'dapo'\?"):
        GRPO(policy="x", variant="dapoo")
    for name in ("DAPO", "Dr-GRPO"):
        folded, usual = GRPO(policy="x", variant=name), GRPO(policy="x", variant=name.lower().replace("-", "_"))
        assert folded.hparams == usual.hparams and folded.objective == usual.objective


@pytest.mark.parametrize("known", [VARIANTS, ABSENT])
def test_names_of_variants_stay_apart_without_their_case(known: dict[str, Any]) -> None:
    assert len({fold(name) for name in known}) == len(known)


def test_objectives_are_data(policy: Path) -> None:
    from lightning_modules.grpo import GRPO
    from lightning_modules.rl_plus import RLPlus

    names = [name for name, row in VARIANTS.items() if not row.method]
    found = {name: GRPO(policy="x", variant=name, lag=0).objective for name in names}
    told = {name: (repr(found[name]), repr(sorted(VARIANTS[name].options.items()))) for name in names}
    assert len(set(told.values())) == len(names)
    assert found["dapo"].trust == {"name": "ppo", "low": 0.2, "high": 0.28}
    assert GRPO(policy="x", variant="gspo", clip=1e-3).objective.trust["high"] == 1e-3  # type: ignore[index]
    changed = GRPO(policy="x", objective={"trust": "none", "anchors": [{"name": "k2", "coef": 0.5}]}).objective
    assert changed.trust == "none" and changed.advantage == "grpo"
    own = RLPlus(policy="x", own_weight=0.5, uniform="one")
    assert own.objective.weight[1] == {"name": "source", "own": 0.5, "external": 1.0}
    assert fit(method("RLPlus", policy), 1, held_out=False).objective.ratio["vocabulary"] == 64


def astray(tokens: Any) -> Any:
    return tokens.base_logps


astray.reads = {"base_logps"}  # type: ignore[attr-defined]


OWN_PARTS = """
import torch
from offpolicy.losses.variants import VARIANTS, Variant
from offpolicy.losses.policy_gradient import Ratio, Surrogate

class Steps:
    critic = True
    def __call__(self, rewards, value, mask):
        return mask * (rewards[:, None] - value), mask * rewards[:, None]

def surprise(rewards, group, own, *, scale):
    return scale * (rewards - rewards.mean())

def square(tokens):
    return Ratio((2 * (tokens.logp - tokens.behavior_logp)).exp())

def capped(ratio, advantage, tokens, *, cap):
    return Surrogate((ratio.value * advantage).clamp(max=cap), ratio.value * advantage > cap)

def rows(values, mask, totals):
    return (values * mask).sum() / totals.rows

def drift(tokens, *, iteration, coef):
    return coef / iteration * (tokens.base_kl + (tokens.logp - tokens.base_logp).square())
drift.reads = ("base_kl", "base_logp")

def undecided(tokens, *, iteration):
    return -1e-3 * tokens.entropy
undecided.reads = ("entropy",)

def young(tokens):
    return 0.5 ** tokens.lag[:, None].to(tokens.mask)

def nearly(tokens, *, iteration):
    return (tokens.value - tokens.returns).abs()
nearly.reads = ("value", "returns")
"""


@pytest.mark.parametrize("critic", [False, True])
def test_components_of_ones_own_train(
    critic: bool, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of a file outside of the package in every slot, through whole iterations with replayed answers."""
    (tmp_path / "own_parts.py").write_text(OWN_PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    objective: dict[str, Any] = {
        "advantage": "own_parts.Steps" if critic else {"name": "own_parts.surprise", "scale": 2.0},
        "ratio": "own_parts.square",
        "trust": {"name": "own_parts.capped", "cap": 3.0},
        "aggregation": "own_parts.rows",
        "anchors": [{"name": "own_parts.drift", "coef": 0.1}],
        "entropy": "own_parts.undecided",
        "weight": ["own_parts.young"],
        "value": "own_parts.nearly" if critic else "none",
    }
    module = method("GRPO", policy, objective=objective, replay_fraction=0.5, replay_window=1, critic_lr=1e-2)
    module = fit(module, 6, tmp_path / "run", held_out=False)
    rows = Table(tmp_path / "run" / "metrics.csv").rows()
    assert all(np.isfinite(row["train/loss"]) for row in rows) and rows[-1]["train/kl/base"] > 0
    assert ("train/critic/error" in rows[-1]) == critic
    sys.modules.pop("own_parts")


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("GRPO", {"variant": "gsppo"}, "Did you mean 'gspo'"),
    ("GRPO", {"variant": "rloo", "clip": 0.2}, "`clip` is given, and the trust region of the variant 'rloo' is 'none'"),
    ("GRPO", {"clip": 0.2, "objective": {"trust": "none"}}, "`clip` is 0.2, and `objective` names the `trust`"),
    ("GRPO", {"batch_size": 9}, "expected a multiple, as groups stay whole. Pass --model.batch_size 8"),
    ("GRPO", {"objective": {"trsut": "none"}}, "Did you mean 'trust'"),
    (
        "GRPO",
        {"objective": {"value": "squared"}},
        "reads returns, value of a critic, and the advantages come from none",
    ),
    (
        "GRPO",
        {"objective": {"weight": ["test_rlvr_methods.astray"]}},
        "reads base_logps; expected fields of the tokens",
    ),
    ("GRPO", {"group_size": 1}, "compares the answers of a group, so it would always be 0; expected ≥ 2"),
    ("GRPO", {"replay_fraction": 0.4}, "`replay_window` is 0"),
    ("ReMix", {"replay_fraction": 0.1}, "of the 4 groups of an iteration makes 0; expected one replayed group"),
    ("ReMix", {"replay_fraction": 0.9}, "of the 4 groups of an iteration makes 4; expected one replayed group"),
    ("GRPO", {"temperature": 0.0}, "`temperature` is 0.0"),
    ("GRPO", {"clip": 0.0, "objective": {"trust": "none"}}, "`clip` is 0.0, and `objective` names the `trust`"),
    ("GRPO", {"clip": 2.0}, "`clip` is 2.0; expected a value in [0.0, 1.0]"),
    ("GRPO", {"reference": "live"}, "`reference` is for preference methods"),
    ("GRPO", {"demonstrations": 2}, "`demonstrations` is 2"),
    ("GRPO", {"kl": "k4"}, "`kl` is 'k4'; expected one of k1, k2, k3, full"),
    ("ReMix", {"base": "trpo"}, "`base` is 'trpo'"),
    ("ReMix", {"clip_center": "both"}, "`clip_center` is 'both'"),
    ("ReMix", {"critic": "tail"}, "`critic` is 'tail'"),
    ("RLPlus", {"uniform": "none"}, "`uniform` is 'none'"),
    ("RLPlus", {"gamma": -1.0}, "`gamma` is -1.0"),
    ("RLPlus", {"clip": 2.0}, "`clip` is 2.0"),
    ("RLPlus", {"group_size": 1}, "leaves no answer of the policy beside the demonstration; expected ≥ 2"),
]


@pytest.mark.parametrize("name, options, words", MISTAKES)
def test_impossible_options(name: str, options: dict[str, Any], words: str, policy: Path) -> None:
    with pytest.raises(UsageError) as caught:
        method(name, policy, **options)
    assert words in str(caught.value)


def test_parts_that_would_pay_nothing_are_refused(policy: Path) -> None:
    forward = {"name": "forward", "coef": 1.0, "gate": "external"}
    for parts in ({"anchors": [forward]}, {"terms": "sft"}):
        with pytest.raises(UsageError, match="`demonstrations` is 0, so it would pay nothing"):
            fit(method("GRPO", policy, objective=parts), 1)
    compared = {"anchors": [forward | {"reference": "behavior"}]}
    with pytest.raises(DataError, match="does not say how likely its solutions were, so it would pay nothing"):
        fit(method("GRPO", policy, objective=compared, demonstrations=1), 1)


def test_impossible_data(policy: Path) -> None:
    from tiny import toy_pairs

    with pytest.raises(DataError, match="has none; expected a column `solution`"):
        fit(method("RLPlus", policy), 1, problems=toy_problems(demonstrations=False))
    with pytest.raises(DataError, match="does not say how likely its solutions were; expected a column"):
        fit(method("RLPlus", policy, demonstrator="known"), 1)
    with pytest.raises(DataError, match="holds no problems"):
        fit(method("GRPO", policy), 1, problems=toy_pairs())
