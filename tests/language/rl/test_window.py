"""Answers that are drawn a window of tokens at a time: what is asked, judged, carried on and learned from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tiny_rl import fit, make_policy, method, told_problems, toy_problems
from toy import differences, run_files

from offpolicy.data.replay import Replay
from offpolicy.data.texts.rollouts import newest_tokens
from offpolicy.data.texts.sequences import token_ids
from offpolicy.errors import DataError, UsageError
from offpolicy.language.rl.advantages import from_critic
from offpolicy.language.rl.asking import problems_in_turn
from offpolicy.language.rl.engine import Completion, Request, Sampling
from offpolicy.language.rl.rows import counted_length, whole_length
from offpolicy.language.rl.window import gone_on, requests_on, unfinished_rows
from offpolicy.losses.policy_gradient import Objective, Tokens, Totals

T_PPO: dict[str, Any] = {"variant": "t_ppo", "group_size": 1, "critic": "head", "critic_lr": 1e-2}
EGAE = {"name": "egae", "lambda_": 0.5}
VALUE = {"name": "squared", "finished": True}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("window") / "policy")


# -- a run by a script -------------------------------------------------------------------------------------------------


class Scripted:
    """Writes what it is told; finds by the prompt how far an answer has come."""

    on_policy = False  # what the policy thinks of the script is what training takes
    script: ClassVar[dict[tuple[int, ...], list[int]]] = {}
    asked: ClassVar[list[tuple[int, list[tuple[int, int, int]]]]] = []  # iteration: number, tokens there, room

    def sync(self, model: Any, version: int) -> None:
        pass

    def generate(
        self, requests: Sequence[Request], how: Sampling, stopped: Callable[[], bool] | None = None
    ) -> list[list[Completion]]:
        found, log = [], []
        for one in requests:
            text = tuple(one.prompt.tolist())
            prompt = next(p for p in self.script if text[: len(p)] == p)
            there = len(text) - len(prompt)
            assert list(text[len(prompt) :]) == self.script[prompt][:there]
            new = np.array(self.script[prompt][there:][: one.most(how)])
            log.append((one.number, there, one.most(how)))
            found.append([Completion(new, np.full(len(new), np.nan), bool(new[-1] == 2))])
        self.asked.append((how.iteration, log))
        return found


class Spy:
    """A weight of 1 that keeps the tokens it sees, by step."""

    columns: ClassVar[frozenset[str]] = frozenset({"token"})
    seen: ClassVar[list[Tokens]] = []

    def __call__(self, tokens: Tokens) -> torch.Tensor:
        Spy.seen.append(tokens)
        return torch.ones_like(tokens.mask)


JUDGED: list[str] = []


def judged(prompt: str, answer: str, reference: str | None) -> float:
    JUDGED.append(str(reference))
    return 1.0


def test_a_run_by_a_script(policy: Path, tmp_path: Path) -> None:
    """Windows of 2 tokens, answers of 5 at most, three in an iteration, of one step.

    In the order of the stream: a (1 token), b (3), c (no end), d (2), e (2), f (4), each of its own token and the end.
    Iteration 1 draws a and two tokens of b and c; iteration 2 the last of b, two of c, and d; iteration 3 the fifth and
    last of c, and e, and two of f; iteration 4 the rest of f, and begins the next pass.
    """
    problems = toy_problems(6)
    order = problems_in_turn(6, 6, 0, 0).tolist()
    answers = dict(zip(order, ([2], [11, 11, 2], [12] * 9, [13, 2], [14, 2], [15, 15, 15, 2])))
    prompts = [tuple(token_ids(problems, problems.tables["problems"][i, 0]).tolist()) for i in range(6)]
    assert len(set(prompts)) == 6
    Scripted.script.clear()
    Scripted.script |= {prompts[i]: answer for i, answer in answers.items()}
    Scripted.asked.clear(), Spy.seen.clear(), JUDGED.clear()
    how: dict[str, Any] = {
        **T_PPO,
        **{"window": 2, "batch_size": 3, "minibatches": 1, "rewards": [f"{__name__}.judged"]},
        "engine": f"{__name__}.Scripted",
        "objective": {"advantage": {**EGAE, "normalize": False}, "weight": [f"{__name__}.Spy"]},
    }
    module = fit(method("GRPO", policy, **how), 4, tmp_path, problems=problems, held_out=False)
    assert Scripted.asked == [
        (1, [(0, 0, 2), (1, 0, 2), (2, 0, 2)]),
        (2, [(2, 0, 2), (0, 2, 2), (1, 2, 2)]),  # new problems, then what is gone on with
        (3, [(1, 0, 2), (2, 0, 2), (0, 4, 1)]),
        (4, [(1, 0, 2), (2, 0, 2), (0, 2, 2)]),
    ]
    again = [i for i in problems_in_turn(6, 2, 6, 0).tolist() if len(answers[i]) <= 2]
    assert sorted(JUDGED) == sorted(map(str, [*order, *again]))  # each once, when it is finished
    learned, known = [], []
    for tokens in Spy.seen:
        token, mask, whole = tokens.columns["token"], tokens.mask.bool(), tokens.whole_mask.bool()  # type: ignore[index,union-attr]
        learned.append(sorted(row[kept].tolist() for row, kept in zip(token, mask)))
        known.append(sorted(row[kept].tolist() for row, kept in zip(token, whole)))
        assert (tokens.lag == 0).all() and torch.equal(tokens.behavior_logp[mask], tokens.previous_logp[mask])
    assert learned[:3] == [[[2], [11, 11], [12, 12]], [[2], [12, 12], [13, 2]], [[12], [14, 2], [15, 15]]]
    assert known[:3] == [[[], [], [2]], [[], [11, 11, 2], [13, 2]], [[], [12] * 5, [14, 2]]]
    store, course = module.course.rollouts.store, module.course
    assert course.problems_seen == 8 and course.generated == 8
    first = store.episodes["prompt"].tolist().index(order[5])
    assert store.episodes["windows"][first] == 2 and not store.episodes["unfinished"][first]
    facts = module.metric_row  # means of iterations 3 and 4
    assert facts["train/answers/carried"] == 1 and facts["train/epoch"] == 8 / 6


def test_earlier_tokens_keep_the_probability_of_the_policy_that_drew_them(policy: Path) -> None:
    """A step of the entropy bonus moves the policy; the tokens of the first window keep what was said of them."""
    kept: list[Replay] = []

    options = {**T_PPO, "window": 2, "minibatches": 1, "batch_size": 4, "lr": 0.1, "entropy": 1.0}
    for steps in (1, 2):
        kept.append(fit(method("GRPO", policy, **options), steps, held_out=False).course.rollouts.store)
    before, after = kept
    carried = np.flatnonzero(before.episodes["unfinished"])
    assert len(carried)
    for row, old in enumerate(carried):
        was = before.steps["logp"][before.start[old] : before.start[old] + 2]
        place = slice(after.start[row], after.start[row] + 2)
        assert (after.steps["logp"][place] == was).all()
        assert (np.abs(after.steps["previous_logp"][place] - was) > 1e-3).any()
    new = newest_tokens(after)
    assert (after.steps["logp"][new] == after.steps["previous_logp"][new]).all()
    np.testing.assert_allclose(after.steps["logp"], after.steps["sampler_logp"], atol=1e-4)


# -- numbers by hand ---------------------------------------------------------------------------------------------------


def windows_store() -> Replay:
    """A finished answer of two windows, (0, 0, 1), and an unfinished one of two tokens."""
    episodes = {
        "reward": np.array([1.0, 0.0]),
        "ended": np.array([True, False]),
        "windows": np.array([2, 1]),
        "unfinished": np.array([False, True]),
    }
    steps = {"window": np.array([0.0, 0, 1, 0, 0])}
    return Replay(steps, start=np.array([0, 3]), length=np.array([3, 2]), episodes=episodes)


def test_advantages_by_hand() -> None:
    """λ = ½: δ = −¼, ½, ¼ of the finished answer, so A = 1/16, 5/8, ¼ and A + V its returns; δ = −¼, 0 of the other.

    Of the newest windows, ¼, −¼, 0, the mean is 0 and the deviation ¼.
    """
    store, value = windows_store(), np.array([0.5, 0.25, 0.75, 0.5, 0.25])
    plain = Objective(advantage={**EGAE, "normalize": False}, value=VALUE)
    found = from_critic(plain, store, np.arange(2), value)
    np.testing.assert_allclose(found["advantage"], [0.0625, 0.625, 0.25, -0.25, 0], rtol=1e-12)
    np.testing.assert_allclose(found["returns"], [0.5625, 0.875, 1, 0.25, 0.25], rtol=1e-12)
    assert newest_tokens(store).tolist() == [False, False, True, True, True]
    assert counted_length(store).tolist() == [1, 2] and whole_length(store).tolist() == [3, 0]
    normal = from_critic(Objective(advantage=EGAE, value=VALUE), store, np.arange(2), value)
    np.testing.assert_allclose(normal["advantage"][newest_tokens(store)], [1, -1, 0], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(normal["returns"], found["returns"], rtol=1e-12)


@pytest.mark.parametrize("mean, policy_loss, value_loss", [
    ("token_mean", -(2 + 3 + 4) / 3, 0.5 * (1 + 4 + 9) / 3),
    ("seq_mean_token_mean", -(2 + (3 + 4) / 2) / 2, 0.5 * (1 + 4 + 9) / 3 / 2),
])  # fmt: skip
def test_loss_by_hand(mean: str, policy_loss: float, value_loss: float) -> None:
    """Advantages 2, 3, 4 of the newest tokens at ratio 1; errors 1, 2, 3 of the finished answer, and 5 elsewhere."""
    mask = torch.tensor([[0, 0, 1], [1, 1, 0]], dtype=torch.float64)
    whole = torch.tensor([[1, 1, 1], [0, 0, 0]], dtype=torch.float64)
    advantage = torch.tensor([[9, 9, 2], [3, 4, 9]], dtype=torch.float64)
    value = torch.tensor([[1, 2, 3], [5, 5, 5]], dtype=torch.float64, requires_grad=True)
    logp = torch.zeros(2, 3, dtype=torch.float64)
    tokens = Tokens(logp, mask, advantage, logp, logp, value=value, returns=torch.zeros_like(logp), whole_mask=whole)
    tokens = tokens._replace(columns={"ended": torch.tensor([True, False])})
    objective = Objective(advantage=EGAE, value=VALUE, aggregation=mean)
    loss, sums = objective.loss(tokens, Totals(2, 3, 8, 3, 3), iteration=1)
    torch.testing.assert_close(loss, torch.tensor(policy_loss + value_loss, dtype=torch.float64))
    loss.backward()
    assert value.grad is not None and (value.grad[0] != 0).all() and (value.grad[1] == 0).all()
    assert sums["critic/error"].tolist() == [14, 3]


def test_what_is_gone_on_with() -> None:
    """Of the iteration before alone, in the order of the store, in its own words, with the room that is left."""
    episodes = {
        "iteration": np.array([1, 2, 2, 2]),
        "policy_version": np.array([1, 2, 2, 2]),
        "unfinished": np.array([True, True, False, True]),
        "windows": np.array([1, 1, 1, 3]),
        "prompt": np.array([4, 5, 6, 7]),
        "asked": np.array([0, 2, 0, 1]),
    }
    steps = {name: np.arange(8, dtype=np.float32) for name in ("logp", "sampler_logp", "window")}
    steps["token"] = np.arange(10, 18, dtype=np.uint8)  # type: ignore[assignment]
    store = Replay(steps, start=np.array([0, 2, 4, 6]), length=np.array([2, 2, 2, 2]), episodes=episodes)
    rows = unfinished_rows(store, 3, 5)
    assert [(one["slot"], one["problem"], one["asked"], one["windows"]) for one in rows] == [(0, 5, 2, 1), (1, 7, 1, 3)]
    asker: Any = SimpleNamespace(prompt=lambda problem, words: np.array([100 + problem, words]))
    asked = requests_on(asker, rows, 5)
    assert [(one.prompt.tolist(), *one[1:]) for one in asked] == [
        ([105, 2, 12, 13], 0, 1, 3),
        ([107, 1, 16, 17], 1, 1, 3),
    ]
    row = gone_on(rows[0], Completion(np.array([3, 2]), np.array([-1.0, -2.0]), True), 3, 5)
    assert row["token"].tolist() == [12, 13, 3, 2] and row["window"].tolist() == [2, 3, 1, 1]
    assert row["logp"].tolist() == row["sampler_logp"].tolist() == [2, 3, -1, -2]
    assert (row["version"], row["windows"], row["ended"], row["asked"]) == (3, 2, True, 2)
    more = Completion(np.array([3, 4, 5, 2]), np.zeros(4), True)  # of an engine that knows no room
    cut = gone_on(rows[0], more, 3, 5)
    assert cut["token"].tolist() == [12, 13, 3, 4, 5] and cut["window"].tolist() == [2, 3, 1, 1, 1] and not cut["ended"]
    assert unfinished_rows(store, 4, 5) == [] == unfinished_rows(None, 1, 5)
    with pytest.raises(DataError, match="by no token"):
        gone_on(rows[0], Completion(np.zeros(0, np.int64), np.zeros(0), False), 3, 5)


# -- equalities of runs ------------------------------------------------------------------------------------------------


def test_a_window_as_long_as_answers_changes_nothing(policy: Path, tmp_path: Path) -> None:
    for name, window in (("none", None), ("whole", 5), ("longer", 99)):
        fit(method("GRPO", policy, **T_PPO, window=window), 5, tmp_path / name)
    none = run_files(tmp_path / "none", 5)
    for name in ("whole", "longer"):
        found = run_files(tmp_path / name, 5)
        for part in ("state_dict", "optimizer_states", "evals"):
            assert not differences(found[part], none[part], part)
        assert [{k: row[k] for k in none["metrics"][0] if "perf" not in k} for row in found["metrics"]] == [
            {k: row[k] for k in none["metrics"][0] if "perf" not in k} for row in none["metrics"]
        ]


@pytest.mark.parametrize("mean", ["seq_mean_token_mean", "token_mean"])
def test_micro_batches_and_engines_change_nothing(mean: str, policy: Path, tmp_path: Path) -> None:
    runs = []
    for i, more in enumerate(({}, {"micro_batch_size": 3}, {"engine": "tiny", "generation_batch": 2})):
        options = {**T_PPO, "window": 2, "objective": {"aggregation": mean}, **more}
        module = fit(method("GRPO", policy, **options), 6, tmp_path / str(i), precision="64-true", held_out=False)
        runs.append((run_files(tmp_path / str(i), 6)["state_dict"], module.course.rollouts.store))
        assert module.course.problems_seen < 3 * 16 and set(module.course.rollouts.store.episodes["windows"]) >= {3}
    for weights, store in runs[1:]:
        assert (store.steps["token"] == runs[0][1].steps["token"]).all()
        for name, value in runs[0][0].items():
            torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=1e-9)


def test_words_and_the_first_screen(policy: Path) -> None:
    """A template stays with an answer; evaluations draw whole answers, and the screen says what a window is."""
    options = {**T_PPO, "window": 2, "minibatches": 1, "templates": ["{prompt} a.", "b {prompt}."]}
    stores = []
    for steps in (1, 2):
        module = fit(method("GRPO", policy, **options), steps, problems=told_problems(policy), held_out=False)
        stores.append(module.course.rollouts.store)
    carried = stores[0].episodes["unfinished"]
    for name in ("prompt", "asked"):
        assert (stores[0].episodes[name][carried] == stores[1].episodes[name][: carried.sum()]).all()
    how = module.answering
    assert [how.sampling(k).max_new_tokens for k in (0, 1, 2)] == [5, 2, 2]
    assert (
        "window",
        "2 new tokens of an answer in an iteration; the next ones go on with what is unfinished",
    ) in how.facts()
    assert how.longest_request() == how.longest_prompt() + 4


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *(
        ("GRPO", {**T_PPO, **options}, f"`{name}`")
        for name, options in {
            "lag": {"lag": 1},
            "replay_fraction": {"replay_fraction": 0.5, "replay_window": 1},
            "min_ess": {"min_ess": 0.5},
            "record": {"record": True},
            "filter": {"filter": "ended"},
            "curriculum": {"curriculum": "vade"},
            "hints": {"hints": "tiers"},
            "correction": {"correction": "score"},
            "tempering": {"tempering": "aepo"},
            "length_cycle": {"length_cycle": {"low": 0.5, "iterations": 4}},
        }.items()
    ),
    ("GRPO", {}, "'grpo' takes every answer for whole"),
    ("GRPO", {"objective": {"advantage": "gae", "value": "squared"}}, "'gae' takes every answer for whole"),
    ("GRPO", {**T_PPO, "group_size": 4}, "`group_size` is 4"),
    ("ReMix", {"base": "ppo", "group_size": 1}, "window"),
    ("GRPO", {"window": 0}, "window"),
]


@pytest.mark.parametrize("name, options, said", REFUSED, ids=lambda one: "-".join(one) if isinstance(one, dict) else "")
def test_what_does_not_go_with_windows(name: str, options: dict[str, Any], said: str, policy: Path) -> None:
    with pytest.raises(UsageError) as caught:
        fit(method(name, policy, **{"window": 2, **options}), 1, held_out=False)
    assert said in str(caught.value)
