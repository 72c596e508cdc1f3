"""Synthetic data measured against the real data they imitate: what the target policy thinks of the actions, what the
true simulator thinks of the transitions, how far from the data they lie, and how their columns are distributed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offpolicy.data.columns import to_numpy
from offpolicy.data.neighbors import NeighborIndex
from offpolicy.data.normalize import Normalizer, mean_std
from offpolicy.data.replay import Replay
from offpolicy.data.sampling import permutation
from offpolicy.data.sizes import Sizes
from offpolicy.environments.wrappers import NoEnvironment
from offpolicy.errors import DataError, UsageError, check_range
from offpolicy.evaluation.simulators import Simulator
from offpolicy.files import atomic_write

ROWS = 4000  # of each set, unless told
LEVELS = (1, 5, 25, 50, 75, 95, 99)  # per cent
SHOWN = 12  # columns in the printed table of quantiles: the columns that differ most
REGENERATION_ROWS, NOVELTY_ROWS = 2000, 500  # of a pool in training


# -- measures ----------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What was measured on one set.

    Attributes:
        name: of the set.
        numbers: ``log_prob`` (mean log π(a|s) per step, nats), ``dynamics_error`` and ``reward_error`` (root mean
            square against the simulator, in standard deviations of the real data), ``dynamics_error_median``,
            ``drift`` (as the dynamics error, of whole trajectories against the simulator that starts where they start
            and gets their actions), ``novelty`` and ``novelty_median`` (distance to the nearest real pair (s, a),
            observations standardised and actions in [-1, 1]; of the real data, to the nearest other pair).
        by_step: ``log_prob``, ``dynamics_error`` and ``drift`` at each step of the trajectories; not of the real data.
        dynamics_error: root mean square per dimension of the observation; empty without a simulator.
        quantiles: column → its quantiles at ``LEVELS`` per cent.
    """

    name: str
    rows: int
    numbers: dict[str, float] = field(default_factory=dict)
    by_step: dict[str, list[float]] = field(default_factory=dict)
    dynamics_error: list[float] = field(default_factory=list)
    quantiles: dict[str, list[float]] = field(default_factory=dict)


