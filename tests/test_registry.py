"""Components by name: what is neither a name nor a mapping is refused in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offpolicy.errors import UsageError
from offpolicy.language.rl.correcting import Score, make_correction
from offpolicy.language.rl.engine import engine_name
from offpolicy.language.rl.engines import make_engine
from offpolicy.language.rl.filtering import Filters
from offpolicy.language.rl.hints import HINTS, Tiers
from offpolicy.losses.policy_gradient import component
from offpolicy.registry import import_callable, import_class, make

MADE: dict[str, Callable[[Any], Any]] = {
    "hints": lambda spec: make("hints", spec, HINTS),
    "correction": make_correction,
    "trust": lambda spec: component("trust", spec),
    "filter": lambda spec: Filters([spec], ()),
    "engine": engine_name,
    "engine ": make_engine,
}


@pytest.mark.parametrize("option", MADE)
@pytest.mark.parametrize("spec", [5, 0.5, True, ["tiers"]], ids=str)
def test_what_is_no_name(option: str, spec: Any) -> None:
    with pytest.raises(UsageError, match=rf"`{option.strip()}` is .*expected a name"):
        MADE[option](spec)


def test_what_is_no_list_of_filters() -> None:
    with pytest.raises(UsageError, match="`filter` is 5; expected a name"):
        Filters(5, ())  # type: ignore[arg-type]


def test_names_and_mappings_are_taken() -> None:
    given = {"name": "tiers", "patience": 3}
    assert make("hints", given, HINTS).patience == 3 and given == {"name": "tiers", "patience": 3}
    assert isinstance(make("hints", "tiers", HINTS), Tiers)
    with pytest.raises(UsageError, match="takes no `7`"):
        make("hints", {"name": "tiers", 7: 1}, HINTS)


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (Tiers, {"tiers": 0.5}, "`tiers` is 0.5; expected a list"),
        (Tiers, {"tiers": None}, "`tiers` is None; expected a list"),
        (Tiers, {"tiers": "idea"}, "`tiers` is 'idea'; expected a list"),
        (Tiers, {"text": 3}, "`text` is '3'; expected"),
        (Tiers, {"patience": 1.5}, "`patience` is 1.5; expected a whole number"),
        (Score, {"instruction": 5}, "`instruction` is 5; expected a text"),
        (Score, {"instruction": ""}, "`instruction` is ''; expected a text"),
        (Score, {"first_stage": 1.5}, "`first_stage` is 1.5; expected a whole number"),
        (Score, {"bonus": float("inf")}, "`bonus` is inf; expected a value in"),
        (Score, {"first_stage": -1}, "`first_stage` is -1; expected a whole number"),
    ],
)
def test_options_of_hints_and_corrections_have_their_type(kind: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        kind(**given)
    assert said in str(caught.value)


def test_columns_and_shares_are_tiers() -> None:
    assert [one.hint for one in Tiers(tiers=["idea", 0.5]).words()] == ["idea", 0.5]


@pytest.mark.parametrize("spec", ['{"name": "tiers", "tiers": [0.5]', "./mine.py", "a b.c", "tiers."])
def test_a_mapping_that_is_none_is_no_import_path(spec: str) -> None:
    with pytest.raises(UsageError, match=r"`hints` is .*; expected one of tiers, scaffold, written, or an import"):
        make("hints", spec, HINTS)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("def (", r"cannot be imported: SyntaxError: invalid syntax \(bad\d.py, line 1\)\. Correct"),
        ("x = 1\n1 / 0", r"cannot be imported: ZeroDivisionError: division by zero \(bad\d.py:2\)"),
        ("import sys\nsys.exit(0)", r"cannot be imported: SystemExit: 0"),
        ("import no_such_module", r"ModuleNotFoundError: No module named 'no_such_module' \(bad\d.py:1\)"),
    ],
)
def test_modules_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, said: str, request: pytest.FixtureRequest
) -> None:
    name = f"bad{request.node.callspec.indices['content']}"
    (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    for find in (lambda path: import_callable(path, "reward"), import_class):
        with pytest.raises(UsageError, match=said):
            find(f"{name}.Mine")


def test_a_file_is_no_import_path() -> None:
    with pytest.raises(UsageError, match=r"`reward` is './mine.py'; expected package.module.function, no path of a"):
        import_callable("./mine.py", "reward")
