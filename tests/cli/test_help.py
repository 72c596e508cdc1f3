"""Help is made from what options are, and every command reads its words in one way."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields

import pytest
from scripts import ROOT

import offpolicy as op
import offpolicy.api
from offpolicy import evaluate, export, fit, generate, sample
from offpolicy.cli.help import documented, options_of
from offpolicy.cli.objective_help import first_sentence, objective_text, variants_text
from offpolicy.cli.reader import Parser, spelled
from offpolicy.data import __main__ as data_command
from offpolicy.errors import UsageError
from offpolicy.language import generation as answers
from offpolicy.losses.components import COMPONENTS
from offpolicy.losses.variants import VARIANTS
from offpolicy.training.options import RunOptions


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, str]:
    """Option → default, as the help tells them."""
    with pytest.raises(SystemExit) as caught:
        fit.main([*argv, "--help"])
    assert not caught.value.code
    text = re.sub(r"\n {31}", " ", capsys.readouterr().out)
    return dict(re.findall(r"^  --((?:run|model)\.\w+) .*? \(((?:\([^()]*\)|[^()])*)\)$", text, re.M))


def real(method: type) -> dict[str, object]:
    """Option → default, as a method that is made without arguments has them."""
    made = method() if not method.trains_on_texts else None  # type: ignore[attr-defined]
    options = {} if made is None else {f"model.{name}": value for name, value in made.hparams.items()}
    for cls in method.__mro__:  # one of texts needs a policy, so its signatures are read
        for name, p in inspect.signature(cls).parameters.items() if "__init__" in vars(cls) and not made else ():
            if p.kind is not p.VAR_KEYWORD:
                options.setdefault(f"model.{name}", p.default)
        if cls.__name__ in ("LanguageModule", "OfflineModule"):
            break
    run = RunOptions(**method.run_defaults)  # type: ignore[attr-defined]
    return options | {f"run.{f.name}": getattr(run, f.name) for f in fields(RunOptions)}


@pytest.mark.parametrize("name", ["TD3BC", "DPO", "GRPO"])
def test_every_default_in_the_help_is_the_real_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found, wanted = shown(capsys, "--model", name), real(getattr(op, name))
    assert {key for key in found if key.startswith("run.")} == {f"run.{f.name}" for f in fields(RunOptions)}
    assert len(found) > 20
    for option, default in found.items():
        assert default == str(wanted[option]) or wanted[option] is inspect.Parameter.empty, option
    if name != "TD3BC":
        assert found["run.eval_every"] == "None" and found["run.log_every"] == "10"


def test_the_short_help_has_the_defaults_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(capsys)
    assert found == {
        "run.eval_every": str(RunOptions().eval_every), "run.eval_episodes": str(RunOptions().eval_episodes),
        "run.log_every": str(RunOptions().log_every), "run.threads": "None",
    }  # fmt: skip


def test_what_docstrings_say() -> None:
    def example(a: int, b: float = 2.0) -> None:
        """An example.

        Args:
            a: the first,
                over two lines.
            b: the second: with a colon.

        Returns:
            nothing: at all.
        """

    assert documented(example) == {"a": "the first, over two lines.", "b": "the second: with a colon."}
    assert [one.default for one in options_of(example, {"a": 3})] == [3, 2.0]


@pytest.mark.parametrize(
    ("command", "argv", "guess"),
    [
        (evaluate, ["run", "--episode", "x"], "invalid int value"),  # an abbreviation, as before
        (evaluate, ["run", "--tempratur=1"], "Did you mean '--temperature'"),
        (sample, ["run", "out", "--trajectorys", "3"], "Did you mean '--trajectories'"),
        (generate, ["run", "--num_sample_s"], "num_sample_s"),
    ],
)
def test_one_reader_names_the_nearest_option(command: object, argv: list[str], guess: str) -> None:
    with pytest.raises(UsageError, match=re.escape(guess)):
        command.main(argv)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("command", "argv"),
    [(evaluate, []), (sample, []), (generate, []), (export, []), (data_command, [])]
    + [(data_command, [name]) for name in ("show", "make", "convert", "compare")],
)
def test_help_is_shown(command: object, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main([*argv, "--help"])  # type: ignore[attr-defined]
    assert not caught.value.code
    assert capsys.readouterr().out.startswith("usage: python -m offpolicy.")


def test_one_spelling_of_options() -> None:
    assert spelled("--max-length=a-b") == "--max_length=a-b" and spelled("--run.eval-every") == "--run.eval_every"
    assert spelled("--data.columns.my-key=x") == "--data.columns.my-key=x" and spelled("-7") == "-7"
    assert spelled("--help=all") == "--help=all" and spelled("a-file") == "a-file" and spelled("--") == "--"
    parser = data_command._parser()
    for written in ("--max-length", "--max_length"):
        assert parser.parse_args(["show", "x", written, "7"]).max_length == 7
    assert isinstance(parser, Parser)


class Built(Exception):
    """Carries the parser of a command, before it reads a word."""


@pytest.mark.parametrize(
    ("command", "function", "other"),
    [
        (evaluate, op.api.evaluate, set()),
        (sample, op.api.sample, {"guidance"}),  # 1 with a policy, else 0
        (generate, answers.sample, {"num_samples"}),  # several to look at, where the function draws one
    ],
)
def test_defaults_of_a_command_are_those_of_its_function(
    command: object, function: object, other: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(parser: Parser, *_: object) -> None:
        raise Built(parser)

    monkeypatch.setattr(Parser, "parse_known_args", build)
    with pytest.raises(Built) as caught:
        command.main([])  # type: ignore[attr-defined]
    told = {action.dest: action.default for action in caught.value.args[0]._actions}
    wanted = {one.name: one.default for one in options_of(function) if one.name in told.keys() - other}
    assert len(wanted) >= 3
    for name, default in wanted.items():
        assert told[name] == default or told[name] is None or default is inspect.Parameter.empty, name


def test_parts_of_the_objective_and_variants_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    parts = ("trust\n  ppo", "min(ρA, clip(ρ, 1 − low", "[low, high]", "terms\n", "lr\n")
    variants = ("dapo              DAPO (arXiv:2503.14476):", "--model.variant NAME")
    for topic, words in (("objective", parts), ("variants", variants)):
        with pytest.raises(SystemExit) as caught:
            fit.main(["--model.help", topic])
        assert not caught.value.code
        said = capsys.readouterr().out
        assert all(word in said for word in words) and max(map(len, said.splitlines())) <= 120


def test_every_part_and_variant_is_told() -> None:
    text = objective_text() + variants_text()
    for slot, known in COMPONENTS.items():
        for name, kind in known.items():
            assert f"\n  {name:<17} {first_sentence(kind)[:20]}" in text, (slot, name)
    assert all(f"\n  {row.method or row.name:<17} {row.title[:20]}" in text for row in VARIANTS.values())


def test_the_table_of_variants_is_what_the_code_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the measured columns, which the page has by itself. Else: python examples/rlvr/objective_table.py"""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "rlvr"))
    import objective_table

    page = objective_table.PAGE.read_text()
    times = (objective_table.known_times(page, column) for column in ("ms", "step, ms"))
    assert objective_table.page_of(page, *times) == page
