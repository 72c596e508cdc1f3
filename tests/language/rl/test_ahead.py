"""Answers drawn before the iteration that they are for: versions, composition, log-probabilities, metrics."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from tiny_rl import ThreadEngine, fit, method, toy_problems

from offpolicy.data.texts.sequences import spans, token_ids
from offpolicy.errors import UsageError
from offpolicy.files import Table
from offpolicy.language.rl.ahead import _were_asked, packed_answers, unpacked_answers
from offpolicy.language.rl.asking import problems_in_turn
from offpolicy.language.rl.engine import Completion, Request
from offpolicy.language.rl.engines import TransformersEngine
from offpolicy.language.rl.objective import age_fact


class Seen(Callback):
    """The store of answers of every iteration as its last step leaves it, and the weights that it began with."""

    def __init__(self) -> None:
        self.stores: dict[int, Any] = {}
        self.weights: dict[int, Any] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.course.is_over(pl_module.global_step):
            self.weights[pl_module.iteration + 1] = copy.deepcopy(pl_module.model).eval()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.stores[pl_module.iteration] = trainer.datamodule.rollouts


def same_weights(ours: Any, theirs: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_on_policy_is_decided_answer_by_answer(policy: Path) -> None:
    """Where an engine is one version late, its own log-probabilities are the behaviour's; else the trainer's are."""
    seen = Seen()
    module = method("GRPO", policy, engine="tiny_rl.LateEngine", lr=0.1)
    fit(module, 4, callbacks=[seen], held_out=False)
    store = seen.stores[2]
    version = store.episodes["policy_version"]
    assert (store.episodes["iteration"] == 2).all() and sorted(set(version.tolist())) == [1, 2]
    late, now = (spans(store, np.flatnonzero(version == v)) for v in (1, 2))
    logp, previous, sampler = (np.asarray(store.steps[k]) for k in ("logp", "previous_logp", "sampler_logp"))
    assert (logp[late] == sampler[late]).all() and abs(previous[late] - logp[late]).max() > 1e-3
    assert (logp[now] == previous[now]).all() and abs(logp[now] - sampler[now]).max() < 1e-4


@pytest.mark.parametrize("lag", [1, 3])
def test_answers_are_those_of_the_policy_of_then(lag: int, policy: Path, tmp_path: Path) -> None:
    """Iteration k learns from what π_v says to its own problems with its own random numbers, v = max(1, k − L)."""
    seen = Seen()
    module = fit(method("GRPO", policy, lag=lag), 10, tmp_path, callbacks=[seen], held_out=False)
    problems, engine = toy_problems(), TransformersEngine()
    for k, store in seen.stores.items():
        version = max(1, k - lag)
        assert (store.episodes["policy_version"] == version).all() and (store.episodes["iteration"] == k).all()
        prompts = store.episodes["prompt"][::4]
        assert sorted(prompts) == sorted(problems_in_turn(len(module.problems.tables["problems"]), 4, 4 * (k - 1), 0))
        engine.sync(seen.weights[version], version)
        asked = [Request(token_ids(problems, problems.tables["problems"][p, 0]), i, 4) for i, p in enumerate(prompts)]
        drawn = [one for some in engine.generate(asked, module.answering.sampling(k, 0)) for one in some]
        assert all((one.token == token_ids(store, row)).all() for row, one in enumerate(drawn))
        assert np.array_equal(np.concatenate([one.logp for one in drawn]), store.steps["sampler_logp"])
        assert k == 1 or np.array_equal(store.steps["logp"], store.steps["sampler_logp"])
    rows = Table(tmp_path / "metrics.csv").rows()
    assert [row["train/engine/version_lag"] for row in rows] == [min(lag, k - 1) for k in range(1, 6)]
    assert rows[0]["train/engine/queue"] == 16 * lag and rows[0].get("train/ratio/mean_lag0") is not None
    last = rows[-1]
    assert last["train/ratio/q50_lag2" if lag == 3 else "train/ratio/q50_lag1"] > 0
    assert last.get("train/ratio/q50_lag0") is None


@pytest.mark.parametrize("name", ["GRPO", "ReMix", "RLPlus"])
def test_an_engine_beside_the_trainer_gives_the_same(name: str, policy: Path, tmp_path: Path) -> None:
    """Whether answers are drawn when they are asked for or during the steps, with evaluations in between or without."""
    options = {"lag": 1, "min_ess": 0.9 if name == "ReMix" else 0.0}
    plain = fit(method(name, policy, **options), 9, tmp_path / "plain")
    beside = fit(method(name, policy, engine="tiny_rl.ThreadEngine", **options), 9, tmp_path / "beside", held_out=False)
    assert same_weights(plain, beside) and plain.generated == beside.generated
    assert beside.answering.engine.most_open == 1
    row = Table(tmp_path / "beside" / "metrics.csv").rows()[-1]
    assert 0 <= row["perf/engine_idle_share"] <= 1 and row["perf/engine_wait_seconds"] >= 0


class CountedEngine(ThreadEngine):
    """Gives back the first two tokens of answers, and counts two seconds for what it draws beside the trainer."""

    def submit(self, ticket: int, requests: Any, how: Any) -> None:
        super().submit(ticket, requests, how)
        self.open[ticket][0].join()
        self.drawing_seconds = round(self.drawing_seconds) + 2.0

    def collect(self, ticket: int, stopped: Any = None) -> Any:
        found = super().collect(ticket, stopped)
        return [[Completion(one.token[:2], one.logp[:2], False) for one in some] for some in found]

    def generate(self, requests: Any, how: Any, stopped: Any = None) -> Any:
        self.drawing_seconds += 1000.0  # evaluations and probes are not answers of training
        return super().generate(requests, how, stopped)


def test_the_speed_of_an_engine_and_what_it_gives_up(policy: Path, tmp_path: Path) -> None:
    """The second iteration learns from what was drawn beside the trainer, the first from what `generate` gave."""
    fit(method("GRPO", policy, engine="test_ahead.CountedEngine", lag=1), 4, tmp_path)
    first, second = Table(tmp_path / "metrics.csv").rows()
    assert first["train/answers/aborted"] == 0.0 and first["train/answers/length"] > 2.0
    assert first["perf/engine_tokens_per_s"] > 0.0
    assert second["train/answers/aborted"] == 1.0 and second["train/answers/length"] == 2.0
    assert second["perf/engine_tokens_per_s"] == 16 * 2.0 / 2.0


def test_a_lag_changes_what_is_learned(policy: Path) -> None:
    late, now = (fit(method("GRPO", policy, lag=lag), 6, held_out=False) for lag in (1, 0))
    assert not same_weights(late, now)


def test_groups_that_were_not_asked_for_are_drawn_at_once(policy: Path) -> None:
    """All old answers are too far from the policy, so half of each iteration, planned as old, is drawn by π_k."""
    seen = Seen()
    module = method("ReMix", policy, lag=1, min_ess=1.0, replay_fraction=0.5, reincarnation=None)
    fit(module, 10, callbacks=[seen], held_out=False)
    asked = []
    for k, store in seen.stores.items():
        group, first = np.unique(store.episodes["group"], return_index=True)
        assert (group >> 32 == k).all() and (group & 0xFFFFFFFF).tolist() == [0, 1, 2, 3]
        late = [1, 1, 1, 1] if k == 1 else [k - 1, k - 1, k, k]
        assert store.episodes["policy_version"][first].tolist() == late
        asked += store.episodes["prompt"][first].tolist()
    assert len(asked) == 20 and module.course.problems_seen == 20
    late, stream = module.ahead.asked[6], problems_in_turn(len(module.problems.tables["problems"]), 22, 0, 0).tolist()
    assert late.groups == 2 and sorted(asked) == sorted(stream[: late.seen] + stream[late.seen + 2 :])


def test_what_is_planned_is_what_an_iteration_needs(policy: Path) -> None:
    """Without forgetting, an iteration with a lag has the fresh and the replayed groups that it has without one."""
    counts = []
    for lag in (0, 2):
        seen = Seen()
        options = {"replay_fraction": 0.75, "replay_window": 2, "reincarnation": 4}
        fit(method("ReMix", policy, lag=lag, **options), 18, callbacks=[seen], held_out=False)
        counts.append([int((s.episodes["iteration"] == k).sum()) for k, s in seen.stores.items()])
    assert counts[0] == counts[1] and len(set(counts[0])) > 1


def test_answers_come_back_from_a_checkpoint_as_they_were() -> None:
    rng = np.random.default_rng(0)

    def completion(n: int, version: int | None) -> Completion:
        drew = None if version is None else np.full(n, version)
        return Completion(rng.integers(0, 9, n), rng.random(n, np.float32), bool(n % 2), drew)

    answers = [[completion(3, 4), completion(1, 4)], [], [completion(5, None)]]
    requests = [Request(np.array([1]), number, len(some)) for number, some in zip((7, 2, 0), answers)]
    found = unpacked_answers(packed_answers(requests, answers))
    assert list(found) == [7, 2, 0]
    for some, ours in zip(answers, found.values(), strict=True):
        for a, b in zip(some, ours, strict=True):
            assert a.token.tolist() == b.token.tolist() and a.logp.tolist() == b.logp.tolist() and a.ended == b.ended
            assert (a.version is None) == (b.version is None)
            assert a.version is None or a.version.tolist() == b.version.tolist()
    assert unpacked_answers(packed_answers([], [])) == {}


def test_what_corrects_for_age(policy: Path) -> None:
    """GRPO weighs by default; a part that the user names comes first; without a lag nothing changes."""
    decoupled = {"name": "decoupled", "cap": 3.0}
    for variant in ("grpo", "dr_grpo", "dapo", "rloo"):
        assert method("GRPO", policy, variant=variant, lag=1).objective.ratio == decoupled
        assert method("GRPO", policy, variant=variant).objective.ratio == "token"
    gspo = method("GRPO", policy, variant="gspo", lag=1).objective
    assert gspo.ratio == "sequence" and gspo.weight == ({"name": "age", "cap": 3.0},)
    assert method("GRPO", policy, lag=1, objective={"ratio": "token"}).objective.ratio == "token"
    for name in ("ReMix", "RLPlus"):
        assert method(name, policy, lag=1).objective == method(name, policy).objective
    for module, text in (
        (method("GRPO", policy, lag=1), "importance weight of the token, at most 3"),
        (method("GRPO", policy, lag=1, variant="gspo"), "times the importance weight of the answer"),
        (method("ReMix", policy, lag=1), "clipped around that of the policy of now"),
        (method("RLPlus", policy, lag=1), "the ratio is to the policy that drew a token"),
    ):
        assert text in age_fact(module.objective)


def test_the_first_screen_says_how_answers_are_drawn(policy: Path) -> None:
    found = {}
    for engine in ("transformers", "tiny_rl.ThreadEngine"):
        module = fit(method("GRPO", policy, engine=engine, lag=2), 1, held_out=False)
        facts = dict(module.describe().facts)
        found[engine] = facts["lag"]
        assert "decoupled" not in facts["age"] and "importance weight" in facts["age"]
    assert found["transformers"].endswith(
        "engine 'transformers' draws them when they are asked for, so nothing overlaps"
    )
    assert found["tiny_rl.ThreadEngine"] == "answers are 2 iterations old, drawn while the policy trains"


def test_lags_that_cannot_be(policy: Path) -> None:
    with pytest.raises(UsageError, match=r"`lag` is 3.*`replay_window` is 2.*replay_window 3"):
        method("ReMix", policy, lag=3)
    method("GRPO", policy, lag=3)
    with pytest.raises(UsageError, match="`lag`"):
        method("GRPO", policy, lag=-1)
    with pytest.raises(UsageError, match=r"draws on the device that trains.*devices"):
        fit(method("GRPO", policy, lag=1, engine="tiny_rl.SharingEngine"), 1)


def test_answers_that_were_kept_belong_to_their_requests() -> None:
    requests = [Request(np.arange(3), 7, 1)]  # a prompt with the beginning of a demonstration, of three tokens in all
    part = packed_answers(requests, [[Completion(np.array([1, 2]), np.zeros(2), True)]])
    assert _were_asked({7: (1, 3)}, [part])
    assert not _were_asked({7: (1, 2)}, [part]) and not _were_asked({7: (2, 3)}, [part])
    del part["prompt"]  # checkpoints of before
    assert _were_asked({7: (1, 2)}, [part])
