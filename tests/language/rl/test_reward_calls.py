"""How rewards are called, what they are given by name, how long they may take, and when they are given up."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from offpolicy.errors import DataError, UsageError
from offpolicy.language.rl.reward_calls import Watchdog, bind
from offpolicy.language.rl.rewards import Rewards, Tally, resolve_verifier

OWN = """
import sys, time

def trl(prompts, completions, **kwargs): return [float(len(c)) for c in completions]
def of_column(completions, level, **kwargs): return level
def of_right(completions, ground_truth): return [float(g) for g in ground_truth]
def single(completion, **kwargs): return len(completion) + (kwargs["reference"] == "4") + kwargs["ended"]
def two(prompt, answer): return 10.0 * len(prompt) + len(answer)
def turned(answer, prompt, reference): return 10.0 * len(prompt) + len(answer)
def right_beside(completion, answer): return float(completion == answer)
def other_names(q, a, r): return float(a == r)
def by_place(*texts): return float(len(texts))
def verl(data_source, solution_str, ground_truth, extra_info=None): return float(ground_truth) + len(data_source)
def keyword(prompt, answer, reference, *, level): return float(level)
def plain(prompt, answer, reference=None, tolerance=0.5): return tolerance

def completions_alone(completions, **kwargs): return [1.0] * len(completions)
def lists(prompts, answers, references): return 1.0
def unknown(text): return 1.0
def nothing(): return 1.0
def misplaced(answer, q, r): return 1.0
async def later(prompt, answer, reference): return 1.0

def fails(prompt, answer, reference): raise RuntimeError("down")
def mistaken(prompt, answer, reference): return undefined
def leaves(prompt, answer, reference):
    if reference == "odd": sys.exit("bye")
    return 1.0
def interrupts(prompt, answer, reference): raise KeyboardInterrupt
def sleeps(prompt, answer, reference): time.sleep(60 if answer == "long" else 0); return 1.0
def turns(prompt, answer, reference):
    while answer == "long": pass
    return 1.0
def stubborn(prompt, answer, reference):
    try: time.sleep(60)
    except BaseException: time.sleep(60)
def sleeps_at_once(prompts, completions): time.sleep(60)
def too_few(prompts, completions): return [1.0]
def some(prompts, completions): return [1.0, None, float("nan"), "x"]
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "called_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "called_rewards", raising=False)


def scores(name: str, **options: Any) -> list[float]:
    columns = {"level": [0.5, 1.5], "data_source": ["d", "dd"], "ground_truth": ["7", "8"]}
    rewards = Rewards(f"called_rewards.{name}", columns=options.pop("names", ()))
    given = {name: columns[name] for name in rewards.columns}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return rewards(["p", "pp"], ["abc", "4"], ["3", "4"], columns=given, lengths=[1, 2]).scores.tolist()


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        ("trl", (), [3.0, 1.0]),
        ("of_column", ("level",), [0.5, 1.5]),
        ("of_right", (), [3.0, 4.0]),
        ("of_right", ("ground_truth",), [7.0, 8.0]),
        ("single", (), [4.0, 3.0]),
        ("two", (), [13.0, 21.0]),
        ("turned", (), [13.0, 21.0]),
        ("right_beside", (), [0.0, 1.0]),
        ("other_names", (), [0.0, 1.0]),
        ("by_place", (), [3.0, 3.0]),
        ("verl", ("data_source",), [4.0, 6.0]),
        ("keyword", ("level", "prompt"), [0.5, 1.5]),
        ("plain", (), [0.5, 0.5]),
    ],
)
def test_values_by_name_and_by_place(name: str, columns: tuple[str, ...], expected: list[float]) -> None:
    assert scores(name, names=columns) == expected


REFUSED = ["completions_alone", "lists", "unknown", "nothing", "later", "misplaced", "verl", "of_column"]


