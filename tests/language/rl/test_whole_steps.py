"""What parts of an objective ask for: facts of the whole step, whole groups, columns, records of answers, the rate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from made_parts import MANY_PARTS
from tiny_rl import fit, method

from offpolicy.errors import UsageError
from offpolicy.files import Table
from offpolicy.language.rl.objective import objective_facts
from offpolicy.language.rl.tokens import numbers
from offpolicy.language.rl.whole_step import pieces
from offpolicy.language.stepping import MicroBatches
from offpolicy.losses.policy_gradient import Objective


def weights(module: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.model.parameters()])


def trained(policy: Path, **options: Any) -> Any:
    return fit(method("GRPO", policy, **options), 4, precision="64-true", held_out=False)


@pytest.mark.parametrize("number, sizes", [(1, [9]), (2, [6, 3]), (3, [4, 2, 3]), (5, [4, 2, 3, 0, 0])])
def test_pieces_hold_whole_groups(number: int, sizes: list[int]) -> None:
    rows, group = np.arange(9)[::-1].copy(), np.array([7, 7, 7, 2, 2, 5, 5, 5, 5])
    cut = pieces(rows, group, number, whole=True)
    assert [len(part) for part in cut] == sizes and np.concatenate(cut).tolist() == rows.tolist()
    assert [len(part) for part in pieces(rows[:0], group, number, whole=True)] == [0] * number
    assert [len(part) for part in pieces(rows, group, 2, whole=False)] == [5, 4]


@pytest.mark.parametrize(
    "wanted, longest, rows, number", [(None, 100, 32, 1), (None, 2000, 8, 4), (12, 9, 8, 4), (17, 9, 16, 2)]
)
def test_micro_batches_of_whole_groups(wanted: int | None, longest: int, rows: int, number: int) -> None:
    cut = MicroBatches()
    cut.cut(32, 1, wanted, longest, together=8)
    assert (cut.rows, cut.number) == (rows, number)
    with pytest.raises(UsageError, match=r"`micro_batch_size` is 7.*there are 8; expected ≥ 8"):
        cut.cut(32, 1, 7, longest, together=8)


@pytest.mark.slow
def test_a_step_is_the_same_however_it_is_cut(policy: Path, tmp_path: Path) -> None:
    """Facts of the step, terms over groups, left-out answers and the factor on the rate; in one piece, and in two."""
    options = {"objective": MANY_PARTS, "batch_size": 12, "group_size": 4}
    whole = trained(policy, **options, micro_batch_size=12)
    assert whole.micro.number == 1
    cut = fit(method("GRPO", policy, **options, micro_batch_size=5), 4, tmp_path, precision="64-true", held_out=False)
    assert cut.micro.number == 3 and cut.micro.rows == 4
    torch.testing.assert_close(weights(cut), weights(whole), rtol=1e-6, atol=1e-7)
    for part, state in cut.objective.own.state_dict().items():
        assert state == whole.objective.own.state_dict()[part]
    assert cut.objective.own.state_dict()["weight/0"] == {"looks": 4}
    store = cut.course.rollouts.store
    out = store.episodes["left_out"]
    assert 0 < out.sum() < len(out)
    assert all(not out[rows].any() for rows in cut.course.steps)
    rows = Table(tmp_path / "metrics.csv").rows()
    assert all(0 < row["train/lr/factor"] < 1 and row["train/lr/skipped"] == 0 for row in rows)
    assert all(0 < row["train/answers/left_out"] < 1 for row in rows)


def test_the_record_of_the_answers(policy: Path) -> None:
    """The advantage stands in the store as the part computes it from what the policy of then thought of the answers."""
    module = fit(method("GRPO", policy, objective={"advantage": "made_parts.LeavesOut"}, minibatches=1), 1,
                 precision="64-true", held_out=False)  # fmt: skip
    store, facts = module.course.rollouts.store, module.course.rollouts.store.episodes
    mean = np.add.reduceat(store.steps["previous_logp"], store.start) / store.length
    kept = ~facts["left_out"]
    rest = facts["advantage"] - facts["reward"] + mean - 0.001 * 8  # what is left is a tenth of the mean entropy
    assert (rest[kept] > 0).all() and (rest[kept] < 0.1 * math.log(64) + 1e-6).all()


@pytest.mark.slow
def test_a_skipped_step_moves_nothing(policy: Path, tmp_path: Path) -> None:
    seen = []

    class Weights(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
            state = trainer.optimizers[0].state
            moments = torch.cat([s["exp_avg"].flatten() for s in state.values()]) if state else torch.zeros(1)
            seen.append((weights(module).clone(), moments.clone(), trainer.optimizers[0].param_groups[0]["lr"]))

    module = method("GRPO", policy, objective={"lr": "made_parts.skips"}, minibatches=1)
    module.run.log_every = 1
    fit(module, 3, tmp_path, callbacks=[Weights()], held_out=False)
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(seen[1][0], seen[2][0]) and [one[2] for one in seen] == [1e-2, 0.0, 1e-2]
    rows = Table(tmp_path / "metrics.csv").rows()
    assert [row["train/lr/skipped"] for row in rows] == [0, 1, 0]


def test_what_cannot_be_had_is_refused(policy: Path) -> None:
    with pytest.raises(
        UsageError, match=r"the column `rewards`, which answers do not have here.*Did you mean 'reward'"
    ):
        fit(method("GRPO", policy, objective={"weight": ["made_parts.asks"]}), 1, held_out=False)
    with pytest.raises(UsageError, match=r"the column `segment[a-z_]*`, which answers do not have here") as found:
        fit(method("GRPO", policy, objective={"trust": "segment"}), 1, held_out=False)
    assert "Did you mean" not in str(found.value)
    with pytest.raises(UsageError, match=r"`lag` is 1, and the advantage asks for the entropy"):
        fit(method("GRPO", policy, objective={"advantage": "made_parts.LeavesOut"}, lag=1), 1, held_out=False)
    with pytest.raises(UsageError, match=r"`micro_batch_size` is 2.*expected ≥ 4"):
        fit(method("GRPO", policy, objective={"terms": ["made_parts.Pairs"]}, micro_batch_size=2), 1, held_out=False)


@pytest.mark.slow
def test_facts_over_the_vocabulary(policy: Path) -> None:
    """The same in one piece and in several; the mean log-ratio is 0 in the first step, when nothing has moved."""
    part = {"objective": {"anchors": ["made_parts.Vocabulary"]}, "batch_size": 8}
    whole, cut = trained(policy, **part), trained(policy, **part, micro_batch_size=3)
    torch.testing.assert_close(weights(cut), weights(whole), rtol=1e-6, atol=1e-7)
    rows = whole.course.rows(2)
    bound = whole.course.rollouts
    with torch.no_grad():
        tokens = whole.tokens(whole.passes.gather(bound, rows))
    assert tokens.mean_log_ratio is not None and float(tokens.mean_log_ratio.abs().max()) > 1e-6  # two steps have moved
    assert numbers(0, 5, torch.tensor([3, 9]), 4)[1].tolist() == numbers(0, 5, torch.tensor([9]), 7)[0, :4].tolist()


def test_the_first_screen_says_what_parts_cost() -> None:
    """One pass more where the step is cut, scores of new answers, and turns that answers do not have."""
    cheap, asking = Objective(), Objective(advantage="made_parts.LeavesOut", weight=({"name": "made_parts.AboveMean"},))
    assert objective_facts(cheap, 4) == []
    assert [line for line, _ in objective_facts(asking, 1)] == ["answers", "turns"]
    lines = dict(objective_facts(asking, 2))
    assert "every micro-batch goes through the policy once more" in lines["step"]
    assert "one turn each" in lines["turns"] and "scored at once" in lines["answers"]
