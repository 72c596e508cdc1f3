"""Answers in two turns: what is asked, rewarded, kept and learned from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tiny_rl import fit, make_policy, method, told_problems
from toy import differences, run_files
from transformers import AutoTokenizer

from offpolicy.data import sampling
from offpolicy.data.replay import Replay
from offpolicy.errors import UsageError
from offpolicy.language.rl.correcting import AGAIN, Score, in_two_turns, requests_again
from offpolicy.language.rl.engine import CONTINUES, Completion, Request, Sampling
from offpolicy.language.rl.engines import answer_uniforms
from offpolicy.language.rl.rows import counted_length
from offpolicy.losses.policy.anchors import TurnKL
from offpolicy.losses.tokens import Tokens, Totals, column
from offpolicy.training.checkpoints import newest_checkpoint

INSTRUCTION = "again now"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("correcting") / "policy")


def test_rewards_and_advantages_by_hand() -> None:
    """Two answers of a group, r₁ = 1 and 0, r₂ = 1 and 2, α = 3: R₂ = r₂ + 3(r₂ − r₁) = 1 and 8, mean 4.5."""
    turn = np.array([0, -1, 1, 1, 0, 0, -1, 1], np.float32)
    episodes = {"group": np.array([7, 7]), "first_reward": np.array([1.0, 0.0]), "reward": np.array([1.0, 2.0])}
    store = Replay({"turn": turn}, start=np.array([0, 4]), length=np.array([4, 4]), episodes=episodes)
    rule = Score(bonus=3.0, first_stage=2)
    assert rule.advantages(store, 2).tolist() == [0, 0, -0.5, -0.5, 0, 0, 0, 0.5]
    assert rule.advantages(store, 3).tolist() == [0.5, 0, -3.5, -3.5, -0.5, -0.5, 0, 3.5]


def test_second_requests_and_rows() -> None:
    """The second request stands behind prompt, first answer and instruction; its number is that of slot and place."""
    first = {"slot": 3, "token": np.array([4, 2]), "logp": np.array([-1.0, -2.0]), "ended": True}
    first["sampler_logp"] = first["logp"]
    asked = requests_again([first, {**first, "token": np.array([5])}], [np.array([9])] * 2, np.array([6, 7]), 4)
    assert [one.prompt.tolist() for one in asked] == [[9, 4, 2, 6, 7], [9, 5, 6, 7]]
    assert [one.number for one in asked] == [AGAIN + 12, AGAIN + 13]
    row = in_two_turns(first, np.array([6, 7]), Completion(np.array([8]), np.array([-3.0]), False), 1)
    assert row["stage"].tolist() == [1] * 5
    assert row["token"].tolist() == [4, 2, 6, 7, 8] and row["turn"].tolist() == [0, 0, -1, -1, 1]
    assert row["logp"].tolist() == row["sampler_logp"].tolist() == [-1, -2, 0, 0, -3]
    assert row["first_ended"] and not row["ended"] and (row["first"], row["behind"]) == (2, 4)


@pytest.mark.parametrize("length", [5, 2048, 4096, 8192, 32768])
def test_no_two_answers_of_an_iteration_share_random_numbers(length: int) -> None:
    """Own answers, second ones, and what goes on from a demonstration; the latter as ever where they can be."""
    prompt, how = np.array([1]), Sampling((2,), length)
    asked = [(0, 2), (1, 2), (AGAIN, 1), (AGAIN + 1, 1), (CONTINUES, 1), (CONTINUES + 1, 1)]
    found = answer_uniforms([Request(prompt, *one) for one in asked], how)
    assert len(found.unique()) == 8 * length
    if length % 8192:
        key = sampling.keys(0, "rollout", torch.tensor([0]))[0]
        assert torch.equal(found[6:7], sampling.uniforms(key, torch.tensor([CONTINUES << 20]), (length,)))


def test_the_instruction_does_not_count() -> None:
    turn = np.array([0, -1, 1, 1, 0, 0, -1, 1], np.float32)
    store = Replay({"turn": turn}, start=np.array([0, 4]), length=np.array([4, 4]))
    assert counted_length(store).tolist() == [3, 3]
    plain = Replay({"logp": turn}, start=np.array([0, 4]), length=np.array([4, 4]))
    assert counted_length(plain).tolist() == [4, 4]


def test_divergence_of_one_turn_by_hand() -> None:
    """e^δ − 1 − δ with δ = ln 2 on the first turn, nothing elsewhere, and nothing in the second stage."""
    logp = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    base = torch.full((1, 4), np.log(2.0), dtype=torch.float64)
    turn = torch.tensor([[0, 0, -1, 1]])
    mask, columns = (turn >= 0).double(), {"turn": turn, "stage": torch.zeros_like(turn)}
    tokens = Tokens(logp, mask, torch.zeros(1), logp.detach(), logp.detach(), base_logp=base, columns=columns)
    part = TurnKL(0.1)
    found = part(tokens, iteration=1)
    torch.testing.assert_close(found[0], 0.1 * (1 - np.log(2.0)) * torch.tensor([1.0, 1, 0, 0], dtype=torch.float64))
    found.sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[-0.1, -0.1, 0, 0]], dtype=torch.float64))
    tokens = tokens._replace(columns=columns | {"stage": torch.ones_like(turn)})
    assert part(tokens, iteration=1).abs().sum() == 0
    assert [Score(first_stage=2).stage(k) for k in (1, 2, 3)] == [0, 0, 1]


class Spy:
    """A weight of 1 that keeps what it sees."""

    columns: ClassVar[frozenset[str]] = frozenset({"turn"})
    seen: ClassVar[list[tuple[torch.Tensor, ...]]] = []

    def __call__(self, tokens: Tokens) -> torch.Tensor:
        turn = column(tokens, "turn")
        if tokens.mask.any():
            Spy.seen.append((tokens.mask.clone(), turn.clone(), tokens.advantage.clone()))
        return torch.ones_like(tokens.mask)


class Sums:
    """A share of 0 that keeps what it is told of a step."""

    seen: ClassVar[list[tuple[Totals, int]]] = []

    def __call__(self, tokens: Tokens, totals: Totals, *, iteration: int) -> torch.Tensor:
        Sums.seen.append((totals, int(tokens.mask.sum())))
        return tokens.logp.sum() * 0.0


OPTIONS: dict[str, Any] = {
    "correction": {"name": "score", "first_stage": 1, "instruction": INSTRUCTION},
    "objective": {
        "trust": "none",
        "aggregation": "seq_sum",
        "anchors": [{"name": "turn_kl", "coef": 0.1}],
        "weight": [f"{__name__}.Spy"],
    },
}


def test_the_facts_of_a_step_in_two_turns(policy: Path, tmp_path: Path) -> None:
    """Tokens are those of the masks, and an answer may be as long as both of its turns."""
    Sums.seen.clear()
    objective = {**OPTIONS["objective"], "terms": [f"{__name__}.Sums"]}
    module = fit(method("GRPO", policy, **{**OPTIONS, "objective": objective}), 1, tmp_path, held_out=False)
    totals = Sums.seen[0][0]
    assert totals.tokens == sum(counted for _, counted in Sums.seen) and totals.max_length == 2 * 5
    store = module.course.rollouts.store
    assert counted_length(store).mean() == module.metric_row["train/answers/length"] < store.length.mean()


@pytest.mark.slow
def test_a_run_in_two_turns_resumes(policy: Path, tmp_path: Path) -> None:
    """Bit for bit; the second answers are scored behind what they were drawn behind, and the instruction counts not."""
    how: dict[str, Any] = {"problems": told_problems(policy), "held_out": False}
    Spy.seen.clear()
    whole = fit(method("GRPO", policy, **OPTIONS), 4, tmp_path / "whole", **how)
    fit(method("GRPO", policy, **OPTIONS), 3, tmp_path / "cut", **how)
    path = newest_checkpoint(tmp_path / "cut")
    fit(method("GRPO", policy, **OPTIONS), 4, tmp_path / "cut", ckpt_path=path, **how)
    found, expected = (run_files(tmp_path / one, 4) for one in ("cut", "whole"))
    for part in ("state_dict", "optimizer_states", "offpolicy"):
        assert not differences(found[part], expected[part], part)
    store = whole.course.rollouts.store
    turn, own = store.steps["turn"], store.steps["turn"] >= 0
    assert set(turn.tolist()) == {0, -1, 1} and (store.steps["stage"] == 1).all()  # of the second iteration
    np.testing.assert_allclose(store.steps["logp"][own], store.steps["sampler_logp"][own], atol=1e-4)
    said = AutoTokenizer.from_pretrained(policy)(INSTRUCTION, add_special_tokens=False)["input_ids"]
    assert store.steps["token"][turn == -1].tolist() == said * store.num_episodes
    assert whole.generated == 2 * 2 * 16 and store.num_episodes == 16
    np.testing.assert_allclose(store.steps["advantage"], Score(first_stage=1).advantages(store, 2))
    for mask, place, advantage in Spy.seen:
        assert (mask.bool() == (place >= 0)).all() and advantage.shape == mask.shape
        assert (advantage[place < 0] == 0).all()
    first_stage = Spy.seen[0]
    assert (first_stage[2][first_stage[1] == 0] == 0).all() and (first_stage[2] != 0).any()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("GRPO", {"lag": 1}, "`lag`"),
    ("GRPO", {"hints": "tiers"}, "`hints`"),
    ("GRPO", {"replay_fraction": 0.5, "replay_window": 1}, "`replay_fraction`"),
    ("GRPO", {"record": True}, "`record`"),
    ("GRPO", {"objective": {"advantage": "gae", "value": "squared"}}, "`objective.value`"),
    ("SPEAR", {}, "--model GRPO"),
    ("GRPO", {"correction": "scores"}, "Did you mean 'score'"),
    ("GRPO", {"correction": "torch.nn.Identity"}, "extends offpolicy.language.rl.correcting.Score"),
    ("GRPO", {"correction": {"name": "score", "bonus": -1.0}}, "bonus"),
]


@pytest.mark.parametrize("name, options, said", REFUSED, ids=lambda one: "-".join(one) if isinstance(one, dict) else "")
def test_what_does_not_go_with_a_second_turn(name: str, options: dict[str, Any], said: str, policy: Path) -> None:
    with pytest.raises(UsageError) as caught:
        fit(method(name, policy, **{"correction": "score", **options}), 1, held_out=False)
    assert said in str(caught.value)
