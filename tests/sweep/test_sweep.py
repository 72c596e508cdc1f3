"""Sweeps: what a plan stands for, which runs go on, and that one failed run or a killed sweep costs no other."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import start_command
from forks import finish
from made_runs import made_run
from scripts import ROOT

from offpolicy.compute.processes import claimed
from offpolicy.errors import UsageError
from offpolicy.sweep import __main__ as command
from offpolicy.sweep import jobs as jobs_of_sweep
from offpolicy.sweep import pool
from offpolicy.sweep.jobs import BUSY, DONE, FAILED_RUN, STOPPED, command_of, is_done, jobs_of, run_job
from offpolicy.sweep.plan import cells_of, plan_text, read_plan, settings_of
from offpolicy.sweep.pool import run_all, told_time
from offpolicy.sweep.search import judged_values, suggested

FAKE = """
import json, pathlib, sys, time
how = json.loads(sys.argv[1])
tries = pathlib.Path(how["folder"]) / "tries"
count = int(tries.read_text()) + 1 if tries.exists() else 1
tries.write_text(str(count))
if how["mode"] == "once" and count == 1 or how["mode"] == "always":
    sys.exit(how["code"])
if how["mode"] == "slow" and count == 1:
    time.sleep(60)
for folder in how["folders"]:
    folder = pathlib.Path(folder)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps({"seed_everything": 0, "trainer": {"max_steps": 20},
        "model": {"class_path": "lightning_modules.bc.BC", "init_args": {}}, "data": {"name": "x"}}))
    (folder / "evals.csv").write_text("step,eval/score\\n10,1.0\\n20,2.0\\n")
    (folder / "checkpoints" / "step=00000020.ckpt").write_text("")
"""


def plan_of(tmp_path: Path, **more: Any) -> Any:
    fields = {"methods": ["BC", "IQL"], "data": ["pendulum-stitch-v0"], "seeds": "0..1", "folder": str(tmp_path / "s")}
    return read_plan(None, fields | {"set": {"trainer.max_steps": 20}} | more)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, int]]:
    """Processes that write the files of a run in a moment; by the end of a job's name how one fails."""
    modes: dict[str, tuple[str, int]] = {}

    def made(job: Any) -> list[str]:
        mode, code = next((value for key, value in modes.items() if job.name.endswith(key)), ("good", 0))
        job.place.mkdir(parents=True, exist_ok=True)
        how = {"mode": mode, "code": code, "folder": str(job.place), "folders": [str(one.folder) for one in job.cells]}
        return [sys.executable, "-c", FAKE, json.dumps(how)]

    monkeypatch.setattr(jobs_of_sweep, "command_of", made)
    return modes


