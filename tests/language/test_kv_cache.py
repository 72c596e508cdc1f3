"""Keys and values with room for more: those of transformers' own cache, without a copy per token."""

from __future__ import annotations

import torch
from test_layout import make
from torch import Tensor

from offpolicy.language.kv_cache import ROOM, make_room


def caches() -> tuple[object, object, Tensor]:
    """What a model keeps of two texts: as it is, and with room."""
    model, ids = make("Qwen2"), torch.arange(3, 13).view(2, 5)
    kept = [model(ids, use_cache=True).past_key_values for _ in range(2)]
    make_room(kept[1])
    return model, kept, ids


def test_logits_are_the_same_bit_for_bit() -> None:
    model, (plain, roomy), ids = caches()
    rows = torch.tensor([1, 1, 0])
    for state in (plain, roomy):
        state.batch_select_indices(rows)
    for t in range(ROOM + 10):  # the room runs out once
        token = torch.tensor([[3 + t % 30], [7], [20]])
        expected, found = (model(token, use_cache=True, past_key_values=state).logits for state in (plain, roomy))
        assert torch.equal(found, expected)
        if t == ROOM // 2:
            plain.batch_select_indices(rows.flip(0))
            roomy.batch_select_indices(rows.flip(0))
    for a, b in zip(plain.layers, roomy.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
        assert b.get_seq_length() == a.get_seq_length() == ids.shape[1] + ROOM + 10


def test_a_token_copies_no_others() -> None:
    model, (_, roomy), _ = caches()
    places = set()
    for _ in range(5):
        model(torch.tensor([[3], [4]]), use_cache=True, past_key_values=roomy)
        places.add(tuple(layer.keys.data_ptr() for layer in roomy.layers))
    assert len(places) == 1


def test_other_caches_stay_as_they_are() -> None:
    state = [torch.ones(2)]
    make_room(state)
    make_room(None)
    sliding = make("Mistral", sliding_window=4)(torch.arange(3, 9)[None], use_cache=True).past_key_values
    kinds = [type(layer) for layer in sliding.layers]
    make_room(sliding)
    assert [type(layer) for layer in sliding.layers] == kinds
