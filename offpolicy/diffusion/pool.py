"""Trajectories of a diffusion model as data: a replay on disk, or a pool that is drawn anew as a policy improves.

Trajectory k of a stream is a pure function of model, policy and options, so they are drawn in pieces of
``batch_size``: every finished piece is a replay folder under ``<out>.parts``, an interrupted call goes on with the
missing ones, and several processes share them. When all are there they become one replay.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from offpolicy.data.guard import read_json
from offpolicy.data.mixing import joined, mixed
from offpolicy.data.renewal import SyntheticOptions
from offpolicy.data.replay import Replay
from offpolicy.data.sizes import Sizes
from offpolicy.diffusion.measures import regeneration_metrics
from offpolicy.diffusion.sampler import GuidanceOptions, SamplerOptions, to_replay
from offpolicy.errors import UsageError, check_range
from offpolicy.files import atomic_write
from offpolicy.training.offline import OfflineModule
from offpolicy.training.opening import load
from offpolicy.trust import Trust, trusting

IN_MEMORY = 1 << 30  # bytes: larger replays are put together and opened as memory maps
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Plan:
    """Which trajectories are drawn, and how: with the weights, all that they depend on.

    Args:
        trajectories: how many, ≥ 1.
        first: number of the first in the stream, ≥ 0.
        seed: of the stream.
        horizon: steps of each, ≥ 2; None for that of the model's training.
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


