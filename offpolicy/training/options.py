"""Options of a run, common to all methods (``--run.*`` on the command line)."""

from __future__ import annotations

from dataclasses import dataclass

from offpolicy.errors import UsageError, check_range
from offpolicy.given import whole_fields


@dataclass
class RunOptions:
    """How a run is carried out; none of these changes what is learned (``matmul`` and ``threads`` change last bits).

    Args:
        block: updates per call of the Trainer, ≥ 1; cut at every interval. Any value gives the same weights.
        eval_every: updates between evaluations and checkpoints, ≥ 0; 0 evaluates at the end only.
        eval_episodes: episodes per evaluation, of each task where the data come with tasks, ≥ 0; 0 never evaluates.
        eval_errors: what an evaluation that raises an error does: "stop" ends the run, whose checkpoint of that update
            is kept; "skip" goes on, with a row in ``evals.csv`` that has the error and no numbers.
        log_every: updates between rows of metrics, ≥ 1.
        threads: torch threads during training; None leaves the setting alone.
        matmul: float32 products on CPU: "auto", "mkl" or "onednn"; "bf16" multiplies in bfloat16, faster and less
            exact, on processors with AMX (see :mod:`offpolicy.compute.matmul`).
        compile: true compiles the losses with ``torch.compile``. "update", of control methods on a CPU, compiles whole
            updates: half a minute to some minutes first, then about 1.4 times the updates; equal up to rounding.
        graph: whether the updates of a block are one CUDA graph: "auto", wherever that is possible; true, which needs a
            CUDA device; false, one by one; "dry", one by one as a graph would be recorded, on a CPU too. Of control
            methods.
        allow_other_data: resume although the data are not those of the checkpoint.
    """

    block: int = 64
    eval_every: int = 5000
    eval_episodes: int = 10
    eval_errors: str = "stop"
    log_every: int = 500
    threads: int | None = None
    matmul: str = "auto"
    compile: bool | str = False
    graph: bool | str = "auto"
    allow_other_data: bool = False

    def __post_init__(self) -> None:
        whole_fields(self, "run")
        for name, low in (("block", 1), ("eval_every", 0), ("eval_episodes", 0), ("log_every", 1)):
            check_range(f"run.{name}", getattr(self, name), low)
        if self.threads is not None:
            check_range("run.threads", self.threads, 1)
        if self.eval_errors not in ("stop", "skip"):
            raise UsageError(f"`run.eval_errors` is {self.eval_errors!r}; expected 'stop' or 'skip'.")
        if self.matmul not in ("auto", "mkl", "onednn", "bf16"):
            raise UsageError(f"`run.matmul` is {self.matmul!r}; expected 'auto', 'mkl', 'onednn' or 'bf16'.")
        self.graph = {"true": True, "false": False}.get(self.graph, self.graph)  # type: ignore[arg-type]
        if not (isinstance(self.graph, bool) or self.graph in ("auto", "dry")):
            raise UsageError(f"`run.graph` is {self.graph!r}; expected 'auto', true, false or 'dry'.")
        self.compile = {"true": True, "false": False}.get(self.compile, self.compile)  # type: ignore[arg-type]
        if not (isinstance(self.compile, bool) or self.compile == "update"):
            raise UsageError(f"`run.compile` is {self.compile!r}; expected true, false or 'update'.")
