"""A pool of synthetic trajectories that training draws anew as its policy improves."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from offpolicy.compute.processes import wait_for_all
from offpolicy.data.mixing import mixed
from offpolicy.data.renewal import SyntheticOptions
from offpolicy.data.replay import Replay
from offpolicy.diffusion.drawing import Progress, TrajectoryPlan, draw_trajectories, holds, opened_replay
from offpolicy.diffusion.measures import regeneration_metrics
from offpolicy.diffusion.opening import check_guides, check_same_data, has_law, open_model
from offpolicy.diffusion.sampler import GuidanceOptions, SamplerOptions


class Pool:
    """Synthetic trajectories that a method trains on beside the real data, in versions.

    Version 1 is drawn without guidance. With the source "policy-guided" version v takes its place at update
    (v - 1)·``every`` and is guided by the policy of that moment. Each takes the next trajectories of one stream.

    Args:
        real: the data.
        source: "policy-guided" or "unguided".
        options: model and numbers.

    Raises:
        UsageError: no model, one that generates nothing, or one of other data.
    """

    def __init__(self, real: Replay, source: str, options: SyntheticOptions) -> None:
        self.real, self.source = real, source
        self.options = options.of_source(source)
        self.model = open_model(options.model)
        self.replay: Replay | None = None  # the synthetic episodes of now
        check_same_data(self.model, real, options.model, "diffusion model", "TrajectoryDiffusion")

    def facts(self, updates: int) -> list[tuple[str, str]]:
        """Lines of the first screen of a run with this many updates in all."""
        o = self.options
        steps = o.horizon or getattr(self.model.view, "horizon", None)  # a generator may have no length of its own
        where = f"{100 * o.share:.4g} % of the rows of a batch"
        when = "drawn once, without guidance"
        if self.source == "policy-guided":
            never = ", which this run does not reach" if o.every >= updates else ""
            when += f"; again every {o.every:,} updates{never}, guided by the policy (coefficient {o.guidance:g})"
        return [
            ("synthetic", f"{o.trajectories:,} trajectories" + (f" of {steps} steps, " if steps else ", ") + where),
            ("", when),
            ("", f"by {o.model} in {o.sampling_steps} sampling steps"),
        ]

    def renew(self, policy: Any, folder: Path) -> Replay:
        """Draw the version that is due into a folder of versions; returns what is trained on, with the real data."""
        trainer = policy.trainer
        folder = Path(trainer.strategy.broadcast(str(folder)))
        version = policy.global_step // self.options.every + 1 if self.source == "policy-guided" else 1
        if version == 1 and self.source == "policy-guided":
            check_guides(policy)
        with as_alone(policy):
            self.model.to(policy.device)
            guide, plan = policy if version > 1 else None, self.plan(policy, version)
            key = plan.key(self.model, guide)
            done = [one for one in folder.glob(f"v{version}-*") if holds(one, key)]  # by a run that was killed then
            out = done[0] if done else folder / f"v{version}"
            found = draw_trajectories(
                self.model, out, plan, policy=guide, fresh=True, progress=on_bar(trainer, plan.trajectories)
            )
        named = folder / f"v{version}-{found.fingerprint()[:12]}"
        wait_for_all()  # until all have opened it under the name it loses
        if trainer.is_global_zero:
            if out != named:
                shutil.rmtree(named, ignore_errors=True)
                out.rename(named)
            for one in folder.glob("v*-*"):  # without a mark no checkpoint needs it; later ones may come up again
                if int(one.name[1:].split("-")[0]) <= version and one != named and not any(one.glob("step=*")):
                    shutil.rmtree(one, ignore_errors=True)
        wait_for_all()
        found = opened_replay(named)
        found.version = version
        before, self.replay = self.replay, found
        policy.meter.add(self.news(before, policy))
        return mixed(self.real, found, self.options.share)

    def take(self, replay: Replay) -> Replay:
        """Go on with a version from disk; returns what is trained on."""
        self.replay = replay
        return mixed(self.real, replay, self.options.share)

    def plan(self, policy: Any, version: int) -> TrajectoryPlan:
        o = self.options
        return TrajectoryPlan(
            trajectories=o.trajectories,
            first=(version - 1) * o.trajectories,
            seed=policy.seed if o.seed is None else o.seed,
            horizon=o.horizon,
            batch_size=o.batch_size,
            guidance=GuidanceOptions(coefficient=o.guidance if version > 1 else 0.0, cosine=o.cosine),
            sampler=SamplerOptions(steps=o.sampling_steps),
            bf16=policy.trainer.precision.startswith("bf16"),
            compile=policy.run.compile,
        )

    def news(self, before: Replay | None, policy: Any) -> dict[str, torch.Tensor]:
        """Numbers about the new version, for the next row of metrics."""
        assert self.replay is not None
        found = {"synthetic/version": float(self.replay.version), "synthetic/steps": float(self.replay.num_steps)}
        with as_alone(policy):
            found |= regeneration_metrics(before, self.replay, policy if has_law(policy) else None, self.real)
        return {name: torch.tensor(value, device=policy.device) for name, value in found.items()}


@contextlib.contextmanager
def as_alone(policy: Any) -> Iterator[None]:
    """As outside of a Trainer: no autocast, float32 by default, and the policy without dropout."""
    training, kind = policy.training, torch.get_default_dtype()
    policy.eval()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(policy.device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(kind)
        policy.train(training)


def on_bar(trainer: Any, total: int) -> Progress | None:
    """What says on the bar of the run how far drawing is."""
    say = getattr(trainer.progress_bar_callback, "say", None)
    return None if say is None else lambda done: say(f"{min(done, total):,} of {total:,} trajectories drawn")
