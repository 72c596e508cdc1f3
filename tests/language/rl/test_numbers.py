r"""Answers with the right number, and answers that only begin with it; lists; texts made to hold up a reader."""

from __future__ import annotations

import importlib.util
import time
from decimal import Decimal

import pytest

from offpolicy.data.texts.numbers import last_mark, last_number_in, number_of, plain_number
from offpolicy.language.rl.mathematics import expression
from offpolicy.language.rl.verifiers import exact, final_number, last_number, math

verified = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs the extra `verify`")

BOXED_WRONG = [  # in a box, for 3
    '3½', '3²', '3√2', '3:1', '\\geq 3', '3 \\text{ million}', '3 million', '3_{4}', '3+', '3\\cdot', '3 \\times',
    '3\\ldots', '3...', '3?', '3~4', '3&4', '3\\\\4', '3\\text{ h }20\\text{ min}', '3 \\text{ is wrong}', '3/',
    '3∞', '\\sim 3', '\\approx 3', '3 \\approx \\pi', '3 4', '3\\ 4', '3\\, 5', '1 2', '\\pm 3', '3 \\pm 1', '3i',
    '3e', '3e2', '3x', '3ab', '3 \\pi', '3%5', '3\\mod 2', '3;3', '3,3,4', '(3,4)', '[3,4]', '\\{3,4\\}',
    '3 \\text{ to } 4', '3-4', '3--', '3 \\text{ or more}', '3 \\times 10^{8}', '3.\\overline{3}', '3.5',
    '3\\frac12', '30', '-3', "3^\\circ 20'", '3\\text{k}', '3\\text{K}', '3\\text{M}', '\\text{3 or 4}',
    '3 \\text{ dozen}', '3 \\text{ hundred}', '3^{-1}', '3!!', '3 \\to 4', '\\frac{3}', '\\frac{3}{',
    '3\\%\\text{ of }5', '3 = 4', '2x = 3', 'x^2 = 3', '3 = x^2', 'x \\ne 3', 'x<3', '|x|=3', '3\\text{th root}',
    '3 \\text{ root}', '\\sqrt{3}', '3 \\sqrt 2', '3 \\ln 2', '\\log_3', '3\\in', '3 \\notin', '3\\cup 4',
    '\\begin{cases}3\\\\4\\end{cases}',
]  # fmt: skip
MARKED_WRONG = [  # after ####, for 3
    '3 or 4', '3 and 4', '3/4', '3:4', '3x', '3 x 4', '3 times 4', '3 plus 4', '3 million', '3k', '3,4', '3, 4',
    '3^2', '3**2', '3*2', '3e2', '3 1/2', '3.5.6', '3 hundred', '3 apples and 2 pears', '3-4', '3–4', '3 to 4',
    '3 = x + 1', '3!', '3 squared', '3 pi', '3 (or 4)', 'three', '4 (3)', '3 minus 1', '3...', '3 + 4', '3 dozen',
    '3 halves', '3 hours 20 minutes', '~3', '> 3', '±3', '3±1', '3%4', '3 not', '3\n#### 4',
]  # fmt: skip
BOXED_RIGHT = [
    '3', '3.0', '+3', '03', '3.', '\\text{3}', '\\textbf{3}', '$3$', '\\$3', '3\\%', '3^\\circ', '3^{\\circ}',
    '3\\text{ cm}', '3\\text{cm}', '3\\ \\text{cm}^2', '3\\,\\mathrm{cm}^{2}', '3 \\text{ m/s}', '3\\text{ m/s}^2',
    '3 \\text{ apples}', '3 apples', 'x = 3', 'x=3', '= 3', '\\boxed{3}', '\\left( 3 \\right)', '(3)', '３', '3\\\\',
    '3 ', '\\ 3', '{3}', '3\\text{ square units}', '3 \\text{ units}^2', '3\\text{ dollars}', '3\\mbox{ cm}',
    '3 \\text{ miles per hour}', '3\\mathrm{~cm}', '\\displaystyle 3', '3 \\text{ percent}', '\\mathbf{3}',
]  # fmt: skip
MARKED_RIGHT = [
    '3', '$3', '3.', '3%', '3 apples', '3 cm^2', '3 cm²', '**3**', '3</answer>', '3 dollars.', 'x = 3', '= 3', '(3)',
    '3.00', '\\$3', '€3', '3€', '3 km/h', '3 hours', '3\r\nbye', '3\nso 4', '3 ####', '`3`', '"3"',
    '3 dollars per day', '3 days', '3 men', '$3 $', '3 GB',
]  # fmt: skip
WRONG = [
    ("3", "\\boxed{\\boxed{3} + 1}"),
    ("3", "\\boxed{3 \\boxed{4}}"),
    ("3", "#### 3 \\boxed{4}"),
    ("3", "\\boxed{3"),
    ("3", "\\boxed{3} \\boxed{4}"),
    ("3", "\\boxed{3}, \\boxed{4}"),
    ("12", "\\boxed{1,2}"),
    ("12", "#### 1,2"),
    ("12", "#### 1, 2"),
    ("1234", "#### 1, 234"),
    ("1234", "#### 12,34"),
    ("1234", "\\boxed{(1,234)}"),
    ("1234", "1,23,4"),
    ("77", "\\boxed{7 7}"),
    ("77", "#### 7 7"),
    ("3", "3\\sqrt{2}"),
    ("2", "2x+1"),
    ("1", "1/2"),
    ("4", "4!"),
    ("3 or 4", "#### 3"),
    ("1/2", "#### 1"),
    ("10:30", "\\boxed{10}"),
    ("1,2", "#### 12"),
]
RIGHT = [
    ("-3", "#### -3"),
    ("-3", "#### −3"),
    ("-3", "\\boxed{-3}"),
    ("-3", "\\boxed{- 3}"),
    ("-15", "#### -$15"),
    ("-15", "#### $-15"),
    ("0.5", "#### .5"),
    ("1000", "#### 1e3"),
    ("1234", "#### 1,234"),
    ("1234", "#### 1 234"),
    ("1234", "\\boxed{1\\,234}"),
    ("1234", "\\boxed{1{,}234}"),
    ("1234567", "#### 1,234,567"),
    ("1234.5", "#### 1,234.50"),
    ("1,234", "#### 1234"),
    ("$1{,}234$", "#### 1234"),
    ("#### 7 apples", "#### 7"),
    ("so \\boxed{7}.", "#### 7"),
    ("3\\text{ cm}", "#### 3"),
    ("3", "\\boxed{4} no \\boxed{3}"),
    ("3", "**Answer: \\boxed{3}**"),
    ("1234", "\\boxed{1,\\!234}"),
]
EQUAL = [
    ("\\frac{1}{2}", "\\boxed{0.5}"),
    ("0.5", "\\boxed{\\frac12}"),
    ("0.5", "#### 1/2"),
    ("\\frac{7}{2}", "\\boxed{\\frac{14}{4}}"),
    ("10-2\\sqrt{5}", "\\boxed{10 - 2\\sqrt{5}}"),
    ("2x+1", "\\boxed{1+2x}"),
    ("2x+1", "\\boxed{y = 2x+1}"),
    ("y=2x+1", "\\boxed{2x+1}"),
    ("8", "\\boxed{2^3}"),
    ("24", "\\boxed{4!}"),
    ("3", "\\boxed{\\log_2 8}"),
    ("3", "\\boxed{|-3|}"),
    ("3", "\\boxed{1+2}"),
    ("3", "\\boxed{1+2=3}"),
    ("\\{3,4\\}", "\\boxed{\\{4,3\\}}"),
    ("(1,2)", "\\boxed{(1,2)}"),
    ("[3,4)", "\\boxed{[3,4)}"),
    ("3, 4", "\\boxed{3,4}"),
    ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}"),
    ("Evelyn", "\\boxed{\\text{Evelyn}}"),
    ("red", "\\boxed{\\text{red}}"),
    ("\\frac{\\pi}{4}", "\\boxed{\\pi/4}"),
    ("2\\pi", "\\boxed{2π}"),
    ("3 \\cdot 10^8", "\\boxed{3 \\times 10^{8}}"),
    ("300000000", "\\boxed{3 \\times 10^{8}}"),
    ("0.5", "\\boxed{50\\%}"),
    ("50\\%", "\\boxed{0.5}"),
    ("\\sqrt{18}", "\\boxed{3\\sqrt2}"),
    ("\\frac{1}{2}", "thus $\\frac{2}{4}$"),
    ("3", "so it is 3"),
    ("7", "1. 3 + 4 = 7"),
    ("7", "3 + 4 = 7"),
    ("3", r"\boxed{3\text{ sq. in.}}"),
    ("3", r"\boxed{3 \quad}"),
    ("x \\in [1,2]", "\\boxed{[1,2]}"),
    ("\\begin{pmatrix}3\\\\4\\end{pmatrix}", "\\boxed{\\begin{pmatrix}3\\\\4\\end{pmatrix}}"),
    ("x^2+y^2=25", "\\boxed{x^2+y^2=25}"),
    ("3", "\\boxed{\\dfrac{6}{2}}"),
    ("0.333333", "\\boxed{0.3333333}"),
    ("\\frac{1}{2}", "\\boxed{\\frac{1}{2}\\text{ cm}}"),
    ("1/2", "#### $\\frac{1}{2}$."),
    ("C", "\\boxed{C}"),
    ("C", "\\boxed{\\text{C}}"),
    ("(C)", "\\boxed{\\text{(C)}}"),
    ("\\text{(C)}", "\\boxed{C}"),
    ("12:30", "\\boxed{12:30}"),
    ("11:00", "\\boxed{11:00}"),
    ("5, -5", "\\boxed{\\pm 5}"),
    ("x>3", "\\boxed{x>3}"),
    ("3x", "\\boxed{3x}"),
    ("no", "\\boxed{no}"),
    ("yes", "\\boxed{\\text{yes}}"),
    ("1011_2", "\\boxed{1011_2}"),
    ("3 \\text{ or } 4", "\\boxed{3,4}"),
    ("10 \\text{ AM}", "\\boxed{10 \\text{ AM}}"),
]
UNEQUAL = [
    ("x^2+y^2=25", "\\boxed{25}"),
    ("10-2\\sqrt{5}", "\\boxed{8}"),
    ("10-2\\sqrt{5}", "\\boxed{10}"),
    ("2x+1", "\\boxed{2}"),
    ("2x+1", "\\boxed{2x+2}"),
    ("2x+1", "\\boxed{2x+1½}"),
    ("\\frac12", "\\boxed{\\frac12 \\text{ million}}"),
    ("(1,2)", "\\boxed{1}"),
    ("3,4", "\\boxed{3}"),
    ("12:30", "\\boxed{12}"),
    ("1,2", "\\boxed{12}"),
    ("3x", "\\boxed{3}"),
    ("C", "\\boxed{D}"),
    ("\\text{Evelyn}", "\\boxed{\\text{Bob}}"),
    ("2", "2x+1"),
    ("1", "1/2"),
    ("3", "3 million"),
    ("3", "3 or 4"),
    ("3", "3½"),
    ("3", "3 hours 20 minutes"),
]


