r"""Numbers as they are written in answers: what is marked as the answer, and whether it is a number alone.

A text is a number when nothing but a unit, a percent sign, currency, a full stop or closing marks stands beside it:
``\$1,234.50``, ``3 cm^2``, ``x = -3`` and ``12 apples.`` are numbers; ``1/2``, ``2x+1``, ``3 or 4``, ``10:30`` and
``3 million`` are none. Digits lose their separators only where these part groups of three: ``1,234``, ``1 234``,
``1\,234``, ``1{,}234``.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

MARK = "####"  # of GSM8K, before the final answer
LONGEST = 400  # characters of a number with its unit; longer texts are not looked at
DIGITS = 3  # of an exponent

_WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width forms of ASCII
_MINUS = dict.fromkeys(map(ord, "\u2012\u2013\u2212\ufe63"), "-")
_SPACE = dict.fromkeys([0xA0, 0x3000, 0x202F, 0x205F, *range(0x2000, 0x200B)], " ")
_UNSEEN = dict.fromkeys([0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF])
PLAIN_FORMS = {**_WIDE, **_MINUS, **_SPACE, **_UNSEEN}

_SEPARATORS = (",", " ", r"\{,\}", r",\\!", r"\\,", r"\\ ", r"\\;", "~")
_GROUPS = "|".join(rf"[1-9][0-9]{{0,2}}(?:{mark}[0-9]{{3}})+(?![0-9])" for mark in _SEPARATORS)
NUMBER = rf"(?:(?:{_GROUPS}|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_MONEY = r"\\?[$€£¥₹¢]"
_WRITTEN = r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mathit|mathsf|mbox|operatorname)\s*\{"

_OPENING = re.compile(
    rf"(?:\s|{_WRITTEN}|\\(?:boxed|fbox)\s*\{{|\\left|\\displaystyle|\\[(\[,;:! ]|{_MONEY}|[(\[{{*_\"'`#“‘«])*"
)
_NAME = re.compile(r"(?:[A-Za-z]\s*\$?\s*)?=")  # of what the number is the value of
_SIGNED = re.compile(rf"([-+]?)\s*(?:{_MONEY}\s*)?({NUMBER})")
_CLOSER = r"(?:\s|\\right|\\q?quad|\\[)\],;:! ]|\\\\|~|[)\]}$€£¥₹¢*_\"'`#”’»]|</[\w:-]+>)"
_CLOSING = re.compile(rf"{_CLOSER}*(?:\.{_CLOSER}*)?\Z")
_ALONE = re.compile(rf"\s*(?:{_MONEY}\s*)?([-+]?)\s*(?:{_MONEY}\s*)?({NUMBER})\s*(?:\\?%|{_MONEY})?\s*\.?\s*")
_ANYWHERE = re.compile(rf"([-+]?)\\?[$€£]?({NUMBER})")

# -- units -------------------------------------------------------------------------------------------------------------

_DEGREE = re.compile(r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|\^?°)\s*(?:[CF]\b)?")
_POWER = re.compile(r"\^\s*\{\s*(-?[0-9])\s*\}")
_PERCENT = re.compile(r"\\?%")
_UNIT = re.compile(
    r"(?P<word>[A-Za-zµμΩ]+)(?P<power>\s*(?:\^-?[0-9]|[²³]))?(?P<dot>\.)?(?P<next>\s*(?:/|·|\\cdot(?![a-z]))\s*|\s+|-)?"
)
_SHORT_WORDS = """
    m g s h l L J N W V mm cm dm km nm mg kg ml mL cl dl lb lbs oz ft yd yds mi hr hrs ms kmh kph mph Hz kHz MHz GHz kW
    kWh kJ MJ Pa kPa bar mol sq cu pt pts qt px ha kB KB MB GB TB rpm bpm mpg Rs GBP am pm AM PM in µm μm Ω
"""
_OTHER_WORDS = """
    or and nor not but plus minus point half halves third thirds quarter quarters fourth fourths fifth fifths sixth
    sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths
    hundred hundreds thousand thousands million millions billion billions trillion trillions mil lakh lakhs crore crores
    grand dozen dozens score gross zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety squared cubed
    factorial root sqrt over divided multiplied mod modulo base power log exp sin cos tan cot sec arcsin arccos arctan
    infinity inf nan alpha beta gamma delta epsilon eta theta iota kappa lambda sigma tau phi chi psi omega rho
    abc more less least most than about around between from except maybe perhaps probably approximately roughly almost
    nearly because since when where wrong false incorrect remainder
