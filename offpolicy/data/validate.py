"""Checks of control data at load, and the replay that they end with.

Every fault is named with file, key, first row and remedy. Content faults (NaN, actions outside the bounds) stop the
load or drop their episodes; structural ones (a missing key, unequal lengths) always stop it.
"""

from __future__ import annotations

import numpy as np

from offpolicy.data.doubts import next_obs_doubts, time_limit_doubts, whole_number_doubts
from offpolicy.data.raw import Raw, count_usable
from offpolicy.data.replay import Replay
from offpolicy.data.scan import CHUNK, Scan, drop_or_raise, numbers_text, range_text
from offpolicy.data.spaces import check_some_numbers
from offpolicy.errors import DataError, UsageError, amount
from offpolicy.moved import names_of

JUMP = 50.0  # largest step / median step inside an episode that looks like a missing end
FIRST_ROWS = 8  # of an episode that tell duplicates


def finish(raw: Raw, *, on_bad: str = "error", clip_actions: bool = False) -> Replay:
    """Check the content and build the replay.

    Args:
        raw: what a reader found, structurally sound.
        on_bad: "error", or "drop_episode" to leave out episodes with faulty content and count them.
        clip_actions: clip actions outside the bounds instead of calling them faulty.

    Returns:
        The replay; ``meta`` has ``notes``, ``warnings``, and action bounds (``action_bounds`` says whose).

    Raises:
        DataError: faulty content, or nothing left to train on.
        UsageError: an unknown ``on_bad``.
    """
    if on_bad not in ("error", "drop_episode"):
        raise UsageError(f"`on_bad` is {on_bad!r}; expected 'error' or 'drop_episode'. Pass one of them.")
    if not len(raw.start):
        raise DataError(f"{raw.where} holds no steps; expected at least one episode with a step.")
    check_some_numbers(raw.where, raw.steps["obs"], raw.steps["action"])
    scan = Scan(raw, clip_actions)
    scan.run()
    if scan.faults:
        drop_or_raise(raw, scan, on_bad)
    _counts(raw, scan)
    _bounds(raw)
    warnings = [*raw.meta.get("warnings", []), *raw.warnings]
    meta = {**raw.meta, "notes": raw.notes, "warnings": list(dict.fromkeys(warnings))}
    replay = Replay(raw.steps, start=raw.start, length=raw.length, tail=raw.tail, episodes=raw.episodes, meta=meta)
    if not count_usable(raw):
        raise DataError(
            f"{raw.where} has no transition to train on: {amount(replay.num_steps, 'step')} in "
            f"{amount(replay.num_episodes, 'episode')}, none with a known next observation. Add "
            "`next_observations` or longer episodes."
        )
    return replay


def _counts(raw: Raw, scan: Scan) -> None:
    """Notes and warnings from what the pass counted."""
    terminated = raw.steps["terminated"]
    end = raw.start + raw.length - 1
    say, warn = raw.notes.append, raw.warnings.append
    if scan.clipped and scan.clip_actions:
        say(f"clipped the actions of {amount(scan.clipped, 'row')} to {range_text(raw.meta)}")
    if scan.rounded:
        rows = amount(scan.rounded, "row")
        say(f"clipped the actions of {rows} outside {range_text(raw.meta)} by rounding only")
    if scan.at_bound:
        say(f"actions exactly on a bound: {amount(scan.at_bound, 'row')}; likelihoods of squashed policies clip them")
    if raw.truncated is not None:
        marked = raw.truncated if raw.marked is None else raw.marked
        unfinished = int((~marked & ~terminated[end]).sum())
        both = int((raw.truncated & terminated[end]).sum())
        if unfinished:
            say(f"{amount(unfinished, 'unfinished episode')} without an end mark: kept as cut by a time limit")
        if both:
            say(f"terminated and truncated at once: {amount(both, 'episode')}, taken as terminated")
    single = int((raw.length == 1).sum())
    if single:
        say(f"{amount(single, 'episode')} of one step: used for transitions, not for windows")
    if "reward" in raw.steps and scan.reward_range[0] == scan.reward_range[1]:
        warn(f"all rewards are {scan.reward_range[0]:g}: there is nothing to learn from them")
    if raw.facts.get("terminates") and not terminated.any():
        warn("no step is terminal although this environment has terminal states: the flags may be lost")
    _jumps(raw, scan)
    for text in (*time_limit_doubts(raw), *next_obs_doubts(raw), *whole_number_doubts(raw)):
        warn(text)
    twins = _duplicates(raw)
    if twins:
        warn(
            f"as many steps and the same beginning as another one: {amount(twins, 'episode')}; they may be duplicates, "
            "and a split would share them"
        )