def run(plan: Any, **options: Any) -> tuple[list[Any], list[str]]:
    lines: list[str] = []
    return run_all(jobs_of(plan, cells_of(plan), lambda _: plan.pack), plan, lines.append, **options), lines


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_plan_means_the_same_as_yaml_and_as_flags(tmp_path: Path) -> None:
    words = ["--methods", "bc", "IQL", "--data", "pendulum-stitch-v0", "--seeds", "0..2", "--grid", "IQL.beta=1,10"]
    flags = read_plan(
        None, command.given(command.arguments([*words, "--set", "trainer.max_steps=20", "--workers", "2"]))
    )
    (tmp_path / "plan.yaml").write_text(plan_text(flags))
    assert read_plan(tmp_path / "plan.yaml", {}) == flags
    assert flags.methods == ("BC", "IQL") and flags.grid == {"IQL.beta": (1, 10)} and flags.workers == 2
    cells = cells_of(flags)
    assert len(cells) == len({one.folder for one in cells}) == 3 + 6  # the grid of IQL makes no other run of BC
    assert {one.settings.get("model.beta") for one in cells if one.method == "IQL"} == {1, 10}
    longer = cells_of(read_plan(tmp_path / "plan.yaml", {"set": {"trainer.max_steps": 40}}))
    assert [one.folder for one in longer] == [one.folder for one in cells]  # more updates go on with the same runs


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"methods": None}, "names no `methods`"),
        ({"methods": ["TD4BC"]}, "Did you mean 'TD3BC'"),
        ({"data": ["pendlum-stitch-v0"]}, "pendulum-stitch-v0"),
        ({"sedes": "0"}, "Did you mean 'seeds'"),
        ({"seeds": "3..1"}, "is empty"),
        ({"workers": 0}, "at least 1"),
        ({"grid": {"run.evel_every": [1]}}, "eval_every"),
        ({"search": {"trials": 3}}, "names no option"),
        ({"search": {"model.alpha": {"low": 1}}}, "low, high and log"),
        ({"search": {"model.alpha": [1], "pruner": "no"}}, "median"),
        ({"search": {"model.alpha": [1]}, "grid": {"model.alpha": [1]}}, "both"),
        ({"search": {"model.alpha": {"low": "a", "high": 2}}}, "from 'a' to 2 .* expected numbers"),
        ({"search": {"model.alpha": {"low": 3, "high": 1}}}, "low < high"),
        ({"search": {"model.alpha": {"low": 0, "high": 1, "log": True}}}, "low > 0"),
        ({"search": {"model.alpha": {"low": 1, "high": 2, "log": "no"}}}, "log 'no'"),
        ({"search": {"trainer.max_steps": [10, 20]}}, "the same run at every length"),
        ({"grid": {"trainer.max_steps": [10, 20]}}, "the same run at every length"),
        ({"grid": {"model.alpha": []}}, "no value of model.alpha"),
        ({"set": {"model": "TD3BC"}}, "`set` has `model`, which the plan decides"),
        ({"set": {"seed_everything": 3}}, "which the plan decides"),
        ({"grid": {"data": ["pendulum-stitch-v0"]}}, "`grid` has `data`, which the plan decides"),
        ({"timeout_s": "abc"}, "expected seconds > 0"),
        ({"timeout_s": -5}, "expected seconds > 0"),
        ({"pack": "no"}, "`pack` is 'no'; expected true or false"),
        ({"folder": ["a"]}, "expected the name of a folder"),
        ({"folder": ""}, "expected the name of a folder"),
    ],
)
def test_bad_plans(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        cells_of(plan_of(tmp_path, **fields)) if fields.get("methods", 1) else read_plan(None, {"data": ["x"]})


def test_bad_files_and_words(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("- 1")
    for text, words in (("- 1", "holds list"), ("a: [", "cannot be read")):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(UsageError, match=words):
            read_plan(tmp_path / "a.yaml", {})
    with pytest.raises(UsageError, match="NAME=VALUE"):
        command.pairs(["model.alpha"], "grid")
    with pytest.raises(UsageError, match="LOW:HIGH"):
        command.spanned("x", "lin:1:2")
    assert command.spanned("x", "log:1e-5:1e-3") == {"low": 1e-5, "high": 1e-3, "log": True}
    assert command.spanned("x", "log:0.1:2") == {"low": 0.1, "high": 2, "log": True} and command.spanned(
        "x", "a,2"
    ) == ["a", 2]
    span = {"model.lr": {"low": "1e-5", "high": "1e-3", "log": True}}  # as YAML reads 1e-5
    assert plan_of(tmp_path, search=span).search.space == {"model.lr": {"low": 1e-5, "high": 1e-3, "log": True}}


@pytest.mark.slow
def test_settings_that_fit_refuses_are_refused_before_anything_runs(tmp_path: Path) -> None:
    for bad in ({"model.alhpa": 1}, {"model.alpha": "much"}, {"model.alpha": -1}):
        plan = plan_of(tmp_path, methods=["TD3BC"], set=bad)
        searched = plan_of(tmp_path, methods=["TD3BC"], search={key: [value] for key, value in bad.items()})
        for one in (plan, command.begun_search(searched)):
            with pytest.raises(UsageError, match="alpha"):
                command.check_cells(one, cells_of(one))
    assert not (tmp_path / "s").exists()


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [True, False])
def test_all_runs_once_and_a_second_sweep_repeats_nothing(tmp_path: Path, fake: Any, pack: bool) -> None:
    plan = plan_of(tmp_path, pack=pack, workers=2)
    done, lines = run(plan)
    assert [job.state for job in done] == [DONE] * (2 if pack else 4) and all(map(is_done, cells_of(plan)))
    assert any("left" in line for line in lines[:-1])
    assert run(plan)[0] == []
    more = plan_of(tmp_path, pack=pack, seeds="0..2")
    assert [job.cells[0].seed for job in jobs_of(more, cells_of(more), lambda _: True)] == [2, 2]


@pytest.mark.parametrize(
    ("mode", "code", "state", "tries"),
    [("once", 1, DONE, 2), ("always", 1, FAILED_RUN, 2), ("always", 4, FAILED_RUN, 1)],
)
def test_a_failed_run_kills_no_other(tmp_path: Path, fake: Any, mode: str, code: int, state: str, tries: int) -> None:
    plan = plan_of(tmp_path, pack=False)
    fake["BC/seed0"] = (mode, code)
    done, lines = run(plan)
    found = {job.name.partition("/")[2]: job for job in done}
    bad = found.pop(next(name for name in found if name.startswith("BC") and name.endswith("seed0")))
    assert (bad.state, bad.tries) == (state, tries) and {job.state for job in found.values()} == {DONE}
    assert state == DONE or any("failed with exit code" in line and str(bad.log) in line for line in lines)


def test_seeds_of_a_process_that_failed_go_on_alone(tmp_path: Path, fake: Any) -> None:
    plan = plan_of(tmp_path, methods=["BC"])
    fake["seeds 0,1"] = ("always", 4)
    done, lines = run(plan)
    assert [len(job.cells) for job in done] == [1, 1] and {job.state for job in done} == {DONE}
    assert "go on alone" in lines[0]


def test_an_interrupted_run_stops_the_sweep(tmp_path: Path, fake: Any) -> None:
    fake["seed0"] = ("always", 130)
    done, lines = run(plan_of(tmp_path, methods=["BC"], pack=False))
    assert [job.state for job in done] == ["stopped"] and "Run the same command again" in lines[-1]


def test_a_run_that_takes_too_long_is_stopped_and_tried_again(tmp_path: Path, fake: Any) -> None:
    fake["seed0"] = ("slow", 0)
    done, _ = run(plan_of(tmp_path, methods=["BC"], seeds="0", timeout_s=0.2))
    assert done[0].state == DONE and done[0].tries == 2


def test_a_run_of_another_sweep_is_waited_for(tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process holds the claim for a moment; then the run is done by it."""
    plan = plan_of(tmp_path, methods=["BC"], seeds="0")
    (job,) = jobs_of(plan, cells_of(plan), lambda _: False)
    claim = plan.folder / ".claims" / job.log.stem
    claim.mkdir(parents=True)
    code = f"""import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from offpolicy.compute.processes import claimed
with claimed(Path({str(claim)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert run_job(job, plan, 1, None).state == BUSY
    finally:
        other.kill()
        other.wait()
    assert run_job(job, plan, 1, None).state == DONE
    with claimed(claim):
        pass  # free again


@pytest.mark.parametrize("left", ['{"pid": 1, "host": "elsewhere", "since": "x"}', "garbage", ""])
def test_a_lock_that_a_killed_run_left_holds_nobody(tmp_path: Path, fake: Any, left: str) -> None:
    """As in folders that were moved here from the machine on which the run was killed."""
    plan = plan_of(tmp_path, methods=["BC"], seeds="0")
    (cell,) = cells_of(plan)
    made_run(cell.folder, planned=100)
    (cell.folder / ".lock").write_text(left)
    (job,) = jobs_of(plan, [cell], lambda _: False)
    assert run_job(job, plan, 1, None).state == DONE


def test_a_run_that_is_waited_for_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PAUSE", 0.0)
    left = [BUSY, BUSY, DONE]

    def start(job: Any) -> Any:
        job.state = left.pop(0)
        return job

    _, lines = run(plan_of(tmp_path, methods=["BC"], seeds="0"), start=start)
    assert sum("is run by another process; it is waited for" in line for line in lines) == 1 and len(lines) == 2


def test_a_run_whose_folder_cannot_be_made_stops_no_other(tmp_path: Path, fake: Any) -> None:
    plan = plan_of(tmp_path, methods=["BC"], pack=False)
    folder = cells_of(plan)[0].folder
    folder.parent.mkdir(parents=True)
    folder.write_text("no folder")
    done, lines = run(plan)
    assert [job.state for job in done] == [FAILED_RUN, DONE]
    assert "failed with exit code 1" in lines[0] and "cell.json" in lines[0] and folder.read_text() == "no folder"


def test_what_goes_on_takes_its_checkpoint_and_the_new_length(tmp_path: Path, fake: Any) -> None:
    plan = plan_of(tmp_path, methods=["BC"], seeds="0")
    run(plan)
    (cell,) = cells_of(plan_of(tmp_path, methods=["BC"], seeds="0", set={"trainer.max_steps": 40}))
    (job,) = jobs_of(plan, [cell], lambda _: True)
    assert not is_done(cell)
    real = command_of(job)  # not that of the fixture
    assert real[3:] == ["--ckpt_path", str(cell.folder), "--trainer.max_steps", "40"]


# -- Ray, Optuna, SLURM ------------------------------------------------------------------------------------------------


def test_script_for_slurm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(tmp_path, workers=3)
    assert command.write_slurm(plan, cells_of(plan), tmp_path / "a b.sh") == 0
    text = (tmp_path / "a b.sh").read_text()
    assert "#SBATCH --array=0-3%3" in text and "--cell" in text and f"sbatch '{tmp_path / 'a b.sh'}'" in text
    assert subprocess.run(["bash", "-n", str(tmp_path / "a b.sh")]).returncode == 0
    assert "not submitted" in capsys.readouterr().out


def test_one_process_of_an_array(tmp_path: Path, fake: Any) -> None:
    plan = plan_of(tmp_path)
    every = command.slurm_jobs(plan, cells_of(plan))
    assert command.run_one(every, 1, plan) == 0 and is_done(cells_of(plan)[1]) and not is_done(cells_of(plan)[0])
    with pytest.raises(UsageError, match="from 0 to 3"):
        command.run_one(every, 9, plan)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed here")
def test_on_a_local_ray(tmp_path: Path) -> None:
    plan = read_plan(None, {
        "methods": ["BC"], "data": ["pendulum-stitch-v0"], "seeds": "0..1", "folder": str(tmp_path / "s"),
        "pack": False, "set": {"trainer.max_steps": 20, "run.eval_episodes": 1, "run.eval_every": 10},
        "threads": 1, "workers": 2,
    })  # fmt: skip
    done, _ = run(plan, ray="local")
    assert [job.state for job in done] == [DONE, DONE] and all(map(is_done, cells_of(plan)))


def test_absent_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray", "optuna"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=r"\.\[ray\]"):
        run(plan_of(tmp_path), ray="local")
    from offpolicy.sweep.search import open_study

    with pytest.raises(UsageError, match=r"\.\[search\]"):
        open_study(plan_of(tmp_path, search={"model.alpha": [1]}), "BC", "x")


class FakeTrial:
    """What a search asks of a trial."""

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        return choices[-1]

    def suggest_int(self, name: str, low: int, high: int, log: bool) -> int:
        return high

    def suggest_float(self, name: str, low: float, high: float, log: bool) -> float:
        return low


def test_space_of_a_search() -> None:
    space = {"a": [1, 2], "b": {"low": 1, "high": 8, "log": True}, "c": {"low": 0.5, "high": 2}}
    assert suggested(FakeTrial(), space) == {"a": 2, "b": 8, "c": 0.5}
    assert settings_of("IQL", {"iql.beta": 1, "TD3BC.alpha": 2, "model.tau": 3}) == {"model.beta": 1, "model.tau": 3}


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="the extra `search` is not installed here")
@pytest.mark.parametrize("pruner", ["median", "asha"])
def test_a_search_finds_the_best_prunes_and_goes_on(tmp_path: Path, pruner: str) -> None:
    """Runs are made on the spot: the score at update t is −(α − 3)² + t/100; a failed run is a failed trial."""
    from offpolicy.sweep.search import search_settings

    space = {"model.alpha": {"low": 0, "high": 6}}
    plan = plan_of(tmp_path, methods=["TD3BC"], search=space | {"trials": 12, "pruner": pruner})
    started: list[int] = []
    ended: list[int] = []

    def made(job: Any, *_: Any) -> Any:
        (cell,), watch = job.cells, _[-1]
        alpha, rows = cell.settings["model.alpha"], "step,eval/score\n"
        started.append(alpha)
        cell.folder.mkdir(parents=True, exist_ok=True)
        model = {"class_path": "lightning_modules.td3bc.TD3BC", "init_args": {"alpha": alpha}}
        config = {"seed_everything": 0, "trainer": {"max_steps": 20}, "model": model, "data": {"name": "x"}}
        (cell.folder / "config.yaml").write_text(yaml.safe_dump(config))
        if len(started) in (2, 4):
            job.state = FAILED_RUN if len(started) == 2 else STOPPED
            return job
        for step in (10, 20):
            rows += f"{step},{-((alpha - 3) ** 2) + step / 100}\n"
            (cell.folder / "evals.csv").write_text(rows)
            if watch is not None and watch(job):
                job.state = "pruned"
                return job
        (cell.folder / "checkpoints").mkdir(exist_ok=True)
        (cell.folder / "checkpoints" / "step=00000020.ckpt").write_text("")
        job.state = DONE
        ended.append(alpha)
        return job

    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):  # which a command leaves with 130
        search_settings(plan, "TD3BC", "x", lines.append, made)
    assert len(started) == 4 and "Run the same command again" in lines[-1]
    (best,) = search_settings(plan, "TD3BC", "x", lines.append, made)
    assert started[4] == started[3]  # the one that was stopped goes on first
    assert best.settings["model.alpha"] in [a for a in ended if abs(a - 3) == min(abs(one - 3) for one in ended)]
    assert any("pruned at update 10" in line for line in lines) and len(ended) < 12
    assert any("trial 1: failed" in line for line in lines)
    count = len(started)
    assert count == 14 and search_settings(plan, "TD3BC", "x", lines.append, made) and len(started) == count


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="the extra `search` is not installed here")
def test_a_search_after_ctrl_c_goes_on_and_repeats_no_trial(tmp_path: Path) -> None:
    """Ctrl-C reaches the search itself: its trial comes again first, and all others have settings of their own."""
    from offpolicy.sweep.search import search_settings

    plan = plan_of(tmp_path, methods=["TD3BC"], search={"model.alpha": {"low": 0.0, "high": 6.0}, "trials": 4})
    started: list[float] = []

    def made(job: Any, *_: Any) -> Any:
        (cell,) = job.cells
        started.append(cell.settings["model.alpha"])
        if len(started) == 2:
            raise KeyboardInterrupt
        made_run(cell.folder, "TD3BC", "x", 0, (1.0,), alpha=started[-1])
        job.state = DONE
        return job

    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        search_settings(plan, "TD3BC", "x", lines.append, made)
    assert "Run the same command again" in lines[-1]
    assert search_settings(plan, "TD3BC", "x", lines.append, made)
    assert started[2] == started[1] and len(started) == 5 and len(set(started)) == 4


@pytest.mark.parametrize("where", [["--ray", "local"], ["--slurm", "a.sh"]])
def test_a_search_runs_on_this_machine(where: list[str]) -> None:
    words = ["--methods", "BC", "--data", "pendulum-stitch-v0", "--search", "model.top=0.1:1"]
    with pytest.raises(UsageError, match="neither --ray nor --slurm"):
        command.main([*words, *where])


def test_losses_are_better_below(tmp_path: Path) -> None:
    from offpolicy.report.runs import read_run

    folder = made_run(tmp_path / "a", "SFT", scores=(0.5, float("nan"), 0.4), column="eval/loss")
    assert judged_values(read_run(folder)) == [(10, -0.5), (30, -0.4)]


def test_times_for_a_person() -> None:
    assert (told_time(50), told_time(600), told_time(7200)) == ("50 s", "10 min", "2.0 h")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_killed_in_the_middle_and_run_again(tmp_path: Path) -> None:
    """The command itself, killed at its first checkpoint: nothing is missing afterwards, and nothing twice."""
    words = ["--methods", "BC", "--data", "pendulum-stitch-v0", "--seeds", "0..1", "--folder", str(tmp_path / "s")]
    words += ["--set", "trainer.max_steps=3000", "run.eval_every=500", "run.eval_episodes=1", "--pack", "false"]
    call = ["-m", "offpolicy.sweep", *words]
    first = start_command(*call, folder=ROOT)
    deadline = time.time() + 120
    while not list((tmp_path / "s").rglob("step=*.ckpt")) and time.time() < deadline:
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL)
    finish(first)
    again = start_command(*call, folder=ROOT)
    finish(again)
    assert first.returncode == -signal.SIGKILL
    assert again.returncode == 0 and "2 done" in again.output, again.output
    assert (tmp_path / "s" / "report" / "index.html").exists()
    for seed in (0, 1):
        (folder,) = (tmp_path / "s").rglob(f"seed{seed}")
        steps = [line.split(",")[0] for line in (folder / "evals.csv").read_text().splitlines()[1:]]
        assert steps == [str(n) for n in range(500, 3001, 500)]
    third = start_command(*call, folder=ROOT)
    finish(third)
    assert third.returncode == 0 and "2 are done, 0 go on, 0 begin" in third.output
