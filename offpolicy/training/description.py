"""What a method says of itself when a run begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EVALUATE = "python -m offpolicy.evaluate {folder}"
EXPORT = "python -m offpolicy.export {folder} policy.pt2"  # where no environment is known


@dataclass(frozen=True)
class Description:
    """Lines for the first screen of a run, and the command for its end.

    Args:
        facts: on data and networks, (label, text) each.
        batch: what one update takes, in a few words.
        evaluates: what an evaluation measures, in a few words; empty when there is none.
        notes: sentences.
        samples: a few rows of the data for a person to read before training; empty for none.
        look: the command that looks at a trained method; ``{folder}`` stands for the folder of its run.
    """

    facts: Sequence[tuple[str, str]] = ()
    batch: str = ""
    evaluates: str = ""
    notes: Sequence[str] = ()
    samples: str = ""
    look: str = EVALUATE


def origin(meta: Mapping[str, Any]) -> str:
    """Where data come from, in a few words."""
    return str(meta.get("file") or {"made": "made here"}.get(str(meta.get("source")), meta.get("source", "arrays")))
