"""RAVL and MBPO — Sims et al. 2024, The Edge-of-Reach Problem in Offline Model-Based RL (arXiv:2402.12527).

Roll-outs of k steps from states of the data (``--data.source model-rollouts``) reach states in their last step that no
roll-out goes on from: the edge of reach. Their values are bootstrapped from and never trained, and a maximum over
actions climbs whatever they happen to be. RAVL answers by pessimism about values, not about dynamics: EDAC's losses,
the minimum of N critics in target and actor and the diversity η, on the roll-outs and a share of the data. With the
true dynamics, where a penalty on the model's uncertainty is 0, it still works.

MBPO (Janner et al. 2019, arXiv:1906.08253) in its offline form is the baseline that fails: two critics, no diversity.
With ``--data.synthetic.penalty`` it is MOPO's (arXiv:2005.13239).

The loop, as in the authors' code (commit 18b5085): every 1,000 updates 50,000 states of the data, k = 5 steps with
actions drawn from the policy of then, five such versions kept, 5 % of a batch real. Where they and this differ:

| detail              | authors' code                           | here                                          |
|---------------------|-----------------------------------------|-----------------------------------------------|
| real rows of 256    | exactly 12                              | each row with probability 0.05                |
| starts of a version | drawn anew without replacement          | the next ones of a random order of all states |
| ring                | 50,000·k·5 rows                         | five versions, fewer rows where roll-outs end |
| model's targets     | Δs and r in their units                 | standardised per column                       |
| model's bounds      | of log σ² shared by all members         | one per member                                |
| model's networks    | SiLU, a decay per layer                 | ReLU, one decay                               |
| held out            | 20 % of rows; the fit ends at a plateau | 20 % of episodes; `trainer.max_steps` updates |

The paper tunes N, k and the share of real data per task; the defaults here are those of the code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning_modules.edac import EDAC
from offpolicy.data.renewal import ROLLOUTS
from offpolicy.training.description import Description


class RAVL(EDAC):
    """EDAC on roll-outs in a world model, robust to states at the edge of reach. Further arguments as of EDAC.

    Args:
        num_critics: N, ≥ 1, and ≥ 2 where η > 0.
        eta: η, weight of the diversity loss, ≥ 0.
    """

    def __init__(self, *, num_critics: int = 10, eta: float = 1.0, **options: Any) -> None:
        super().__init__(num_critics=num_critics, eta=eta, **options)

    def describe(self) -> Description:
        found = super().describe()
        if getattr(self.trainer.datamodule, "source", "real") == ROLLOUTS:  # type: ignore[attr-defined]
            return found
        name, critics, eta = type(self).__name__, self.hparams.num_critics, self.hparams.eta
        note = (
            f"{name} without roll-outs is EDAC with `num_critics` {critics} and `eta` {eta:g}. Pass --data.source "
            f"{ROLLOUTS} and --data.synthetic.model RUN, a run of WorldModel on these data."
        )
        return replace(found, notes=[*found.notes, note])


class MBPO(RAVL):
    """Soft actor-critic on roll-outs in a world model: RAVL without its pessimism. Arguments as of RAVL."""

    def __init__(self, *, num_critics: int = 2, eta: float = 0.0, **options: Any) -> None:
        super().__init__(num_critics=num_critics, eta=eta, **options)
