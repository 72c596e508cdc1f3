"""Verifiers and rewards: numbers as they are written in solutions, functions of the user, and what fails."""

from __future__ import annotations

import importlib.util
import threading
import warnings
from typing import Any

import pytest

from offpolicy.errors import UsageError
from offpolicy.language.rl import mathematics, verifiers
from offpolicy.language.rl.rewards import Rewards, resolve_verifier
from offpolicy.language.rl.verifiers import (
    Format,
    Length,
    choose_verifier,
    exact,
    final_number,
    final_part,
    last_number,
    math,
    read_final_number,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", 7),
        ("#### 1,234.50", 1234.5),
        ("####-12.", -12),
        ("#### $15", 15),
        ("#### -$15", -15),
        ("#### 5 apples", 5),
        ("#### 1\nno wait\n#### 2", 2),
        ("#### .5", 0.5),
        ("#### −3", -3),
        ("the answer is 7", None),
        ("#### seven", None),
        ("#### ", None),
        ("", None),
    ],
)
def test_numbers_are_read(text: str, number: float | None) -> None:
    found = read_final_number(text)
    assert (None if found is None else float(found)) == number


def test_final_number() -> None:
    assert final_number("q", "a\n#### 12", "b\n#### 12.0") == 1.0
    assert final_number("q", "a\n#### 13", "b\n#### 12") == 0.0
    assert final_number("q", "12", "b\n#### 12") == 0.0  # it must be given as the answer
    assert final_number("q", "#### 12", None) is None
    assert final_number("q", "#### 12", "twelve") is None


