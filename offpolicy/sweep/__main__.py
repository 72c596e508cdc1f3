"""Many runs by one plan: ``python -m offpolicy.sweep plan.yaml``, or ``--methods BC IQL --data A B --seeds 0..4``.

Running it again goes on with what is unfinished and repeats nothing.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from offpolicy.cli import entry
from offpolicy.cli.reader import Parser
from offpolicy.errors import UsageError, amount

SIGNALLED = 130


def main(argv: list[str]) -> int:
    """Show the plan, run what is unfinished, and write the report; returns the exit code."""
    args = arguments(argv)

    from offpolicy.files import atomic_write
    from offpolicy.sweep.jobs import STOPPED, jobs_of
    from offpolicy.sweep.plan import cells_of, plan_text, read_plan

    plan = read_plan(Path(args.plan) if args.plan else None, given(args))
    if plan.search is not None and (args.ray or args.slurm):
        raise UsageError("a search runs on this machine; expected neither --ray nor --slurm with it. Leave them out.")
    if plan.search is not None:
        each = f"{amount(len(plan.methods), 'method')} on {amount(len(plan.data), 'data set')}"
        say(f"{amount(plan.search.trials, 'trial')} for each of {each}, in {plan.folder}, ended ones counted")
        if args.dry:
            return 0
    cells = cells_of(plan)
    check_cells(plan, cells if plan.search is None else cells_of(begun_search(plan)))
    jobs = jobs_of(plan, cells, shares_seeds)
    if args.cell is not None:
        every = jobs_of(plan, cells, shares_seeds) if args.cell < 0 else slurm_jobs(plan, cells)
        return run_one(every, args.cell, plan)
    if plan.search is None:
        show(plan, cells, jobs)
    if args.dry:
        return 0
    atomic_write(plan.folder / "sweep.yaml", plan_text(plan))
    if args.slurm:
        return write_slurm(plan, cells, Path(args.slurm))
    if plan.search is not None:
        return search(plan, args.report)

    from offpolicy.sweep.pool import run_all

    done = run_all(jobs, plan, say, ray=args.ray)
    if any(job.state == STOPPED for job in done):
        return SIGNALLED
    return conclude(plan, cells, args.report)


def arguments(argv: list[str]) -> Any:
    """The words of the command."""
    parser = Parser("python -m offpolicy.sweep", description="Run methods by data by settings by seeds.")
    parser.add_argument("plan", nargs="?", help="YAML file with the fields below; options come on top")
    parser.add_argument("--methods", nargs="+", help="names of methods")
    parser.add_argument("--data", nargs="+", help="names of data, or files")
    parser.add_argument("--seeds", help="0..4, or 0,3,7 (0)")
    parser.add_argument("--set", nargs="+", metavar="NAME=VALUE", help="settings of all runs: trainer.max_steps=1000")
    parser.add_argument("--grid", nargs="+", metavar="NAME=A,B", help="all combinations: model.alpha=1,2.5")
    parser.add_argument(
        "--search", nargs="+", metavar="NAME=LOW:HIGH", help="Optuna: 1:10, log:1:10 or A,B (extra search)"
    )
    parser.add_argument("--trials", type=int, help="of a search, for each method and data (20)")
    parser.add_argument("--pruner", help="of a search: median, asha or none (median)")
    parser.add_argument("--search_seeds", help="seeds of each trial (0)")
    parser.add_argument("--folder", help="where the runs lie (runs/sweep)")
    parser.add_argument("--workers", type=int, help="processes at a time (1)")
    parser.add_argument("--threads", type=int, help="of each process (the processors shared out)")
    parser.add_argument("--retries", type=int, help="of a run that failed (1)")
    parser.add_argument("--timeout_s", type=float, help="seconds after which a run counts as failed (no end)")
    parser.add_argument("--pack", choices=("true", "false"), help="seeds of one setting share a process (true)")
    parser.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster; local starts one here (extra ray)")
    parser.add_argument("--slurm", metavar="FILE", help="write an array script for SLURM and stop")
    parser.add_argument("--cell", type=int, help="run one process of the plan alone, as the script for SLURM does")
    parser.add_argument(
        "--report", default="", help="folder of the report at the end; none for no report (FOLDER/report)"
    )
    parser.add_argument("--dry", action="store_true", help="show the plan and stop")
    return parser.parse_args(argv)


def given(args: Any) -> dict[str, Any]:
    """Fields of the plan that stand on the command line."""
    found = {
        name: getattr(args, name) for name in ("methods", "data", "seeds", "folder", "workers", "threads", "retries")
    }
    found["timeout_s"] = args.timeout_s
    found["pack"] = None if args.pack is None else args.pack == "true"
    found["set"] = {key: yaml.safe_load(text) for key, text in pairs(args.set, "set")} or None
    found["grid"] = {
        key: [yaml.safe_load(one) for one in text.split(",")] for key, text in pairs(args.grid, "grid")
    } or None
    space = {key: spanned(key, text) for key, text in pairs(args.search, "search")}
    if space:
        more = {"trials": args.trials, "pruner": args.pruner, "seeds": args.search_seeds}
        found["search"] = space | {key: value for key, value in more.items() if value is not None}
    return found


def pairs(words: list[str] | None, option: str) -> list[tuple[str, str]]:
    """NAME=VALUE words."""
    found = []
    for word in words or ():
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals or not value:
            raise UsageError(f"--{option} has {word!r}; expected NAME=VALUE, such as model.alpha=2.5.")
        found.append((name, value))
    return found


def spanned(name: str, text: str) -> Any:
    """What a search may take: 1:10, log:1:10 or a,b,c."""
    from offpolicy.sweep.plan import number

    parts = text.split(":")
    if len(parts) == 1:
        return [yaml.safe_load(one) for one in text.split(",")]
    numbers = [number(one) for one in parts[-2:]]
    if (
        len(parts) > 3
        or (len(parts) == 3 and parts[0] != "log")
        or not all(isinstance(n, (int, float)) for n in numbers)
    ):
        raise UsageError(f"--search has {name}={text}; expected LOW:HIGH, log:LOW:HIGH or A,B.")
    return {"low": numbers[0], "high": numbers[1], "log": len(parts) == 3}


def check_cells(plan: Any, cells: Any) -> None:
    """Refuse settings that `fit` would refuse, before anything runs: each combination is read as `fit` reads it."""
    from offpolicy.cli.arguments import read_command
    from offpolicy.cli.parser import parse
    from offpolicy.sweep.plan import commands_of

    seen = set()
    for cell in cells:
        if cell.folder.parent not in seen:
            seen.add(cell.folder.parent)
            parse(read_command([*commands_of([cell]), "--seed_everything", str(cell.seed)]))


def begun_search(plan: Any) -> Any:
    """The plan with the first value of everything that is searched for, to be checked as a grid is."""
    space = plan.search.space
    first = {key: (one["low"] if isinstance(one, dict) else one[0],) for key, one in space.items()}
    return replace(plan, grid=first, search=None)


def shares_seeds(method: str) -> bool:
    """Whether several seeds of a method train in one process; of others' methods nobody knows before they try."""
    from offpolicy.registry import class_path, import_class

    path = class_path(method)
    return path.startswith("lightning_modules.") and bool(getattr(import_class(path), "seed_axis", False))