@pytest.mark.parametrize("name", REFUSED)
def test_signatures_are_checked_before_training(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        Rewards(f"called_rewards.{name}")
    for words in (
        f"called_rewards.{name}",
        f"def {name}(prompt, answer, reference)",
        "(prompts, completions, **kwargs)",
    ):
        assert words in str(caught.value)
    with pytest.raises(UsageError, match=r"without `level`"):
        Rewards("called_rewards.keyword")


def test_a_parameter_of_the_user_wins_over_a_column() -> None:
    given = {"name": "called_rewards.keyword", "level": 3.0}
    rewards = Rewards(given, columns=["level"])
    assert rewards.columns == () and rewards(["q"], ["a"], [None]).scores.tolist() == [3.0]
    assert bind(lambda prompt, answer, reference: 0, "x").names == ("prompt", "answer", "reference")


def test_a_verifier_by_path_has_no_score_where_it_fails() -> None:
    assert resolve_verifier("called_rewards.two")("p", "ab", None) == 12.0
    assert resolve_verifier("called_rewards.trl")("p", "ab", None) == 2.0
    with pytest.warns(UserWarning, match="RuntimeError: down"):
        assert resolve_verifier("called_rewards.fails")("p", "ab", None) is None
    with pytest.raises(UsageError, match="def unknown"):
        resolve_verifier("called_rewards.unknown")


def test_an_exit_is_a_failure_and_an_interruption_is_none() -> None:
    rewards = Rewards("called_rewards.leaves")
    with pytest.warns(UserWarning, match=r"it called sys.exit.'bye'."):
        found = rewards(["p"] * 3, ["a"] * 3, ["odd", "even", "odd"])
    assert found.scores.tolist() == [0.0, 1.0, 0.0] and found.problems == 2
    rewards.check([rewards.tallies], ended=True)  # it worked once
    with pytest.raises(KeyboardInterrupt):
        Rewards("called_rewards.interrupts")(["p"], ["a"], ["1"])


@pytest.mark.parametrize("name", ["sleeps", "turns"])
def test_a_time_limit_for_each_answer(name: str) -> None:
    former = signal.getsignal(signal.SIGALRM)
    rewards, began = Rewards(f"called_rewards.{name}", seconds=0.2), time.monotonic()
    with pytest.warns(UserWarning, match=r"took longer than 0.2 s"):
        found = rewards(["p"] * 3, ["long", "short", "long"], ["1"] * 3)
    assert found.scores.tolist() == [0.0, 1.0, 0.0] and time.monotonic() - began < 20.0
    assert signal.getsignal(signal.SIGALRM) is former


def test_a_time_limit_for_the_whole_batch_and_for_what_catches_it_once() -> None:
    for name in ("sleeps_at_once", "stubborn"):
        began = time.monotonic()
        with pytest.warns(UserWarning, match=r"took longer than 0.1 s"):
            assert Rewards(f"called_rewards.{name}", seconds=0.1)(["p"], ["a"], ["1"]).problems == 1
        assert time.monotonic() - began < 20.0


def test_an_alarm_of_others_still_rings() -> None:
    """Within the limit, the signal goes to whoever had it before."""
    rung: list[int] = []
    former = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    try:
        with Watchdog(60.0) as watchdog:
            watchdog.start()
            signal.raise_signal(signal.SIGALRM)
    finally:
        signal.signal(signal.SIGALRM, former)
    assert rung == [signal.SIGALRM]


def test_outside_of_the_main_thread_nothing_is_interrupted() -> None:
    found: list[float] = []
    thread = threading.Thread(
        target=lambda: found.extend(Rewards("called_rewards.two", seconds=0.01)(["p"], ["a"], [None]).scores)
    )
    thread.start()
    thread.join()
    assert found == [11.0]


def test_lists_of_numbers() -> None:
    rewards = Rewards("called_rewards.some")
    with pytest.warns(UserWarning, match="could not judge"):
        found = rewards(["p"] * 4, ["a"] * 4, [None] * 4)
    assert found.scores.tolist() == [1.0, 0.0, 0.0, 0.0] and found.problems == 3
    rewards = Rewards("called_rewards.too_few")
    with pytest.warns(UserWarning, match="it returned 1 values for 2 answers"):
        rewards(["p"] * 2, ["a"] * 2, [None] * 2)
    with pytest.raises(UsageError, match=r"called_rewards.too_few failed for every one of 2 answers.*a list with"):
        rewards.check([rewards.tallies])


def test_when_a_reward_is_given_up() -> None:
    """A mistake in the code at once, other failures after eight different problems, all of them at the end."""
    with pytest.warns(UserWarning):
        mistaken = Rewards("called_rewards.mistaken")
        mistaken(["p"], ["a"], ["1"])
        fails = Rewards(["called_rewards.fails", "format"])
        fails(["p"] * 9, ["a"] * 9, ["1"] * 9)
    with pytest.raises(UsageError, match=r"called_rewards.mistaken failed for every one of 1 answers: NameError"):
        mistaken.check([mistaken.tallies])
    fails.check([fails.tallies])  # one problem
    fails.check([fails.tallies], ended=True)  # format worked
    fails([f"p{i}" for i in range(7)], ["a"] * 7, ["1"] * 7)
    with pytest.raises(
        UsageError, match=r"fails failed for every one of 16 answers: RuntimeError: down; expected a num"
    ):
        fails.check([fails.tallies])
    other = {name: Tally(worked=1) for name in fails.names}
    fails.check([fails.tallies, other])  # it worked in another process
    alone = Rewards("exact")
    with pytest.warns(UserWarning):
        alone(["p"], ["a"], [None])
    alone.check([alone.tallies])
    with pytest.raises(UsageError, match="right answers that it can read"):
        alone.check([alone.tallies], ended=True)


# -- whole runs --------------------------------------------------------------------------------------------------------


def run(policy: Path, tmp_path: Path, rows: list[dict[str, Any]], *rewards: str, **options: Any) -> Any:
    from tiny_rl import ProblemData, method, quiet

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = method("GRPO", policy, rewards=list(rewards), minibatches=1, eval_samples=0, **options)
    quiet(2).fit(module, ProblemData(str(path), tokenizer=str(policy), eval_fraction=0.3))
    return module


def test_prompts_without_answers_and_columns_of_the_data(policy: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"w{i} w1", "level": i} for i in range(10)]
    module = run(policy, tmp_path, rows, "called_rewards.of_column")
    assert module.answering.rewards.problems == 0
    with pytest.raises(DataError, match=r"no right answers, with which the reward exact compares"):
        run(policy, tmp_path, rows, "exact")
    with pytest.raises(UsageError, match=r"`reward` names none; expected one or several"):
        run(policy, tmp_path, rows)


def test_a_run_in_which_no_reward_works_ends_with_an_error(policy: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"w{i} w1", "answer": str(i)} for i in range(5)]
    with pytest.warns(UserWarning), pytest.raises(UsageError, match=r"called_rewards.mistaken failed .* of 8 answers"):
        run(policy, tmp_path, rows, "called_rewards.mistaken")
    with pytest.warns(UserWarning), pytest.raises(UsageError, match=r"called_rewards.fails failed .* of 18 answers"):
        run(policy, tmp_path, rows, "called_rewards.fails")
