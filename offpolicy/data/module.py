"""The data side of a Lightning fit: an open replay, and a loader that yields ticks because batches are drawn on the
device by the method."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from offpolicy.data.collection import Collection
from offpolicy.data.online import NOTHING, OnlineOptions
from offpolicy.data.renewal import RENEWED, SOURCES, Renewal, Renewer, SyntheticOptions
from offpolicy.data.replay import Replay
from offpolicy.data.ring import Ring
from offpolicy.data.seed_collections import SeedCollections
from offpolicy.errors import DataError, UsageError, check_range, known_as, nearest
from offpolicy.given import whole
from offpolicy.moved import names_of

NONE_DRAWN = SyntheticOptions()
HELD_OUT, FEW = 0.1, 50  # share of the episodes where it is asked for without a number; of fewer than so many none


class Ticks(IterableDataset[int]):
    """Endless zeros: one tick is one block of updates."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


class DataModule(LightningDataModule):
    """A replay for the Trainer.

    Args:
        name: a known data set ("pendulum-stitch-v0", "hopper-medium-v2", a Minari id, an OGBench name) or a file or
            folder (.hdf5, .npz, a folder written by ``convert``).
        download: fetch a known set that is not on disk.
        on_bad: "error" stops at faulty content; "drop_episode" drops and counts the episodes that have it.
        clip_actions: clip actions outside the bounds instead of stopping.
        timeout_step: what to do with the last step before a time limit when its successor is unknown: "drop", "keep"
            or "self"; None takes what published numbers of the source use ("drop" for D4RL).
        sha256: expected hash of the file; None accepts what the first load recorded.
        env_id: gymnasium environment to evaluate in, for files that do not name one ("Pendulum-v1").
        env_kwargs: its arguments.
        obs_keys: parts of a dict observation that ``obs`` consists of, in order.
        max_episode_steps: its step limit; in files without end marks, longer episodes are cut there.
        extra_columns: columns of HDF5 files and Minari data that are not read unless named, such as [infos/weight].
        holdout: share of the episodes, chosen by a hash, that no update sees, in [0, 1), for ``run.select``; None is
            0.1, and 0 of fewer than 50 episodes.
        source: "real" trains on the data alone; "policy-guided" mostly on trajectories of a diffusion model, drawn anew
            under the policy's guidance as it improves; "unguided" mostly on trajectories drawn once without a policy;
            "model-rollouts" mostly on short roll-outs of the policy in a world model, drawn anew as it improves.
        synthetic: of the sources other than "real": the model, and how it is used.
        online: data collected in training. With ``name`` the id of ``online.env`` there are no other data.

    For data that change during training set ``change_every`` (updates) and override :meth:`on_block_start`. Where
    ``source`` asks for drawn data, ``renewer`` is what draws them; :func:`offpolicy.load_data` and
    :func:`offpolicy.fit` set it.
    """

    change_every: int = 0
    change_from: int = 0  # the update from which multiples are counted
    online: OnlineOptions = NOTHING
    collection: Collection | SeedCollections | None = None  # made once the data are open, if anything is collected
    seed: int = 0  # of what is collected; a method sets it to its own
    seeds: tuple[int, ...] = ()  # the same of several, each of which collects by itself
    holdout: float | None = 0.0
    whole: Replay | None = None  # with the episodes that are held out
    held_out: Replay | None = None  # those alone

    def __init__(
        self,
        name: str = "pendulum-stitch-v0",
        *,
        download: bool = True,
        on_bad: str = "error",
        clip_actions: bool = False,
        timeout_step: str | None = None,
        sha256: str | None = None,
        env_id: str | None = None,
        env_kwargs: dict[str, Any] | None = None,
        obs_keys: list[str] | None = None,
        max_episode_steps: int | None = None,
        extra_columns: list[str] | None = None,
        holdout: float | None = 0.0,
        source: str = "real",
        synthetic: SyntheticOptions = NONE_DRAWN,
        online: OnlineOptions = NOTHING,
    ) -> None:
        super().__init__()
        source = known_as(source, SOURCES) or source
        if source not in SOURCES:
            guess = nearest(source, SOURCES)
            raise UsageError(f"`data.source` is {source!r}; expected one of {', '.join(SOURCES)}.{guess}")
        if source != "real" and online.env_steps:
            raise UsageError(
                f"`data.source` is {source!r}, and `data.online.env_steps` {online.env_steps:,}; expected synthetic or "
                "collected data, not both. Leave one out."
            )
        self.name, self.source, self.online = name, source, online
        self.synthetic = synthetic.of_source(source)
        if holdout is not None:
            check_range("data.holdout", holdout, 0.0, 1.0, upper_open=True)
        self.holdout = holdout
        if holdout and online.env_steps:
            raise UsageError(
                f"`data.holdout` is {holdout}, and `data.online.env_steps` {online.env_steps:,}; expected one of them, "
                "as nothing is held out of data that are collected. Leave one out."
            )
        max_episode_steps = None if max_episode_steps is None else whole("max_episode_steps", max_episode_steps, 1)
        self.options: dict[str, Any] = {
            "download": download,
            "on_bad": on_bad,
            "clip_actions": clip_actions,
            "timeout_step": timeout_step,
            "sha256": sha256,
            "env_id": env_id,
            "env_kwargs": env_kwargs,
            "obs_keys": obs_keys,
            "max_episode_steps": max_episode_steps,
            "extra_columns": extra_columns,
        }
        self.replay: Replay | None = None
        self.renewer: Renewer | None = None
        self.renewal: Renewal | None = None  # made by the renewer once the real data are open
        self._saved_version = 0
        if source != "real":
            self.change_every = self.synthetic.every if source in RENEWED else sys.maxsize
        if online.env_steps:
            self.change_every = online.round_steps * online.utd

    @classmethod
    def of(cls, replay: Replay) -> DataModule:
        """A data module around a replay at hand."""
        module = cls(str(replay.meta.get("name", "arrays")))
        module.replay = replay
        return module

    def __repr__(self) -> str:
        """The data report, once the data are open."""
        if self.replay is None:
            return f"<{type(self).__name__} of {self.name}, not open yet>"
        if not {"obs", "action", "terminated"} <= self.replay.steps.keys():
            return repr(self.replay)
        from offpolicy.data.report import report

        return str(report(self.replay))

    __str__ = __repr__

    def settings(self) -> dict[str, Any]:
        """The arguments this was made with, as plain values."""
        drawn = {} if self.source == "real" else {"source": self.source, "synthetic": asdict(self.synthetic)}
        online = {"online": asdict(self.online)} if self.online.env_steps else {}
        kept = {} if self.holdout == 0.0 else {"holdout": self.holdout}
        return {"name": self.name, **self.options, **kept, **drawn, **online}

    def load(self) -> Replay:
        """Open the data if they are not open yet; downloads, makes, collects, validates."""
        if self.collection is None and self.online.env_steps:
            self.replay = self._collecting(self._before()).first()
        if self.replay is None:
            from offpolicy.data.sources import open_source

            self.replay = open_source(str(self.name), **self.options)
        if self.holdout != 0.0 and self.held_out is None:
            self._hold_out(self.replay)
        if self.source != "real" and self.renewal is None and self.renewer is not None:
            self.renewal = self.renewer(self.replay, self.source, self.synthetic)
        return self.replay

    def _before(self) -> Replay | None:
        """The data that are there before any are collected."""
        if self.replay is None and self.name != self.online.env:
            from offpolicy.data.sources import open_source

            return open_source(str(self.name), **self.options)
        return self.replay

    def _collecting(self, offline: Replay | None) -> Collection | SeedCollections:
        """What collects, beside or after these data."""
        kwargs = {name: self.options[name] for name in ("max_episode_steps", "obs_keys")}

        def of_seed(seed: int) -> Collection:
            return Collection(self.online, offline, seed, **kwargs)

        self.collection = SeedCollections(of_seed, self.seeds) if self.seeds else of_seed(self.seed)
        return self.collection

    def planned_updates(self) -> int | None:
        """Updates of a run that ends when everything has been collected; None where nothing is."""
        self.load()
        return None if self.collection is None else self.collection.updates

    def begin_at(self, updates: int, saved: Mapping[str, Any] | None, seed: int, seeds: tuple[int, ...] = ()) -> None:
        """Say where a run goes on: an offline one begins to collect there, one that collects keeps its beginning.

        Args:
            updates: made before.
            saved: :meth:`state_dict` of the checkpoint, if there is one.
            seed: of the run.
            seeds: of a run of several.
        """
        if not self.online.env_steps:
            return
        self.load()
        assert self.collection is not None
        if seeds != self.collection.seeds:  # said only now
            self.seeds = seeds
            self._collecting(self.collection.offline).first()
        self.seed, self.replay = seed, self.collection.begin_at(updates, saved, seed)
        self.change_from = self.collection.switch

    def _hold_out(self, whole: Replay) -> None:
        """Keep some episodes from training; what remains says so in its facts."""
        if self.holdout is None:
            self.holdout = HELD_OUT if whole.num_episodes >= FEW else 0.0
        if self.holdout:
            self.whole = whole
            self.replay, self.held_out = whole.split(self.holdout)
            self.replay.meta = whole.meta | {"held_out": {"share": self.holdout, "of": whole.fingerprint()}}

    def prepare_data(self) -> None:
        self.load()  # on one process first, so that only one downloads

    def setup(self, stage: str) -> None:
        self.load()
        if self.collection is not None and self.collection.rounds:  # as an earlier fit may have left it
            self.replay = self.collection.first()
        if self.renewal is not None:  # an earlier fit may have left its own
            self.replay, self.renewal.replay = self.renewal.real, None
        elif self.source != "real":
            raise UsageError(
                f"`data.source` is {self.source!r}, but the data module has no `renewer`, which draws such data; "
                f"expected one. Make it with offpolicy.load_data(..., source={self.source!r}), or train with "
                "offpolicy.fit."
            )

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(Ticks(), batch_size=None)

    def on_block_start(self, policy: Any) -> None:
        """Change the replay: append whole episodes to a :class:`Ring`, or put another replay into ``self.replay``.

        Called on every process before the updates after each multiple of ``change_every`` (0 included), so all
        processes must make the same change; a pure function of ``policy.global_step`` and the weights does. A new
        replay must have another ``version`` than the one it replaces.

        Args:
            policy: the method being trained; ``policy.act(obs)`` is its current behaviour.
        """
        if self.renewal is not None:
            self.replay = self.renewal.renew(policy, self._versions_folder())
        if self.collection is not None:
            folder = policy.trainer.strategy.broadcast(str(self._versions_folder()))
            self.replay = self.collection.collect(policy, Path(folder))

    # -- what a checkpoint knows of data that change -------------------------------------------------------------------

    def _versions_folder(self) -> Path:
        return Path(self.trainer.default_root_dir if self.trainer is not None else ".") / "replay"

    def _version_folder(self, state: Mapping[str, Any]) -> Path:
        return self._versions_folder() / f"v{state['version']}-{state['fingerprint'][:12]}"

    def state_dict(self) -> dict[str, Any]:
        """Version and fingerprint; the data of a changed replay are written beside the checkpoint first."""
        replay = self.load()
        if self.collection is not None:  # its rounds lie on disk
            return self.collection.state()
        if self.renewal is not None and self.renewal.replay is not None:
            replay = self.renewal.replay  # the real data do not change
        drawn = {} if self.source == "real" else {"source": self.source}
        if replay.version == 0 and self._saved_version == 0:
            return {"version": 0, **drawn}
        state = {"version": replay.version, "fingerprint": replay.fingerprint(), **drawn}
        if isinstance(replay, Ring):
            state["head"] = replay.head
        self._keep(replay, self._version_folder(state))
        self._saved_version = replay.version
        return state

    def _keep(self, replay: Replay, newest: Path) -> None:
        """Write a version unless it is there, marked by the checkpoint that needs it; remove versions of none.

        Those that no checkpoint of the run folder needs any more, and only where no other checkpoints are written.
        """
        if self.trainer is not None and not self.trainer.is_global_zero:
            return
        if not newest.exists():
            replay.save(newest)
        if self.trainer is None:
            return
        (newest / f"step={self.trainer.global_step:08d}").touch()
        if not all(getattr(one, "in_run_folder", False) for one in self.trainer.checkpoint_callbacks):
            return
        checkpoints = newest.parent.parent / "checkpoints"
        for folder in newest.parent.glob("v*-*"):
            steps = [mark.name for mark in folder.glob("step=*")]
            if folder != newest and steps and not any(any(checkpoints.glob(f"{step}.ckpt*")) for step in steps):
                shutil.rmtree(folder, ignore_errors=True)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        version, source = state_dict["version"], state_dict.get("source", "real")
        if source != self.source:
            raise UsageError(
                f"the checkpoint was trained with `data.source` {source!r}, which is {self.source!r} now; expected the "
                f"same. Pass --data.source {source} and its options, or start a fresh run."
            )
        if "online" in state_dict or "of_seeds" in state_dict:
            self._take_rounds(state_dict)
            return
        if version == 0:
            return
        replay = self._stored(state_dict)
        if self.renewal is not None:
            self.replay, self._saved_version = self.renewal.take(replay), version
            return
        self.replay = Ring.reopen(replay, state_dict["head"]) if "head" in state_dict else replay
        self.replay.version = self._saved_version = version

    def _take_rounds(self, state: Mapping[str, Any]) -> None:
        self.load()
        if self.collection is None:
            raise UsageError(
                "the checkpoint was trained on data that it collected, and `data.online.env_steps` is 0; expected the "
                "options that it was collected with. Pass --data.online.env_steps N, or start a fresh run."
            )
        before = getattr(self.trainer, "ckpt_path", None)
        folders = [self._versions_folder(), *([] if before is None else [Path(before).parent.parent / "replay"])]
        self.replay = self.collection.restore(state, folders)
        self.change_from = self.collection.switch

    def _stored(self, state: Mapping[str, Any]) -> Replay:
        """The replay that lies on disk beside a checkpoint."""
        folder, version = self._version_folder(state), state["version"]
        before = getattr(self.trainer, "ckpt_path", None)
        if not folder.exists() and before is not None:  # an older checkpoint goes on in a new folder
            beside = Path(before).parent.parent / "replay" / folder.name
            folder = beside if beside.exists() else folder
        if not folder.exists():
            raise DataError(
                f"the checkpoint was trained on version {version} of a changing replay, expected in {folder}, which "
                "does not exist. Resume in the folder of the run, or start a fresh one."
            )
        replay = Replay.load(folder, mmap=self.load().is_mapped)
        if replay.fingerprint() != state["fingerprint"]:
            raise DataError(f"{folder} is not the replay of the checkpoint (fingerprints differ). Restore that folder.")
        replay.version = version
        return replay


__getattr__ = names_of("offpolicy.data.module")  # the names that stood here in version 0.1
