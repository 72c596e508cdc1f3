"""Keys and values of the tokens that were read, in memory with room for those to come.

A cache of ``transformers`` puts keys and values of each new token behind the others by copying them all.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

ROOM = 64  # tokens at most; where they run out, half of what is there is added


def make_room(state: Any, wanted: int = ROOM) -> None:
    """Let the layers of a cache that keep the whole past as it is take new tokens without copying the old ones.

    Args:
        state: what a model keeps; anything else is left as it is.
        wanted: tokens that may come.
    """
    from transformers.cache_utils import DynamicLayer

    layers = getattr(state, "layers", None)
    if not isinstance(layers, list):
        return
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            layers[i] = _roomy()(layer, min(wanted, ROOM))


@cache
def _roomy() -> Any:
    """The class of layers with room; transformers is imported when it is needed."""
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):  # type: ignore[misc]
        """Keys and values (B, H, T, D) as the first T places of memory that has more."""

        def __init__(self, layer: Any, room: int) -> None:
            super().__init__()
            self.room = room
            self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
            self.keys: Tensor = layer.keys
            self.values: Tensor = layer.values
            self.memory: list[Tensor] = []  # of keys and values, once a token is added

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            first = self.keys.shape[-2]
            last = first + key_states.shape[-2]
            if not self.memory or last > self.memory[0].shape[-2]:
                length = last + (max(ROOM, last // 2) if self.memory else self.room)
                self.memory = [_with_room(x, length) for x in (self.keys, self.values)]
            for memory, new in zip(self.memory, (key_states, value_states)):
                memory[..., first:last, :] = new
            self.keys, self.values = (memory[..., :last, :] for memory in self.memory)
            return self.keys, self.values

        def batch_select_indices(self, indices: Tensor) -> None:
            self.memory = []
            super().batch_select_indices(indices)

        def reorder_cache(self, beam_idx: Any) -> None:
            self.memory = []
            super().reorder_cache(beam_idx)

    return RoomyLayer


def _with_room(x: Tensor, length: int) -> Tensor:
    """x (B, H, T, D) as the beginning of memory for ``length`` tokens."""
    memory = x.new_empty(*x.shape[:-2], length, x.shape[-1])
    memory[..., : x.shape[-2], :] = x
    return memory
