"""Packed transitions of a ring: what grows is what would be packed anew, in the same memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from toy import toy_replay

from offpolicy.data import sampling
from offpolicy.data.mixing import SPLIT
from offpolicy.data.normalize import Normalizer
from offpolicy.data.ring import Ring
from offpolicy.data.views import GrowingTransitions, PackedTransitions, TransitionView

CPU = torch.device("cpu")


def bound(view: TransitionView, ring: Ring) -> Any:
    obs, action = (ring.steps[name].shape[1] for name in ("obs", "action"))
    return view.bind(ring, Normalizer((obs,), action), CPU)


def with_tail(lengths: tuple[int, ...], seed: int, known: bool = True) -> Any:
    found = toy_replay(lengths, seed=seed)
    obs = np.random.default_rng(seed).normal(size=(len(lengths), found.steps["obs"].shape[1])).astype(np.float32)
    found.tail = {"obs": obs, "valid": np.full(len(lengths), known)}
    return found


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("view", [TransitionView(), TransitionView(n_step=3, next_action=True)])
def test_what_grows_is_what_is_packed_anew(view: TransitionView, keep: bool) -> None:
    """Around the ring more than once, exactly full and past a gap at the end; offline rows without successors stay."""
    ring = Ring(with_tail((4, 3), 0, known=not keep), 20, keep=keep)
    if keep:
        ring.meta = {**ring.meta, SPLIT: [7, 0.5]}
    grown = bound(view, ring)
    assert isinstance(grown, GrowingTransitions)
    table, place = grown.table.data_ptr(), grown.place.data_ptr()
    words = sampling.bits(sampling.keys(0, "index", torch.arange(3)), torch.arange(8))
    for seed, lengths in enumerate(((5, 3), (2,), (3, 6), (4,), (1, 1, 9), (13,), (2, 2))):
        ring.append(with_tail(lengths, seed + 1))
        assert grown.grow(ring) and (grown.table.data_ptr(), grown.place.data_ptr()) == (table, place)
        anew = bound(view, ring)
        plain = PackedTransitions(view, ring, grown.normalizer, CPU)
        assert len(grown) == len(anew) == len(plain) == len(ring.usable_rows())
        assert grown.rows.tolist() == sorted(ring.usable_rows())
        ours, theirs = grown.gather(grown.pick(words, torch.arange(8))), anew.gather(anew.pick(words, torch.arange(8)))
        for name, value in ours._asdict().items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(theirs, name)), name
        assert ours.row is not None and (not keep or ((ours.row < 7).sum(-1) == 4).all())
        every, other = grown.gather(torch.arange(len(grown))), plain.gather(torch.arange(len(plain)))
        order = torch.argsort(other.row)
        for name, value in every._asdict().items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(other, name)[order]), name


def test_what_cannot_grow_is_packed_anew() -> None:
    ring = Ring(with_tail((4, 3), 0), 20)
    view = bound(TransitionView(), ring)
    ring.append(with_tail((2,), 1, known=False))
    assert not view.grow(ring) and type(bound(TransitionView(), ring)) is PackedTransitions
    ring = Ring(with_tail((4, 3), 0), 20)
    view = bound(TransitionView(), ring)
    for seed in (1, 2):
        ring.append(with_tail((2,), seed))
    assert not view.grow(ring) and not view.grow(Ring(with_tail((4, 3), 0), 20))
    assert bound(TransitionView(), ring).grow(ring) is False  # nothing has been appended since
