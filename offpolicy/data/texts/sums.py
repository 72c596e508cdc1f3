"""Two-digit sums: a task that is made here."""

from __future__ import annotations

import numpy as np

from offpolicy.data.sampling import permutation
from offpolicy.data.texts.formats import Source
from offpolicy.errors import UsageError


def addition(split: str | None = None) -> Source:
    """All two-digit sums ``ab+cd=`` with three-digit answers; sums whose units carry are marked.

    Args:
        split: "train" (9,600 sums; None is the same) or "test" (the other 400, always the same).
    """
    if split not in (None, "train", "test"):
        raise UsageError(f"`split` is '{split}'; expected 'train' or 'test'. Pass one of them.")
    order = permutation(0, 0, 10_000).numpy()
    chosen = np.sort(order[:400] if split == "test" else order[400:])
    a, b = np.divmod(chosen, 100)
    answer = [f"{total:03d}" for total in a + b]
    columns = {
        "prompt": [f"{x:02d}+{y:02d}=" for x, y in zip(a, b)],
        "answer": answer,
        "solution": answer,
        "carry": (a % 10 + b % 10 >= 10).tolist(),
    }
    others = ["train" if split == "test" else "test"]
    return Source("addition", len(chosen), list(columns), columns.__getitem__, {"file": "made here"}, others=others)