def _jumps(raw: Raw, scan: Scan) -> None:
    if scan.moves is None:
        return
    moves = scan.moves
    moves[raw.start + raw.length - 1] = np.nan
    if scan.covered is not None:
        moves[~scan.covered] = np.nan
    known = moves[np.isfinite(moves)]
    if not len(known):
        return
    median = float(np.sqrt(np.median(known)))
    largest = float(np.sqrt(known.max()))
    if median > 0 and largest / median > JUMP:
        row = int(np.nanargmax(moves))
        count = int((known > (JUMP * median) ** 2).sum())
        raw.warnings.append(
            f"jumps of more than {JUMP:.0f} times the median step inside episodes: {amount(count, 'step')} (largest "
            f"{largest / median:.0f} times, row {row}); the ends of episodes may not all be marked"
        )


def _duplicates(raw: Raw) -> int:
    """How many episodes equal an earlier one in length and in their first rows."""
    if len(raw.start) < 2:
        return 0
    parts = [raw.steps[k] for k in ("obs", "action", "reward") if k in raw.steps]
    digest = raw.length.astype(np.uint64)
    weights = np.random.default_rng(0)
    for t in range(min(FIRST_ROWS, int(raw.length.max()))):
        rows = raw.start + np.minimum(t, raw.length - 1)
        for column in parts:
            width = int(np.prod(column.shape[1:], dtype=np.int64))
            odd = weights.integers(1, 2**63, width, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
            for low in range(0, len(rows), CHUNK):
                chosen = rows[low : low + CHUNK]
                words = np.ascontiguousarray(column[chosen]).reshape(len(chosen), width)
                bits = words.view(np.uint32) if words.dtype == np.float32 else words
                digest[low : low + CHUNK] += bits.astype(np.uint64) @ odd
    return len(digest) - len(np.unique(digest))


def _bounds(raw: Raw) -> None:
    """Record whose action bounds are used; those of the data when the environment's are not known."""
    if "action_n" in raw.facts:
        raw.meta["action_n"] = int(raw.facts["action_n"])
        return
    known = raw.meta.get("action_low") is not None and raw.meta.get("action_bounds") != "data"
    if known:
        raw.meta.setdefault("action_bounds", "environment")
        if np.isfinite([raw.meta["action_low"], raw.meta["action_high"]]).all():
            return
    action = raw.steps["action"]
    covered = int(raw.length.sum()) == len(action)
    spans = [slice(0, len(action))] if covered else [slice(s, s + n) for s, n in zip(raw.start, raw.length)]
    low = np.min([action[span].min(0) for span in spans], axis=0)
    high = np.max([action[span].max(0) for span in spans], axis=0)
    if known:
        raw.notes.append(
            f"actions are bounded by {range_text(raw.meta)}; where a side has no bound, the data's is taken: "
            f"[{numbers_text(low.tolist())}] to [{numbers_text(high.tolist())}]"
        )
        return
    raw.meta |= {"action_low": low.tolist(), "action_high": high.tolist(), "action_bounds": "data"}


__getattr__ = names_of("offpolicy.data.validate")  # the names that stood here in version 0.1
