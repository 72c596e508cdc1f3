"""Runs of a plan as processes: which are done, which go on, which seeds share one, and how one process is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offpolicy.cli.entry import MACHINE
from offpolicy.compute.processes import claimed, is_claimed
from offpolicy.errors import UsageError
from offpolicy.files import PLACES, WriteError, atomic_write, known_folders
from offpolicy.given import seeds_text
from offpolicy.report.runs import CONFIG, read_run, updates_kept
from offpolicy.sweep.plan import LENGTH, RunCell, SweepPlan, commands_of

DONE, FAILED_RUN, BUSY, STOPPED, PRUNED = "done", "failed", "busy", "stopped", "pruned"
ENDED = -1  # in place of an exit code: the process was ended by who watches it
NO_RETRY = (2, 3, 4)  # exit codes of a wrong setting, of wrong data and of divergence, which would be the same again
STOP = (130, 143)  # somebody stopped it, and with it the sweep
LOGS = "logs"
Watch = Callable[["Job"], bool]  # asked now and then; true ends the process, with its checkpoint


@dataclass
class Job:
    """One process: a run, or the seeds of a setting together.

    Attributes:
        cells: its runs.
        log: file of what it prints.
        tries: how often it was started.
        seconds: it took in all.
        code: exit code of the last try.
        fault: why it could not be started; empty where it was.
    """

    cells: list[RunCell]
    log: Path
    tries: int = 0
    seconds: float = 0.0
    code: int = 0
    fault: str = ""
    state: str = field(default="waiting")

    @property
    def name(self) -> str:
        first = self.cells[0]
        return first.name if len(self.cells) == 1 else f"{first.name.rpartition('/')[0]}/{self.seeds}"

    @property
    def seeds(self) -> str:
        return f"seeds {seeds_text([one.seed for one in self.cells])}"

    @property
    def joint(self) -> Path:
        return self.cells[0].folder.parent

    @property
    def place(self) -> Path:
        """Folder of the process's run."""
        return self.cells[0].folder if len(self.cells) == 1 else self.joint


def is_done(cell: RunCell) -> bool:
    """Whether a run has made all its updates: its last checkpoint and evaluation are there."""
    if not (cell.folder / CONFIG).exists():
        return False
    try:
        run = read_run(cell.folder)
    except UsageError:
        return False
    wanted = cell.updates or run.planned
    if wanted is None or run.failed_last:
        return False
    ended = (cell.folder / "curves.png").exists()  # drawn at the end, when the last checkpoint may be gone: run.keep
    return max(run.updates if ended else 0, *updates_kept(cell.folder), 0) >= wanted


def has_begun(cell: RunCell) -> bool:
    """Whether a run has a checkpoint to go on from."""
    return bool(updates_kept(cell.folder))


def jobs_of(plan: SweepPlan, cells: Sequence[RunCell], shares: Callable[[str], bool]) -> list[Job]:
    """The processes that what is unfinished needs.

    Args:
        plan: of the sweep.
        cells: of the plan, done or not.
        shares: whether seeds of a method can share a process.
    """
    groups: dict[Path, list[RunCell]] = {}
    for cell in cells:
        if not is_done(cell):
            groups.setdefault(cell.folder.parent, []).append(cell)
    jobs = []
    for joint, some in groups.items():
        together = [one for one in some if not has_begun(one)]
        if (joint / PLACES).exists():  # begun together: go on so if nobody went on alone
            begun = set(known_folders(joint))
            together = [one for one in some if one.seed in begun]
            together = together if {one.seed for one in together} == begun and updates_kept(joint) else []
        if not (plan.pack and len(together) > 1 and shares(some[0].method)):
            together = []
        rest = [one for one in some if one not in together]
        jobs += [_job(plan, together)] if together else []
        jobs += [_job(plan, [one]) for one in rest]
    return jobs


