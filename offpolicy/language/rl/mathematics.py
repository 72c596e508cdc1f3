r"""Mathematical answers: which texts are expressions, and whether one equals another, by ``math-verify``.

That library reads as much of a text as it can and drops the rest, so a text that begins with the right number would
pass for it. An answer to a reference that is an expression is therefore shown to it only where every part of the answer
is known to be read, and rewritten with plain digits.
"""

from __future__ import annotations

import importlib.util
import re
import threading
from concurrent.futures import ProcessPoolExecutor
from functools import cache, lru_cache
from multiprocessing import get_context
from typing import Any

from offpolicy.data.texts.numbers import DIGITS, NUMBER, PLAIN_FORMS, begins_with_number, is_unit, last_mark, number_of

LONGEST = 2000  # characters of an expression
SEEN = 20_000  # characters at the end of an answer without a mark that are looked at

_PLAINER = {"×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "∙": r"\cdot ", "π": r"\pi "}
_TOKEN = re.compile(
    rf"""
    (?P<space>\s|~|\\[,;:!\ ]|\\(?:q?quad|left|right|displaystyle|limits)(?![A-Za-z]))
    |(?P<number>{NUMBER.replace(" ", "[ ]")})
    |(?P<value>[A-Za-zπ]|\\(?:pi|alpha|beta|gamma|delta|epsilon|theta|kappa|lambda|mu|nu|rho|sigma|tau|phi|omega)
        (?![A-Za-z]))
    |(?P<function>\\(?:[dtc]?frac|sqrt|ln|log|exp|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|[dt]?binom)(?![A-Za-z]))
    |(?P<sign>[-+])
    |(?P<operator>[*/^×÷·∙]|\\(?:cdot|times|div)(?![A-Za-z]))
    |(?P<open>[(\[{{])
    |(?P<close>[)\]}}])
    |(?P<bar>\|)
    |(?P<after>!)
    |(?P<below>_)
    """,
    re.VERBOSE,
)
_KINDS = {"number": "n", "value": "v", "function": "f", "sign": "s", "operator": "o"} | {
    "open": "(", "close": ")", "bar": "|", "after": "!", "below": "_"
}  # fmt: skip
_IMPOSSIBLE = re.compile(  # in the kinds of the tokens of an expression
    r"^[o!)_]|[sof_(]$|[so][o)!]|ss|\([o!)]|(?<![f_])nn|(?<!f)_|f[)!|s]|v{4}|^vv+$"
)
_NAMED = re.compile(r"\s*(?:\\?[A-Za-z]|\\[a-z]+|[A-Za-z]{4,})\s*(?:\([^()=]*\)\s*)?")  # y, f(x), Area
_LAST_TEXT = re.compile(
    r"\s*(?:\\(?:text|textrm|mathrm|mbox)\s*\{[^{}]*\}\s*(?:\^\s*\{?[0-9]\}?)?|\^\s*\{?\\circ\}?)\Z"
)
_DOLLARS = re.compile(r"\$[^$]+\$")
_CLOSER = r"(?:\s|\$|\\[)\]]|\\\\)"
_MARKS = re.compile(rf"\A(?:\s|\$|\\[(\[])+|{_CLOSER}*(?:\.{_CLOSER}*)?\Z")


def expression(text: str) -> str | None:
    r"""A text as LaTeX with plain digits, where all of it is one expression of known parts; else None.

    Numbers, letters, arithmetic, powers, roots, fractions and common functions are known; of ``y = 2x`` the last side
    is the expression, and a unit at the end is left out. Sets, intervals, words and inequalities are none.
    """
    if len(text) > LONGEST:
        return None
    text = _MARKS.sub("", text.translate(PLAIN_FORMS))
    if text.startswith("~"):  # about
        return None
    *names, text = text.split("=")
    for name in names:
        if name.strip() and not _NAMED.fullmatch(name) and (not _tokens(name) or re.search("[A-Za-z]", name)):
            return None
    unit = _LAST_TEXT.search(text)
    if unit is not None and unit.start() and is_unit(unit[0]):
        text = text[: unit.start()]
    return _tokens(text)


def _tokens(text: str) -> str | None:
    place, made, kinds, opened = 0, [], "", []
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            return None
        kind, place, token = str(found.lastgroup), found.end(), found[0]
        if kind == "space":
            made.append(" ")
            continue
        kinds += _KINDS[kind]
        if kind == "open":
            opened.append({"(": ")", "[": "]", "{": "}"}[token])
        elif kind == "close" and (not opened or opened.pop() != token):
            return None
        elif kind == "number":
            if "," in token and set(opened) & {")", "]"}:  # (1,234) may be a pair
                return None
            digits, _, power = re.sub(r"[^0-9.eE+-]", "", token).lower().partition("e")
            if len(power) > DIGITS + 1:
                return None
            token = rf"({digits} \cdot 10^{{{power}}})" if power else digits
        made.append(_PLAINER.get(token, token))
    if opened or kinds.count("|") % 2 or not kinds or _IMPOSSIBLE.search(kinds):
        return None
    return "".join(made).strip()


def readable(text: str, *, marked: bool, reference: str) -> str | None:
    """What ``math-verify`` is given of an answer, None where it would read but a part of it.

    Args:
        text: what is marked as the answer, or else all of it.
        marked: whether it is.
        reference: the right answer.
    """
    alone = _alone(text)
    if alone is not None:
        return alone
    if not marked and not begins_with_number(text):
        return text[-SEEN:]
    if re.search("[0-9]", reference) and _alone(_asked(reference)) is not None:
        return None
    return rf"\boxed{{{text.replace('$', '')}}}"


def _alone(text: str) -> str | None:
    """A number or an expression, for ``math-verify``."""
    number = number_of(text)
    if number is not None:
        return rf"${number:f}\%$" if re.search("%|[Pp]er ?cent", text) else f"${number:f}$"
    found = expression(text)
    return None if found is None else f"${found}$"


def _asked(reference: str) -> str:
    mark = last_mark(reference)
    return reference.strip() if mark is None else mark.content.strip()


def is_reference(text: str, reference: str) -> bool:
    """Whether a text is the reference itself, apart from white space that parts no digits or letters: 7 7 is not 77."""
    return _tight(text) == _tight(_asked(reference)) != ""


def _tight(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text))