@pytest.mark.parametrize(
    ("reference", "answer"),
    [*WRONG, *(("3", rf"\boxed{{{text}}}") for text in BOXED_WRONG), *(("3", f"#### {text}") for text in MARKED_WRONG)],
)
def test_answers_that_only_begin_with_the_right_number(reference: str, answer: str) -> None:
    assert not final_number("q", answer, reference)  # 0, or None where the reference is no number
    assert not math("q", answer, reference)


@pytest.mark.parametrize(
    ("reference", "answer"),
    [*RIGHT, *(("3", rf"\boxed{{{text}}}") for text in BOXED_RIGHT), *(("3", f"#### {text}") for text in MARKED_RIGHT)],
)
def test_right_numbers_as_people_write_them(reference: str, answer: str) -> None:
    assert final_number("q", answer, reference) == 1.0 and math("q", answer, reference) == 1.0


@verified
@pytest.mark.parametrize(("reference", "answer"), EQUAL)
def test_equal_expressions(reference: str, answer: str) -> None:
    assert math("q", answer, reference) == 1.0


@verified
@pytest.mark.parametrize(("reference", "answer"), UNEQUAL)
def test_expressions_that_share_a_beginning(reference: str, answer: str) -> None:
    assert math("q", answer, reference) == 0.0


