"""Log-probabilities of the answers under the policy at the start of an iteration and under the base."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offpolicy.compute import processes
from offpolicy.compute.devices import send
from offpolicy.data.replay import Replay
from offpolicy.data.texts import rollouts as store_of
from offpolicy.data.texts.rollouts import BoundRollouts, Rollouts, external_tokens, newest_tokens
from offpolicy.data.texts.sequences import runs, spans
from offpolicy.language.head import FinalStates
from offpolicy.language.reference import evaluating
from offpolicy.language.rl.advantages import from_critic
from offpolicy.language.rl.forward import Forward
from offpolicy.language.sharding import cut, cut_as, exchange
from offpolicy.losses.answers import OF_POLICY
from offpolicy.losses.health import effective_sample_size
from offpolicy.losses.policy_gradient import Objective

Weights = dict[str, Tensor]


class Scoring:
    """Scores of answers under earlier weights of the policy.

    Args:
        passes: through the policy as it is now.
        objective: whose parts say what they read.
        on_policy: whether the engine draws from the weights that it is given.
        dropout: whether the policy drops numbers out in training.

    Attributes:
        base: trained weights of the base of the divergence.
        base_moved: whether the base is another one than the policy at its start.
        previous: trained weights of π_k, where the objective asks for its whole distribution; else None.
        hears: whether the forward pass of the first step says what π_k thinks of its rows.
    """

    def __init__(self, passes: Forward, objective: Objective, *, on_policy: bool, dropout: bool) -> None:
        self.passes, self.objective, self.on_policy = passes, objective, on_policy
        self.hears = not (objective.uses_critic or dropout or "mean_log_ratio" in objective.reads)
        self.base: Weights = self._snapshot()
        self.base_moved = False
        self.previous: Weights | None = None
        self._said: list[Any] = []  # what the first step heard: rows, and log-probabilities of their tokens

    # -- earlier weights -----------------------------------------------------------------------------------------------

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.passes.model.named_parameters() if p.requires_grad}

    def _snapshot(self) -> Weights:
        """A copy of the trained weights of the policy."""
        with cut(self.passes.model):
            return {name: p.detach().clone() for name, p in self._trained().items()}

    def move_base(self) -> None:
        """Take the policy as it is now for the base; no answer may stay in the store then."""
        self.base, self.base_moved = self._snapshot(), True

    @contextlib.contextmanager
    def under(self, weights: Weights) -> Iterator[None]:
        """Within it, the policy has these weights."""
        self._exchange(weights)
        try:
            yield
        finally:
            self._exchange(weights)

    def _exchange(self, weights: Weights) -> None:
        with cut(self.passes.model):
            for name, p in self._trained().items():
                weights[name] = exchange(p, weights[name])

    def others(self, batch: Rollouts) -> dict[str, FinalStates]:
        """The states, at the tokens of a batch, of every policy to which the objective wants the exact divergence."""
        found = {}
        for name, weights in (("base", self.base), ("previous", self.previous)):
            if f"{name}_kl" in self.objective.reads and weights is not None:
                with evaluating(self.passes.model), self.under(weights):
                    found[name] = self.passes.states(batch)
        return found

    def state_dict(self) -> dict[str, Any]:
        kept = {"base": self.base if self.base_moved else None, "previous": self.previous}
        return {name: w and {k: v.cpu() for k, v in w.items()} for name, w in kept.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device, own = self.passes.device, self._trained()
        found = {name: w and {k: cut_as(v.to(device), own[k]) for k, v in w.items()} for name, w in state.items()}
        if found["base"] is not None:
            self.base, self.base_moved = found["base"], True
        self.previous = found["previous"]

    # -- log-probabilities ---------------------------------------------------------------------------------------------

    def score(self, bound: BoundRollouts, steps: Sequence[np.ndarray], k: int, *, base: bool) -> Replay:
        """The store with the columns of this iteration, filled in for the rows of its steps.

        The first step is made by π_k itself, so its own forward pass says what π_k thinks of its rows (:meth:`hear`),
        except where a critic needs all of them at once, or dropout makes that pass another.

        Args:
            bound: the store with its problems.
            steps: the rows of each step of the iteration.
            k: the iteration.
            base: whether somebody asks what the base thinks.
        """
        store, objective = bound.store, self.objective
        self.previous = self._snapshot() if "previous_kl" in objective.reads else None
        self._said = []
        rows, critic = np.unique(np.concatenate(steps)), objective.uses_critic
        known = np.setdiff1d(rows, steps[0]) if self.hears else rows
        columns: dict[str, Any] = dict(store.steps)
        more = [
            *(["old_value"] if critic else []),
            *(["previous_mean_logp"] if "mean_log_ratio" in objective.reads else []),
        ]
        if "previous_logp" in columns and not more:  # the advantage asked for it; the first step says it anew
            columns["previous_logp"] = np.array(columns["previous_logp"])
            columns["previous_logp"][spans(store, steps[0])[: None if self.hears else 0]] = np.nan
            known = known[np.isnan(columns["previous_logp"][store.start[known]])]

        def fill(where: np.ndarray, found: dict[str, np.ndarray]) -> None:
            for name, values in found.items():
                columns.setdefault(name, np.full(store.num_steps, np.nan, values.dtype))
                columns[name][spans(store, where)] = values

        found = self.columns(bound, known, ("previous_logp", *more))
        fill(known, found | (from_critic(objective, store, rows, found["old_value"]) if critic else {}))
        if base:
            said = columns.get("base_logp", np.full(store.num_steps, np.nan))
            new = rows[np.isnan(said[store.start[rows]])]  # the base stays the same as long as answers are kept
            with self.under(self.base):
                fill(new, self.columns(bound, new, ("base_logp",)))
        else:
            columns.pop("base_logp", None)
        columns["logp"] = np.where(self._drawn_now(store, k), columns["previous_logp"], columns["logp"])
        return Replay(columns, start=store.start, length=store.length, episodes=store.episodes)

    def told(self, bound: BoundRollouts, k: int) -> dict[str, np.ndarray]:
        """What the advantage reads of ``OF_POLICY`` on the new answers, (E,) float64 each.

        Args:
            bound: the new answers of an iteration, which are noted to be scored.
            k: the iteration.
        """
        wanted, store = self.objective.reads_of_answers & OF_POLICY, bound.store
        if not wanted or self.objective.uses_critic:
            return {}
        more = {"entropy": "mean_entropy", "head_norm": "head_norm"}
        names = ("previous_logp", *(name for name, reader in more.items() if reader in wanted))
        found = self.columns(bound, np.arange(store.num_episodes), names)
        store.steps["previous_logp"], drawn = found["previous_logp"], np.asarray(store.steps["logp"])  # type: ignore[index]
        by_now = self._drawn_now(store, k) | external_tokens(store) | np.isnan(drawn)
        found["logp"] = np.where(by_now, found["previous_logp"], drawn)
        found["gap"] = np.where(external_tokens(store), 0.0, found["previous_logp"] - found["logp"])
        of_answers = (
            {"head_norm": found.pop("head_norm")[store.start].astype(np.float64)} if "head_norm" in found else {}
        )
        sums = {name: np.add.reduceat(values, store.start, dtype=np.float64) for name, values in found.items()}
        of_answers |= {f"mean_{name}": total / store.length for name, total in sums.items()} | {
            "log_weight": sums["gap"]
        }
        return {name: of_answers[name] for name in wanted}

    def _drawn_now(self, store: Replay, k: int) -> np.ndarray:
        """Tokens that π_k drew, so that what it thinks of them is the behaviour; (tokens of the store,) bool.

        Decided per answer, by its version, which is that of its newest window; an engine that never draws from the
        weights it is given says so.
        """
        fresh = np.repeat(store.episodes["policy_version"] == k, store.length)
        fresh &= ~external_tokens(store) & newest_tokens(store)
        if self.on_policy:
            return fresh
        return fresh & np.isnan(np.asarray(store.steps["logp"]))

    def hear(self, batch: Rollouts, logp: Tensor) -> None:
        """Note what π_k says of a batch of the first step, (B, T)."""
        if self.hears:
            inside = torch.arange(logp.shape[1], device="cpu") < batch.answer.length[:, None]
            self._said.append((batch.row.numpy(), logp.detach().cpu()[inside].numpy()))

    def keep(self, store: Any, k: int) -> None:
        """Put into the store what π_k said of the rows of the first step, for the steps and iterations to come."""
        if not self.hears:
            return
        drawn = self._drawn_now(store, k)
        for rows, logps in (part for parts in processes.gathered(self._said) for part in parts):
            place = spans(store, rows)
            for name in ("previous_logp", "logp"):
                store.steps[name] = store.steps[name].astype(logps.dtype, copy=False)
            store.steps["previous_logp"][place] = logps
            store.steps["logp"][place] = np.where(drawn[place], logps, store.steps["logp"][place])
        self._said = []
        store.__dict__.pop("_fingerprint", None)

    def columns(self, bound: BoundRollouts, rows: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns of the tokens of these rows, ascending, under the weights of now; processes share the work."""
        passes, store = self.passes, bound.store
        by_length = rows[np.argsort(-bound.lengths[rows].sum(1), kind="stable")]
        by_length = by_length[np.argsort(store.episodes["group"][by_length], kind="stable")]
        mine, parts = np.array_split(by_length, processes.world_size())[processes.rank()], []
        for start in range(0, len(mine), passes.rows):
            batch = passes.gather(bound, mine[start : start + passes.rows])
            scores = passes.scores(
                batch,
                entropy="entropy" in names,
                vocabulary="previous_mean_logp" in names,
                norms="head_norm" in names,
            )
            values: dict[str, Any] = {
                "previous_logp": scores.logps,
                "base_logp": scores.logps,
                "entropy": scores.entropy,
            }
            values["previous_mean_logp"] = scores.mean_logp
            if scores.head_norm is not None:  # one number of all tokens of an answer
                values["head_norm"] = scores.head_norm.repeat_interleave(send(batch.answer.length, passes.device))
            if "old_value" in names:
                values["old_value"] = passes.values(batch, scores)
            parts.append((batch.row.numpy(), {name: values[name].cpu().numpy() for name in names}))
        length = store.length[rows]
        first, size = np.cumsum(length) - length, int(length.sum())
        out: dict[str, np.ndarray] = {name: np.full(size, np.nan, np.float32) for name in names}
        for part in processes.gathered(parts):
            for some, values in part:
                place = runs(first[np.searchsorted(rows, some)], store.length[some])
                for name in names:
                    out[name] = out[name].astype(values[name].dtype, copy=False)
                    out[name][place] = values[name]
        return out

    # -- admission -----------------------------------------------------------------------------------------------------

    def admit(
        self,
        problems: Replay,
        store: Replay | None,
        draw: Callable[[Replay | None], list[np.ndarray]],
        k: int,
        *,
        least: float,
    ) -> tuple[Replay | None, list[np.ndarray]]:
        """Draw replayed groups, forgetting iterations whose answers are too far from the policy.

        Args:
            problems: what the answers answer.
            store: of the answers of earlier iterations; None where there are none.
            draw: the groups of each sweep, of what is left of a store.
            k: the iteration that begins.
            least: effective sample size, as a share of their number, that answers of an iteration must have to stay.

        Returns:
            What is left of the store, and the groups of each sweep.
        """
        while True:
            old = draw(store)
            if not (least and store is not None):
                return store, old
            rows = np.flatnonzero(np.isin(store.episodes["group"], np.concatenate(old)))
            now = self.columns(BoundRollouts(problems, store), rows, ("previous_logp",))["previous_logp"]
            gap = torch.from_numpy(now - np.asarray(store.steps["logp"])[spans(store, rows)]).double()
            log_weight = torch.segment_reduce(gap, "sum", lengths=torch.from_numpy(store.length[rows]))
            version = store_of.iteration_of(store)
            far = [
                v
                for v in np.unique(version[rows])
                if effective_sample_size(log_weight[torch.from_numpy(version[rows] == v)]) < least
            ]
            if not far:
                return store, old
            store = store_of.select_answers(store, ~np.isin(version, far))
