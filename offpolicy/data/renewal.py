"""Data that are replaced during training: what a data module asks of whoever replaces them, and the options for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from offpolicy.data.replay import Replay
from offpolicy.errors import check_range
from offpolicy.given import whole_fields

SOURCES = ("real", "policy-guided", "unguided")  # what a control method may train on


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


class Renewal(Protocol):
    """Data in versions, each drawn when it is due and mixed with the real data.

    Attributes:
        real: the data as they were opened, which do not change.
        replay: the drawn part of the version of now; None before the first.
    """

    real: Replay
    replay: Replay | None

    def facts(self, updates: int) -> list[tuple[str, str]]:
        """Lines of the first screen of a run with this many updates in all: a name and a text each."""

    def renew(self, policy: Any, folder: Path) -> Replay:
        """Draw the version that is due into a folder of versions; returns what is trained on."""

    def take(self, replay: Replay) -> Replay:
        """Go on with a drawn part that lies on disk; returns what is trained on."""


Renewer = Callable[[Replay, str, SyntheticOptions], Renewal]  # from the real data, the source and its options
