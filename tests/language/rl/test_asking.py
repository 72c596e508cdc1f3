"""Which problems are asked and in which words: templates, hints, a curriculum."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_rl import fit, make_policy, method, told_problems, write_problems
from toy import differences, run_files

from offpolicy.compute import processes
from offpolicy.data.texts.problems import Problems, open_problems, select_problems
from offpolicy.data.texts.retelling import OtherWords, beginning, retold
from offpolicy.data.texts.rollouts import BoundRollouts
from offpolicy.data.texts.sequences import token_ids
from offpolicy.errors import DataError, UsageError
from offpolicy.language.rl.asking import Asked, AskedProblems
from offpolicy.language.rl.curricula import Gain, Vade, concentrations
from offpolicy.language.rl.hints import BEHIND_HINT, Scaffold, Tiers, with_help
from offpolicy.training.checkpoints import newest_checkpoint

TEMPLATES = ["a {prompt}", "{prompt} b", "c {prompt} c"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("asking") / "policy")


@pytest.fixture(scope="module")
def problems(policy: Path) -> Problems:
    return told_problems(policy)


def texts(problems: Any, rows: Any, policy: Path) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    return [tokenizer.decode(token_ids(problems, row), skip_special_tokens=True).replace(" ", "") for row in rows]


def test_other_words(problems: Problems, policy: Path) -> None:
    """Templates stand in place of that of the data, hints within it; a problem without a solution keeps its own."""
    told = retold(problems, [OtherWords(TEMPLATES[0], None, "templates"), OtherWords("{prompt} {hint}?", 0.5, "hints")])
    found = texts(told, told.tables["problems/asked"][3], policy)
    assert found == ["3+1=.", "a3+1=", "3+1=weadd?."]
    assert texts(told, told.tables["problems"][3, :1], policy) == ["3+1=."]
    assert len(problems.start) < len(told.start) and "problems/asked" not in problems.tables
    assert beginning("a b c d #### e", 0.75) == "a b c" and beginning("a b \\boxed{c}", 0.9) == "a"
    assert beginning(None, 0.5) == ""
    rows = [{"prompt": f"{i}+1=", "answer": f"{i + 1}", "plan": "" if i else "add"} for i in range(2)]
    path = write_problems(policy.parent / "planned.jsonl", rows)
    planned = open_problems(str(path), tokenizer=str(policy), template="{prompt}.")
    told = retold(planned, [OtherWords("{hint}+{prompt}", "plan", "hints")])
    assert texts(told, told.tables["problems/asked"][:2, 1], policy) == ["add+0+1=.", "1+1=."]
    with pytest.raises(DataError, match="Did you mean 'plan'"):
        retold(planned, [OtherWords("{hint}+{prompt}", "plans", "hints")])
    with pytest.raises(DataError, match="Pass a larger"):
        retold(problems, [OtherWords("a" * 40 + "{prompt}", None, "templates")])


def test_vade_by_hand() -> None:
    """Problem 0: 3 right, 1 wrong, then nothing; problem 1: nothing, then 2 wrong."""
    rule = Vade(slow=0.5, fast=0.25)
    rule.begin(3)
    rule.learn(np.array([0, 0, 0, 0]), np.array([True, True, True, False]))
    assert rule.counts.tolist() == [[4, 1, 1], [2, 1, 1]]
    rule.learn(np.array([1, 1]), np.array([False, False]))
    assert rule.counts.tolist() == [[1 + 0.5 * 3, 1, 1], [1 + 0.5 * 1, 3, 1]]
    rule.counts = np.array([[1e6, 1e6, 1e6, 1.0], [1.0, 1e6, 3e6, 1e6]])  # p = 1, ½, ¼, 0
    assert rule.order(0, 1)[:2].tolist() == [1, 2]
    again = Vade()
    again.begin(4)
    assert again.order(0, 1).tolist() != again.order(0, 2).tolist() and sorted(again.order(3, 1)) == [0, 1, 2, 3]
    again.load_state_dict(rule.state_dict())
    assert again.order(5, 7).tolist() == rule.order(5, 7).tolist()


def test_hints_by_hand() -> None:
    """Two failures add a tier, up to the last; a success takes one back; what was not asked stays."""
    rule = Tiers(tiers=(0.3, 0.6), patience=2)
    rule.begin(2)
    tiers = []
    for right in (False, False, False, False, False, False, True, False, True, True):
        rule.learn(np.array([0, 0]), np.array([False, right]))
        tiers.append(int(rule.tier[0]))
    assert tiers == [0, 1, 1, 2, 2, 2, 1, 1, 0, 0]
    assert rule.tier[1] == rule.failures[1] == 0


class Sees(torch.nn.Module):
    """A model whose last states are the tokens' rows of a table."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(table, dtype=torch.float64))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=(None, self.table[input_ids]))


