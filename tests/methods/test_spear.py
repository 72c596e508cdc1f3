"""SPEAR: what is stored, what comes back and when, and how much it counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from tiny_rl import fit, make_policy, method

from lightning_modules.spear import SPEAR
from offpolicy.errors import UsageError
from offpolicy.language.rl.lengths import CosineCycle, make_cycle
from offpolicy.losses.policy_gradient import Objective
from offpolicy.losses.tokens import Tokens, Totals


class Seen(Callback):
    """The store, the steps and the baseline of every iteration."""

    def __init__(self) -> None:
        self.found: dict[int, Any] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        found = dict(module.course.rollouts.store.episodes), module.course.steps, list(module.means)
        self.found[module.iteration] = found


def test_successes_come_back_once_there_are_enough(tmp_path: Path) -> None:
    make_policy(tmp_path / "policy")
    seen = Seen()
    module = fit(
        method("SPEAR", tmp_path / "policy", capacity=4, ramp=4, tolerate=1), 12, callbacks=[seen], held_out=False
    )
    came = {k: (facts["group"] < 0).sum() for k, (facts, _, _) in seen.found.items()}
    assert set(came.values()) == {0, 4}  # a power of two, at most the capacity
    for k, (facts, steps, means) in seen.found.items():
        back = facts["group"] < 0
        level = np.median(means)
        assert len(means) == 4 * k and len(steps) == 2 + bool(came[k])
        stored = (facts["advantage"] > 0) & ~facts["left_out"] & ~back
        assert bool(came[k]) == ((facts["reward"][stored] > level).sum() > 6)
        if came[k]:
            np.testing.assert_allclose(facts["advantage"][back], facts["reward"][back] - level)
            assert (facts["advantage"][back] >= 0).all() and sorted(steps[-1]) == np.flatnonzero(back).tolist()
            assert set(facts["weight"][back]) == {module.coefficient(k)}
            after = seen.found.get(k + 1, seen.found[k])[0]
            new = after["iteration"][after["group"] >= 0]
            assert k + 1 not in seen.found or set(new) == {k + 1}  # the store was emptied
    assert SPEAR(policy="x").coefficient(50) == pytest.approx(0.5) and SPEAR(policy="x").coefficient(300) == 1.0
    with pytest.raises(UsageError, match="a store of successes of its own"):
        SPEAR(policy="x", replay_fraction=0.5, replay_window=1)


def test_clip_cov_holds_for_what_comes_back_alone() -> None:
    """The same tokens as new answers and as ones that come back with half the weight."""
    torch.manual_seed(0)
    logp = -torch.rand(4, 6, dtype=torch.float64)
    given = {"mask": torch.ones_like(logp), "behavior_logp": logp - 0.05, "previous_logp": logp}
    advantage = torch.tensor([9.0, -9.0, 5.0, 0.5], dtype=torch.float64)

    def slope(group: int) -> torch.Tensor:
        leaf = logp.clone().requires_grad_()
        columns = {"group": torch.full((4,), group), "weight": torch.full((4,), 1.0 if group > 0 else 0.5)}
        tokens = Tokens(logp=leaf, advantage=advantage, uniform=logp.exp(), columns=columns, **given)
        trust = {"name": "replayed_clip_cov", "share": 0.2, "lb": 1e-3}
        objective = Objective(advantage="dr_grpo", trust=trust, aggregation="seq_sum", weight=("stored",))
        return torch.autograd.grad(objective.loss(tokens, Totals(4, 24, 6, 6), iteration=1)[0], leaf)[0]

    new, back = slope(1), slope(-1)
    assert (new != 0).all() and 0 < int((back == 0).sum()) <= 4  # a fifth of 24 tokens, of those in the band
    kept = back != 0
    torch.testing.assert_close(back[kept], 0.5 * new[kept])


def test_lengths_along_a_cosine() -> None:
    """From 100 to 40 and back in eight iterations: 40 + 60·(1 + cos(π/4))/2 in the second."""
    cycle = CosineCycle(low=0.4, iterations=8)
    assert [cycle.length(k, 100) for k in (0, 1, 2, 3, 5, 9)] == [100, 100, 91, 70, 40, 100]
    with pytest.raises(UsageError, match=r"length_cycle\.low"):
        CosineCycle(low=0.0)
    with pytest.raises(UsageError, match="`length_cycle` is 5; expected parameters"):
        make_cycle(5)
    with pytest.raises(UsageError, match="takes no `lows`"):
        make_cycle({"lows": 0.5})
