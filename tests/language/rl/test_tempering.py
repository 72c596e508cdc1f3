"""Hot and cold answers: how hot, to which problems, with which random numbers, and what is learned from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tiny_rl import early_letters, fit, make_policy, method, told_problems
from toy import differences, run_files
from transformers import AutoTokenizer

from offpolicy.data.replay import Replay
from offpolicy.errors import UsageError
from offpolicy.language.rl.correcting import AGAIN
from offpolicy.language.rl.engine import CONTINUES, Completion, Request, Sampling
from offpolicy.language.rl.engines import TransformersEngine, answer_uniforms
from offpolicy.language.rl.hints import BEHIND_HINT
from offpolicy.language.rl.tempering import TEMPERED, Tempering, drawn_entropy, with_tempered
from offpolicy.losses.tokens import Tokens, Totals
from offpolicy.training.checkpoints import newest_checkpoint

OPTIONS: dict[str, Any] = {
    "variant": "aepo",
    "tempering": {"name": "aepo", "target": 9.0, "high": 1.5, "low": 0.5, "share": 0.5},
    "rewards": ["tiny_rl.ends_early"],
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("tempering") / "policy")


def test_entropy_and_temperature_by_hand() -> None:
    """(1 + 2 + 6)/3 = 3 nats over the tokens of both own answers; a demonstration says nothing."""
    rows = [{"source": 0, "logp": np.array([-1.0, -2.0])}, {"source": 0, "logp": np.array([-6.0])}]
    assert drawn_entropy([*rows, {"source": 1, "logp": np.array([-99.0])}]) == 3.0
    rule = Tempering(target=3.0, high=1.25, low=0.5)
    assert [rule.heat(entropy) for entropy in (2.9, 3.0, 3.1)] == [1.25, 1.25, 0.5]
    with pytest.raises(UsageError, match="expected a number for each"):
        drawn_entropy([*rows, {"source": 0, "logp": np.array([np.nan])}])


def groups_of(k: int, groups: int) -> Replay:
    slot = np.repeat(np.arange(groups), 2)
    episodes = {"group": slot + (k << 32), "prompt": slot + 100, "asked": slot % 3}
    return Replay({"token": slot}, start=np.arange(len(slot)), length=np.ones_like(slot), episodes=episodes)


@pytest.mark.parametrize(("groups", "share", "count"), [(64, 1 / 64, 1), (4, 1 / 64, 1), (8, 0.25, 2), (5, 1.0, 5)])
def test_groups_that_are_answered_once_more(groups: int, share: float, count: int) -> None:
    """A share of the groups, at least one, each with its problem and words; others in other iterations."""
    found = [Tempering(share=share).chosen(groups_of(k, groups), k, 0) for k in range(1, 20)]
    for some in found:
        assert len(some) == count and some == sorted(set(some))
        assert all((problem, words) == (slot + 100, slot % 3) for slot, problem, words in some)
    assert count == groups or len({tuple(some) for some in found}) > 1
    assert found[0] == Tempering(share=share).chosen(groups_of(1, groups), 1, 0)


@pytest.mark.parametrize("length", [5, 2048, 4096, 8192, 16384, 32768])
def test_no_two_answers_of_an_iteration_share_random_numbers(length: int) -> None:
    numbers = [(s, 2) for s in (0, 1, TEMPERED, TEMPERED + 1)]
    numbers += [(first + s, 1) for first in (AGAIN, *(BEHIND_HINT * t for t in (3, 8)), CONTINUES) for s in (0, 1)]
    found = answer_uniforms([Request(np.array([1]), *one) for one in numbers], Sampling((2,), length))
    assert len(found.unique()) == sum(samples for _, samples in numbers) * length


def test_no_tempered_answer_was_right() -> None:
    one = np.array([3])
    fresh = Replay({"token": one}, start=np.array([0]), length=np.array([1]), episodes={"group": one})
    assert with_tempered(fresh, None).episodes["tempered"].tolist() == [False]


class Scripted(TransformersEngine):
    """Answers what the policy draws at the temperature of sampling, and at others ``a``, ``z`` in turn."""

    asked: ClassVar[list[tuple[Request, Sampling]]] = []

    def __init__(self, batch_size: int = 256, tokenizer: Any = None) -> None:
        super().__init__(batch_size)
        self.said = [tokenizer(text, add_special_tokens=False)["input_ids"] + [2] for text in ("a", "z")]

    def generate(self, requests: Any, how: Sampling, stopped: Any = None) -> Any:
        if how.temperature in (0.0, 1.0):
            return super().generate(requests, how, stopped)
        Scripted.asked += [(one, how) for one in requests]
        made = [Completion(np.array(token), np.full(len(token), -7.0), True) for token in self.said]
        return [[made[k % 2] for k in range(one.samples)] for one in requests]


class Keeps:
    """A share of 0 that keeps what it sees."""

    seen: ClassVar[list[tuple[Tokens, Totals]]] = []

    def __call__(self, tokens: Tokens, totals: Totals, *, iteration: int) -> torch.Tensor:
        Keeps.seen.append((tokens, totals))
        return tokens.logp.sum() * 0.0


@pytest.mark.parametrize("target, heat", [(9.0, 1.5), (0.0, 0.5)])
def test_what_is_drawn_kept_and_learned(target: float, heat: float, policy: Path, tmp_path: Path) -> None:
    """Of four groups of four, two are answered once more, each twice right: 16 answers as ever, and 4 beside them.

    Ratios are 1 and advantages of groups sum to 0, so the loss is −(mean ℓ of each of the 4 answers)/20.
    """
    Scripted.asked, Keeps.seen = [], []
    options: dict[str, Any] = {"minibatches": 1, "batch_size": 16, "engine": f"{__name__}.Scripted"}
    options |= {"variant": "aepo", "rewards": OPTIONS["rewards"], "objective": {"terms": [f"{__name__}.Keeps"]}}
    rule = {**OPTIONS["tempering"], "target": target}
    how: dict[str, Any] = {"held_out": False, "precision": "64-true", "problems": told_problems(policy)}
    module = fit(method("GRPO", policy, **options, tempering=rule), 2, tmp_path, **how)
    row, size = module.metric_row, len(Scripted.asked)
    assert {one.temperature for _, one in Scripted.asked} == {heat} and size == 4  # two groups in two iterations
    assert all(one.samples == 4 and one.number - TEMPERED in range(4) for one, _ in Scripted.asked)
    assert [row[f"train/tempered/{name}"] for name in ("temperature", "drawn", "left_out")] == [heat, 8, 4]

    store: Any = module.course.rollouts.store
    hot = store.episodes["tempered"]
    assert hot.tolist() == [False] * 16 + [True] * 4 and module.generated == 2 * (16 + 8)
    said = AutoTokenizer.from_pretrained(policy).decode(store.steps["token"][store.start[hot][0]][None])
    assert said.strip() == "a" and (store.episodes["reward"][hot] == 1).all()
    last = {one.number - TEMPERED + (2 << 32): one for one, drawn in Scripted.asked if drawn.iteration == 2}
    assert np.unique(store.episodes["group"][hot]).tolist() == sorted(last)
    of_hot = np.repeat(hot, store.length)
    said = store.steps["sampler_logp"]
    assert np.isnan(said[of_hot]).all() and (store.steps["logp"] == store.steps["previous_logp"]).all()
    assert np.isfinite(store.steps["logp"]).all() and not (store.steps["logp"][of_hot] == -7.0).any()

    for (tokens, totals), iteration in zip(Keeps.seen, (1, 2)):
        mean = (tokens.logp * tokens.mask).sum(1) / tokens.mask.sum(1)
        tempered = tokens.columns["tempered"]  # type: ignore[index]
        assert totals.rows == 20 and int(tempered.sum()) == 4 and (tokens.advantage[tempered] == 0).all()
        loss, _ = module.objective.loss(tokens, totals, iteration=iteration, health=False)
        torch.testing.assert_close(loss, -mean[tempered].sum() / 20, rtol=0, atol=1e-12)
    plain = fit(method("GRPO", policy, **options | {"variant": "grpo", "objective": {}}), 1, **how)
    first: Any = plain.course.rollouts.store
    once = fit(method("GRPO", policy, **options, tempering=rule), 1, **how).course.rollouts.store
    for name in ("digest", "advantage", "reward", "group"):
        assert np.array_equal(once.episodes[name][:16], first.episodes[name]), name
    whole = -once.steps["sampler_logp"][np.repeat(~once.episodes["tempered"], once.length)]
    again = fit(method("GRPO", policy, **options, tempering=rule), 1, tmp_path / "once", **how)
    row = again.metric_row
    assert row["train/tempered/entropy"] == pytest.approx(whole.astype(np.float64).mean(), rel=1e-12)
    for name in ("reward/own", "answers/length"):
        assert row[f"train/{name}"] == plain.metric_row[f"train/{name}"]


def always_right(prompt: str, answer: str, reference: str | None) -> float:
    """A reward by which every answer is right, and some are better."""
    return 1.0 + early_letters(prompt, answer, reference)


@pytest.mark.slow
def test_a_run_with_tempered_answers_resumes(policy: Path, tmp_path: Path) -> None:
    """Bit for bit, in the middle of an iteration too; steps have whole groups as ever."""
    how: dict[str, Any] = {"problems": told_problems(policy), "held_out": False}
    options = {**OPTIONS, "rewards": [f"{__name__}.always_right"]}
    whole = fit(method("GRPO", policy, **options), 6, tmp_path / "whole", **how)
    for steps in (3, 4):
        path = newest_checkpoint(tmp_path / "cut") if steps > 3 else None
        fit(method("GRPO", policy, **options), steps, tmp_path / "cut", ckpt_path=path, **how)
    fit(method("GRPO", policy, **options), 6, tmp_path / "cut", ckpt_path=newest_checkpoint(tmp_path / "cut"), **how)
    found, expected = (run_files(tmp_path / one, 6) for one in ("cut", "whole"))
    for part in ("state_dict", "optimizer_states", "offpolicy"):
        assert not differences(found[part], expected[part], part)
    hot = whole.course.rollouts.store.episodes["tempered"]
    assert int(hot.sum()) == 8 and [int((~hot[rows]).sum()) for rows in whole.course.steps] == [8, 8]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("GRPO", {"lag": 1}, "`lag`"),
    ("GRPO", {"replay_fraction": 0.5, "replay_window": 1}, "`replay_fraction`"),
    ("GRPO", {"replay": "r3"}, "`replay`"),
    ("GRPO", {"demonstrations": 1}, "`demonstrations`"),
    ("GRPO", {"record": True}, "`record`"),
    ("GRPO", {"engine": "replay", "records": "none"}, "`engine`"),
    ("GRPO", {"rewards": ["majority"]}, "`rewards`"),
    ("GRPO", {"objective": {"entropy": "aepo", "advantage": "gae", "value": "squared"}}, "`objective.value`"),
    ("GRPO", {"objective": {"entropy": "aepo", "terms": ["drpo_contrast"]}}, "`objective`"),
    ("GRPO", {"objective": {}}, "no part of `objective` learns from"),
    ("GRPO", {"objective": {"entropy": "aepo"}, "tempering": None}, "nothing draws hot and cold"),
    ("SPEAR", {}, "--model GRPO"),
    ("GRPO", {"engine": "vllm", "tempering": {"name": "aepo", "high": 2.5}}, "`temperature` is 2.5"),
    ("GRPO", {"tempering": "aep"}, "Did you mean 'aepo'"),
    ("GRPO", {"tempering": "torch.nn.Identity"}, "extends offpolicy.language.rl.tempering.Tempering"),
    ("GRPO", {"tempering": {"name": "aepo", "low": 1.1}}, "low"),
    ("GRPO", {"tempering": {"name": "aepo", "high": 0.9}}, "high"),
    ("GRPO", {"tempering": {"name": "aepo", "share": 0.0}}, "share"),
]


@pytest.mark.parametrize("name, options, said", REFUSED, ids=lambda one: "-".join(one) if isinstance(one, dict) else "")
def test_what_does_not_go_with_tempered_answers(name: str, options: dict[str, Any], said: str, policy: Path) -> None:
    usual = {"tempering": "aepo", "objective": {"entropy": "aepo"}}
    with pytest.raises(UsageError) as caught:
        fit(method(name, policy, **{**usual, **options}), 1, held_out=False, problems=told_problems(policy))
    assert said in str(caught.value)


@pytest.mark.parametrize("other", [{"correction": "score"}, {"hints": "scaffold"}])
def test_other_further_answers(other: dict[str, Any], policy: Path) -> None:
    with pytest.raises(UsageError, match=f"`{next(iter(other))}`"):
        fit(method("GRPO", policy, **OPTIONS, **other), 1, held_out=False, problems=told_problems(policy))