def test_gain_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cosines of all pairs: 1 for like directions, ½ for two that are at right angles, 0 for opposite ones."""
    model, prompts = Sees([[2, 0], [0, 3], [-1, 0]]), [np.array(one) for one in ([0, 2], [0, 0, 0], [0, 1])]
    found = concentrations(model, prompts)
    np.testing.assert_allclose(found, [0, 1, 0.5])
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "rank", lambda: 1)
    monkeypatch.setattr(processes, "gathered", lambda mine: [found[::2], mine])
    np.testing.assert_allclose(concentrations(model, iter(prompts)), found)
    monkeypatch.undo()
    rule = Gain(deviation=1e-3, step=0.5)
    rule.begin(3)
    rule.look(model, prompts)
    rule.look(model, [])  # once is enough
    assert rule.order(0, 1).tolist() == [1]
    rule.learn(np.array([1, 2]), np.array([True, False]))  # accuracy ½, mean C ¾
    assert rule.mean == pytest.approx(0.25 * np.tanh(1.5))
    rule.learn(np.array([0]), np.array([False]))  # would go back
    assert rule.mean == pytest.approx(0.25 * np.tanh(1.5))
    rule.deviation, again = 1.0, Gain(deviation=1.0)
    again.begin(3)
    again.load_state_dict(rule.state_dict())
    orders = [again.order(0, k).tolist() for k in range(200)]
    assert orders == [rule.order(0, k).tolist() for k in range(200)] and {*map(len, orders)} == {3}
    firsts = np.bincount([one[0] for one in orders], minlength=3)
    assert firsts[1] > firsts[2] > firsts[0] > 0
    rule.step = 9.0
    rule.learn(np.array([1]), np.array([True]))
    assert rule.mean == 2  # the last one


def judged(slot: int, problem: int, right: bool, asked: int = 0) -> dict[str, Any]:
    return {"slot": slot, "problem": problem, "right": right, "source": 0, "asked": asked}


def test_scaffold_by_hand() -> None:
    """Groups without a right answer, of problems that have failed twice, get a hinted answer in place of their last."""
    rule = Scaffold()
    rule.begin(3)
    rows = [judged(0, 2, False), judged(0, 2, False), judged(1, 1, False), judged(1, 1, True), judged(2, 0, False)]
    assert rule.wanted(rows) == []
    rule.learn(np.array([2, 2, 1, 1]), np.array([False, False, False, True]))
    assert rule.failures.tolist() == [0, 0, 1] and rule.wanted(rows) == [(0, 2)]
    wrong, right = judged(0, 2, False, 1), judged(0, 2, True, 2)
    assert with_help(rows, [wrong]) == rows
    helped = with_help(rows, [right])
    assert helped == [rows[0], right, *rows[2:]] and rule.wanted(helped) == []


class Backwards:
    """Asks the last problems first, and counts what it is told."""

    def begin(self, problems: int) -> None:
        self.problems, self.told = problems, 0

    def order(self, seed: int, iteration: int) -> np.ndarray:
        return np.arange(self.problems)[::-1]

    def learn(self, problem: np.ndarray, right: np.ndarray) -> None:
        self.told += len(problem)

    def state_dict(self) -> dict[str, Any]:
        return {"told": self.told}

    def load_state_dict(self, state: Any) -> None:
        self.told = state["told"]


class Beyond(Backwards):
    def order(self, seed: int, iteration: int) -> np.ndarray:
        return np.array([self.problems])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"templates": ["no place"]}, "expected a text with {prompt}"),
    ({"templates": "{prompt}"}, "expected a list"),
    ({"templates": TEMPLATES, "hints": "tiers"}, "expected one of them"),
    ({"templates": TEMPLATES, "demonstrations": 1}, "--model.demonstrations 0"),
    ({"templates": TEMPLATES, "replay": "r3"}, "puts stored answers into other groups"),
    ({"hints": "tiers", "lag": 1}, "--model.lag 0"),
    ({"curriculum": "vade", "lag": 1}, "--model.lag 0"),
    ({"curriculum": "vader"}, "Did you mean 'vade'"),
    ({"curriculum": "torch.nn.Identity"}, "expected a class with begin"),
    ({"curriculum": f"{__name__}.Beyond"}, "expected one row of whole numbers from 0 to 7"),
    ({"hints": "torch.nn.Identity"}, "expected 'tiers', 'scaffold'"),
    ({"hints": "scaffold", "group_size": 1}, "--model.group_size 8"),
    ({"hints": "scaffold", "rewards": ["majority"]}, "--model.hints tiers"),
    ({"hints": "scaffold", "engine": "replay", "records": "none"}, "expected an engine that draws"),
    ({"hints": {"name": "tiers", "tiers": [0.5, 0.25]}}, "expected ascending shares"),
    ({"hints": {"name": "tiers", "text": "{prompt}"}}, "expected {prompt} and {hint}"),
]


@pytest.mark.parametrize("options, said", REFUSED, ids=lambda one: "-".join(one) if isinstance(one, dict) else "")
def test_bad_options(options: dict[str, Any], said: str, policy: Path, problems: Problems) -> None:
    with pytest.raises(UsageError) as caught:
        fit(method("GRPO", policy, **options), 1, problems=problems, held_out=False)
    assert said in str(caught.value)


def test_words_need_texts_and_solutions(policy: Path, problems: Problems) -> None:
    with pytest.raises(DataError, match="does not keep their texts"):
        fit(method("GRPO", policy, templates=TEMPLATES), 1, held_out=False)
    bare = open_problems(
        str(write_problems(policy.parent / "bare.jsonl", [{"prompt": "1", "answer": "1"}] * 3)), tokenizer=str(policy)
    )
    with pytest.raises(DataError, match="expected a column `solution`"):
        AskedProblems(bare, SimpleNamespace(hints="tiers"))


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ({"curriculum": "vade"}, {"curriculum": "gain"}),
        ({"curriculum": "gain"}, {"curriculum": "vade"}),
        ({"hints": "scaffold"}, {"hints": {"name": "tiers", "tiers": Scaffold().tiers, "text": Scaffold().text}}),
        ({"hints": {"name": "tiers", "tiers": Scaffold().tiers, "text": Scaffold().text}}, {"hints": "scaffold"}),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(
    written: dict[str, Any], wanted: dict[str, Any], problems: Problems
) -> None:
    """Whatever its state looks like; one of the same kind goes on, written with its kind or, by older versions, not."""

    def asked(options: dict[str, Any]) -> AskedProblems:
        return AskedProblems(problems, SimpleNamespace(**options, group_size=4, engine="tiny"))

    state = asked(written).state_dict()
    with pytest.raises(UsageError, match="was written with other"):
        asked(wanted).load_state_dict(state)
    asked(written).load_state_dict(state)
    del state["kinds"]
    asked(written).load_state_dict(state)


def never(prompt: str, answer: str, reference: str) -> float:
    return 0.0


def with_three_words(prompt: str, answer: str, reference: str) -> float:
    """Right behind the last hint alone."""
    return 1.0 if "weaddone" in prompt.replace(" ", "") else len(answer) % 3 / 10


def by_words(prompt: str, answer: str, reference: str) -> float:
    """Depends on the words that a problem was put into, which a reward is given."""
    return float(prompt.replace(" ", "").startswith("a")) + len(answer) % 3 / 10


RUNS: dict[str, dict[str, Any]] = {
    "templates": {"templates": TEMPLATES, "rewards": [f"{__name__}.by_words"], "lag": 1, "micro_batch_size": 3},
    "hints": {
        "hints": {"name": "tiers", "text": "{prompt} {hint}"},
        "rewards": [f"{__name__}.never"],
        "replay_fraction": 0.5,
        "replay_window": 2,
    },
    "scaffold": {"hints": {"name": "scaffold", "patience": 1}, "rewards": [f"{__name__}.with_three_words"]},
    "own": {"curriculum": f"{__name__}.Backwards"},
    "gain": {"curriculum": {"name": "gain", "deviation": 2.0, "step": 2.0}, "rewards": ["tiny_rl.ends_early"]},
    "vade": {"curriculum": "vade", "rewards": ["tiny_rl.ends_early"], "filter": "signal"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_runs_resume_and_say_what_was_asked(
    name: str, policy: Path, problems: Problems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit from the middle of an iteration; two processes ask what one does.

    Records and scores have the prompt that was asked: what the policy thinks of an answer is what the engine thought.
    """
    some = np.arange(8) < (4 if name == "hints" else 8)  # few come back soon
    how: dict[str, Any] = {"problems": select_problems(problems, some), "held_out": False}
    options = {**RUNS[name], "record": True}
    whole = fit(method("GRPO", policy, **options), 6, tmp_path / "whole", **how)
    fit(method("GRPO", policy, **options), 3, tmp_path / "cut", **how)
    path = newest_checkpoint(tmp_path / "cut")
    fit(method("GRPO", policy, **options), 6, tmp_path / "cut", ckpt_path=path, **how)
    found, expected = (run_files(tmp_path / one, 6) for one in ("cut", "whole"))
    for part in ("state_dict", "optimizer_states", "offpolicy"):
        assert not differences(found[part], expected[part], part)
    next_one = Asked(9, 9, 40, 5), 0
    alone = {r.number: r.prompt.tolist() for r in whole.answering.requests(*next_one)}
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    shared: dict[int, list[int]] = {}
    for rank in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shared |= {r.number: r.prompt.tolist() for r in whole.answering.requests(*next_one)}
    monkeypatch.undo()
    assert shared == alone and len(alone) == 5
    lines = [json.loads(one) for one in (tmp_path / "whole" / "records.jsonl").read_text().splitlines()]
    store, asked = whole.course.rollouts.store, whole.problems
    bound = BoundRollouts(asked, store)
    np.testing.assert_allclose(store.steps["logp"], store.steps["sampler_logp"], atol=1e-4)
    if name == "vade":
        assert "asked" not in store.episodes and whole.answering.asking.curriculum.counts.max() > 1
        return
    if name == "gain":
        assert whole.answering.asking.curriculum.mean > 0 and whole.answering.asking.curriculum.known
        return
    if name == "own":
        assert whole.answering.asking.curriculum.told == 3 * 16
        assert store.episodes["prompt"].reshape(4, 4).tolist() == [[7] * 4, [6] * 4, [5] * 4, [4] * 4]
        return
    assert (bound.lengths[:, 0] == asked.length[bound.prompts]).all()
    words = store.episodes["asked"]
    groups = store.episodes["group"]
    if name == "scaffold":
        assert all(words[groups == group].tolist() == [0, 0, 0, 3] for group in np.unique(groups))
        assert (
            whole.generated == 3 * (16 + 3 * 4) and store.episodes["reward"].reshape(4, 4)[:, 3].tolist() == [1.0] * 4
        )
        assert sorted(line["request"] for line in lines[-8:])[4:] == [slot + 3 * BEHIND_HINT for slot in range(4)]
    else:
        assert all(len(set(words[groups == group].tolist())) == 1 for group in np.unique(groups))
    recorded = {tuple(line["prompt"]) for line in lines}
    assert {tuple(token_ids(asked, row).tolist()) for row in bound.prompts} <= recorded
    own = {tuple(token_ids(asked, row).tolist()) for row in asked.tables["problems"][:, 0]}
    if name == "templates":
        assert (words > 0).all() and len(set(words.tolist())) > 1 and not own & recorded
        heads = [tuple(row["prompt"][:2]) for row in lines]  # BOS, and what a template begins with
        a = tuple(token_ids(asked, asked.tables["problems/asked"][0, 1])[:2].tolist())
        assert len(set(heads)) > 2 and a in heads
        assert all((reward >= 1) == (head == a) for row, head in zip(lines, heads) for reward in row["rewards"])
        other = method("GRPO", policy, **{**options, "templates": TEMPLATES[:1]})
        with pytest.raises(UsageError, match="with other `templates`"):
            fit(other, 9, tmp_path / "whole", ckpt_path=newest_checkpoint(tmp_path / "whole"), **how)
    else:
        assert words.max() > 0 and own & recorded and recorded - own
