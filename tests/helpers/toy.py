"""Small data, small settings of every method, and a quiet Trainer, for tests and for the scripts they start."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer

from offpolicy.data.module import DataModule
from offpolicy.data.replay import Replay
from offpolicy.files import Table
from offpolicy.registry import find_method
from offpolicy.training.checkpoint_io import AtomicCheckpointIO
from offpolicy.training.checkpoints import read_checkpoint
from offpolicy.training.goals import GoalModule
from offpolicy.training.offline import OfflineModule
from offpolicy.training.run_folder import RunFolder

# name → (method, small settings). A method joins the tests of blocks, resume, distribution and precision by its line.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "BC": ("BC", {}),
    "BC-half": ("BC", {"top": 0.5, "max_grad_norm": 0.5}),
    "TD3BC": ("TD3BC", {}),
    "IQL": ("IQL", {}),
    "IQL-dropout": ("IQL", {"actor_dropout": 0.3, "update_order": "original", "deterministic": True}),
    "PRDC": ("PRDC", {"state_weight": 0.5, "candidates": 4}),
    "PRDC-cached": ("PRDC", {"state_weight": 0.5, "candidates": 4, "search": "cached", "num_neighbors": 2}),
    "A2PR": ("A2PR", {"actor_hidden_dims": (8, 8), "critic_hidden_dims": (8, 8), "vae_hidden_dims": (8, 8)}),
    "ODICE": ("ODICE", {"value_hidden_dims": (8, 8), "actor_hidden_dims": (8, 8)}),
    "CQL": (
        "CQL",
        {
            "actor_hidden_dims": (8, 8),
            "critic_hidden_dims": (8, 8),
            "second_critic_hidden_dims": (8,),
            "num_actions": 2,
            "lagrange_gap": 0.8,
            "penalty_min": 1.0,
            "max_backup": True,
            "backup_entropy": True,
        },
    ),
    "AWAC": ("AWAC", {}),
    "ReBRAC": ("ReBRAC", {}),
    "SAC": ("SAC", {}),
    "SAC-ensemble": (
        "SAC",
        {
            "num_critics": 4,
            "num_min_critics": 2,
            "layer_norm": True,
            "init": "xavier",
            "actor_q": "mean",
            "policy_freq": 3,
            "update_order": "critic_first",
        },
    ),
    "TD3": ("TD3", {}),
    "EDAC": ("EDAC", {"num_critics": 3, "eta": 0.01}),  # with one action axis a larger eta only adds rounding
    "DecisionTransformer": (
        "DecisionTransformer",
        {"context_length": 4, "embed_dim": 8, "num_layers": 2, "dropout": 0.0, "warmup_steps": 30},
    ),
    "DecisionTransformer-dropout": (
        "DecisionTransformer",
        {"context_length": 4, "embed_dim": 8, "num_layers": 2, "dropout": 0.2},
    ),
    "HIQL": ("HIQL", {"subgoal_steps": 3, "rep_dim": 4, "low_actor_rep_grad": True}),
    "OTA-clipped": (
        "OTA",
        {"batch_size": 16, "hidden_dims": (8, 8), "subgoal_steps": 3, "actor_p_random": 0.3, "max_grad_norm": 0.5},
    ),
    "GCIVL-geometric": ("GCIVL", {"actor_geometric": True}),
    "GCIQL": ("GCIQL", {}),
    "GCBC": ("GCBC", {}),
    "WorldModel": ("WorldModel", {"members": 3, "elites": 2}),
    "FQE": ("FQE", {"num_critics": 2, "holdout": 0.2}),
    "TrajectoryDiffusion": (
        "TrajectoryDiffusion",
        {"horizon": 6, "stride": 2, "num_features": 32, "num_blocks": 2, "ema_every": 3, "lr": 1e-4},
    ),
}
COMMON = {"batch_size": 16, "hidden_dims": (8, 8)}


def toy_replay(lengths: Sequence[int] = (10,) * 30, *, seed: int = 0, obs_dim: int = 3, **meta: Any) -> Replay:
    """Random episodes of these lengths with the spaces of Pendulum-v1 (action bounds ±2), some of them terminated."""
    rng = np.random.default_rng(seed)
    length = np.asarray(lengths, dtype=np.int64)
    start = np.cumsum(length) - length
    n, episodes = int(length.sum()), len(length)
    terminated = np.zeros(n, dtype=bool)
    terminated[(start + length - 1)[rng.random(episodes) < 0.3]] = True
    steps = {
        "obs": rng.normal(1.0, 2.0, (n, obs_dim)).astype(np.float32),
        "action": rng.uniform(-2.0, 2.0, (n, 1)).astype(np.float32),
        "reward": rng.normal(-1.0, 1.0, n).astype(np.float32),
        "terminated": terminated,
    }
    tail = {"obs": rng.normal(1.0, 2.0, (episodes, obs_dim)).astype(np.float32)}
    facts = {
        "name": "toy",
        "env_id": "Pendulum-v1",
        "max_episode_steps": 10,
        "action_low": [-2.0],
        "action_high": [2.0],
    }
    return Replay(steps, start=start, length=length, tail=tail, meta=facts | meta)


def method(name: str, **options: Any) -> OfflineModule:
    """A small method of the list, with seed 0, rows every 20 updates and one short evaluation every 45."""
    kind, settings = METHODS[name]
    cls = find_method(kind)
    common = {key: value for key, value in COMMON.items() if key in inspect.signature(cls).parameters}
    made = cls(**(common | settings | options))
    made.seed = 0
    if isinstance(made, GoalModule):
        made.agent = lambda: plain_agent(made)  # type: ignore[method-assign]
    made.run.log_every, made.run.eval_every, made.run.eval_episodes = 20, 45, 1
    return made


def plain_agent(module: GoalModule) -> Any:
    """An agent for environments without goals: it always goes for the same one."""
    return lambda obs: module.act_goal(obs, np.zeros(module.sizes.obs_dim))


def quiet(max_steps: int, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
    """A Trainer on one CPU process that prints nothing and writes nothing of its own."""
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    plugins = options.pop("plugins", [AtomicCheckpointIO()])
    fixed: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "plugins": plugins, "callbacks": list(callbacks)}
    return Trainer(max_steps=max_steps, **(silent | fixed | options))


def fit(
    module: OfflineModule,
    replay: Replay | DataModule | None = None,
    max_steps: int = 90,
    folder: Path | None = None,
    ckpt_path: Path | None = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> OfflineModule:
    """Train to ``max_steps``, in a run folder when one is given."""
    data = replay if isinstance(replay, DataModule) else DataModule.of(toy_replay() if replay is None else replay)
    if folder:
        options |= {"default_root_dir": str(folder), "enable_checkpointing": True}
        callbacks = [*callbacks, RunFolder(folder)]
    trainer = quiet(max_steps, callbacks, **options)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module


class Rows(Callback):
    """Collects the rows of metrics, without their speeds."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        row = pl_module.metric_row
        if row.get("step") == trainer.global_step:
            self.rows.append({k: v for k, v in row.items() if not k.startswith("perf/")})


