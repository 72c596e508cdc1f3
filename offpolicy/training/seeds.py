"""Several seeds trained at once: one more axis in front of every weight, and how to take one of them out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from offpolicy.compute.casts import fresh_casts
from offpolicy.errors import UsageError
from offpolicy.training.checkpoints import plain_hparams
from offpolicy.trust import speaking

# Modules of torch that only hold parameters for others to use; every other layer of torch has a fixed number of axes.
HOLDERS = (nn.ParameterList, nn.ParameterDict)


def checked_seeds(seeds: Any) -> tuple[int, ...]:
    """Seeds as whole numbers.

    Raises:
        UsageError: one is no whole number ≥ 0, or stands there twice.
    """
    given = tuple(seeds) if isinstance(seeds, Iterable) and not isinstance(seeds, (str, bytes)) else (seeds,)
    found = tuple(int(s) for s in given if isinstance(s, (int, np.integer)) and not isinstance(s, bool))
    if len(found) != len(given) or any(seed < 0 for seed in found) or len(set(found)) != len(found):
        raise UsageError(f"`seeds` is {seeds!r}; expected whole numbers ≥ 0, each once, such as (0, 1, 2).")
    return found


def build_stacked(method: Any, build: Callable[[], None]) -> None:
    """Build once per seed and put the parameters of all seeds into one tensor with an axis in front.

    Raises:
        UsageError: a layer of the method has no room for that axis.
    """
    name = type(method).__name__
    if not method.seed_axis:
        raise UsageError(f"{name} trains one seed per process; expected `seeds` empty. Start one each.")
    states = []
    for seed in method.seeds:
        torch.manual_seed(seed)
        build()
        states.append({key: p.detach().clone() for key, p in method.named_parameters()})
    for key, layer in method.named_modules():
        kind = type(layer)
        own = any(True for _ in layer.parameters(recurse=False))
        if own and kind.__module__.startswith("torch.nn") and not isinstance(layer, HOLDERS):
            raise UsageError(
                f"{name} has a layer without an axis for seeds (`{key}` is a torch.nn.{kind.__name__}); expected "
                "`seeds` empty, or layers of offpolicy.nn. Start one seed per process."
            )
    for key, p in method.named_parameters():
        p.data = torch.stack([state[key] for state in states])


def ask_each(method: Any, question: Callable[[], Any]) -> Any:
    """The answers of every seed (S, …), bit by bit those of a method of that seed alone.

    One product over all seeds would round otherwise, so each seed's weights take the place of the stack in turn.

    Args:
        question: gives a tensor, a dict of tensors or None.
    """
    seeds, whole = method.seeds, [(p, p.data) for p in method.parameters()]
    answers = []
    method._seeds = ()
    try:
        with fresh_casts():  # autocast would keep the cast of the first seed's weights
            for index in range(len(seeds)):
                for p, stack in whole:
                    p.data = stack[index].clone()
                answers.append(question())
    finally:
        for p, stack in whole:
            p.data = stack
        method._seeds = seeds
    if isinstance(answers[0], dict):
        return {name: torch.stack([answer[name] for answer in answers]) for name in answers[0]}
    return None if answers[0] is None else torch.stack(answers)


def taken(method: Any, seed: int) -> Any:
    """A method of one seed with the weights of that seed; see :meth:`ActingModule.take_seed`."""
    index = method.seeds.index(seed)
    with speaking(method.words):
        single = type(method)(**plain_hparams(method.hparams))
    single.run = replace(method.run)
    single.data_meta, single.data_fingerprint = dict(method.data_meta), method.data_fingerprint
    single.initialize(method.sizes, seed)
    single.to(method.device)
    own = {**dict(single.named_parameters()), **dict(single.named_buffers())}
    for key, value in {**dict(method.named_parameters()), **dict(method.named_buffers())}.items():
        part = value[index] if value.shape[1:] == own[key].shape and value.dim() > own[key].dim() else value
        own[key].data = part.detach().clone()
    single.load_extra_state(method.extra_state())
    single.updates = method.updates
    return single.train(method.training)


def over_seeds(method: Any, measure: Callable[[Any], Mapping[str, float]]) -> dict[str, float]:
    """Measure a method; one of several seeds seed by seed, each as if it had been trained alone.

    Args:
        method: what is measured.
        measure: method of one seed → numbers by name.

    Returns:
        The numbers of ``measure``. With seeds the mean over them under the same names, and each seed's own as
        ``<name>_seed<seed>``.
    """
    if not method.seeds:
        return dict(measure(method))
    found = {}
    for index, seed in enumerate(method.seeds):
        single = method.take_seed(seed)
        if "agent" in vars(method):  # replaced by hand, for this object alone: it answers for all seeds
            single.agent = partial(_one_agent, method, index)  # type: ignore[method-assign]
        found[seed] = measure(single)
    names = dict.fromkeys(name for numbers in found.values() for name in numbers)
    means = {k: float(np.mean([numbers[k] for numbers in found.values() if k in numbers])) for k in names}
    return means | {f"{k}_seed{seed}": value for seed, numbers in found.items() for k, value in numbers.items()}


def _one_agent(method: Any, index: int, **options: Any) -> OneSeed:
    return OneSeed(method.agent(**options), index)


class OneSeed:
    """One seed of an agent that plays all of them."""

    def __init__(self, agent: Any, index: int) -> None:
        self._agent, self._index = agent, index

    def act(self, obs: Any) -> Any:
        """Actions (n, A) of the agent's (S, n, A)."""
        return getattr(self._agent, "act", self._agent)(obs)[self._index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)  # `reset`, `observe` and the like, where the agent has them
