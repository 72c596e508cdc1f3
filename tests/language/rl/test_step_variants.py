"""Published variants whose parts look at the whole step, in runs of a tiny policy: cut into micro-batches as in one
piece, and gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_rl import fit, method

from offpolicy.files import Table

LOOKS: dict[str, dict[str, Any]] = {
    "stale": {  # answers of the policy before: bounds, the learning rate, tokens that answers share
        "lag": 1,
        "objective": {
            "ratio": "token",
            "trust": {"name": "bapo", "target": 0.45},
            "weight": ["steer", {"name": "mask_negative", "factor": 0.9}],
            "lr": "ess",
        },
    },
    "entropy": {  # drawn tokens, and what remembers the entropy
        "objective": {
            "trust": {"name": "clip_cov", "share": 0.2, "lb": 0.0, "ub": 60.0},
            "entropy": {"name": "siren", "coef": 0.5, "aggregation": "token_mean"},
            "anchors": [
                {"name": "lp_reg", "share": 0.3},
                {"name": "kl_cov", "share": 0.2, "denominator": "previous"},
            ],
        },
    },
    "moves": {  # tokens that the step would move too far, of answers of the policy before
        "lag": 1,
        "objective": {"trust": {"name": "capo", "least": -1e-3, "kl": None}, "lr": "ess"},
    },
    "groups": {
        "objective": {"ratio": "none", "trust": "gtpo", "terms": [{"name": "copg", "beta": 0.5, "coef": 0.1}]},
    },
}


def weights(module: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOKS)
def test_a_variant_is_the_same_however_its_steps_are_cut(name: str, policy: Path, tmp_path: Path) -> None:
    options = {**LOOKS[name], "batch_size": 12, "group_size": 4}

    def trained(rows: int, folder: Path | None = None) -> Any:
        module = method("GRPO", policy, **options, micro_batch_size=rows)
        return fit(module, 4, folder, precision="64-true", held_out=False)

    whole, cut = trained(12, tmp_path), trained(5)
    assert (whole.micro.number, cut.micro.number) == (1, 3)
    torch.testing.assert_close(weights(cut), weights(whole), rtol=1e-6, atol=1e-7)
    assert cut.objective.own.state_dict().keys() == whole.objective.own.state_dict().keys()
    if name == "moves":
        assert all(0 < row["train/ratio/clipped"] < 1 for row in Table(tmp_path / "metrics.csv").rows())
    if name == "stale":
        factors = [row["train/lr/factor"] for row in Table(tmp_path / "metrics.csv").rows()]
        assert all(0 < factor <= 1 for factor in factors) and min(factors) < 1
