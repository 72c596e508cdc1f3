"""Published variants of the objective, by name: a choice of parts each. Every file has those of one kind."""

from __future__ import annotations

from offpolicy.losses.variants import classic, exploration, trust_regions
from offpolicy.losses.variants.row import Variant

VARIANTS: dict[str, Variant] = {row.name: row for row in (*classic.ROWS, *trust_regions.ROWS, *exploration.ROWS)}

__all__ = ["VARIANTS", "Variant"]
