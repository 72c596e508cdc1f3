"""A generator of trajectories that needs no training, with the interface of trajectory diffusion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from toy import fit, toy_replay

from offpolicy.api import load_data
from offpolicy.data import sampling
from offpolicy.data.module import DataModule
from offpolicy.data.renewal import SyntheticOptions
from offpolicy.data.replay import Replay
from offpolicy.diffusion.sampler import GuidanceOptions, SamplerOptions
from offpolicy.training.offline import Metrics, OfflineModule, Rate, Sizes
from offpolicy.trust import trust_always

trust_always("toy_generator")  # runs of it are opened by the name of its class
HORIZON = 6
POOL = {"trajectories": 20, "batch_size": 8, "every": 40}


class ToyGenerator(OfflineModule):
    """Trajectory k is noise of k; guidance adds ``coefficient`` times the score of the policy once."""

    calls: list[tuple[int, int]]  # (first, count) of every call

    def __init__(self, *, batch_size: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.calls = []

    def build(self, sizes: Sizes) -> None:
        self.scale = nn.Linear(1, 1)

    def learning_rates(self) -> dict[str, Rate]:
        return {"scale": 1e-3}

    def update(self, batch: Any, step: int) -> Metrics:
        loss = self.scale(batch.reward[:, None]).square().mean()
        self.step("scale", loss)
        return {"loss": loss.detach()}

    def policy(self, obs: Tensor) -> Tensor:
        return obs.new_zeros(*obs.shape[:-1], self.sizes.action_dim)

    def generate(
        self,
        count: int,
        *,
        first: int = 0,
        seed: int = 0,
        horizon: int | None = None,
        policy: OfflineModule | None = None,
        sampler: SamplerOptions | None = None,
        guidance: GuidanceOptions | None = None,
        batch_size: int = 1024,
        bf16: bool = False,
        compile: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, Tensor]:
        self.calls.append((first, count))
        rows, steps = torch.arange(first, first + count), horizon or HORIZON

        def noise(name: str, *shape: int) -> Tensor:
            return sampling.normals(sampling.keys(seed, name, torch.zeros(1, dtype=torch.int64)), rows, shape)[0]

        obs, raw = noise("obs", steps, self.sizes.obs_dim), noise("action", steps, self.sizes.action_dim)
        if policy is not None and guidance is not None and guidance.coefficient:
            with torch.enable_grad():
                raw.requires_grad_()
                logp = policy.log_prob(obs.to(self.device), raw.tanh().to(self.device))
                (gradient,) = torch.autograd.grad(logp.sum(), raw)
            raw = raw.detach() + guidance.coefficient * gradient
        if progress is not None:
            progress(count)
        ended = (sampling.mix(rows) % 4 == 0)[:, None] & (torch.arange(steps) == steps // 2)
        return {"obs": obs, "action": raw.tanh(), "reward": noise("reward", steps), "terminated": ended}


def toy_model(folder: Path, replay: Replay | None = None) -> Path:
    """The run folder of a toy generator for the toy data (or others)."""
    module = ToyGenerator()
    module.seed = 0
    module.run.eval_episodes = 0
    fit(module, toy_replay() if replay is None else replay, 2, folder)
    return folder


def pool(model: Path, source: str = "policy-guided", **options: Any) -> DataModule:
    """The toy data with three pieces of trajectories, drawn anew every 40 updates."""
    return load_data(toy_replay(), source=source, synthetic=SyntheticOptions(str(model), **(POOL | options)))


def versions(folder: Path) -> list[str]:
    """The versions of the pool that lie in the folder of a run."""
    return sorted(path.name.partition("-")[0] for path in (folder / "replay").iterdir())