def test_only_groups_of_three_digits_lose_their_separators() -> None:
    """A list of numbers is not their concatenation, whichever reward reads it."""
    for text in ("1,234", "1 234", r"1\,234", "1{,}234", "1\u202f234"):
        assert number_of(text) == plain_number(text) == last_number_in(text) == 1234
    for text, last in (("1,2", 2), ("12,34", 34), ("1, 234", 234), ("1,234,56", 56), ("1234,567", 567), ("3 5", 5)):
        assert number_of(text) is None and plain_number(text) is None and last_number_in(text) == last
    for reference, answer in (("12", "1,2"), ("1234", "12,34"), ("1234", "1, 234")):
        for reward in (exact, last_number, final_number, math):
            assert reward("q", answer, reference) == 0.0
            assert not reward("q", reference, answer)
    assert last_number("q", "it was 1,234", "1234") == exact("q", "1,234", "1234") == 1.0
    assert last_number("q", "3e5", "3") == 0.0 and last_number("q", "1e3", "1000") == 1.0


def test_marks() -> None:
    """The last one counts; a box within a box is part of it; a box that is not closed holds no answer."""
    for text, content, whole in (
        ("a #### 3 b\nc", "3 b", True),
        (r"\boxed{1} and \boxed{\frac{1}{2}} .", r"\frac{1}{2}", True),
        (r"\boxed{\boxed{3} + 1}", r"\boxed{3} + 1", True),
        (r"\boxed{\{3\}}", r"\{3\}", True),
        (r"\boxed{4} \boxed{3", "3", False),
        (r"\boxed{ so \boxed{3}", "3", True),
        ("#### 3\n####", "3", True),
        (r"\fbox {3}", "3", True),
    ):
        assert last_mark(text) == (content, whole)
    assert last_mark("3") is None and last_mark("####") is None
    assert last_mark("#### 3", ended=False) == ("3", False) and last_mark("#### 3\n", ended=False) == ("3", True)


