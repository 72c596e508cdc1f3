"""Several seeds trained at once: one more axis in front of every weight, and how to take one of them out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from offpolicy.compute.casts import fresh_casts
from offpolicy.errors import UsageError
from offpolicy.given import as_whole, seed_number, seed_numbers, seeds_text
from offpolicy.training.checkpoints import plain_hparams
from offpolicy.training.seed_room import check_room
from offpolicy.training.slices import over
from offpolicy.trust import speaking

# Modules of torch that only hold parameters for others to use; every other layer of torch has a fixed number of axes.
HOLDERS = (nn.ParameterList, nn.ParameterDict)


def checked_seeds(seeds: Any) -> tuple[int, ...]:
    """Seeds as whole numbers, none for none.

    Raises:
        UsageError: one is no whole number ≥ 0, or stands there twice.
    """
    if isinstance(seeds, (str, bytes)):
        raise UsageError(f"`seeds` is {seeds!r}; expected whole numbers ≥ 0, each once, such as (0, 1, 2).")
    return () if isinstance(seeds, (tuple, list)) and not seeds else seed_numbers(seeds)


def chosen_seeds(seed: Any, seeds: Any, before: tuple[int, ...] = ()) -> tuple[int, tuple[int, ...]]:
    """The seed of a run and, where it has several, all of them; of several the first stands for the run.

    Args:
        seed: as the user gave it; None for 0.
        seeds: as the user gave them, see :func:`offpolicy.given.seed_numbers`; None for those of ``before``.
        before: seeds that the method has.

    Raises:
        UsageError: both were given, or one is no seed.
    """
    found = before if seeds is None else seed_numbers(seeds)
    if found and seed is not None:
        raise UsageError(
            f"`seed` is {seed!r} and `seeds` is {seeds_text(found)}; expected one of the two. Leave `seed` out."
        )
    if len(found) == 1 and seeds is not None:
        return found[0], ()
    if isinstance(as_whole(seed), Iterable) and not (isinstance(seed, str) and seed.isdecimal()):
        raise UsageError(f"`seed` is {seed!r}; expected one whole number. Did you mean `seeds`?")
    return (found[0] if found else seed_number(0 if seed is None else seed)), found


def build_stacked(method: Any, build: Callable[[], None]) -> None:
    """Build once per seed and put the parameters of all seeds into one tensor with an axis in front.

    Raises:
        UsageError: a layer of the method has no room for that axis.
    """
    name = type(method).__name__
    if not method.seed_axis:
        raise UsageError(f"{name} trains one seed per process; expected `seeds` empty. Start one each.")
    states, buffers = [], dict[str, torch.Tensor]()
    for seed in method.seeds:
        torch.manual_seed(seed)
        build()
        states.append({key: p.detach().clone() for key, p in method.named_parameters()})
        if not buffers:
            buffers = {key: buffer.clone() for key, buffer in method.named_buffers()}
            check_room(method)
    for key, buffer in method.named_buffers():
        if not torch.equal(buffer.nan_to_num(), buffers[key].nan_to_num()):
            raise UsageError(
                f"{name} has a buffer that depends on the seed (`{key}`), and buffers have no axis for seeds; expected "
                "a parameter. Register it as one that takes no gradient, or start one seed per process."
            )
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


def method_of_seed(method: Any, seed: int) -> Any:
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
        The numbers of ``measure``. With seeds the mean over them under the same names, their standard deviation as
        ``<name>_seed_std``, and each seed's own as ``<name>_seed<seed>``.
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
    each = {name: {seed: numbers[name] for seed, numbers in found.items() if name in numbers} for name in names}
    return {column: value for name, values in each.items() for column, value in over(name, values).items()}


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