class Crash(Callback):
    """Ends training by an error before the first block that starts at or after an update."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step >= self.update:
            raise ZeroDivisionError("crash")


def weights(module: OfflineModule) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def differences(first: Any, second: Any, where: str = "") -> list[str]:
    """Where two trees of dicts, sequences and tensors differ, bit by bit."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        found = [f"{where}/{key} is in one only" for key in first.keys() ^ second.keys()]
        for key in first.keys() & second.keys():
            found += differences(first[key], second[key], f"{where}/{key}")
        return found
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        return [d for i, (a, b) in enumerate(zip(first, second)) for d in differences(a, b, f"{where}/{i}")]
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        same = first.dtype == second.dtype and torch.equal(first, second)
    else:
        same = type(first) is type(second) and first == second
    return [] if same else [f"{where}: {first} != {second}"]


def run_files(folder: Path, update: int) -> dict[str, Any]:
    """What a run leaves that must not depend on how often it was interrupted."""
    checkpoint = read_checkpoint(folder / "checkpoints" / f"step={update:08d}.ckpt")
    parts = ("state_dict", "optimizer_states", "offpolicy", "hyper_parameters", "global_step")
    return {
        **{part: checkpoint[part] for part in parts},
        "metrics": [{k: v for k, v in row.items() if "perf/" not in k} for row in Table(folder / "metrics.csv").rows()],
        "evals": Table(folder / "evals.csv").rows(),
    }
