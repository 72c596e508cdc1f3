"""Trajectories of a diffusion model drawn into a replay on disk.

Trajectory k of a stream is a pure function of model, policy and options, so they are drawn in pieces of
``batch_size``: every finished piece is a replay folder under ``<out>.parts``, an interrupted call goes on with the
missing ones, and several processes share them. When all are there they become one replay.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from offpolicy.compute.processes import rank, wait_for_all, world_size
from offpolicy.data.guard import read_json
from offpolicy.data.mixing import joined
from offpolicy.data.replay import Replay
from offpolicy.diffusion.opening import open_model, open_policy
from offpolicy.diffusion.sampler import GuidanceOptions, SamplerOptions, to_replay
from offpolicy.errors import UsageError, check_range
from offpolicy.files import atomic_write
from offpolicy.training.offline import OfflineModule
from offpolicy.trust import Trust, trusting

IN_MEMORY = 1 << 30  # bytes: larger replays are put together and opened as memory maps
Progress = Callable[[int], None]


@dataclass(frozen=True)
class TrajectoryPlan:
    """Which trajectories are drawn, and how: with the weights, all that they depend on.

    Args:
        trajectories: how many, ≥ 1.
        first: number of the first in the stream, ≥ 0.
        seed: of the stream.
        horizon: steps of each, ≥ 2; None for the horizon of the model's training.
        batch_size: drawn at once, ≥ 1.
        guidance: by the policy; none with coefficient 0.
        sampler: of the noise.
        bf16: products of the network in bfloat16, which GPUs do faster.
        compile: the network with ``torch.compile``; pays on GPUs.
    """

    trajectories: int = 1024
    first: int = 0
    seed: int = 0
    horizon: int | None = None
    batch_size: int = 256
    guidance: GuidanceOptions = field(default_factory=GuidanceOptions)
    sampler: SamplerOptions = field(default_factory=SamplerOptions)
    bf16: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        lows = {"trajectories": 1, "first": 0, "batch_size": 1, "horizon": 2}
        for name, low in lows.items():
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), low, option=name)

    @property
    def pieces(self) -> int:
        return -(-self.trajectories // self.batch_size)

    def piece(self, k: int) -> tuple[int, int]:
        """First trajectory of a piece in the stream, and how many it has."""
        start = k * self.batch_size
        return self.first + start, min(self.batch_size, self.trajectories - start)

    def key(self, model: OfflineModule, policy: OfflineModule | None) -> str:
        """What equal trajectories have in common: a hash over options and weights."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        for module in (model, policy):
            for name, value in sorted(module.state_dict().items()) if module is not None else ():
                digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def draw_trajectories(
    model: OfflineModule,
    out: Path,
    plan: TrajectoryPlan,
    *,
    policy: OfflineModule | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Replay:
    """Draw the trajectories of a plan into a replay folder; processes of one group share the work.

    Args:
        model: generates trajectories.
        out: new folder; pieces lie in ``<out>.parts`` until all are finished.
        plan: what is drawn.
        policy: whose actions are preferred; None for no guidance.
        fresh: throw pieces of another plan away, instead of stopping.
        progress: is told how many trajectories are finished, of all processes together.

    Returns:
        The replay, opened from the folder.

    Raises:
        UsageError: ``<out>.parts`` holds pieces of another plan.  DataError: what was drawn is not finite.
    """
    own, world = rank(), world_size()  # this process and how many share the work
    parts, key = out.with_name(out.name + ".parts"), plan.key(model, policy)
    if own == 0 and not holds(out, key):
        _claim(parts, key, plan, fresh)
    wait_for_all()
    if not holds(out, key):
        folders = [parts / f"{k:06d}" for k in range(plan.pieces)]
        for k, folder in enumerate(folders):
            if k % world == own and not folder.exists():
                first, count = plan.piece(k)
                done = plan.batch_size * sum(one.exists() for one in folders)
                _draw_piece(model, plan, first, count, policy, _after(progress, done)).save(folder)
        wait_for_all()
        if own == 0:
            _join(folders, {"key": key, **asdict(plan)}).save(out)
            shutil.rmtree(parts, ignore_errors=True)
        wait_for_all()
    if progress is not None:
        progress(plan.trajectories)
    return opened_replay(out)


def _draw_piece(
    model: OfflineModule,
    plan: TrajectoryPlan,
    first: int,
    count: int,
    policy: OfflineModule | None,
    progress: Progress | None,
) -> Replay:
    generate: Any = model.generate
    trajectories = generate(
        count,
        first=first,
        seed=plan.seed,
        horizon=plan.horizon,
        policy=policy,
        sampler=plan.sampler,
        guidance=plan.guidance,
        batch_size=plan.batch_size,
        bf16=plan.bf16,
        compile=plan.compile,
        progress=progress,
    )
    return to_replay(trajectories, model.data_meta)


def _join(folders: list[Path], record: dict[str, Any]) -> Replay:
    """All pieces as one replay, on disk beside them where it is large."""
    pieces = [Replay.load(folder) for folder in folders]
    large = sum(piece.nbytes for piece in pieces) > IN_MEMORY
    scratch = folders[0].parent / "joined" if large else None
    return joined(pieces, scratch, meta={**pieces[0].meta, "drawn": record})


def _claim(parts: Path, key: str, plan: TrajectoryPlan, fresh: bool) -> None:
    """Make the folder of pieces, or make sure that the pieces in it belong to this plan."""
    record = parts / "plan.json"
    found = read_json(record) if record.is_file() else None
    if found is not None and found.get("key") != key:
        if not fresh:
            now, before = json.loads(json.dumps(asdict(plan))), dict(found.get("plan") or {})
            changed = [f"{k} {before.get(k)} → {now[k]}" for k in now if before.get(k) != now[k]]
            raise UsageError(
                f"{parts} holds trajectories of another call ({', '.join(changed) or 'other weights'}); expected those "
                "of this one. Repeat that call to finish it, remove the folder, or write somewhere else."
            )
        shutil.rmtree(parts)
    if not record.exists():
        atomic_write(record, json.dumps({"key": key, "plan": asdict(plan)}, indent=1) + "\n")


def holds(out: Path, key: str) -> bool:
    """Whether a folder is what the plan with this key makes."""
    file = out / "meta.json"
    if not file.is_file():
        return False
    meta = read_json(file).get("meta")
    drawn = meta.get("drawn") if isinstance(meta, dict) else None
    return isinstance(drawn, dict) and drawn.get("key") == key


def opened_replay(folder: Path) -> Replay:
    """A replay folder: in memory, or mapped where it is large."""
    replay = Replay.load(folder)
    return replay if replay.nbytes > IN_MEMORY else Replay.load(folder, mmap=False)


def _after(progress: Progress | None, done: int) -> Progress | None:
    return None if progress is None else lambda more: progress(done + more)


def sample(
    model: OfflineModule | str | Path,
    out: str | Path,
    *,
    policy: OfflineModule | str | Path | None = None,
    guidance: float | None = None,
    cosine: float = 0.3,
    trajectories: int = 1024,
    first: int = 0,
    horizon: int | None = None,
    sampling_steps: int = 32,
    seed: int = 0,
    batch_size: int = 256,
    bf16: bool = False,
    compile: bool = False,
    progress: Progress | None = None,
    trust: Trust = None,
) -> Replay:
    """Draw trajectories from a diffusion model into a replay folder, which any control method can train on.

    Args:
        model: a trained trajectory diffusion model, its run folder or a checkpoint.
        out: new folder. A call that was interrupted goes on where it was, with the same result.
        policy: whose actions are preferred: a trained method, run folder or checkpoint; None for none.
        guidance: κ ≥ 0, how far actions are pulled to the policy; 1 with a policy unless given.
        cosine: weight ≥ 0 of a bump of guidance in the middle of sampling.
        trajectories: how many, ≥ 1.
        first: number of the first in the stream of the seed, ≥ 0.
        horizon: steps of each, ≥ 2, one more than its transitions; None for the horizon of the model's training.
        sampling_steps: noise levels, ≥ 2.
        seed: of the stream.
        batch_size: trajectories drawn at once, ≥ 1; other values change last bits.
        bf16: compute the network's products in bfloat16, which GPUs do faster.
        compile: compile the network with ``torch.compile``; pays on GPUs.
        progress: is told how many trajectories are finished.
        trust: packages that the runs may name, as of :func:`offpolicy.load`.

    Returns:
        The replay, opened from the folder.

    Raises:
        UsageError: no such runs, models that do not fit together, or a folder that holds something else.
    """
    strength = (0.0 if policy is None else 1.0) if guidance is None else guidance
    if policy is None and strength:
        raise UsageError(f"`guidance` is {strength} and there is no policy; expected one. Pass --policy RUN.")
    for name, value, low in (("guidance", strength, 0), ("cosine", cosine, 0), ("sampling_steps", sampling_steps, 2)):
        check_range(name, value, low, option=name)
    plan = TrajectoryPlan(
        trajectories=trajectories,
        first=first,
        seed=seed,
        horizon=horizon,
        batch_size=batch_size,
        guidance=GuidanceOptions(coefficient=strength, cosine=cosine),
        sampler=SamplerOptions(steps=sampling_steps),
        bf16=bf16,
        compile=compile,
    )
    with trusting(trust):
        model, target = open_model(model), Path(out)
        guide = None if policy is None else open_policy(policy, model)
    if target.exists() and not holds(target, plan.key(model, guide)):
        raise UsageError(f"{target} exists and holds something else; expected a new folder. Choose another.")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    for module in (model, guide):
        if module is not None:
            module.to(device)
    return draw_trajectories(model, target, plan, policy=guide, progress=progress)
