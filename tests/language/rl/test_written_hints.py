"""Hints that the policy writes: when, what becomes of them, and what is learned behind them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_rl import fit, make_policy, method, write_problems
from toy import differences, run_files

from offpolicy.compute import processes
from offpolicy.data.texts.numbers import numbers_in
from offpolicy.data.texts.problems import Problems, open_problems
from offpolicy.errors import DataError, UsageError
from offpolicy.language.rl.asking import AskedProblems
from offpolicy.language.rl.engine import Completion
from offpolicy.language.rl.engines import TransformersEngine
from offpolicy.language.rl.hints import GIVES_AWAY, SHOWN, UNFIT, WRITES, Written, gives_away, write_hints
from offpolicy.training.checkpoints import newest_checkpoint

SPEC = {
    "name": "written",
    "tiers": ["a", "b"],
    "instruction": "{tier}{prompt}{solution}.",
    "text": "{prompt}?{hint}",
    "tokens": 9,
}
OPTIONS: dict[str, Any] = {"hints": SPEC, "max_new_tokens": 12, "rewards": [f"{__name__}.by_prompt"], "record": True}
LETTERS = {letter: 4 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz0123456789 +-=.?")}
SAID = ["abc", "it is 2", "", "x" * 9]  # to problems 0 to 3; the last makes the longest problem too long


def by_prompt(prompt: str, answer: str, reference: str) -> float:
    """Wrong, but behind a hint to problem 0."""
    return float("0+1=?" in prompt.replace(" ", "")) + len(answer) % 3 / 10


class Says(TransformersEngine):
    """Writes what the test says, and remembers what it was asked to write."""

    asked: dict[tuple[int, int], str]

    def generate(self, requests: Any, how: Any, stopped: Any = None) -> Any:
        found = super().generate(requests, how, stopped)
        self.asked = getattr(self, "asked", {})
        for i, request in enumerate(requests):
            if WRITES <= request.number < 2 * WRITES:
                problem = request.number - WRITES
                self.asked[how.iteration, problem] = read(request.prompt)
                assert (request.samples, request.room) == (1, 9)
                token = np.array([*(LETTERS[letter] for letter in SAID[problem]), 2])
                found[i] = [Completion(token, np.zeros(len(token)), True)]
        return found


def read(tokens: Any) -> str:
    letters = dict(zip(LETTERS.values(), LETTERS))
    return "".join(letters.get(int(token), "#" if token == 3 else "") for token in tokens)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("written") / "policy")


@pytest.fixture(scope="module")
def problems(policy: Path) -> Problems:
    """Four sums, the last with a long prompt and without a long solution."""
    rows = [{"prompt": f"{i}+1=", "solution": f"we add ####{i + 1}"} for i in range(3)]
    rows.append({"prompt": "say it 3+1=", "solution": "####4"})
    path = write_problems(policy.parent / "sums.jsonl", rows)
    return open_problems(str(path), tokenizer=str(policy), template="{prompt}.", max_prompt_length=40)


@pytest.mark.parametrize(
    ("hint", "answers", "wanted"),
    [
        ("there are 72 of them", ["72"], True),
        ("5-72, that is", ["72"], True),
        ("72.0 in all", ["72"], True),
        ("1,234 in all", ["1234"], True),
        ("720 or 7", ["72"], False),
        ("add both halves", ["72"], False),
        ("take option B now", ["b"], True),
        ("take the better one", ["b"], False),
        ("it is New  york", ["Boston", "New York"], True),
        ("half of it: 1/2", ["1/2"], True),
        (r"so \frac{1}{2} is left", [r"\frac{1}{2}"], True),
        ("anything", ["", " "], False),
    ],
)
def test_gives_away(hint: str, answers: list[str], wanted: bool) -> None:
    assert gives_away(hint, answers) is wanted


def test_numbers_in_a_text() -> None:
    assert sorted(map(float, numbers_in("3 of -4, $1,200.5 and 2e3"))) == [3, 4, 1200.5, 2000]


def test_what_becomes_of_hints(policy: Path, problems: Problems, tmp_path: Path) -> None:
    """All four problems fail in iteration 1. In 2 and 3 the policy writes to each, in the words of tier 1 and then 2.

    One hint is shown, one has the answer, one no word, and one makes its problem longer than every request. Right
    answers behind the hint take a tier back, so that problem 0 has tier 1 in iteration 2 and none in iteration 3.
    """
    trained = fit(
        method("GRPO", policy, **OPTIONS, engine=f"{__name__}.Says"), 6, tmp_path, problems=problems, held_out=False
    )
    rule, engine = trained.answering.asking.hints, trained.answering.engine
    assert engine.asked == {
        (2, 0): "a0+1=we add ####1.",
        (2, 1): "a1+1=we add ####2.",
        (2, 2): "a2+1=we add ####3.",
        (2, 3): "asay it 3+1=####4.",
        (3, 1): "b1+1=we add ####2.",
        (3, 2): "b2+1=we add ####3.",
        (3, 3): "bsay it 3+1=####4.",
    }
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    asked = [{read(line["prompt"]) for line in lines if line["iteration"] == k} for k in (1, 2, 3)]
    plain = {"0+1=.", "1+1=.", "2+1=.", "say it 3+1=."}
    assert asked == [plain, plain - {"0+1=."} | {"0+1=?a b c."}, plain]
    assert rule.tier.tolist() == [1, 2, 2, 2] and rule.iteration == 3
    assert [rule.hints[i].kind for i in (1, 2, 3)] == [GIVES_AWAY, UNFIT, UNFIT]
    assert rule.metrics() == {"hints/written": 3, "hints/gave_away": 1, "hints/unfit": 2}
    assert trained.answering.asking.facts() == [
        (
            "hints",
            "written by the policy from the solution, 9 tokens or less, to whole groups, after 1 iteration of "
            "failures; none in evaluations",
        )
    ]


def test_hints_of_an_iteration_are_written_once(policy: Path, problems: Problems) -> None:
    """Two processes write what one does; a problem that is asked twice has one hint; the next iteration begins anew."""
    drawn: list[list[int]] = []

    class Answers:
        def __init__(self) -> None:
            self.asking = AskedProblems(problems, SimpleNamespace(hints=SPEC, replay_window=0, engine="tiny"))
            self.asking.hints.tier[:] = [1, 2, 0, 1]

        def prompt(self, problem: int, words: int) -> np.ndarray:
            return np.array([problem, words])

        def generated(self, requests: Any, *_: Any) -> Any:
            drawn.append([int(r.number) - WRITES for r in requests])
            assert all(r.prompt[1] == self.asking.hints.tier[r.prompt[0]] for r in requests)
            return [[Completion(np.array([int(r.prompt[0])]), np.zeros(1), True)] for r in requests]

        def finals(self, prompts: Any, answers: Any) -> list[str]:
            return [f"do {'abcd'[int(one.token[0])]}" for one in answers]

    def written(answering: Any, *k: int) -> dict[str, Any]:
        for iteration in k:
            write_hints(answering, np.array([1, 0, 1, 2]), iteration, 0, None)  # type: ignore[arg-type]
        return answering.asking.state_dict()

    one = Answers()
    written(one, 2)
    write_hints(one, np.array([3, 0]), 2, 0, None)  # type: ignore[arg-type]
    assert drawn == [[0, 1], [3]] and list(one.asking.hints.hints) == [0, 1, 3]
    assert [hint.kind for hint in one.asking.hints.hints.values()] == [SHOWN] * 3
    assert one.asking.hints.tier_of(np.arange(4)).tolist() == [3, 3, 0, 3]
    texts, table = one.asking.problems, one.asking.problems.tables["problems/asked"]
    first = texts.start[table[1, 3]]
    assert read(texts.steps["token"][first : first + texts.length[table[1, 3]]]) == "1+1=?do b."
    assert table[2, 3] == table[2, 0]
    again = Answers()
    again.asking.load_state_dict(one.asking.state_dict())
    assert not differences(again.asking.state_dict(), one.asking.state_dict())
    assert (again.asking.problems.tables["problems/asked"] == table).all()
    assert (again.asking.problems.steps["token"] == texts.steps["token"]).all()
    written(one, 3)
    assert list(one.asking.hints.hints) == [0, 1]

    parts: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "world_size", lambda: 2)
        for rank in (0, 1):
            patch.setattr(processes, "rank", lambda rank=rank: rank)
            patch.setattr(processes, "gathered", lambda mine: parts.append(mine) or [])
            written(Answers(), 3)
        patch.setattr(processes, "gathered", lambda mine: parts[::-1])
        both = Answers()
        assert not differences(written(both, 3), one.asking.state_dict())


def test_a_method_that_keeps_answers_is_refused(policy: Path, problems: Problems) -> None:
    """Its old answers would be scored behind the hints of now."""
    with pytest.raises(UsageError, match="brings answers of earlier ones"):
        fit(method("SPEAR", policy, hints=SPEC, max_new_tokens=12), 1, problems=problems, held_out=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"replay_window": 1}, "--model.replay_window 0"),
        ({"engine": "replay", "records": "none"}, "among which the hints are not"),
        ({"hints": {"name": "written", "tiers": [0.5]}}, "expected texts that say how much"),
        ({"hints": {"name": "written", "instruction": "{prompt} {tier}"}}, "expected {solution} in it"),
        ({"hints": {"name": "written", "tokens": 0}}, "`tokens` is 0"),
        ({"lag": 1}, "--model.lag 0"),
    ],
)
def test_bad_options_of_written_hints(policy: Path, problems: Problems, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        fit(method("GRPO", policy, **{**OPTIONS, **options}), 1, problems=problems, held_out=False)
    assert said in str(caught.value)


def test_problems_without_solutions_are_refused(policy: Path) -> None:
    path = write_problems(policy.parent / "bare.jsonl", [{"prompt": "1", "answer": "1"}] * 3)
    bare = open_problems(str(path), tokenizer=str(policy))
    with pytest.raises(DataError, match="expected a column `solution`, from which the policy writes"):
        AskedProblems(bare, SimpleNamespace(hints=SPEC, replay_window=0, engine="tiny"))


@pytest.mark.slow
def test_a_run_with_written_hints_resumes(policy: Path, problems: Problems, tmp_path: Path) -> None:
    """Bit for bit from the middle of an iteration behind hints that the policy drew."""
    how: dict[str, Any] = {"problems": problems, "held_out": False}
    whole = fit(method("GRPO", policy, **OPTIONS), 6, tmp_path / "whole", **how)
    assert whole.answering.asking.hints.hints and isinstance(whole.answering.asking.hints, Written)
    fit(method("GRPO", policy, **OPTIONS), 3, tmp_path / "cut", **how)
    path = newest_checkpoint(tmp_path / "cut")
    resumed = fit(method("GRPO", policy, **OPTIONS), 4, tmp_path / "cut", ckpt_path=path, **how)
    store = resumed.course.rollouts.store
    assert (store.episodes["asked"] == 3).any()
    np.testing.assert_allclose(store.steps["logp"], store.steps["sampler_logp"], atol=1e-4)  # behind the hint
    path = newest_checkpoint(tmp_path / "cut")
    fit(method("GRPO", policy, **OPTIONS), 6, tmp_path / "cut", ckpt_path=path, **how)
    found, expected = (run_files(tmp_path / one, 6) for one in ("cut", "whole"))
    for part in ("state_dict", "optimizer_states", "offpolicy"):
        assert not differences(found[part], expected[part], part)
