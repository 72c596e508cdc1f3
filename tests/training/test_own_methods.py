"""What a class of a user's own lacks is one sentence that says what to write."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import offpolicy as op
from offpolicy.errors import UsageError
from offpolicy.nn.policies import DeterministicPolicy
from offpolicy.training.meter import Meter


class Bare(op.OfflineModule):
    pass


class Built(op.OfflineModule):
    def __init__(self, batch_size: int = 7) -> None:
        super().__init__()
        self.save_hyperparameters()

    def build(self, sizes: op.Sizes) -> None:
        self.actor = DeterministicPolicy(sizes.obs_dim, sizes.action_dim, (4,))


SIZES = op.Sizes(obs_dim=2, action_dim=1)


def test_what_is_not_defined_is_named() -> None:
    with pytest.raises(UsageError, match=r"Bare must define build\(sizes\)"):
        Bare().initialize(SIZES, seed=0)
    built = Built().initialize(SIZES, seed=0)
    assert built.common.batch_size == 7  # arguments that the base acts on
    with pytest.raises(UsageError, match=r"Built must define learning_rates\(\), e.g. {'actor': 3e-4}"):
        built.configure_optimizers()
    with pytest.raises(UsageError, match=r"Built must define policy\(obs\)"):
        built.policy(torch.zeros(1, 2))


@pytest.mark.parametrize("returned", [torch.tensor(0.5), (torch.tensor(0.5), {}), None])
def test_an_update_without_a_dict_of_metrics(returned: Any) -> None:
    with pytest.raises(UsageError, match=r"expected a dict of metrics by name. Write, .* {'loss': loss.detach\(\)}"):
        Meter().add(returned)
