"""Scripts that make tables: what was interrupted is no result and goes on, and wrong arguments are one sentence."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from made_runs import made_run
from scripts import ROOT
from toy import Crash, toy_replay

import offpolicy as op
from offpolicy.errors import UsageError
from offpolicy.training.checkpoints import place_in


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    folder, _, stem = name.rpartition("/")
    monkeypatch.syspath_prepend(str(ROOT / "examples" / folder))
    for other in ("table", "variants", "addition"):
        monkeypatch.delitem(sys.modules, other, raising=False)
    return __import__(stem)


def test_an_interrupted_fit_is_no_result(tmp_path: Path) -> None:
    short: dict[str, Any] = {"max_steps": 4, "eval_every": 0, "verbose": False, "save_every": 2}
    assert place_in(tmp_path / "a") == {"folder": tmp_path / "a"}
    with pytest.raises(ZeroDivisionError):
        op.fit(op.BC(hidden_dims=(8,)), toy_replay(), **short, **place_in(tmp_path / "a"), callbacks=[Crash(2)])
    assert place_in(tmp_path / "a") == {"ckpt_path": tmp_path / "a"}
    result = op.fit(op.BC(hidden_dims=(8,)), toy_replay(), **short, **place_in(tmp_path / "a"))
    assert result.complete() is result and result.updates == 4
    result.interrupted = 2
    with pytest.raises(KeyboardInterrupt, match="was interrupted at update 4"):
        result.complete()


def test_what_a_variant_had_measured_when_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = script("rlvr/variants", monkeypatch)
    monkeypatch.setattr(variants, "steps_for", lambda *_: 2)
    ended = op.FitResult(SimpleNamespace(), tmp_path, {}, 1, interrupted=2)  # type: ignore[arg-type]
    monkeypatch.setattr(op, "fit", lambda *_, **__: ended, raising=False)
    with pytest.raises(KeyboardInterrupt):
        variants.one_run("addition", "grpo", 0, 0, tmp_path, 64)
    assert not list(tmp_path.rglob("measured.json"))


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("control/table", "--seeds 0", "'0' is none; expected a whole number of at least 1"),
        ("control/table", "--jobs x", "'x' is none; expected a whole number of at least 1"),
        ("rlvr/addition", "--only REMIX", "invalid choice: 'REMIX'"),
        ("rlvr/variants", "--lags -1", "'-1' is none; expected a whole number of at least 0"),
        ("rlvr/variants", "--variants grpo dapoo", "Did you mean 'dapo'"),
        ("rlvr/variants", "--variants otr", "expected its method"),
    ],
)
def test_wrong_arguments(name: str, words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=said):
        script(name, monkeypatch).main(["--root", str(tmp_path / "new"), *words.split()])
    assert not (tmp_path / "new").exists()


def test_a_table_goes_on_with_what_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first run of a seed is stopped after its first checkpoint; then its row has no seconds."""
    table, commands, code = script("control/table", monkeypatch), [], [130]

    def fit(command: list[str], **_: Any) -> Any:
        folder = Path(command[command.index("--folder" if "--folder" in command else "--ckpt_path") + 1])
        commands.append(command[3:])
        if not folder.exists():
            made_run(folder, scores=(1.0, 3.0))
            op.BC(hidden_dims=(8,)).prepare(toy_replay()).save(folder / "checkpoints" / "step=00000010.ckpt")
        return SimpleNamespace(returncode=code.pop() if code else 0, stderr="")

    monkeypatch.setattr(subprocess, "run", fit)
    words = ["--root", str(tmp_path), "--methods", "BC", "BC", "--seeds", "1", "--data", "maze", "--jobs", "1"]
    with pytest.raises(KeyboardInterrupt):
        table.main(words)
    assert not list(tmp_path.rglob("seconds.txt"))
    assert table.main(words) == 0
    assert commands[1] == ["--ckpt_path", str(tmp_path / "maze" / "BC" / "seed0")] and len(commands) == 2
    assert "| BC | 3.0 | 3.0 | 3.0 | – |" in capsys.readouterr().out
    assert table.main(words) == 0 and len(commands) == 2  # read, not repeated


def test_after_an_error_no_other_job_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    addition, ran = script("rlvr/addition", monkeypatch), []

    def job(number: int) -> None:
        ran.append(number)
        if number == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ThreadPoolExecutor(1) as pool:
        addition.results(pool, [pool.submit(job, number) for number in range(200)])
    assert len(ran) < 200
