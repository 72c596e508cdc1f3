"""Branched roll-outs of a policy in a world model, which training draws anew as the policy improves.

Every version starts from states of the data, which come one after another in a random order, and plays the policy of
then for k steps, as MBPO (arXiv:1906.08253) does; the newest versions are trained on beside the data.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offpolicy.compute.processes import gathered, rank, world_size
from offpolicy.data import sampling
from offpolicy.data.mixing import joined, mixed
from offpolicy.data.renewal import ROLLOUTS, Renewal, SyntheticOptions
from offpolicy.data.replay import Replay
from offpolicy.diffusion.measures import regeneration_metrics
from offpolicy.diffusion.opening import check_same_data, open_world_model
from offpolicy.diffusion.pool import Pool, as_alone, on_bar
from offpolicy.diffusion.sampler import PASSING
from offpolicy.environments.terminations import termination_of
from offpolicy.errors import DataError, UsageError
from offpolicy.nn.critics import EnsembleCritic
from offpolicy.training.acting import ActingModule

log = logging.getLogger(__name__)
STATES = 2000  # that critics are asked in, of the first and of the last steps


class RolloutPool:
    """Roll-outs that a method trains on beside the real data, in versions.

    Version v is rolled out at update (v - 1)·``every`` by the policy of that moment; the newest ``keep`` versions are
    trained on. Roll-out n of a run starts in the n-th state of a random order of the data, which is followed by another
    one, and depends on weights, seed and n alone.

    Args:
        real: the data.
        source: "model-rollouts".
        options: model and numbers.

    Raises:
        UsageError: no model, one that rolls nothing out, or one of other data.
    """

    def __init__(self, real: Replay, source: str, options: SyntheticOptions) -> None:
        self.real = real
        self.options = options.of_source(source)
        self.model: Any = open_world_model(options.model)
        self.replay: Replay | None = None  # the roll-outs of now
        check_same_data(self.model, real, options.model, "world model", "WorldModel")
        own = getattr(self.model, "termination", None)
        self.termination, self.ends = termination_of(real.meta, self.model.sizes.obs_dim)
        if own is not None:
            self.termination, self.ends = own, f"end by the rule of {type(self.model).__name__}"

    def facts(self, updates: int) -> list[tuple[str, str]]:
        """Lines of the first screen of a run with this many updates in all."""
        o = self.options
        never = ", which this run does not reach" if o.every >= updates else ""
        kept = f"the newest {o.keep} versions are kept" if o.keep > 1 else "the newest version is kept"
        penalty = f"; {o.penalty:g} times the model's uncertainty off each reward" if o.penalty else ""
        return [
            ("synthetic", f"{o.trajectories:,} roll-outs of {o.steps} steps, {100 * o.share:.4g} % of a batch's rows"),
            ("", f"again every {o.every:,} updates{never}, by the policy of then; {kept}"),
            ("", f"by {o.model}; they {self.ends}{penalty}"),
        ]

    def renew(self, policy: Any, folder: Path) -> Replay:
        """Roll the version that is due out; returns what is trained on, with the real data."""
        o, before = self.options, self.replay
        version = policy.global_step // o.every + 1
        with as_alone(policy):
            draws = self._draws(policy, tell=before is None)
            found = self._rolled(policy, version, draws)
            fresh = self._episodes(found, version)
            news = self._news(policy, fresh, found)
        kept = np.zeros(0, bool) if before is None else before.episodes["rolled"] > version - o.keep
        parts = [before.filter(kept)] if before is not None and kept.any() else []
        self.replay = joined([*parts, fresh], meta=fresh.meta)
        self.replay.version = version
        news |= {"synthetic/version": float(version), "synthetic/steps": float(self.replay.num_steps)}
        policy.meter.add({name: torch.tensor(value, device=policy.device) for name, value in news.items()})
        return mixed(self.real, self.replay, o.share)

    def take(self, replay: Replay) -> Replay:
        """Go on with roll-outs from disk; returns what is trained on."""
        self.replay = replay
        return mixed(self.real, replay, self.options.share)

    # -- rolling out ---------------------------------------------------------------------------------------------------

    def _draws(self, policy: Any, tell: bool) -> bool:
        """Whether actions are drawn from the policy; a deterministic one plays its action as it is.

        Raises:
            UsageError: the policy gives no action for one observation alone.
        """
        policy.check_one_seed()
        name, kind = type(policy).__name__, type(policy)
        if kind.policy is ActingModule.policy or kind.agent is not ActingModule.agent:
            raise UsageError(
                f"{name} gives no action for one observation alone, and roll-outs are played by such actions; expected "
                f"another method than {name} with `data.source` {ROLLOUTS!r}. Choose RAVL, MBPO, SAC or the like."
            )
        obs = policy.normalizer.obs_scale.new_zeros(1, policy.sizes.obs_dim)
        policy.policy(obs)  # raises the error of a method that does not act
        try:
            policy.sample_action(obs, obs.new_zeros(1, policy.sizes.action_dim))
        except UsageError:
            if tell and rank() == 0:
                log.warning("%s is deterministic: roll-outs take its actions as they are, without noise.", name)
            return False
        return True

    def starts(self, numbers: Tensor, seed: int) -> np.ndarray:
        """The rows (n,) of the data in which roll-outs of these numbers (n,) begin."""
        count = self.real.num_steps
        rows = np.empty(len(numbers), np.int64)
        turn = (numbers // count).numpy()
        for k in np.unique(turn):
            key = sampling.keys(seed, "start of a roll-out", torch.tensor([k], device="cpu"))[0]
            order = sampling.bits(key, torch.arange(count, device="cpu")).argsort(stable=True)
            here = turn == k
            rows[here] = self.real.rows[order[numbers[torch.from_numpy(here)] % count].numpy()]
        return rows

    def _rolled(self, policy: Any, version: int, draws: bool) -> dict[str, np.ndarray]:
        """Roll-outs of a version as the world model gives them; the processes of a run share the work."""
        o, say = self.options, on_bar(policy.trainer, self.options.trajectories)
        seed = policy.seed if o.seed is None else o.seed
        self.model.to(policy.device)
        first, pieces = (version - 1) * o.trajectories, -(-o.trajectories // o.batch_size)
        own: dict[int, dict[str, np.ndarray]] = {}
        for piece in range(rank(), pieces, world_size()):
            place = piece * o.batch_size
            numbers = torch.arange(place, min(place + o.batch_size, o.trajectories), device="cpu") + first
            obs = self.real.take(self.starts(numbers, seed), ("obs",))["obs"]
            fixed = {"termination": self.termination, "sampled": draws, "successors": True}
            found = self.model.rollout(obs, policy, o.steps, seed, first=int(numbers[0]), **fixed)
            if o.penalty:
                flat = [found[name].flatten(0, 1) for name in ("obs", "action")]
                found["uncertainty"] = self.model.uncertainty(*flat).reshape(found["reward"].shape)
            found["action"] = self.model.normalizer.environment_action(found["action"])
            own[piece] = {name: value.cpu().numpy() for name, value in found.items()}
            if say is not None:
                say(place + len(numbers))
        every = {piece: found for part in gathered(own) for piece, found in part.items()}
        return {name: np.concatenate([every[piece][name] for piece in range(pieces)]) for name in every[0]}

    def _episodes(self, found: dict[str, np.ndarray], version: int) -> Replay:
        """Roll-outs as episodes that end at their first terminated step, each with the successor of its last step."""
        o, ended = self.options, found["terminated"].astype(bool)
        length = np.where(ended.any(1), ended.argmax(1) + 1, o.steps)
        kept = np.arange(o.steps) < length[:, None]
        bad = np.zeros(len(length), bool)
        for name in found.keys() - {"terminated"}:
            bad |= (~np.isfinite(found[name]).reshape(*kept.shape, -1).all(2) & kept).any(1)
        if bad.any():
            raise DataError(
                f"{bad.sum():,} of {len(bad):,} roll-outs have numbers that are not finite (first: {bad.argmax()}); "
                "expected numbers. Train the world model longer, or roll out fewer steps: --data.synthetic.steps."
            )
        steps = {name: np.ascontiguousarray(found[name][kept]) for name in ("obs", "action", "reward", "terminated")}
        low, high = (self.real.meta.get(name) for name in ("action_low", "action_high"))
        if low is not None and high is not None:  # a rounding may have left the bounds
            steps["action"] = np.clip(steps["action"], *(np.asarray(bound, np.float32) for bound in (low, high)))
        if o.penalty:
            steps["reward"] = (steps["reward"] - o.penalty * found["uncertainty"][kept]).astype(np.float32)
        return Replay(
            steps,
            start=np.cumsum(length) - length,
            length=length,
            tail={"obs": found["next_obs"][np.arange(len(length)), length - 1]},
            episodes={"rolled": np.full(len(length), version)},
            meta={
                **{key: value for key, value in self.real.meta.items() if key not in PASSING},
                "name": f"{self.real.meta.get('name', 'data')} rolled out",
                "source": "synthetic",
                "drawn": asdict(o),
            },
        )

    # -- news ----------------------------------------------------------------------------------------------------------

    def _news(self, policy: Any, fresh: Replay, found: dict[str, np.ndarray]) -> dict[str, float]:
        """Numbers about the new version, for the next row of metrics."""
        o = self.options
        news = regeneration_metrics(None, fresh, None, self.real, novelty_rows=0)
        if o.penalty:
            news.pop("synthetic/reward_error", None)  # it would have the penalty in it
            news["synthetic/uncertainty"] = float(found["uncertainty"].mean())
        news["synthetic/ended"] = float(np.asarray(fresh.steps["terminated"]).mean(dtype=np.float64))
        whole = ~found["terminated"].any(1)
        critic = getattr(policy, "critic", None)
        if not isinstance(critic, EnsembleCritic) or not whole.any():
            return news
        pick = np.flatnonzero(whole)[:: -(-int(whole.sum()) // STATES)]
        with torch.no_grad():
            spreads = []
            for obs in (found["next_obs"][pick, o.steps - 1], found["obs"][pick, 0]):
                x = policy.normalized(obs)
                spreads.append(spread_of_critics(critic(x, policy.policy(x).clamp(-1.0, 1.0))))
        (last, last_gap), (first, first_gap) = spreads
        if first > 0 and first_gap > 0:  # one critic does not disagree with itself
            news |= {"synthetic/edge_q_std": last / first, "synthetic/edge_q_gap": last_gap / first_gap}
        return news


def pool_of(real: Replay, source: str, options: SyntheticOptions) -> Renewal:
    """What draws the data of a source anew; arguments and errors as of :class:`RolloutPool` and :class:`Pool`."""
    return (RolloutPool if source == ROLLOUTS else Pool)(real, source, options)


def spread_of_critics(q: Tensor) -> tuple[float, float]:
    """Standard deviation among critics, and their mean less their smallest, each the mean over states.

    Args:
        q: (E, n).
    """
    gap = q.mean(0) - q.amin(0)
    return float(q.std(0, correction=0).mean()), float(gap.mean())
