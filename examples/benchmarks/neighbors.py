"""What PRDC's nearest-neighbour search costs, beside a KD-tree asked anew every time.

usage: python examples/benchmarks/neighbors.py [--rows 1000000] [--obs-dim 17] [--action-dim 6] [--candidates 64]
                                               [--batches 20] [--no-methods] [--no-memory]

Data like those of a simulated robot: long smooth episodes near a six-dimensional surface. A batch is 256 stored states
with an action each, 0.2 around the stored one (near), as noisy as a normal of deviation 0.3 (cloned) or 0.5 (off), or
uniform. Milliseconds of processor time per batch on one thread, one way after the other over the
same batches:

  kd_tree   scipy's cKDTree over all pairs, one query, as the authors do it; ties are not looked for
  tree      our search="tree": the same and every tie
  first     our search="exact" on rows never seen before
  exact     our search="exact" on rows seen before
  cached    our search="cached" on rows seen before

Memory in MiB, each in a process of its own after the same batches, and at its peak: what the authors' way needs beyond
the data (pairs in float32, a KD-tree over them in float64), and what our search="exact" does on columns of the table
that batches are gathered from.

Then, with a policy cloned from the data, updates per second of processor time of TD3BC and PRDC on rows seen before.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import figure
from scipy.signal import lfilter
from scipy.spatial import cKDTree
from torch import Tensor

from offpolicy import Replay
from offpolicy.data.neighbors import NeighborIndex

BETA, BATCH = 2.0, 256


def trajectories(rows: int, obs_dim: int, action_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """States and actions of episodes of 1000 steps: smooth functions of six slow processes, and a little noise."""
    rng = np.random.default_rng(0)
    drive = rng.standard_normal((rows // 1000, 1000, 6))
    hidden = lfilter([np.sqrt(1 - 0.98**2)], [1, -0.98], drive, axis=1).reshape(-1, 6)
    obs = np.tanh(0.7 * hidden @ rng.standard_normal((6, obs_dim)) + 0.3 * rng.standard_normal(obs_dim))
    obs += 0.02 * rng.standard_normal(obs.shape)
    action = np.tanh(hidden @ rng.standard_normal((6, action_dim))) + 0.3 * rng.standard_normal((len(obs), action_dim))
    obs = (obs - obs.mean(0)) / (obs.std(0) + 1e-3)
    return obs.astype(np.float32), action.clip(-1, 1).astype(np.float32)


def spent(call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    began = time.process_time()
    result = call(*arguments)
    return time.process_time() - began, result


def moves(g: torch.Generator) -> dict[str, Callable[[Tensor], Tensor]]:
    """Policies by name: from stored actions to theirs."""
    return {
        "near": lambda a: a + 0.4 * torch.rand(a.shape, generator=g) - 0.2,
        "cloned": lambda a: a + 0.3 * torch.randn(a.shape, generator=g),
        "off": lambda a: (a + 0.5 * torch.randn(a.shape, generator=g)).clamp(-1, 1),
        "uniform": lambda a: 2 * torch.rand(a.shape, generator=g) - 1,
    }


def queries(args: argparse.Namespace, obs: Tensor, action: Tensor) -> dict[str, Any]:
    """Milliseconds per batch, by how far the policy is from the data."""
    g = torch.Generator().manual_seed(1)
    points = torch.cat([BETA * obs, action], 1).double().numpy()
    build, plain = spent(cKDTree, points)
    index_build, tree = spent(partial(NeighborIndex, search="tree"), obs, action, BETA)
    tree.query(action[:1], torch.zeros(1, dtype=torch.int64))
    results: dict[str, Any] = {"build_s": {"kd_tree": round(build, 2), "index": round(index_build, 2)}}
    for policy, move in moves(g).items():
        make = partial(NeighborIndex, obs, action, BETA, candidates=args.candidates)
        cached, exact = make(search="cached"), make(search="exact")
        for index in (cached, exact):
            index.query(action[:1], torch.zeros(1, dtype=torch.int64))  # builds the tree of the states
        batches = []
        for _ in range(args.batches if policy != "uniform" else min(args.batches, 3)):
            row = torch.randint(0, len(obs), (BATCH,), generator=g)
            query = move(action[row])
            batches.append((query, row, torch.cat([BETA * obs[row], query], 1).double().numpy()))
        times: dict[str, list[float]] = {}
        answers: dict[str, list[Any]] = {}
        ways = {"first": exact, "kd_tree": plain, "tree": tree, "exact": exact, "cached": cached}
        for query, row, _ in batches:
            cached.query(query, row)
        for name, way in ways.items():
            runs = [spent(way.query, key) if way is plain else spent(way.query, q, row) for q, row, key in batches]
            times[name], answers[name] = [1000 * took for took, _ in runs], [answer for _, answer in runs]
        seen: dict[str, list[float]] = {"own_distance": [], "distance": [], "certified": [], "agreement": []}
        for i, (query, row, _) in enumerate(batches):
            right = answers["exact"][i]
            assert torch.equal(right.row, answers["tree"][i].row)
            assert torch.equal(right.row[:, 0], torch.from_numpy(answers["kd_tree"][i][1]))
            seen["own_distance"].append(float((query - action[row]).norm(dim=1).mean()))
            seen["distance"].append(float(right.distance.mean()))
            seen["certified"].append(float(right.certified.float().mean()))
            seen["agreement"].append(float((answers["cached"][i].row == right.row).float().mean()))
        ms = {name: round(statistics.median(values), 3) for name, values in times.items()}
        results[policy] = {
            "ms": ms,
            "kd_tree_over": {name: round(ms["kd_tree"] / ms[name], 1) for name in ("first", "exact", "cached")},
            **{name: round(statistics.mean(values), 4) for name, values in seen.items()},
        }
        print(policy, results[policy], file=sys.stderr)
    return results


def memory(args: argparse.Namespace, way: str) -> dict[str, int]:
    """MiB that a way to search needs beyond the data, after its batches and at its peak (Linux only)."""
    obs, action = (torch.from_numpy(x) for x in trajectories(args.rows, args.obs_dim, args.action_dim))
    table, (first, last) = torch.cat([obs, action], 1), (args.obs_dim, args.obs_dim + args.action_dim)
    del obs, action
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    before = resident()["VmRSS"]
    obs, action = table[:, :first], table[:, first:last]
    search: Any
    if way == "kd_tree":
        pairs = np.concatenate([BETA * obs.numpy(), action.numpy()], 1)
        search = cKDTree(pairs)
    else:
        search = NeighborIndex(obs, action, BETA, candidates=args.candidates)
    g = torch.Generator().manual_seed(1)
    for move in moves(g).values():
        for _ in range(min(args.batches, 5)):
            row = torch.randint(0, len(obs), (BATCH,), generator=g)
            query = move(action[row])
            if way == "kd_tree":
                search.query(torch.cat([BETA * obs[row], query], 1).numpy())
            else:
                search.query(query, row)
    after = resident()
    return {"held": (after["VmRSS"] - before) >> 10, "peak": (after["VmHWM"] - before) >> 10}


def resident() -> dict[str, int]:
    """The memory of this process in KiB: now and at its peak."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Vm"))
    return {name.strip(":"): int(size) for name, size, *_ in lines}


