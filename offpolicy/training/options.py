"""Options of a run, common to all methods (``--run.*`` on the command line)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from offpolicy.errors import UsageError, check_range
from offpolicy.given import is_whole_type, whole


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
        matmul: float32 products on CPU: "auto", "mkl" or "onednn" (see :mod:`offpolicy.compute.matmul`).
        compile: compile the losses with ``torch.compile``; pays on GPUs, not on CPUs.
        allow_other_data: resume although the data are not those of the checkpoint.
    """

    block: int = 64
    eval_every: int = 5000
    eval_episodes: int = 10
    eval_errors: str = "stop"
    log_every: int = 500
    threads: int | None = None
    matmul: str = "auto"
    compile: bool = False
    allow_other_data: bool = False

    def __post_init__(self) -> None:
        whole_fields(self, "run")
        for name, low in (("block", 1), ("eval_every", 0), ("eval_episodes", 0), ("log_every", 1)):
            check_range(f"run.{name}", getattr(self, name), low)
        if self.threads is not None:
            check_range("run.threads", self.threads, 1)
        if self.eval_errors not in ("stop", "skip"):
            raise UsageError(f"`run.eval_errors` is {self.eval_errors!r}; expected 'stop' or 'skip'.")
        if self.matmul not in ("auto", "mkl", "onednn"):
            raise UsageError(f"`run.matmul` is {self.matmul!r}; expected 'auto', 'mkl' or 'onednn'.")


def whole_fields(options: Any, group: str) -> None:
    """Make the fields for whole numbers ints, in whatever form they were given. Raises :class:`UsageError`."""
    for field in fields(options):
        value = getattr(options, field.name)
        if is_whole_type(field.type) and value is not None:
            object.__setattr__(options, field.name, whole(f"{group}.{field.name}", value))


@dataclass(frozen=True)
class SyntheticOptions:
    """Trajectories of a diffusion model that control methods train on (``--data.synthetic.*``).

    Args:
        model: run folder or checkpoint of a trained trajectory diffusion model.
        guidance: κ ≥ 0, how far actions are pulled to the policy in a sampling step; fewer steps want a larger one.
        cosine: weight ≥ 0 of a bump of guidance in the middle of sampling.
        trajectories: in the pool, ≥ 1.
        horizon: steps of each, ≥ 2, one more than its transitions; None for that of the model's training.
        every: updates after which the pool is drawn anew under the policy of then, ≥ 1; published 10,000 of a million.
        share: probability that a row of a batch is synthetic, in (0, 1]; published 240 of 256.
        sampling_steps: noise levels of the sampler, ≥ 2; the published 256 take eight times as long as 32 and are more
            exact (dynamics error on the point maze 0.07 instead of 0.11).
        batch_size: trajectories drawn at once, ≥ 1; other values change last bits.
        seed: of the trajectories; None for that of the run.
    """

    model: str | None = None
    guidance: float = 1.0
    cosine: float = 0.3
    trajectories: int = 2048
    horizon: int | None = None
    every: int = 10_000
    share: float = 0.9375
    sampling_steps: int = 32
    batch_size: int = 256
    seed: int | None = None

    def __post_init__(self) -> None:
        whole_fields(self, "data.synthetic")
        lows = {"guidance": 0, "cosine": 0, "trajectories": 1, "horizon": 2, "every": 1}
        for name, low in {**lows, "sampling_steps": 2, "batch_size": 1}.items():
            if getattr(self, name) is not None:
                check_range(f"data.synthetic.{name}", getattr(self, name), low)
        check_range("data.synthetic.share", self.share, 0.0, 1.0, lower_open=True)


SOURCES = ("real", "policy-guided", "unguided")  # what a control method may train on
