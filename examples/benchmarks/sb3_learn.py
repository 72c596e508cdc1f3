"""stable-baselines3's SAC or TD3, run by ``online.py`` with the interpreter of an environment that has it.

usage: python sb3_learn.py METHOD ENV STEPS RANDOM_STEPS BUFFER_ROWS
"""

from __future__ import annotations

import json
import sys
import time

import stable_baselines3 as sb3
import torch
from stable_baselines3.common.callbacks import BaseCallback

method, env, steps, random_steps, rows = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
torch.set_num_threads(1)
marks: list[tuple[int, float, float]] = []


class Mark(BaseCallback):
    def _on_step(self) -> bool:
        if self.num_timesteps % 200 == 0 and self.num_timesteps > random_steps:
            marks.append((self.num_timesteps, time.perf_counter(), time.process_time()))
        return True


options = {
    "learning_rate": 3e-4,
    "buffer_size": rows,
    "batch_size": 256,
    "train_freq": 1,
    "gradient_steps": 1,
    "learning_starts": random_steps,
    "policy_kwargs": {"net_arch": [256, 256]},
    "device": "cpu",
    "seed": 0,
}
getattr(sb3, method)("MlpPolicy", env, **options).learn(steps, callback=Mark())
print(json.dumps({"marks": marks, "stable_baselines3": sb3.__version__}))