"""
_SHORT = frozenset(_SHORT_WORDS.split())  # units too short to be told from a product of variables otherwise
_POWERED = _SHORT | {"unit", "units", "inch", "inches", "feet", "foot", "meter", "meters", "metre", "metres", "mile"}
_FILLERS = frozenset(("a", "an", "of", "the", "on", "at"))
_OTHER = frozenset(_OTHER_WORDS.split())  # words that change the number, or what it says


def is_unit(tail: str) -> bool:
    """Whether what follows a number, without marks at its end, is a unit such as ``cm^2`` or "apples per day"."""
    degree = _DEGREE.match(tail.lstrip())
    if degree is not None:
        return not _bare(tail.lstrip()[degree.end() :]).strip(" CF")
    if _PERCENT.fullmatch(_bare(tail)):
        return True
    attached = tail[0].isascii() and tail[0].isalpha()
    tail, place, count = _bare(tail), 0, 0
    while place < len(tail):
        found = _UNIT.match(tail, place)
        if found is None or (found["next"] is None and found.end() < len(tail)):
            return False
        word = found["word"]
        if attached and not count and not (len(word) > 1 and word in _SHORT):
            return False  # 3x is a product
        if (found["power"] and word not in _POWERED) or (found["dot"] and word not in _SHORT):
            return False
        known = word in _SHORT or (word.lower() in _FILLERS and count > 0)
        if not known and (len(word) < 3 or word.lower() in _OTHER or not re.search("[aeiouAEIOU]", word)):
            return False
        place, count = found.end(), count + 1
    return 0 < count <= 6


def _bare(text: str) -> str:
    """A text without commands of fonts and spaces, and without braces around a power."""
    return re.sub(rf"{_WRITTEN}|\\[,;:! ]|[~}}]", " ", _POWER.sub(r"^\1", text)).strip()


# -- numbers -----------------------------------------------------------------------------------------------------------


def number_of(text: str) -> Decimal | None:
    """The number that a text is, with nothing beside it but what the module allows; else None."""
    text = text.strip().translate(PLAIN_FORMS)
    if len(text) > LONGEST:
        return None
    opened = _OPENING.match(text)
    assert opened is not None
    named = _NAME.match(text, opened.end())
    if named is not None:
        opened = _OPENING.match(text, named.end())
        assert opened is not None
    found = _SIGNED.match(text, opened.end())
    if found is None or ("," in found[2] and re.search(r"[(\[]", text[: opened.end()])):
        return None  # (1,234) may be a pair
    tail = _CLOSING.sub("", _POWER.sub(r"^\1", text[found.end() :]))
    return _decimal(found[1], found[2]) if not tail or is_unit(tail) else None


def plain_number(text: str) -> Decimal | None:
    """The number that a text is apart from spaces, currency, a percent sign and a last full stop; else None."""
    text = text.strip().translate(PLAIN_FORMS)
    found = _ALONE.fullmatch(text) if len(text) <= LONGEST else None
    return None if found is None else _decimal(found[1], found[2])


def begins_with_number(text: str) -> bool:
    """Whether a text is one line that begins with a number, which no item of a list does."""
    text = text.strip().translate(PLAIN_FORMS)
    opened = _OPENING.match(text)
    found = None if opened is None else _SIGNED.match(text, opened.end())
    return found is not None and "\n" not in text and not re.match(r"[.)]\s", text[found.end() :])


def last_number_in(text: str) -> Decimal | None:
    """The last number anywhere in a text, whatever stands beside it; None where there is none."""
    found = _last(_ANYWHERE.finditer(text.translate(PLAIN_FORMS)))
    return None if found is None else _decimal(found[1], found[2])


def numbers_in(text: str) -> set[Decimal]:
    """The numbers anywhere in a text, without their signs, which a text may part from them."""
    found = [_decimal("", one[2]) for one in _ANYWHERE.finditer(text.translate(PLAIN_FORMS))]
    return {number for number in found if number is not None}


def _decimal(sign: str, digits: str) -> Decimal | None:
    bare = re.sub(r"[^0-9.eE+-]", "", digits)
    if len(bare) > LONGEST or len(re.split("[eE][-+]?", bare + "e")[1]) > DIGITS:
        return None
    try:
        return Decimal(sign + bare)
    except InvalidOperation:
        return None


# -- marks -------------------------------------------------------------------------------------------------------------


class Mark(NamedTuple):
    """What a text marks as its answer.

    Attributes:
        content: the text in the box, or after ``####`` up to the end of its line.
        whole: false for a box that is not closed, and for a line that was cut off.
    """

    content: str
    whole: bool


_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"(?<!#)#{4,}\s*(?=[^\s#])")  # something follows


def last_mark(text: str, *, ended: bool = True) -> Mark | None:
    r"""The last ``####`` or ``\boxed{}`` of a text; a box within a box is part of it. None where there is none.

    Args:
        text: what is read.
        ended: false where the text was cut off, so that its last line may go on.
    """
    hashes = _last(_HASHES.finditer(text))
    box = _last_box(text)
    if box is not None and (hashes is None or box[0] > hashes.start()):
        return box[1]
    if hashes is None:
        return None
    line = re.match(r"[^\r\n]*", text[hashes.end() :])
    assert line is not None
    return Mark(line[0], ended or hashes.end() + len(line[0]) < len(text))


def _last(matches: Iterator[re.Match[str]]) -> re.Match[str] | None:
    return next(iter(deque(matches, maxlen=1)), None)


def _last_box(text: str) -> tuple[int, Mark] | None:
    """Where the last outermost box begins, and what it holds."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    closes: dict[int, int] = {}
    opened: list[int] = []
    for token in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if token[0] == "{":
            opened.append(token.start())
        elif token[0] == "}" and opened:
            closes[opened.pop()] = token.start()
    last, end = None, 0
    for box in boxes:
        if box.start() >= end:
            brace = box.end() - 1
            last, end = box, closes.get(brace, box.end())
    assert last is not None
    closed = closes.get(last.end() - 1)
    return last.start(), Mark(text[last.end() : closed], closed is not None)
