"""The data report: what a replay holds, in numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from offpolicy.data.columns import to_numpy
from offpolicy.data.raw import Raw, count_usable
from offpolicy.data.replay import Replay
from offpolicy.data.scan import range_text
from offpolicy.errors import amount

WHOSE = {"environment": "of the environment", "data": "of the data, as no environment is known", "given": "as given"}


@dataclass(frozen=True)
class Report:
    """What a replay holds, as numbers; ``str()`` is the plain text shown at load.

    Attributes:
        name, source, file: where the data come from.
        rows, episodes, usable: steps, episodes, and steps a transition may be drawn from.
        length, returns: (smallest, mean, largest) per episode; returns are undiscounted and untransformed.
        reward: (smallest, mean, largest) per step; None, like returns, when there is none.
        terminated: steps at which the environment ended the episode; the other episodes were cut.
        action_range: bounds and whose they are.
        columns: name → dtype and shape.
        source_dtypes: name → dtype in the source, where it was another.
        environment: id and scores, or why there are none.
        notes, warnings: counts and doubts from the load.
        fingerprint: SHA-256 over all columns when asked for.
    """

    name: str
    source: str
    file: str | None
    rows: int
    episodes: int
    usable: int
    length: tuple[float, float, float]
    returns: tuple[float, float, float] | None
    reward: tuple[float, float, float] | None
    terminated: int
    action_range: str
    columns: dict[str, str]
    source_dtypes: dict[str, str]
    environment: str
    notes: list[str]
    warnings: list[str]
    fingerprint: str | None = None

    def __str__(self) -> str:
        def triple(values: tuple[float, float, float]) -> str:
            return " / ".join(f"{v:,.6g}" for v in values)

        cut = max(self.episodes - self.terminated, 0)
        dropped = self.rows - self.usable
        without = f" ({amount(dropped, 'step')} without a known successor)" if dropped else ""
        usable = amount(self.usable, "usable transition")
        lines = [
            f"{self.name} ({self.source}{', ' + self.file if self.file else ''})",
            f"  steps        {self.rows:,} in {amount(self.episodes, 'episode')}; {usable}{without}",
            f"  length       {triple(self.length)}   (smallest / mean / largest)",
        ]
        if self.returns is not None and self.reward is not None:
            lines += [f"  return       {triple(self.returns)}", f"  reward       {triple(self.reward)}"]
        else:
            lines += ["  reward       none: for goal-conditioned and cloning methods"]
        lines += [
            f"  ends         {self.terminated:,} terminated, {cut:,} truncated",
            f"  actions      {self.action_range}",
            "  columns      " + ", ".join(f"{k} {v}" for k, v in self.columns.items()),
        ]
        if self.source_dtypes:
            lines += ["  stored as    " + ", ".join(f"{k} {v}" for k, v in self.source_dtypes.items())]
        lines += [f"  environment  {self.environment}"]
        if self.fingerprint:
            lines += [f"  fingerprint  {self.fingerprint}"]
        lines += [f"  note: {note}" for note in self.notes] + [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def report(replay: Replay, *, fingerprint: bool = False) -> Report:
    """Measure a replay.

    Args:
        replay: control data.
        fingerprint: also compute the SHA-256 over all columns (reads everything).
    """
    meta = replay.meta
    stop = replay.start + replay.length
    flags = np.concatenate([[0], np.cumsum(to_numpy(replay.steps["terminated"]), dtype=np.int64)])
    returns = reward = None
    if "reward" in replay.steps:
        per_episode = replay.returns()
        returns = _spread(per_episode)
        whole = int(replay.length.sum()) == len(replay.steps["reward"])
        column = to_numpy(replay.steps["reward"])
        column = column if whole else column[replay.rows]
        reward = (float(column.min()), float(per_episode.sum() / replay.num_steps), float(column.max()))
    if "action_n" in meta:
        actions = f"{meta['action_n']} discrete actions"
    elif meta.get("action_low") is not None:
        actions = f"{range_text(meta)} ({WHOSE[meta.get('action_bounds', 'environment')]})"
    else:
        actions = "bounds unknown"
    return Report(
        name=str(meta.get("name", "replay")),
        source=str(meta.get("source", "arrays")),
        file=meta.get("file"),
        rows=replay.num_steps,
        episodes=replay.num_episodes,
        usable=_usable_of(replay),
        length=_spread(replay.length),
        returns=returns,
        reward=reward,
        terminated=int((flags[stop] - flags[replay.start]).sum()),
        action_range=actions,
        columns={k: f"{to_numpy(v).dtype} {tuple(v.shape)}" for k, v in replay.steps.items()},
        source_dtypes=dict(meta.get("source_dtypes", {})),
        environment=_environment(meta),
        notes=list(meta.get("notes", [])),
        warnings=list(meta.get("warnings", [])),
        fingerprint=replay.fingerprint() if fingerprint else None,
    )


def _spread(values: np.ndarray) -> tuple[float, float, float]:
    return float(values.min()), float(values.mean()), float(values.max())


def _usable_of(replay: Replay) -> int:
    columns = {k: to_numpy(v) for k, v in replay.steps.items() if k in ("obs", "next_obs", "valid_td", "terminated")}
    tail = {k: to_numpy(v) for k, v in replay.tail.items()}
    return count_usable(Raw(columns, replay.start, replay.length, "", tail))


def _environment(meta: Mapping[str, Any]) -> str:
    env = meta.get("env_id")
    text = str(env) if env else "none known: no returns are measured"
    if env and meta.get("max_episode_steps"):
        text += f", {meta['max_episode_steps']} steps"
    if meta.get("ref_min_score") is not None and meta.get("ref_max_score") is not None:
        text += f"; score 0 = {meta['ref_min_score']:g}, 100 = {meta['ref_max_score']:g}"
        text += f" ({meta.get('score_kind', 'normalised')})"
    elif env:
        text += "; no reference scores, so no normalised score"
    return text + (f". {meta['score_note'][0].upper()}{meta['score_note'][1:]}" if meta.get("score_note") else "")
