"""Train on arrays of your own, in six lines."""

import numpy as np

import offpolicy

rng = np.random.default_rng(0)
obs, action = rng.normal(size=(5000, 3)), rng.uniform(-2, 2, size=(5000, 1))  # your logs, one row per step
episode_end = np.arange(5000) % 100 == 99
arrays = {"obs": obs, "action": action, "reward": -(obs[:, 0] ** 2), "terminated": np.zeros(5000, bool)}
data = offpolicy.load_data({**arrays, "episode_end": episode_end})
run = offpolicy.fit(offpolicy.TD3BC(hidden_dims=(64, 64)), data, max_steps=500, eval_every=0)
print(run.method.act(obs[:2]))