HUGE = [
    "#" * 100_000, r"\boxed{" * 20_000, r"\boxed{" * 9_000 + "3" + "}" * 9_000, "#### " + "1,234," * 20_000,
    "#### " + "1 " * 50_000, "9" * 100_000, "{" * 100_000, r"\frac{1}" * 5_000, "$" * 20_000, "1," * 50_000,
    "#### " + " " * 100_000 + "x", r"\boxed{" + "(" * 1_500 + "3" + "+1" * 100, "#### 3 " + "a " * 50_000,
    "#### 1e999999999", r"\boxed{1e999999999}", "1e" + "9" * 50_000, r"\boxed{" + r"\text{" * 5_000,
]  # fmt: skip


@pytest.mark.parametrize("answer", HUGE, ids=range(len(HUGE)))
def test_no_text_holds_up_a_reader(answer: str) -> None:
    began = time.process_time()
    for reward in (exact, last_number, final_number):
        assert reward("q", answer, "7") == 0.0
    assert expression(answer) is None
    assert time.process_time() - began < 3.0  # a tenth of a second or so


@verified
def test_a_power_tower_ends_after_the_time_limit() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="longer than 1 s"):
        math("q", r"\boxed{9^{9^{9^{9}}}}", "3", timeout=1.0)
    assert time.monotonic() - began < 30.0


def test_numbers_stay_exact() -> None:
    assert number_of("0.1") == Decimal("0.1") and number_of("12345678901234567890.5") == Decimal(
        "12345678901234567890.5"
    )
    assert number_of("1e3") == 1000 and number_of("1e-2") == Decimal("0.01") and number_of("1e99999") is None
