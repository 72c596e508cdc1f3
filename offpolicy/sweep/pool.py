"""Processes of a sweep side by side: on this machine, or on a Ray cluster; a failed one never stops the others."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from offpolicy.errors import UsageError, amount
from offpolicy.sweep.jobs import BUSY, DONE, FAILED_RUN, STOPPED, Job, last_words, run_job, separated
from offpolicy.sweep.plan import SweepPlan

PAUSE = 2.0  # seconds until a run that somebody else trains is looked at again
Tell = Callable[[str], None]
Start = Callable[[Job], Job]


def run_all(
    jobs: Sequence[Job], plan: SweepPlan, tell: Tell, *, ray: str | None = None, start: Start | None = None
) -> list[Job]:
    """Run every process of a plan; returns them with what became of each.

    Args:
        jobs: processes, in order.
        plan: of the sweep.
        tell: gets a line after each.
        ray: address of a Ray cluster, "local" to start one here; None for processes of this machine.
        start: in place of running a process, for tests.
    """
    ready = OnRay(plan, ray) if ray else Local(plan, start)
    finished: list[Job] = []
    waiting = list(jobs)
    waited: set[str] = set()
    try:
        for job in ready(waiting):
            if job.state == BUSY:
                if job.name not in waited:
                    tell(f"{job.name} is run by another process; it is waited for.")
                waited.add(job.name)
                time.sleep(PAUSE)
                waiting.append(job)
                continue
            finished.append(job)
            if job.state == STOPPED:
                tell(f"{job.name} was stopped, so no other begins. Run the same command again to go on.")
                break
            if job.state == FAILED_RUN and (alone := separated(job, plan)):
                tell(f"{job.name} ended with exit code {job.code}; its unfinished seeds go on alone. See {job.log}.")
                finished.pop()
                waiting += alone
                continue
            tell(_line(job, finished, len(waiting) + ready.running(), plan.workers))
    except KeyboardInterrupt:
        tell("Stopped: what runs saves, and no other begins. Run the same command again to go on.")
        raise
    finally:
        ready.close()
    return finished


def _line(job: Job, finished: Sequence[Job], left: int, workers: int) -> str:
    """What became of a process, and how long the rest takes if they are like those that ended."""
    ended, total = len(finished), len(finished) + left
    if job.state == DONE:
        what = f"done in {job.seconds:,.0f} s" if job.tries else "done by another sweep"
    else:
        why = job.fault or last_words(job)
        what = f"failed with exit code {job.code} after {amount(job.tries, 'try', 'tries')}, see {job.log}: {why}"
    seconds = sum(one.seconds for one in finished) / ended * left / min(workers, max(1, left))
    about = f"; about {told_time(seconds)} left" if left else ""
    return f"[{ended}/{total}] {job.name}: {what}{about}"


def told_time(seconds: float) -> str:
    """A length of time for a person."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Local:
    """Processes of this machine: as many at a time as the plan has workers, graphics cards in turn."""

    def __init__(self, plan: SweepPlan, start: Start | None = None) -> None:
        self.plan, self.threads = plan, threads_of(plan)
        self.start = start or self._start
        self.pool = ThreadPoolExecutor(plan.workers)
        self.futures: set[Future[Job]] = set()
        self.slots = list(range(plan.workers))
        self.lock = threading.Lock()
        self.cards = graphics_cards()

    def _start(self, job: Job) -> Job:
        with self.lock:
            slot = self.slots.pop(0)
        try:
            card = self.cards[slot % len(self.cards)] if self.cards else None
            return run_job(job, self.plan, self.threads, card)
        finally:
            with self.lock:
                self.slots.append(slot)

    def __call__(self, waiting: list[Job]) -> Iterator[Job]:
        while waiting or self.futures:
            while waiting and len(self.futures) < self.plan.workers:
                self.futures.add(self.pool.submit(self.start, waiting.pop(0)))
            ended, self.futures = wait(self.futures, return_when=FIRST_COMPLETED)
            for one in ended:
                yield one.result()

    def running(self) -> int:
        return len(self.futures)

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)


class OnRay:
    """Processes wherever a Ray cluster has room; folders lie on a disk that all its machines see.

    Ray keeps no truth: whether a run is done, its folder says.
    """

    def __init__(self, plan: SweepPlan, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise UsageError("--ray needs the package ray; install the extra: pip install -e '.[ray]'.") from None
        self.ray, self.plan, self.threads = ray, plan, threads_of(plan)
        options: dict[str, Any] = {"ignore_reinit_error": True, "log_to_driver": False}
        if address == "local":
            options |= {"num_cpus": plan.workers * self.threads, "include_dashboard": False}
        else:
            options |= {"address": address}
        self.ours = not ray.is_initialized()
        ray.init(**options)
        cards = ray.cluster_resources().get("GPU", 0.0)
        self.remote = ray.remote(num_cpus=self.threads, num_gpus=1 if cards else 0, max_retries=1)(run_job)
        self.refs: list[Any] = []
        self.jobs: dict[Any, Job] = {}

    def __call__(self, waiting: list[Job]) -> Iterator[Job]:
        while waiting or self.refs:
            while waiting:
                job = waiting.pop(0)
                ref = self.remote.remote(job, self.plan, self.threads, None)
                self.refs.append(ref)
                self.jobs[ref] = job
            ended, self.refs = self.ray.wait(self.refs, num_returns=1)
            for ref in ended:
                yield self._result(ref)

    def _result(self, ref: Any) -> Job:
        """What became of a process; one whose machine was lost has failed."""
        try:
            return self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            job = self.jobs[ref]
            job.state, job.code, job.tries = FAILED_RUN, 1, job.tries + 1
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with open(job.log, "a") as log:
                log.write(f"{type(error).__name__}: {error}\n")
            return job

    def running(self) -> int:
        return len(self.refs)

    def close(self) -> None:
        if self.ours:
            self.ray.shutdown()


def threads_of(plan: SweepPlan) -> int:
    """Threads of one process: as the plan says, else the processors shared out."""
    return plan.threads or max(1, processors() // plan.workers)


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def graphics_cards() -> list[int]:
    """Cards by their numbers, as far as CUDA shows them."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES", ""):
        return [int(one) for one in visible.split(",") if one.strip().isdigit()]
    import torch

    return list(range(torch.cuda.device_count()))
