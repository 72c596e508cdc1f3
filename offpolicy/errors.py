"""The kinds of mistake a user can make, and the checks that name them."""

from __future__ import annotations

import difflib
import math
import traceback
from collections.abc import Iterable
from pathlib import Path


class UsageError(ValueError):
    """A misspelt name, an unknown option or an impossible setting (exit code 2).

    Attributes:
        together: every process of the run raises it at the same update, so none has to be ended by the others.
    """

    together = False


class DataError(ValueError):
    """Data that cannot be trained on as they are (exit code 3)."""


class DivergenceError(UsageError):
    """Training whose losses or weights are no longer finite, by its settings or the scale of its data (exit code 4)."""


def described(error: BaseException) -> str:
    """Kind, first line and place of an error: 'RuntimeError: out of range (my_env.py:33)'."""
    text = str(error).strip().split("\n", 1)[0][:200].rstrip(".")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    told = isinstance(error, SyntaxError) or not frames  # that kind says its place itself
    place = "" if told else f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
    return type(error).__name__ + (f": {text}" if text else "") + place


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A sentence naming the closest candidate, or the empty string when none is close."""
    by_key = {fold(c): c for c in candidates}
    match = difflib.get_close_matches(fold(name), by_key, n=1, cutoff=0.5)
    return f" Did you mean '{by_key[match[0]]}'?" if match else ""


def listed(items: Iterable[object], limit: int = 10) -> str:
    """The first items as one text, long ones shortened, and how many more there are: messages stay readable."""
    texts = [str(item) for item in items]
    shown = [text if len(text) <= 80 else f"{text[:77]}…" for text in texts[:limit]]
    more = len(texts) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


def amount(number: int, one: str, many: str = "") -> str:
    """A number with what it counts: "1 episode", "1,200 episodes"; ``many`` is a plural that takes more than an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


SYNONYMS = {  # what options are called elsewhere
    "learning_rate": "lr",
    "gamma": "discount",
    "hidden_sizes": "hidden_dims",
    "hidden_size": "hidden_dims",
    "hidden_layers": "hidden_dims",
    "polyak": "tau",
    "n_critics": "num_critics",
    "normalize": "normalize_obs",
    "kl_coef": "beta",
    "rank": "lora_rank",
}


def nearest_options(name: str, candidates: Iterable[str]) -> list[str]:
    """The options that a misspelt one may mean, at most three: of the same words (``lr``: ``actor_lr``, ``critic_lr``),
    under another library's name, or the closest in spelling."""
    known = list(candidates)
    word = SYNONYMS.get(name.lower(), name.lower())
    if word in known:
        return [word]
    same = [option for option in known if f"_{word}_" in f"_{option.rpartition('.')[2]}_"]
    if same:
        return same[:3]
    match = difflib.get_close_matches(fold(name), by_key := {fold(c): c for c in known}, n=1, cutoff=0.5)
    return [by_key[key] for key in match]


def resembles(name: str, other: str) -> bool:
    """Whether one name is another one misspelt, beyond doubt; a word as short as ``lr`` is like anything."""
    return len(name) >= 4 and difflib.SequenceMatcher(None, fold(name), fold(other)).ratio() > 0.7


def fold(name: str) -> str:
    """The form in which names are compared: case, '-', '_' and '+' do not matter."""
    return name.lower().replace("-", "").replace("_", "").replace("+", "")


def known_as(name: str, known: Iterable[str]) -> str | None:
    """The one of the known names that a name means, whatever its case, '-', '_' and '+'; None when it means none."""
    return next((one for one in known if fold(one) == fold(name)), None)


def check_range(
    name: str,
    value: float,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    lower_open: bool = False,
    upper_open: bool = False,
    infinite: bool = False,
    option: str | None = None,
) -> None:
    """Raise :class:`UsageError` unless ``low <= value <= high`` (an open end excludes its bound).

    ``infinite`` allows infinity, as a limit that is never reached. ``option`` is its name on the command line; unless
    given, that of a method's argument, or ``name`` where it has a dot.
    """
    lower_open |= low == -math.inf and not infinite
    upper_open |= high == math.inf and not infinite
    try:
        above = value > low if lower_open else value >= low
        below = value < high if upper_open else value <= high
    except TypeError:
        raise UsageError(f"`{name}` is {value!r}; expected a number. Pass a number.") from None
    if above and below:
        return
    interval = f"{'(' if lower_open else '['}{low}, {high}{')' if upper_open else ']'}"
    option = option or (name if "." in name else f"model.{name}")
    raise UsageError(f"`{name}` is {value}; expected a value in {interval}. Change `--{option}` or leave it out.")


def check_whole_number(name: str, value: object, low: int) -> None:
    """Raise :class:`UsageError` unless the value is a whole number of at least ``low``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise UsageError(f"`{name}` is {value!r}; expected a whole number of at least {low}.")


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raise :class:`UsageError` unless the value is one of those known."""
    if value not in known:
        guess = nearest(str(value), known) or " Change it or leave it out."
        raise UsageError(f"`{name}` is '{value}'; expected one of {', '.join(known)}.{guess}")


def check_widths(name: str, widths: Iterable[int]) -> None:
    """Raise :class:`UsageError` unless every width of a network's hidden layers is at least 1."""
    for width in widths:
        check_range(name, width, 1)