def methods(
    args: argparse.Namespace,
    obs: np.ndarray,
    action: np.ndarray,
    watch: Callable[[Callable[[], None]], dict[str, float]] = lambda _: {},
) -> dict[str, Any]:
    """Updates per second of processor time on rows seen before, with the policy that cloning gives.

    ``watch`` may measure more of PRDC's block of updates.
    """
    from lightning_modules.prdc import PRDC
    from lightning_modules.td3bc import TD3BC
    from offpolicy.compute import matmul

    end = np.zeros(len(obs), dtype=bool)
    end[999::1000] = True
    steps = {"obs": obs, "action": action, "reward": obs[:, 0], "terminated": np.zeros(len(obs), dtype=bool)}
    bounds = {"action_low": [-1.0] * action.shape[1], "action_high": [1.0] * action.shape[1]}
    replay = Replay(steps, episode_end=end, meta=bounds)
    plain: Any = TD3BC(alpha=0.0).prepare(replay)
    ours: Any = PRDC(alpha=0.0, candidates=args.candidates).prepare(replay)
    rates: dict[str, list[float]] = {"TD3BC": [], "PRDC": []}
    with matmul.matmul_setting(matmul.choose_matmul("auto")):
        for t in range(0, args.clone, 100):
            plain.run_block(t, 100)
        ours.actor.load_state_dict(plain.actor.state_dict())
        for turn in range(args.turns + 1):  # updates of the same numbers draw the same rows
            for name, module in (("TD3BC", plain), ("PRDC", ours)):
                module.meter.read(lambda x: x)
                took, _ = spent(module.run_block, 10**6, 64)
                if turn:
                    rates[name].append(64 / took)
        more = watch(partial(ours.run_block, 10**6, 64))
    row = ours.meter.read(lambda x: x)
    updates = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    ratio = statistics.median(a / b for a, b in zip(rates["PRDC"], rates["TD3BC"], strict=True))
    state = {k: round(row[k], 3) for k in ("own_transition", "neighbor_distance", "certified")}
    return {"updates_per_cpu_s": updates, "prdc_over_td3bc": round(ratio, 3), **state, **more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--obs-dim", type=int, default=17)
    parser.add_argument("--action-dim", type=int, default=6)
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--clone", type=int, default=1000, help="updates of cloning before methods are timed")
    parser.add_argument("--turns", type=int, default=5, help="blocks of 64 updates per method")
    parser.add_argument("--no-methods", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--worker", choices=("kd_tree", "exact"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.worker:
        print(json.dumps(memory(args, args.worker)))
        return
    obs, action = trajectories(args.rows, args.obs_dim, args.action_dim)
    report: dict[str, Any] = {
        "about": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            **vars(args),
        },
        "queries": queries(args, torch.from_numpy(obs), torch.from_numpy(action)),
    }
    if not args.no_memory:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
        report["memory_mib"] = {way: figure([*command, way], 1) for way in ("kd_tree", "exact")}
    if not args.no_methods:
        report["methods"] = methods(args, obs, action)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
