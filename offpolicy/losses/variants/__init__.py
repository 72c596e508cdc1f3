"""Published variants of the objective, by name: a choice of parts each. Every file has those of one kind."""

from __future__ import annotations

from offpolicy.losses.variants import budget, classic, exploration, group_statistics, methods, replay, trust_regions
from offpolicy.losses.variants.row import Variant

ROWS = (
    *classic.ROWS,
    *group_statistics.ROWS,
    *budget.ROWS,
    *trust_regions.ROWS,
    *exploration.ROWS,
    *replay.ROWS,
    *methods.ROWS,
)
VARIANTS: dict[str, Variant] = {row.name: row for row in ROWS}

__all__ = ["ROWS", "VARIANTS", "Variant"]