def test_verifier_by_name_and_path(tmp_path, monkeypatch) -> None:
    assert resolve_verifier("final_number") is final_number
    (tmp_path / "own_verifier.py").write_text("def short(prompt, answer, reference):\n    return 1 / len(answer)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_verifier("own_verifier.short")("", "four", None) == 0.25
    assert resolve_verifier("own_verifier:short")("", "four", None) == 0.25
    for name, message in (
        ("final-number", "Did you mean 'final_number'"),
        ("no_such_module.f", "no module 'no_such_module'"),
        ("own_verifier.long", "no 'long'"),
        ("own_verifier.shrt", "no 'shrt'; expected a function. Did you mean 'short'?"),
        ("own_verifier.__name__", "expected a function"),
    ):
        with pytest.raises(UsageError, match=message):
            resolve_verifier(name)


def test_the_verifier_that_fits() -> None:
    assert choose_verifier(["#### 1", "x #### 2"]) is final_number
    assert choose_verifier(["#### 1", None]) is None
    assert choose_verifier([]) is None


@pytest.mark.parametrize(
    ("verifier", "answer", "reference", "score"),
    [
        (exact, " 079 ", "79", 1.0),
        (exact, "079", "80", 0.0),
        (exact, "79 apples", "79", 0.0),
        (exact, "Paris", "Paris", 1.0),
        (exact, "paris", "Paris", 0.0),
        (exact, "nan", "nan", 1.0),  # a text like any other
        (exact, "79", None, None),
        (last_number, "7 and 9 make 16.", "16", 1.0),
        (last_number, "16 is what 7 and 9 make", "16", 0.0),
        (last_number, "it costs $1,250.00", "1250", 1.0),
        (last_number, "from 3-5", "-5", 1.0),
        (last_number, "no idea", "16", 0.0),
        (last_number, "16", "sixteen", None),
        (final_number, "#### 1,000", "1000", 1.0),
        (final_number, "#### 5.", "5", 1.0),
        (final_number, "#### 50%", "50", 1.0),
        (final_number, "so \\boxed{42}", "42", 1.0),
        (final_number, "\\boxed{41} #### 42", "42", 1.0),
        (final_number, "#### 42 \\boxed{41}", "42", 0.0),
        (final_number, "42", "42", 0.0),
        (final_number, "<think>#### 1</think>#### 2", "2", 1.0),
        (final_number, "<think>#### 2", "2", 0.0),
        (final_number, "#### 2 as thought</think> but", "2", 0.0),
    ],
)
def test_verifiers(verifier: Any, answer: str, reference: str | None, score: float | None) -> None:
    assert verifier("q", answer, reference) == score


def test_thinking_that_the_prompt_opened() -> None:
    """Without its end the answer has not begun."""
    for verifier in (final_number, last_number, math):
        assert verifier("q", "#### 2", "2") == 1.0 and verifier("q <think>\n", "#### 2", "2") == 0.0
        assert verifier("q <think>\n", "3</think>#### 2", "2") == 1.0
    assert exact("q", "2", "2") == 1.0 and exact("q <think>", "2", "2") == 0.0
    assert verifiers.Format()("q <think>", "#### 2", "2") == 0.0 and verifiers.Format()("q", "#### 2", "2") == 1.0


def test_answers_that_were_cut_off() -> None:
    """A number at the very end may lack its last digits, and a line that was cut off may go on with anything."""
    assert final_part("#### 12", ended=False) == "#### " and final_part("#### 12\nand", ended=False) == "#### 12\n"
    for verifier in (final_number, last_number, math):
        assert verifier("q", "#### 12", "12", ended=True) == 1.0
        assert verifier("q", "#### 12", "12", ended=False) == 0.0
        assert verifier("q", "#### 12\nand", "12", ended=False) == 1.0
        assert verifier("q", "so \\boxed{12} is", "12", ended=False) == 1.0
    for verifier in (final_number, math):
        assert verifier("q", "#### 12 times", "12", ended=False) == 0.0
        assert verifier("q", "\\boxed{12 and", "12", ended=False) == 0.0
    assert last_number("q", "#### 12 is", "12", ended=False) == 1.0
    assert exact("q", "12", "12", ended=False) == 0.0


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs the extra `verify`")
def test_mathematics() -> None:
    for answer, reference, score in (
        ("thus $\\frac{2}{4}$", "\\frac{1}{2}", 1.0),
        ("thus \\boxed{0.5}", "\\frac{1}{2}", 1.0),
        ("thus \\boxed{0.6}", "\\frac{1}{2}", 0.0),
        ("#### 1,234", "#### 1234", 1.0),
        ("no idea", "3", 0.0),
    ):
        assert math("q", answer, reference) == score
    assert math("q", "3", None) is None


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs the extra `verify`")
def test_mathematics_in_a_thread(monkeypatch) -> None:
    """Outside of the main thread the work goes to a process of its own, whose main thread can be timed."""
    sent: list[tuple[Any, ...]] = []

    class Worker:
        def submit(self, function: Any, *arguments: Any) -> Any:
            sent.append(arguments)
            return type("Future", (), {"result": staticmethod(lambda: 1.0)})

    monkeypatch.setattr(mathematics, "_worker", Worker)
    found: list[float | None] = []
    thread = threading.Thread(target=lambda: found.append(math("q", "\\boxed{3}", "x")))
    thread.start()
    thread.join()
    assert found == [1.0] and sent == [("$3$", "x", 5.0)]


def test_mathematics_without_the_extra(monkeypatch) -> None:
    """Numbers as Decimals: marked, else the last."""
    monkeypatch.setattr(verifiers.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    assert math("q", "#### 1,234.50 dollars, or so", "1234.5") == 0.0
    assert math("q", "#### 1,234.50 dollars", "1234.5") == 1.0
    assert math("q", "\\boxed{15/3}", "5") == 0.0  # nobody can tell
    assert math("q", "7 + 8 = 15", "15") == 1.0
    assert math("q", "7 + 8 = 16", "15") == 0.0
    assert math("q", "x", "x^2") is None


def test_format_and_length() -> None:
    assert [Format()("q", a, None) for a in ("#### 1", "\\boxed{1}", "1", "#### 1 #### 2")] == [1.0, 1.0, 0.0, 0.0]
    assert Format(r"<a>.*</a>")("q", "<a>x\ny</a>", None) == 1.0
    assert Format(r"<a>.*</a>")("q", "<a>x</a>.", None) == 0.0
    penalty = Length(limit=10, room=4)
    assert [penalty("q", "a", None, length=n) for n in (1, 6, 7, 10, 99)] == [0.0, 0.0, -0.25, -1.0, -1.0]
    with pytest.raises(UsageError, match="regular expression"):
        Format("(")
    with pytest.raises(UsageError, match="`room`"):
        Length(limit=3, room=4)


def test_a_weighted_sum() -> None:
    """1·correct + 0.1·format + 0.5·length: (1 + 0.1 + 0, 0.1 − 0.5, 0)."""
    reward = Rewards(["final_number", {"name": "format", "weight": 0.1}, {"name": "length", "weight": 0.5, "limit": 9}])
    assert reward.names == ("final_number", "format", "length")
    assert str(reward) == "final_number + 0.1·format + 0.5·length"
    found = reward(["q"] * 3, ["#### 7", "#### 8", "7"], ["7"] * 3, lengths=[3, 9, 3])
    assert found.scores.tolist() == pytest.approx([1.1, -0.4, 0.0]) and found.problems == 0
    assert found.parts["final_number"].tolist() == [1.0, 0.0, 0.0]
    assert found.parts["length"].tolist() == [0.0, -1.0, 0.0]  # without their weights
    assert Rewards("exact")(["q"], ["1"], ["1"], ended=[False]).scores.tolist() == [0.0]


OWN_REWARDS = """
def brittle(prompt, answer, reference, *, bonus=0.0):
    odd = {"nan": float("nan"), "inf": float("inf"), "none": None, "text": "good", "large": 1e39}
    return {"half": 0.5, **odd}[answer] + bonus

def short(prompt, answer, reference, *, length, ended):
    return 1.0 / length if ended else -1.0
"""


def test_what_is_right_does_not_depend_on_the_other_parts() -> None:
    """A long right answer earns less than 1 and a wrong one may earn more; else all of it counts."""
    given = ["q"] * 2, ["#### 4", "#### 5"], ["4", "4"]
    mixed = Rewards([{"name": "length", "limit": 2}, {"name": "final_number", "weight": 0.5}, "format"])
    scored = mixed(*given, lengths=[2, 1])
    assert scored.scores.tolist() == [0.5, 1.0] and mixed.solved(scored).tolist() == [True, False]
    plain = Rewards([{"name": "format", "weight": 0.5}])
    assert plain.solved(plain(*given)).tolist() == [False, False]


def test_functions_of_the_user_cannot_stop_a_run(tmp_path, monkeypatch) -> None:
    """Exceptions, NaN, infinity, None and texts score 0 and are counted; the first is shown, once."""
    (tmp_path / "own_rewards.py").write_text(OWN_REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    reward = Rewards({"name": "own_rewards.brittle", "weight": 2.0})
    answers = ["half", "boom", "nan", "inf", "none", "text", "large", "half"]
    with pytest.warns(UserWarning, match=r"reward 'brittle': KeyError: 'boom'; answer 'boom'. It scores 0"):
        found = reward(["q"] * 8, answers, [None] * 8)
    assert found.scores.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0] and found.problems == 6
    assert found.failed.tolist() == [False, True, True, True, True, True, True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reward(["q"], ["nan"], [None]).problems == 1
    assert reward.problems == 7 and reward.first_problem is not None and "boom" in reward.first_problem
    assert Rewards({"name": "own_rewards:brittle", "bonus": 1.0})(["q"], ["half"], [None]).scores.tolist() == [1.5]
    own = Rewards("own_rewards.short")
    assert own(["q"] * 2, ["a", "b"], [None] * 2, ended=[True, False], lengths=[4, 4]).scores.tolist() == [0.25, -1.0]
    with pytest.raises(UsageError, match="no `lengths` were given"):
        own(["q"], ["a"], [None])


def test_answers_without_a_reference_are_counted() -> None:
    with pytest.warns(UserWarning, match="could not judge"):
        found = Rewards()(["q", "q"], ["#### 1", "#### 1"], [None, "1"])
    assert found.scores.tolist() == [0.0, 1.0] and found.problems == 1


def test_bad_rewards() -> None:
    for given, message in (
        ("final-number", "Did you mean 'final_number'"),
        ([], "names none"),
        ([5], "expected a name, an import path"),
        (["exact", "exact"], "'exact' twice"),
        ({"name": "length"}, "without `limit`"),
        ({"name": "format", "patern": "a"}, "Did you mean 'pattern'"),
        ({"name": "exact", "ended": False}, "takes no `ended`"),
        ("no_such_module.f", "`reward` is 'no_such_module.f', but there is no module"),
        ({"name": "exact", "weight": "big"}, "`weight`"),
    ):
        with pytest.raises(UsageError, match=message):
            Rewards(given)  # type: ignore[arg-type]
