"""Data that are replaced during training: what a data module asks of whoever replaces them, and the options for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from offpolicy.data.replay import Replay
from offpolicy.errors import UsageError, check_range
from offpolicy.given import whole_fields

ROLLOUTS = "model-rollouts"
SOURCES = ("real", "policy-guided", "unguided", ROLLOUTS)  # what a control method may train on
RENEWED = ("policy-guided", ROLLOUTS)  # those that are drawn again as the policy improves
NUMBERS = {"trajectories": 2048, "every": 10_000, "share": 0.9375, "batch_size": 256}  # of a diffusion model
ROLLOUT_NUMBERS = {"trajectories": 50_000, "every": 1000, "share": 0.95, "batch_size": 8192} | {
    "steps": 5,
    "keep": 5,
    "penalty": 0.0,
}
DIFFUSION_ALONE = ("guidance", "cosine", "horizon", "sampling_steps")


@dataclass(frozen=True)
class SyntheticOptions:
    """Trajectories of a model that control methods train on (``--data.synthetic.*``).

    Where the default is None, it is a number of the source. Those of "model-rollouts" are RAVL's (arXiv:2402.12527).

    Args:
        model: run folder or checkpoint of a trained model: a trajectory diffusion model, or for "model-rollouts" a
            world model.
        guidance: κ ≥ 0, how far actions are pulled to the policy in a sampling step; fewer steps want a larger one.
        cosine: weight ≥ 0 of a bump of guidance in the middle of sampling.
        trajectories: drawn for each version, ≥ 1; None for 2,048, of roll-outs 50,000.
        horizon: steps of each, ≥ 2, one more than its transitions; None for that of the model's training.
        every: updates after which trajectories are drawn anew under the policy of then, ≥ 1; None for 10,000 (published
            of a million), of roll-outs 1,000.
        share: probability that a row of a batch is synthetic, in (0, 1]; None for 0.9375 (published 240 of 256), of
            roll-outs 0.95.
        sampling_steps: noise levels of the sampler, ≥ 2; the published 256 take eight times as long as 32 and are more
            exact (dynamics error on the point maze 0.07 instead of 0.11).
        batch_size: trajectories drawn at once, ≥ 1; None for 256, of roll-outs 8,192. Other values change last bits.
        seed: of the trajectories; None for that of the run.
        steps: k, transitions of a roll-out that does not end before, ≥ 1; None for 5.
        keep: versions of roll-outs that are trained on, the newest ones, ≥ 1; None for 5.
        penalty: λ ≥ 0, taken off the reward of a roll-out's step times the model's uncertainty there, the largest norm
            among members of their standard deviations (MOPO, arXiv:2005.13239); None for 0.
    """

    model: str | None = None
    guidance: float = 1.0
    cosine: float = 0.3
    trajectories: int = None  # type: ignore[assignment]
    horizon: int | None = None
    every: int = None  # type: ignore[assignment]
    share: float = None  # type: ignore[assignment]
    sampling_steps: int = 32
    batch_size: int = None  # type: ignore[assignment]
    seed: int | None = None
    steps: int = None  # type: ignore[assignment]
    keep: int = None  # type: ignore[assignment]
    penalty: float = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        whole_fields(self, "data.synthetic")
        lows = {"guidance": 0, "cosine": 0, "trajectories": 1, "horizon": 2, "every": 1, "sampling_steps": 2}
        for name, low in {**lows, "batch_size": 1, "steps": 1, "keep": 1, "penalty": 0}.items():
            if getattr(self, name) is not None:
                check_range(f"data.synthetic.{name}", getattr(self, name), low)
        if self.share is not None:
            check_range("data.synthetic.share", self.share, 0.0, 1.0, lower_open=True)

    def of_source(self, source: str) -> SyntheticOptions:
        """These options with the numbers of a source where none are given.

        Raises:
            UsageError: one is given that the source does not know.
        """
        usual = SyntheticOptions()
        if source == "real":
            for one in fields(self):
                if getattr(self, one.name) != getattr(usual, one.name):
                    raise UsageError(
                        f"`data.synthetic.{one.name}` is {getattr(self, one.name)}, but `data.source` is 'real'; "
                        "expected 'policy-guided' or 'unguided', or 'model-rollouts' with a world model. Add "
                        "--data.source policy-guided, or leave it out."
                    )
            return self
        numbers: dict[str, Any] = ROLLOUT_NUMBERS if source == ROLLOUTS else NUMBERS
        for name in DIFFUSION_ALONE if source == ROLLOUTS else ROLLOUT_NUMBERS.keys() - NUMBERS.keys():
            if getattr(self, name) != getattr(usual, name):
                other = "'policy-guided' or 'unguided'" if source == ROLLOUTS else f"'{ROLLOUTS}'"
                raise UsageError(
                    f"`data.synthetic.{name}` is {getattr(self, name)}, and `data.source` is {source!r}; expected it "
                    f"with {other} alone. Leave one of the two out."
                )
        return replace(self, **{name: value for name, value in numbers.items() if getattr(self, name) is None})


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
