"""What the policy at the start of an iteration, and the base of the divergence, think of the answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offpolicy.compute import processes
from offpolicy.data.replay import Replay
from offpolicy.data.texts import rollouts as store_of
from offpolicy.data.texts.rollouts import OWN, BoundRollouts, Rollouts
from offpolicy.data.texts.sequences import runs, spans
from offpolicy.language.head import FinalStates, final_states
from offpolicy.language.reference import evaluating
from offpolicy.language.rl.advantages import from_critic
from offpolicy.losses.health import effective_sample_size

Weights = dict[str, Tensor]


class Scoring:
    """Scores of answers under earlier weights of a method in training.

    Attributes:
        base: trained weights of the base of the divergence.
        base_moved: whether they are others than those the policy started from.
        previous: those of π_k, where the objective asks for its whole distribution; else None.
    """

    def __init__(self, method: Any) -> None:
        self.method = method
        self.base: Weights = self._snapshot()
        self.base_moved = False
        self.previous: Weights | None = None
        self._said: list[Any] = []  # by the first step: rows, and log-probabilities of their tokens

    # -- earlier weights -----------------------------------------------------------------------------------------------

    def _snapshot(self) -> Weights:
        """A copy of the trained weights of the policy."""
        return {name: p.detach().clone() for name, p in self.method.model.named_parameters() if p.requires_grad}

    def move_base(self) -> None:
        """Take the policy as it is now for the base; no answer may stay in the store then."""
        self.base, self.base_moved = self._snapshot(), True

    @contextlib.contextmanager
    def under(self, weights: Weights) -> Iterator[None]:
        """Within it, the policy has these weights."""
        own = {name: p for name, p in self.method.model.named_parameters() if p.requires_grad}
        for name, p in own.items():
            p.data, weights[name] = weights[name], p.data
        try:
            yield
        finally:
            for name, p in own.items():
                p.data, weights[name] = weights[name], p.data

    def others(self, batch: Rollouts) -> dict[str, FinalStates]:
        """The states of those policies to which the objective wants the exact divergence, at the tokens of a batch."""
        found = {}
        for name, weights in (("base", self.base), ("previous", self.previous)):
            if f"{name}_kl" in self.method.objective.reads and weights is not None:
                with evaluating(self.method.model), self.under(weights):
                    found[name] = final_states(self.method.model, self.method.layout(batch))
        return found

    def state_dict(self) -> dict[str, Any]:
        kept = {"base": self.base if self.base_moved else None, "previous": self.previous}
        return {name: w and {k: v.cpu() for k, v in w.items()} for name, w in kept.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self.method.device
        found = {name: w and {k: v.to(device) for k, v in w.items()} for name, w in state.items()}
        if found["base"] is not None:
            self.base, self.base_moved = found["base"], True
        self.previous = found["previous"]

    # -- log-probabilities ---------------------------------------------------------------------------------------------

    def score(self, bound: BoundRollouts, steps: Sequence[np.ndarray], k: int) -> Replay:
        """The store with the columns of this iteration, filled in for the rows of its steps.

        The first step is made by π_k itself, so its own forward pass says what π_k thinks of its rows (:meth:`hear`),
        except where a critic needs all of them at once, or dropout makes that pass another.
        """
        store, objective = bound.store, self.method.objective
        self.previous = self._snapshot() if "previous_kl" in objective.reads else None
        self._said = []
        rows, critic = np.unique(np.concatenate(steps)), objective.uses_critic
        known = np.setdiff1d(rows, steps[0]) if self.hears else rows
        columns: dict[str, Any] = dict(store.steps)

        def fill(where: np.ndarray, found: dict[str, np.ndarray]) -> None:
            for name, values in found.items():
                columns.setdefault(name, np.full(store.num_steps, np.nan, values.dtype))
                columns[name][spans(store, where)] = values

        found = self.columns(bound, known, ("previous_logp", *(("old_value",) if critic else ())))
        fill(known, found | (from_critic(objective, store, rows, found["old_value"]) if critic else {}))
        if self._wants_base(len(steps)):
            said = columns.get("base_logp", np.full(store.num_steps, np.nan))
            new = rows[np.isnan(said[store.start[rows]])]  # the base stays the same as long as answers are kept
            with self.under(self.base):
                fill(new, self.columns(bound, new, ("base_logp",)))
        else:
            columns.pop("base_logp", None)
        columns["logp"] = np.where(self._drawn_now(store, k), columns["previous_logp"], columns["logp"])
        return Replay(columns, start=store.start, length=store.length, episodes=store.episodes)

    def _drawn_now(self, store: Replay, k: int) -> np.ndarray:
        """Tokens that π_k drew, so that what it thinks of them is the behaviour; (tokens of the store,) bool."""
        fresh = np.repeat((store.episodes["policy_version"] == k) & (store.episodes["source"] == OWN), store.length)
        if getattr(self.method.answering.engine, "on_policy", True):
            return fresh
        return fresh & np.isnan(np.asarray(store.steps["logp"]))

    @property
    def hears(self) -> bool:
        """Whether the forward pass of the first step says what π_k thinks of its rows."""
        return not (self.method.objective.uses_critic or self.method.has_dropout)

    def hear(self, batch: Rollouts, logp: Tensor, mask: Tensor) -> None:
        """Note what π_k says of a batch of the first step, (B, T) each."""
        if self.hears:
            self._said.append((batch.row.numpy(), logp.detach()[mask > 0].cpu().numpy()))

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

    def _wants_base(self, steps: int) -> bool:
        method = self.method
        if "base_logp" in method.objective.reads:
            return True
        now = method.global_step
        return method.hparams.base_kl and any(method.writes_row(step) for step in range(now + 1, now + 1 + steps))

    def columns(self, bound: BoundRollouts, rows: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns of the tokens of these rows, ascending, under the weights of now; processes share the work."""
        method, store = self.method, bound.store
        world, rank = method.world_size, method.process_rank
        by_length = rows[np.argsort(-bound.lengths[rows].sum(1), kind="stable")]
        by_length = by_length[np.argsort(store.episodes["group"][by_length], kind="stable")]
        mine, parts = np.array_split(by_length, world)[rank], []
        for start in range(0, len(mine), method.micro.rows):
            batch = method.gather(bound, mine[start : start + method.micro.rows])
            scores = method.forward_tokens(batch)
            values = {"previous_logp": scores.logps, "base_logp": scores.logps}
            if "old_value" in names:
                values["old_value"] = method.values(batch, scores)
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
        self, problems: Replay, store: Replay | None, wanted: int, sweeps: int, k: int
    ) -> tuple[Replay | None, list[np.ndarray]]:
        """Draw replayed groups, forgetting iterations whose answers are too far from the policy."""
        least, seed = self.method.hparams.min_ess, self.method.seed or 0
        while True:
            old = store_of.drawn(store, wanted, sweeps, seed, k)
            if not (least and store is not None and wanted):
                return store, old
            rows = np.flatnonzero(np.isin(store.episodes["group"], np.concatenate(old)))
            now = self.columns(BoundRollouts(problems, store), rows, ("previous_logp",))["previous_logp"]
            gap = torch.from_numpy(now - np.asarray(store.steps["logp"])[spans(store, rows)]).double()
            log_weight = torch.segment_reduce(gap, "sum", lengths=torch.from_numpy(store.length[rows]))
            version = store.episodes["policy_version"]
            far = [
                v
                for v in np.unique(version[rows])
                if effective_sample_size(log_weight[torch.from_numpy(version[rows] == v)]) < least
            ]
            if not far:
                return store, old
            store = store_of.select_answers(store, ~np.isin(version, far))