def _job(plan: SweepPlan, cells: list[RunCell]) -> Job:
    first = cells[0]
    seeds = f"seeds{seeds_text([one.seed for one in cells])}" if len(cells) > 1 else first.folder.name
    return Job(cells, plan.folder / LOGS / f"{first.folder.parent.parent.name}-{first.folder.parent.name}-{seeds}.log")


def command_of(job: Job) -> list[str]:
    """The command of a process: what begins, or what goes on from its newest checkpoint."""
    fit = [sys.executable, "-m", "offpolicy.fit"]
    first = job.cells[0]
    if updates_kept(job.place):
        length = first.settings.get(LENGTH)
        return [*fit, "--ckpt_path", str(job.place), *([f"--{LENGTH}", str(length)] if length else [])]
    seeds = ["--seed_everything", str(first.seed)]
    if len(job.cells) > 1:
        seeds = ["--seeds", seeds_text([one.seed for one in job.cells])]
    return [*fit, *commands_of(job.cells), *seeds, "--folder", str(job.place)]


def run_job(job: Job, plan: SweepPlan, threads: int, gpu: int | None, watch: Watch | None = None) -> Job:
    """Run a process to its end, and again where it failed; what became of it is in the job.

    No other sweep runs the same meanwhile. A run that somebody else trains is "busy".
    """
    claim = plan.folder / ".claims" / job.log.stem
    try:
        claim.mkdir(parents=True, exist_ok=True)
        with claimed(claim):
            if any(one.folder.is_dir() and is_claimed(one.folder) for one in job.cells):
                job.state = BUSY
                return job
            if all(map(is_done, job.cells)):
                job.state = DONE
                return job
            return _tried(job, plan, threads, gpu, watch)
    except UsageError:  # another sweep has it
        job.state = BUSY
        return job
    except (OSError, WriteError) as error:  # a disk or folder that cannot be written
        job.state, job.code, job.fault = FAILED_RUN, MACHINE, str(error)
        return job


def _tried(job: Job, plan: SweepPlan, threads: int, gpu: int | None, watch: Watch | None) -> Job:
    for cell in job.cells:
        about = {"method": cell.method, "data": cell.data, "seed": cell.seed, "settings": cell.settings}
        atomic_write(cell.folder / "cell.json", json.dumps(about, indent=2, default=str) + "\n")
    for _ in range(plan.retries + 1):
        job.tries += 1
        began = time.perf_counter()
        job.code = _process(job, plan, threads, gpu, watch)
        job.seconds += time.perf_counter() - began
        if job.code in STOP or job.code == ENDED:
            job.state = PRUNED if job.code == ENDED else STOPPED
            return job
        if job.code == 0 and all(map(is_done, job.cells)):
            job.state = DONE
            return job
        if job.code in NO_RETRY:
            break
    job.state = FAILED_RUN
    return job


def _process(job: Job, plan: SweepPlan, threads: int, gpu: int | None, watch: Watch | None) -> int:
    """One try; returns its exit code, 1 for one that took too long and -1 for one that the watch ended."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
    command = command_of(job)
    with open(job.log, "ab") as log:
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        began, stopped = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while True:
                try:
                    code = process.wait(0.5)
                    return stopped or code
                except subprocess.TimeoutExpired:
                    late = plan.timeout_s is not None and time.perf_counter() - began > plan.timeout_s
                    if not stopped and (late or (watch is not None and watch(job))):
                        process.terminate()  # which saves
                        stopped = 1 if late else ENDED
        except BaseException:
            process.terminate()
            process.wait()
            raise


def separated(job: Job, plan: SweepPlan) -> list[Job]:
    """The runs of a process that failed, one each: a seed that diverges does not take the others along."""
    return [_job(plan, [one]) for one in job.cells if not is_done(one)] if len(job.cells) > 1 else []


def last_words(job: Job, lines: int = 1) -> str:
    """The end of what a process printed."""
    try:
        text = job.log.read_text("utf-8", errors="replace")
    except OSError:
        return ""
    return " ".join(line.strip() for line in text.strip().splitlines()[-lines:])[:300]