def equal(answer: str, reference: str, timeout: float) -> float | None:
    """Whether an answer equals a reference, as ``math-verify`` says; None where it cannot read the reference.

    Args:
        answer: as :func:`readable` gives it.
        reference: the right answer, as text or LaTeX.
        timeout: seconds for reading an expression, and for comparing.

    Raises:
        TimeoutError: it took longer.
    """
    if threading.current_thread() is threading.main_thread():
        return _equal(answer, reference, timeout)
    return _worker().submit(_equal, answer, reference, timeout).result()  # signals measure the time: a main thread's


def prepare() -> None:
    """Load ``math-verify`` where it is installed: its first expression takes seconds, which no answer should pay."""
    if importlib.util.find_spec("math_verify") is not None and threading.current_thread() is threading.main_thread():
        _load()


@cache
def _load() -> None:
    _parse("$1$", 600)


def _equal(answer: str, reference: str, timeout: float) -> float | None:
    from math_verify import verify
    from math_verify.errors import TimeoutException

    prepare()
    seconds = max(1, round(timeout))
    try:
        gold = _parse_reference(reference, seconds)
        if not gold:
            return None
        found = _parse(answer, seconds)
        return float(verify(gold, found, timeout_seconds=seconds, raise_on_error=True))  # not symmetric: gold first
    except TimeoutException:  # no Exception, so nobody would catch it
        raise TimeoutError(f"math-verify took longer than {seconds} s") from None


@lru_cache(maxsize=4096)
def _parse_reference(reference: str, seconds: int) -> Any:
    text = _asked(reference)
    alone = _alone(text)
    if alone is not None:
        return _parse(alone, seconds)
    first, second = (text, f"${text}$") if "$" in text else (f"${text}$", text)
    return _parse(first, seconds) or _parse(second, seconds)


def _parse(text: str, seconds: int) -> Any:
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    options: dict[str, Any] = {"parsing_timeout": seconds, "raise_on_error": True}
    if _DOLLARS.fullmatch(text):  # of 3ab, it would take "ab" for a unit
        plain = NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
        )
        options["extraction_config"] = [LatexExtractionConfig(normalization_config=plain), ExprExtractionConfig()]
    return parse(text, **options)


@cache
def _worker() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))