def show(plan: Any, cells: Any, jobs: Any) -> None:
    """What will happen."""
    from offpolicy.sweep.jobs import has_begun, is_done
    from offpolicy.sweep.pool import threads_of

    done = sum(map(is_done, cells))
    begun = sum(has_begun(one) for job in jobs for one in job.cells)
    counts = (len(plan.methods), "method"), (len(plan.data), "data set"), (len(plan.seeds), "seed")
    sizes = " × ".join(amount(*count) for count in counts)
    say(f"{amount(len(cells), 'run')} in {plan.folder}: {sizes}")
    say(f"  {done} are done, {begun} go on, {len(cells) - done - begun} begin")
    threads = amount(threads_of(plan), "thread")
    say(f"  {amount(len(jobs), 'process', 'processes')}, {plan.workers} at a time with {threads} each")
    for job in jobs[:30]:
        say(f"  {job.name}")
    if len(jobs) > 30:
        say(f"  and {len(jobs) - 30} more")


def slurm_jobs(plan: Any, cells: Any) -> list[Any]:
    """Processes by number, the same whatever is done already: one per run."""
    from offpolicy.sweep.jobs import Job

    alone = replace(plan, pack=False)
    return [Job([one], alone.folder / "logs" / f"cell-{i}.log") for i, one in enumerate(cells)]


def run_one(jobs: list[Any], number: int, plan: Any) -> int:
    """Run one process of a plan; returns the exit code."""
    from offpolicy.sweep.jobs import DONE, run_job
    from offpolicy.sweep.pool import threads_of

    if not 0 <= number < len(jobs):
        raise UsageError(f"--cell is {number}; expected a number from 0 to {len(jobs) - 1}.")
    job = run_job(jobs[number], plan, threads_of(plan), None)
    say(f"{job.name}: {job.state}, see {job.log}")
    return 0 if job.state == DONE else 1


def write_slurm(plan: Any, cells: Any, script: Path) -> int:
    """Write the script of an array; returns the exit code."""
    from offpolicy.files import atomic_write
    from offpolicy.sweep.slurm import array_script

    (plan.folder / "logs").mkdir(parents=True, exist_ok=True)
    text = array_script(plan, len(cells), plan.folder / "sweep.yaml", script, sys.executable)
    atomic_write(script, text)
    say(f"script  {script}: {len(cells)} tasks. It was not submitted: sbatch {script}")
    return 0


def search(plan: Any, report: str) -> int:
    """Search for settings of every method on every data set; returns the exit code."""
    from offpolicy.given import seeds_text
    from offpolicy.sweep.search import search_settings

    best = [one for data in plan.data for method in plan.methods for one in search_settings(plan, method, data, say)]
    say(f"Settings were chosen on seeds {seeds_text(plan.search.seeds)}; report them on others.")
    return conclude(plan, best, report) if best else 1


def conclude(plan: Any, cells: Any, report: str) -> int:
    """Say what is done and write the report; returns the exit code."""
    from offpolicy.report.build import write_report
    from offpolicy.sweep.jobs import has_begun, is_done

    states = Counter("done" if is_done(one) else "begun" if has_begun(one) else "not begun" for one in cells)
    say(", ".join(f"{count} {state}" for state, count in sorted(states.items())))
    if report != "none":
        try:
            out = report or plan.folder / "report"
            say(f"page  {write_report([plan.folder], out, title=f'Sweep {plan.folder.name}')}")
        except UsageError as error:  # no run has begun
            say(f"no report: {error}")
    return 0 if set(states) == {"done"} else 1


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    entry.run(main)
