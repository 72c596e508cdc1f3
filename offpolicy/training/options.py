"""Options of a run, common to all methods (``--run.*`` on the command line)."""

from __future__ import annotations

from dataclasses import dataclass

from offpolicy.errors import UsageError, check_choice, check_range
from offpolicy.given import whole_fields
from offpolicy.training.keeping import Keeping

LEAST = {
    "block": 1,
    "eval_every": 0,
    "eval_episodes": 0,
    "save_every": 0,
    "log_every": 1,
    "threads": 1,
    "select_updates": 5,
}
FINAL = ("whole", "weights_only")
SELECT = ("none", "fqe", "loss")


@dataclass
class RunOptions:
    """How a run is carried out; none of these changes what is learned (``matmul`` and ``threads`` change last bits).

    Args:
        block: updates per call of the Trainer, ≥ 1; cut at every interval. Any value gives the same weights.
        eval_every: updates between evaluations, ≥ 0; 0 evaluates at the end only. None fits the length of the run: a
            fifth of it, at least 200 and at most 5,000 updates; of language models a tenth, at least 10 and at most
            500. A run that goes on keeps its own.
        eval_episodes: episodes per evaluation, of each task where the data come with tasks, ≥ 0; 0 never evaluates.
        eval_errors: what an evaluation that raises an error does: "stop" ends the run, whose checkpoint of that update
            is kept; "skip" goes on, with a row in ``evals.csv`` that has the error and no numbers.
        save_every: updates between checkpoints, ≥ 0; 0 writes one at the end only. None writes one before every
            evaluation, so that one that fails costs no update. Otherwise evaluations write none, unless they are the
            best so far.
        keep: which checkpoints stay: "best" (the newest and the best), "last" (the newest alone), "all", "every:N"
            (multiples of N updates, the newest and the best), or a number: the newest so many and the best.
        select: how a checkpoint is chosen without an environment, once training has ended: "none"; "fqe", by fitted Q
            evaluation of every checkpoint; "loss", of methods that read no rewards, by the error to the actions of
            held-out episodes. A tenth of the episodes is held out of training for it where there are 50 or more
            (``data.holdout`` says another share). Until then all checkpoints stay.
        select_updates: of fitted Q evaluation, ≥ 5; None for as many as pass rewards back over three horizons.
        final: what the checkpoint of the last update holds: "whole", from which training can go on to more updates, or
            "weights_only", without the state of the optimisers, from which it cannot.
        async_save: whether a checkpoint is copied in memory and written by a thread while training goes on: true,
            false, or "auto", which does so from 64 MB on where the copy fits. The next one waits for it, and so does
            the end of the run. The file is the same.
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
    eval_every: int | None = None
    eval_episodes: int = 10
    eval_errors: str = "stop"
    save_every: int | None = None
    keep: int | str = 2
    select: str = "none"
    select_updates: int | None = None
    final: str = "whole"
    async_save: bool | str = "auto"
    log_every: int = 500
    threads: int | None = None
    matmul: str = "auto"
    compile: bool | str = False
    graph: bool | str = "auto"
    allow_other_data: bool = False

    def __post_init__(self) -> None:
        whole_fields(self, "run")
        for name, low in LEAST.items():
            if getattr(self, name) is not None:
                check_range(f"run.{name}", getattr(self, name), low)
        Keeping.of(self.keep)
        check_choice("run.final", self.final, FINAL)
        check_choice("run.select", self.select, SELECT)
        if self.eval_errors not in ("stop", "skip"):
            raise UsageError(f"`run.eval_errors` is {self.eval_errors!r}; expected 'stop' or 'skip'.")
        if self.matmul not in ("auto", "mkl", "onednn", "bf16"):
            raise UsageError(f"`run.matmul` is {self.matmul!r}; expected 'auto', 'mkl', 'onednn' or 'bf16'.")
        self.graph = {"true": True, "false": False}.get(self.graph, self.graph)  # type: ignore[arg-type]
        if not (isinstance(self.graph, bool) or self.graph in ("auto", "dry")):
            raise UsageError(f"`run.graph` is {self.graph!r}; expected 'auto', true, false or 'dry'.")
        self.async_save = {"true": True, "false": False}.get(self.async_save, self.async_save)  # type: ignore[arg-type]
        if not (isinstance(self.async_save, bool) or self.async_save == "auto"):
            raise UsageError(f"`run.async_save` is {self.async_save!r}; expected 'auto', true or false.")
        self.compile = {"true": True, "false": False}.get(self.compile, self.compile)  # type: ignore[arg-type]
        if not (isinstance(self.compile, bool) or self.compile == "update"):
            raise UsageError(f"`run.compile` is {self.compile!r}; expected true, false or 'update'.")
