"""Parts that look at the step that the optimiser would make: what they see, and where they are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny_rl import fit, method
from transformers import AutoModelForCausalLM

from offpolicy.errors import UsageError
from offpolicy.language.head import output_weight
from offpolicy.language.rl.trial import check_trial

OPEN = {"name": "capo", "least": None, "kl": None}  # rejects nothing


class Moves(Callback):
    """What was found before each step, and how the step moved the output layer."""

    def __init__(self) -> None:
        self.expected: list[torch.Tensor] = []
        self.found: list[torch.Tensor] = []
        self.rejected = 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.expected.append(pl_module.whole_step.move.clone())
        self.before = output_weight(pl_module.model).detach().clone()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.step_ended:
            self.found.append(output_weight(pl_module.model).detach() - self.before)


OTHERS: list[dict[str, Any]] = [
    {"optimizer": "adafactor", "micro_batch_size": 3},
    {"lag": 1, "weight_decay": 0.1},
    {"gradient_clip_val": 1e-3},
]


@pytest.mark.parametrize("given", OTHERS)
def test_the_move_is_that_of_the_optimiser(given: dict[str, Any], policy: Path) -> None:
    """Where nothing is rejected the step is the one that was tried, in pieces too and with a factor on its rate."""
    moves, parts = Moves(), {"trust": OPEN, "lr": "made_parts.slower"}
    limit = {name: value for name, value in given.items() if name == "gradient_clip_val"}
    options = {name: value for name, value in given.items() if name not in limit}
    module = method("GRPO", policy, objective=parts, minibatches=2, **options)
    fit(module, 3, callbacks=[moves], precision="64-true", held_out=False, **limit)
    assert len(moves.found) == 3 and all(move.any() for move in moves.found)
    atol = 1e-7 if "optimizer" in options else 1e-13  # Adafactor rounds weights to float32
    torch.testing.assert_close(torch.stack(moves.found), torch.stack(moves.expected), rtol=1e-9, atol=atol)


def test_nothing_rejected_is_ppo(policy: Path) -> None:
    """To the last bit, in pieces as well."""
    weights = []
    for trust in (OPEN, "ppo"):
        module = fit(method("GRPO", policy, objective={"trust": trust}, micro_batch_size=3), 3, held_out=False)
        weights.append(torch.cat([p.detach().flatten() for p in module.model.parameters()]))
    assert torch.equal(*weights)


MISTAKES: dict[str, dict[str, Any]] = {
    "the output layer is not trained": {"trained": False},
    "weights are cut by 'fsdp2'": {"sharded": True},
    "`optimizer` is 'adamw_8bit'": {"optimizer": "adamw_8bit"},
    "`offload_optimizer` is true": {"offload_optimizer": True},
    "`gradient_clip_algorithm` is 'value'": {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
}


@pytest.mark.parametrize("words", MISTAKES)
def test_where_the_move_cannot_be_known(words: str, policy: Path) -> None:
    usual = {"trained": True, "sharded": False, "optimizer": "adamw", "offload_optimizer": False}
    given = SimpleNamespace(**usual | {"gradient_clip_val": None, "gradient_clip_algorithm": None} | MISTAKES[words])
    model = AutoModelForCausalLM.from_pretrained(policy).requires_grad_(given.trained)
    with pytest.raises(UsageError, match=f"asks how the optimiser would move the output layer.*{words}"):
        check_trial(model, given, given, sharded=given.sharded)


def test_a_run_is_refused_before_it_trains(policy: Path) -> None:
    limit = MISTAKES["`gradient_clip_algorithm` is 'value'"]
    with pytest.raises(UsageError, match="asks how the optimiser would move the output layer"):
        fit(method("GRPO", policy, variant="capo"), 1, held_out=False, **limit)
