"""What language data hold, for a person to read before training."""

from __future__ import annotations

from typing import Any

from offpolicy.data.replay import Replay


def report(replay: Replay) -> str:
    """The data report: counts, lengths, what was decided about the format, notes and warnings."""
    return f"{replay.meta.get('name')}: {replay.num_episodes:,} texts, {replay.num_steps:,} tokens"


def samples(replay: Replay, tokenizer: Any, n: int = 2) -> str:
    """The first ``n`` rows decoded, with the boundary between prompt and answer marked."""
    return ""
