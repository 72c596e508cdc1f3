"""SAC or TD3 of stable-baselines3 with evaluations, run by ``online.py`` with the interpreter of its environment.

usage: python sb3_curve.py METHOD ENV SEED FILE SETTINGS

SETTINGS is a JSON object: steps, random_steps, eval_every, eval_episodes, hidden_dims, lr, batch_size. FILE becomes a
table of environment steps and mean returns of the deterministic policy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gymnasium
import stable_baselines3 as sb3
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

method, env, seed, file = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
given = json.loads(sys.argv[5])
torch.set_num_threads(1)
rows: list[tuple[int, float]] = []


class Evaluate(BaseCallback):
    def _init_callback(self) -> None:
        self.env = Monitor(gymnasium.make(env))
        self.env.reset(seed=10_000)

    def _on_step(self) -> bool:
        if self.num_timesteps % given["eval_every"] == 0:
            mean, _ = evaluate_policy(self.model, self.env, given["eval_episodes"])
            rows.append((self.num_timesteps, float(mean)))
        return True


learner = getattr(sb3, method)(
    "MlpPolicy",
    env,
    learning_rate=given["lr"],
    buffer_size=given["steps"],
    batch_size=given["batch_size"],
    train_freq=1,
    gradient_steps=1,
    learning_starts=given["random_steps"],
    policy_kwargs={"net_arch": given["hidden_dims"]},
    device="cpu",
    seed=seed,
)
learner.learn(given["steps"], callback=Evaluate())
lines = ["env/steps,eval/return_mean", *(f"{steps},{mean}" for steps, mean in rows)]
file.write_text("\n".join(lines) + "\n")