class Judge:
    """Measures data against the real ones.

    Args:
        real: the data that are imitated.
        policy: a trained method whose distribution of actions is asked; None leaves the likelihood out.
        rows: of each set, at most, the same whenever the set is.
        novelty_rows: of them, for the search of neighbours; None for all, 0 for none.

    Raises:
        UsageError: a policy of other sizes.
    """

    def __init__(self, real: Replay, policy: Any = None, *, rows: int = ROWS, novelty_rows: int | None = None) -> None:
        check_range("rows", rows, 2, option="rows")
        self.real, self.policy, self.rows, self.novelty_rows = real, policy, rows, novelty_rows
        self.sizes = Sizes.of(real)
        if policy is not None:
            self._check(policy.sizes, f"the policy ({type(policy).__name__})", UsageError)
        self.normalizer = Normalizer((self.sizes.obs_dim,), self.sizes.action_dim)
        rows_of_all = None if real.is_whole else real.rows
        self.normalizer.fit(real, rows_of_all, normalize_obs=True, reward_transform="r", eps=0.0)
        self.obs_scale = self.normalizer.obs_scale.double().numpy()
        self.reward_std = float(mean_std(to_numpy(real.steps["reward"])[:, None], rows_of_all)[1][0]) or 1.0
        self.simulator: Simulator | None = None
        self.why_no_simulator = ""
        try:
            self.simulator = Simulator(real.meta, self.sizes)
        except NoEnvironment as error:
            self.why_no_simulator = str(error)
        self._index: NeighborIndex | None = None

    def close(self) -> None:
        """Close the simulator."""
        if self.simulator is not None:
            self.simulator.close()

    def measure(self, replay: Replay, name: str | None = None, *, whole: bool = True) -> Measured:
        """All measures of one set, the real one included; without ``whole``, only the measures of single transitions.

        Raises:
            DataError: its sizes differ from those of the real data.
        """
        name = name or str(replay.meta.get("name", "data"))
        self._check(Sizes.of(replay), name, DataError)
        rows = sampled(replay, self.rows)
        found = Measured(name, len(rows))
        steps: dict[str, np.ndarray] = {}
        if self.policy is not None:
            steps["log_prob"] = self.log_prob(replay, rows)
            found.numbers["log_prob"] = float(steps["log_prob"].mean())
        if self.simulator is not None:
            error, reward_error = self.errors(replay, rows)
            steps["dynamics_error"] = np.sqrt(np.square(error).mean(1))
            found.numbers["dynamics_error"] = float(np.sqrt(np.square(error).mean()))
            found.numbers["dynamics_error_median"] = float(np.median(steps["dynamics_error"]))
            found.dynamics_error = np.sqrt(np.square(error).mean(0)).tolist()
            if np.isfinite(reward_error).all():
                found.numbers["reward_error"] = float(np.sqrt(np.square(reward_error).mean()))
        if self.novelty_rows != 0:
            distance = self.novelty(replay, rows if self.novelty_rows is None else sampled(replay, self.novelty_rows))
            found.numbers |= {"novelty": float(distance.mean()), "novelty_median": float(np.median(distance))}
        if replay is not self.real and replay.is_whole:
            found.by_step = {k: _by_step(v, replay.t[rows], rms=k == "dynamics_error") for k, v in steps.items()}
            if self.simulator is not None and whole:
                drift, t = self.drift(replay)
                found.numbers["drift"] = float(np.sqrt(np.square(drift).mean()))
                found.by_step["drift"] = _by_step(drift, t, rms=True)
        if whole:
            found.quantiles = column_quantiles(replay)
        return found

    def _check(self, sizes: Any, what: str, kind: type[Exception]) -> None:
        if (sizes.obs_dim, sizes.action_dim) != (self.sizes.obs_dim, self.sizes.action_dim):
            raise kind(
                f"{what} has observations of width {sizes.obs_dim} and actions of width {sizes.action_dim}, "
                f"{self.real.meta.get('name', 'the real data')} has {self.sizes.obs_dim} and {self.sizes.action_dim}; "
                "expected the same. Compare what belongs to one task."
            )

    @torch.no_grad()
    def log_prob(self, replay: Replay, rows: np.ndarray) -> np.ndarray:
        """log π(a|s) of these rows (n,), nats."""
        taken = replay.take(rows, ("obs", "action"))
        like = {"device": self.policy.device, "dtype": self.policy.dtype_of_weights}
        action = self.policy.normalizer.action(taken["action"].to(**like))
        return self.policy.log_prob(taken["obs"].to(**like), action).double().cpu().numpy()

    def errors(self, replay: Replay, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stored minus simulated next observation (n, O) and reward (n,), in standard deviations of the real data."""
        assert self.simulator is not None
        taken = {k: v.double().cpu().numpy() for k, v in replay.take(rows, ("obs", "action", "reward")).items()}
        next_obs, reward = self.simulator.step(taken["obs"], taken["action"])
        stored = replay.next_obs(rows).double().cpu().numpy()
        return (stored - next_obs) * self.obs_scale, (taken["reward"] - reward) / self.reward_std

    def drift(self, replay: Replay) -> tuple[np.ndarray, np.ndarray]:
        """How far trajectories are from the simulator's with the same start and actions, and the step, (n,) each.

        Root mean square over dimensions, in standard deviations of the real data, of as many whole trajectories as the
        judge's number of rows allows.
        """
        assert self.simulator is not None
        count = max(1, min(replay.num_episodes, int(self.rows // replay.length.mean())))
        known = np.isin(np.arange(len(replay.steps["obs"])), replay.rows_with_successor())
        found, steps = [], []
        for episode in permutation(0, 0, replay.num_episodes)[:count].tolist():
            rows = replay.start[episode] + np.arange(replay.length[episode])
            action = replay.take(rows, ("action",))["action"].cpu().numpy()
            start = replay.take(rows[:1], ("obs",))["obs"][0].cpu().numpy()
            error = (replay.next_obs(rows).double().cpu().numpy() - self.simulator.play(start, action)) * self.obs_scale
            found.append(np.sqrt(np.square(error).mean(1))[known[rows]])
            steps.append(np.flatnonzero(known[rows]))
        return np.concatenate(found), np.concatenate(steps)

    def novelty(self, replay: Replay, rows: np.ndarray) -> np.ndarray:
        """Distance (n,) to the nearest pair of the real data; of real ones, to the nearest other."""
        if self._index is None:
            taken = self.real.take(self.real.rows, ("obs", "action"))
            obs, action = (taken[k].float().cpu() for k in ("obs", "action"))
            self._index = NeighborIndex(self.normalizer.obs(obs), self.normalizer.action(action), 1.0, search="tree")
        taken = replay.take(rows, ("obs", "action"))
        obs, action = (taken[k].float().cpu() for k in ("obs", "action"))
        own = replay is self.real
        found = self._index.query(self.normalizer.action(action), obs=self.normalizer.obs(obs), k=1 + own)
        return found.distance[:, -1].numpy()


def sampled(replay: Replay, count: int) -> np.ndarray:
    """At most ``count`` rows whose successor is known, chosen by a hash, ascending."""
    rows = np.sort(replay.rows_with_successor())
    return rows if len(rows) <= count else np.sort(rows[permutation(0, 0, len(rows))[:count].numpy()])


def column_quantiles(replay: Replay) -> dict[str, list[float]]:
    """Quantiles at ``LEVELS`` of every dimension of observations and actions, and of rewards."""
    found: dict[str, list[float]] = {}
    for name in ("obs", "action", "reward"):
        column = to_numpy(replay.steps[name])
        values = column if replay.is_whole else column[replay.rows]
        values = np.percentile(values.reshape(replay.num_steps, -1), LEVELS, axis=0)
        names = [name] if name == "reward" else [f"{name}[{i}]" for i in range(values.shape[1])]
        found |= dict(zip(names, values.T.astype(float).tolist()))
    return found


def _by_step(values: np.ndarray, t: np.ndarray, *, rms: bool) -> list[float]:
    """Mean (or root mean square) of the values at each step; NaN where there is none."""
    count = np.bincount(t)
    sums = np.bincount(t, np.square(values) if rms else values)
    mean = np.divide(sums, count, out=np.full(len(count), np.nan), where=count > 0)
    return (np.sqrt(mean) if rms else mean).tolist()


# -- comparing sets ----------------------------------------------------------------------------------------------------

WORDS = {
    "log_prob": "log π(a|s) per step, nats",
    "dynamics_error": "dynamics error (rms, standard deviations)",
    "dynamics_error_median": "  median over transitions",
    "reward_error": "reward error (rms, standard deviations)",
    "drift": "drift from the simulator over trajectories",
    "novelty": "distance to the nearest real pair",
    "novelty_median": "  median",
}


@dataclass
class Comparison:
    """Measures of the real data and of synthetic sets beside them; prints as a table."""

    real: Measured
    synthetic: list[Measured]
    why_no_simulator: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values; a step without a transition is None."""
        real, *sets = (asdict(one) for one in (self.real, *self.synthetic))
        for one in sets:
            one["by_step"] = {k: [None if v != v else v for v in values] for k, values in one["by_step"].items()}
        return {"levels": list(LEVELS), "real": real, "synthetic": sets}

    def __str__(self) -> str:
        sets = [self.real, *self.synthetic]
        width = max(12, *(len(one.name) + 2 for one in sets))
        label = max(map(len, WORDS.values())) + 2
        lines = [" " * label + "".join(f"{one.name:>{width}}" for one in sets)]
        lines.append(f"{'transitions measured':<{label}}" + "".join(f"{one.rows:>{width},}" for one in sets))
        for key, words in WORDS.items():
            if any(key in one.numbers for one in sets):
                cells = (f"{one.numbers[key]:.4g}" if key in one.numbers else "–" for one in sets)
                lines.append(f"{words:<{label}}" + "".join(f"{cell:>{width}}" for cell in cells))
        names = sorted(self.shifts(), key=lambda name: -self.shifts()[name])[:SHOWN]
        hidden = len(self.real.quantiles) - len(names)
        lines.append(f"quantiles 5 %, 50 %, 95 %{f' ({hidden} columns that differ less left out)' if hidden else ''}")
        pick = [LEVELS.index(level) for level in (5, 50, 95)]
        for name in [name for name in self.real.quantiles if name in names]:
            for one in sets:
                three = "".join(f"{one.quantiles[name][i]:>11.4g}" for i in pick)
                lines.append(f"  {name if one is self.real else '':<12}{one.name:<{width}}{three}")
        if self.why_no_simulator:
            lines.append(f"note: {self.why_no_simulator}")
        return "\n".join(lines)

    def shifts(self) -> dict[str, float]:
        """Largest difference of a quantile from the real one, per column, in units of the real 5 % to 95 % range."""
        low, high = LEVELS.index(5), LEVELS.index(95)
        found = {}
        for name, real in self.real.quantiles.items():
            span = (real[high] - real[low]) or 1.0
            found[name] = max(abs(a - b) for one in self.synthetic for a, b in zip(one.quantiles[name], real)) / span
        return found


def compare(
    real: Replay, synthetic: Mapping[str, Replay] | Sequence[Replay], policy: Any = None, *, rows: int = ROWS
) -> Comparison:
    """Measure real and synthetic sets.

    Args:
        real: the data that are imitated.
        synthetic: sets by name, or sets that name themselves.
        policy: a trained method whose distribution of actions is asked; None leaves the likelihood out.
        rows: of each set, at most, for likelihood, dynamics and novelty; quantiles take all.

    Raises:
        UsageError: a policy of other sizes, or without a distribution of actions.  DataError: sets of other sizes.
    """
    named = (
        dict(synthetic) if isinstance(synthetic, Mapping) else {_name(one, i): one for i, one in enumerate(synthetic)}
    )
    judge = Judge(real, policy, rows=rows)
    try:
        measured = [judge.measure(one, name) for name, one in named.items()]
        return Comparison(judge.measure(real), measured, judge.why_no_simulator)
    finally:
        judge.close()


def _name(replay: Replay, number: int) -> str:
    return str(replay.meta.get("name") or f"set {number + 1}")


def regeneration_metrics(
    before: Replay | None, after: Replay, policy: Any, real: Replay, *, novelty_rows: int = NOVELTY_ROWS
) -> dict[str, float]:
    """What a regeneration changed, for a row of metrics; a few thousand rows, cheap beside the sampling itself.

    Args:
        before: the pool that is replaced; None for the first.
        after: the new one.
        policy: the method being trained, as it is now; None leaves likelihoods out.
        real: the data that are imitated.
        novelty_rows: for the search of neighbours; 0 for none.

    Returns:
        ``synthetic/log_prob``, ``synthetic/log_prob_before`` (of the old pool under the same policy),
        ``synthetic/novelty`` and, where there is a simulator, ``synthetic/dynamics_error`` and
        ``synthetic/reward_error``.
    """
    judge = Judge(real, policy, rows=REGENERATION_ROWS, novelty_rows=novelty_rows)
    try:
        numbers = judge.measure(after, whole=False).numbers
        if before is not None:
            numbers["log_prob_before"] = float(judge.log_prob(before, sampled(before, REGENERATION_ROWS)).mean())
    finally:
        judge.close()
    return {f"synthetic/{name}": value for name, value in numbers.items() if not name.endswith("_median")}


# -- picture -----------------------------------------------------------------------------------------------------------


def plot(comparison: Comparison, path: str | Path) -> Path:
    """Draw quantiles, and likelihood and dynamics error against the step of the trajectory, as a PNG.

    Columns are shown in units of the real data: 0 is their median, ±1 the ends of their 5 % to 95 % range.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # as in `files.plot_curves`
    from matplotlib.figure import Figure

    sets = [comparison.real, *comparison.synthetic]
    curves = [
        k for k in ("log_prob", "dynamics_error", "drift") if any(k in one.by_step for one in comparison.synthetic)
    ]
    figure = Figure(figsize=(4.5 + 3.2 * len(curves), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 + len(curves), squeeze=False, width_ratios=[1.3] + [1.0] * len(curves))[0]
    names = sorted(comparison.real.quantiles, key=lambda n: -comparison.shifts()[n])[:SHOWN]
    names = [name for name in comparison.real.quantiles if name in names]
    low, middle, high = (LEVELS.index(level) for level in (5, 50, 95))
    for k, one in enumerate(sets):
        for i, name in enumerate(names):
            real = comparison.real.quantiles[name]
            half = 0.5 * (real[high] - real[low]) or 1.0
            q = [(value - 0.5 * (real[high] + real[low])) / half for value in one.quantiles[name]]
            x = i + (k - 0.5 * (len(sets) - 1)) * 0.7 / len(sets)
            panels[0].plot([x, x], [q[0], q[-1]], color=f"C{k}", linewidth=1)
            panels[0].plot([x, x], [q[low], q[high]], color=f"C{k}", linewidth=3)
            panels[0].plot(x, q[middle], "o", color=f"C{k}", markersize=4, label=one.name if i == 0 else None)
    panels[0].set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
    panels[0].set_title("quantiles: 1–99 % thin, 5–95 % thick, median; real 5–95 % = ±1", fontsize=8)
    for axes, name in zip(panels[1:], curves):
        for k, one in enumerate(comparison.synthetic, start=1):
            axes.plot(one.by_step.get(name, []), color=f"C{k}")
        if name == "log_prob":
            axes.axhline(comparison.real.numbers[name], color="C0", linestyle="--")
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        axes.set_title(WORDS[name], fontsize=8)
        axes.set_xlabel("step of the trajectory")
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(sets), fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    atomic_write(path, picture.getvalue())
    return Path(path)


__all__ = ["Comparison", "Judge", "Measured", "Simulator", "compare", "plot", "regeneration_metrics"]
