"""Verifiers: numbers as they are written in solutions, and functions of the user."""

from __future__ import annotations

import pytest

from offpolicy.errors import UsageError
from offpolicy.language.rewards import choose_verifier, final_number, read_final_number, resolve_verifier


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
        ("own_verifier.__name__", "expected a function"),
    ):
        with pytest.raises(UsageError, match=message):
            resolve_verifier(name)


def test_the_verifier_that_fits() -> None:
    assert choose_verifier(["#### 1", "x #### 2"]) is final_number
    assert choose_verifier(["#### 1", None]) is None
    assert choose_verifier([]) is None
