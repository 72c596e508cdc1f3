"""Advantages that see the record of an answer, in runs: what stands in the store is what the component says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_rl import fit, method

from offpolicy.data.texts.rollouts import OWN
from offpolicy.errors import UsageError
from offpolicy.losses.answers import Answers, Judged
from offpolicy.losses.policy_gradient import component

RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "median": ({"name": "median"}, {"batch_size": 9, "group_size": 3}),
    "risk": ({"name": "risk", "bundle": 2}, {}),
    "unlikeliness": ({"name": "unlikeliness"}, {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_advantages_of_a_run(name: str, policy: Path) -> None:
    """What stands in the store is what the component says of the answers of the last iteration, in their order."""
    spec, options = RUNS[name]
    iterations = 1 if name == "risk" else 2  # what it remembers has moved on with the second
    module = method("GRPO", policy, objective={"advantage": spec}, minibatches=1, **options)
    fit(module, iterations, precision="64-true", held_out=False)
    store = module.course.rollouts.store
    facts = {key: torch.from_numpy(values) for key, values in store.episodes.items()}
    length, logp = torch.from_numpy(store.length), torch.from_numpy(store.steps["logp"])
    known = {key: facts[key] for key in ("reward", "group", "ended", "prompt")}
    answers = Answers(
        **known,
        own=facts["source"] == OWN,
        length=length,
        parts={},
        iteration=iterations,
        mean_logp=torch.segment_reduce(logp.double(), "mean", lengths=length),
    )
    part = component("advantage", spec)
    found = part(answers)
    found = found if isinstance(found, Judged) else Judged(found, torch.ones_like(answers.own))
    torch.testing.assert_close(found.advantage.double(), facts["advantage"].double(), rtol=1e-5, atol=1e-6)
    assert facts["advantage"].any()
    if name == "median":
        assert torch.equal(facts["left_out"].bool(), ~found.kept) and int(found.kept.sum()) == 6
    if name == "risk":
        assert torch.equal(module.objective.own.state_dict()["advantage"]["quantiles"], part.state_dict()["quantiles"])


def test_a_baseline_by_norms_of_gradients(policy: Path) -> None:
    """Rate 0 leaves the policy where it was, so every answer, scored alone, has the norm that the run had of it."""
    module = method("GRPO", policy, objective={"advantage": "opob"}, minibatches=1, lr=0.0)
    fit(module, 1, precision="64-true", held_out=False)
    bound = module.course.rollouts
    facts = {key: torch.from_numpy(values) for key, values in bound.store.episodes.items()}
    with torch.no_grad():
        alone = (module.passes.gather(bound, np.array([row])) for row in range(bound.store.num_episodes))
        norm = torch.cat([module.passes.scores(batch, norms=True).head_norm for batch in alone]).double()
    baseline = torch.empty_like(norm)
    for group in facts["group"].unique():
        some = facts["group"] == group
        square = norm[some].square()
        baseline[some] = (square * facts["reward"][some]).sum() / square.sum()
    torch.testing.assert_close(facts["advantage"].double(), facts["reward"] - baseline, rtol=1e-5, atol=1e-6)
    assert facts["advantage"].any() and norm.std() > 0.01


def test_what_a_run_does_not_have_is_refused(policy: Path) -> None:
    with pytest.raises(UsageError, match=r"a group has 4 answers.*--model.group_size 5"):
        fit(method("GRPO", policy, objective={"advantage": "median"}), 1, held_out=False)
    with pytest.raises(UsageError, match=r"reads the reward 'format'; there is .*early_letters"):
        fit(method("GRPO", policy, objective={"advantage": "ada"}), 1, held_out=False)
