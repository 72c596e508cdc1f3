"""d3rlpy's ``fit`` on random data, run by ``control.py`` with the interpreter of an environment that has d3rlpy 2.8.

usage: python d3rlpy_fit.py METHOD THREADS UPDATES ROWS
"""

from __future__ import annotations

import json
import resource
import sys
import time

import d3rlpy
import numpy as np
import torch

method, threads, updates, rows = sys.argv[1], *map(int, sys.argv[2:5])
torch.set_num_threads(threads)
rng = np.random.default_rng(0)
timeouts = np.zeros(rows, np.float32)
timeouts[999::1000] = 1
dataset = d3rlpy.dataset.MDPDataset(
    rng.standard_normal((rows, 17), dtype=np.float32),
    rng.uniform(-1, 1, (rows, 6)).astype(np.float32),
    rng.standard_normal(rows, dtype=np.float32),
    np.zeros(rows, np.float32),
    timeouts=timeouts,
)
config = {"TD3BC": d3rlpy.algos.TD3PlusBCConfig, "IQL": d3rlpy.algos.IQLConfig, "BC": d3rlpy.algos.BCConfig}
algo = config[method](batch_size=256).create(device="cpu:0")
marks: list[tuple[int, float, float]] = []


def mark(_: object, epoch: int, step: int) -> None:
    if (step >= updates // 10 and (step - updates // 10) % 64 == 0) or step == updates + updates // 10:
        marks.append((step, time.perf_counter(), time.process_time()))


algo.fit(
    dataset,
    n_steps=updates + updates // 10,
    n_steps_per_epoch=updates + updates // 10,
    logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
    show_progress=False,
    callback=mark,
)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"marks": marks, "peak_mib": peak, "d3rlpy": d3rlpy.__version__}))