def draw(
    model: OfflineModule,
    out: Path,
    plan: Plan,
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
    rank, world = _place()
    parts, key = out.with_name(out.name + ".parts"), plan.key(model, policy)
    if rank == 0 and not _holds(out, key):
        _claim(parts, key, plan, fresh)
    _wait()
    if not _holds(out, key):
        folders = [parts / f"{k:06d}" for k in range(plan.pieces)]
        for k, folder in enumerate(folders):
            if k % world == rank and not folder.exists():
                first, count = plan.piece(k)
                done = plan.batch_size * sum(one.exists() for one in folders)
                _draw_piece(model, plan, first, count, policy, _after(progress, done)).save(folder)
        _wait()
        if rank == 0:
            _join(folders, {"key": key, **asdict(plan)}).save(out)
            shutil.rmtree(parts, ignore_errors=True)
        _wait()
    if progress is not None:
        progress(plan.trajectories)
    return opened(out)


def _draw_piece(
    model: OfflineModule,
    plan: Plan,
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


def _claim(parts: Path, key: str, plan: Plan, fresh: bool) -> None:
    """Make the folder of pieces, or make sure that those in it belong to this plan."""
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


def _holds(out: Path, key: str) -> bool:
    """Whether a folder is what the plan with this key makes."""
    file = out / "meta.json"
    if not file.is_file():
        return False
    meta = read_json(file).get("meta")
    drawn = meta.get("drawn") if isinstance(meta, dict) else None
    return isinstance(drawn, dict) and drawn.get("key") == key


def opened(folder: Path) -> Replay:
    """A replay folder: in memory, or mapped where it is large."""
    replay = Replay.load(folder)
    return replay if replay.nbytes > IN_MEMORY else Replay.load(folder, mmap=False)


def _after(progress: Progress | None, done: int) -> Progress | None:
    return None if progress is None else lambda more: progress(done + more)


def _place() -> tuple[int, int]:
    """Rank and number of the processes that work together."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _wait() -> None:
    if _place()[1] > 1:
        torch.distributed.barrier()


# -- a whole call ------------------------------------------------------------------------------------------------------


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
        horizon: steps of each, ≥ 2, one more than its transitions; None for that of the model's training.
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
    plan = Plan(
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
    if target.exists() and not _holds(target, plan.key(model, guide)):
        raise UsageError(f"{target} exists and holds something else; expected a new folder. Choose another.")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    for module in (model, guide):
        if module is not None:
            module.to(device)
    return draw(model, target, plan, policy=guide, progress=progress)


def open_model(model: OfflineModule | str | Path | None) -> OfflineModule:
    """A model that generates trajectories.

    Raises:
        UsageError: none given, no such run, or a run of another kind.
    """
    if model is None:
        raise UsageError(
            "no diffusion model is given; expected the run folder of one. Train it with `python -m offpolicy.fit "
            "--model TrajectoryDiffusion --data NAME` and pass --data.synthetic.model RUN."
        )
    found = open_method(model)
    if not callable(getattr(found, "generate", None)):
        where = f"{model} is a run of " if not isinstance(model, OfflineModule) else "the model is "
        raise UsageError(
            f"{where}{type(found).__name__}, which generates no trajectories; expected one of TrajectoryDiffusion."
        )
    return found


def open_policy(policy: OfflineModule | str | Path, model: OfflineModule) -> OfflineModule:
    """A policy that can guide the model.

    Raises:
        UsageError: it was built for other sizes, or its actions have no probabilities.
    """
    found = open_method(policy)
    if (found.sizes.obs_dim, found.sizes.action_dim) != (model.sizes.obs_dim, model.sizes.action_dim):
        raise UsageError(
            f"the policy takes {_dims(found.sizes)} and the diffusion model makes {_dims(model.sizes)}; expected the "
            "same. Choose runs on the same data."
        )
    check_guides(found)
    return found


def check_guides(policy: OfflineModule) -> None:
    """Raise what a method whose actions have no probabilities answers, before hours of training."""
    sizes, weight = policy.sizes, next(policy.parameters())
    policy.log_prob(weight.new_zeros(1, sizes.obs_dim), weight.new_zeros(1, sizes.action_dim))


def has_law(policy: OfflineModule) -> bool:
    """Whether the actions of a method have probabilities."""
    try:
        check_guides(policy)
    except UsageError:
        return False
    return True


def open_method(run: OfflineModule | str | Path) -> OfflineModule:
    """A method of control: itself, or from its run folder or checkpoint. Raises :class:`UsageError` for others."""
    if isinstance(run, OfflineModule):
        return run
    found = load(run)
    if not isinstance(found, OfflineModule):
        raise UsageError(f"{run} is a run of {type(found).__name__}, a language model; expected a method of control.")
    return found


def _dims(sizes: Sizes) -> str:
    return f"{sizes.obs_dim} numbers of observation and {sizes.action_dim} of action"


# -- during training ---------------------------------------------------------------------------------------------------


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
        self.real, self.source, self.options = real, source, options
        self.model = open_model(options.model)
        self.replay: Replay | None = None  # the synthetic episodes of now
        self._check()

    def _check(self) -> None:
        made, real, model = Sizes.of(self.real), self.real.meta, self.model
        if (made.obs_dim, made.action_dim) != (model.sizes.obs_dim, model.sizes.action_dim):
            raise UsageError(
                f"the diffusion model {self.options.model} makes {_dims(model.sizes)}, but {real.get('name')} has "
                f"{_dims(made)}; expected the same. Train one on these data."
            )
        names = [meta.get("name") for meta in (model.data_meta, real)]
        if names[0] != names[1]:
            raise UsageError(
                f"the diffusion model {self.options.model} was trained on {names[0]}, but the data are {names[1]}; "
                f"expected the same. Train one with `python -m offpolicy.fit --model TrajectoryDiffusion --data "
                f"{real.get('file') or names[1]}`."
            )

    def facts(self, updates: int) -> list[tuple[str, str]]:
        """Lines of the first screen of a run with this many updates in all."""
        o = self.options
        steps, where = o.horizon or self.model.option("horizon", None), f"{100 * o.share:.4g} % of the rows of a batch"
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
        with _as_alone(policy):
            self.model.to(policy.device)
            guide, plan = policy if version > 1 else None, self.plan(policy, version)
            key = plan.key(self.model, guide)
            done = [one for one in folder.glob(f"v{version}-*") if _holds(one, key)]  # by a run that was killed then
            out = done[0] if done else folder / f"v{version}"
            found = draw(self.model, out, plan, policy=guide, fresh=True, progress=_on_bar(trainer, plan.trajectories))
        named = folder / f"v{version}-{found.fingerprint()[:12]}"
        _wait()  # until all have opened it under the name it loses
        if trainer.is_global_zero:
            if out != named:
                shutil.rmtree(named, ignore_errors=True)
                out.rename(named)
            for one in folder.glob("v*-*"):  # without a mark no checkpoint needs it; later ones may come up again
                if int(one.name[1:].split("-")[0]) <= version and one != named and not any(one.glob("step=*")):
                    shutil.rmtree(one, ignore_errors=True)
        _wait()
        found = opened(named)
        found.version = version
        before, self.replay = self.replay, found
        policy.meter.add(self.news(before, policy))
        return mixed(self.real, found, self.options.share)

    def take(self, replay: Replay) -> Replay:
        """Go on with a version from disk; returns what is trained on."""
        self.replay = replay
        return mixed(self.real, replay, self.options.share)

    def plan(self, policy: Any, version: int) -> Plan:
        o = self.options
        return Plan(
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
        with _as_alone(policy):
            found |= regeneration_metrics(before, self.replay, policy if has_law(policy) else None, self.real)
        return {name: torch.tensor(value, device=policy.device) for name, value in found.items()}


@contextlib.contextmanager
def _as_alone(policy: Any) -> Iterator[None]:
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


def _on_bar(trainer: Any, total: int) -> Progress | None:
    """What says on the bar of the run how far drawing is."""
    say = getattr(trainer.progress_bar_callback, "say", None)
    return None if say is None else lambda done: say(f"{min(done, total):,} of {total:,} trajectories drawn")
