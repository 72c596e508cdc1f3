"""What an answer will be worth, judged before each of its tokens."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from offpolicy.errors import UsageError
from offpolicy.language.attention import attention_inputs, take_packed
from offpolicy.language.head_checks import decoder_of
from offpolicy.language.layout import Layout
from offpolicy.language.reading import taken

CRITICS = ("model", "head")


class Critic(nn.Module):
    """Values of states, the ones that predict the scored tokens of a layout.

    Args:
        policy: a causal language model of ``transformers``, without adapters.
        kind: "model", a decoder of its own that starts as the policy's; or "head", two layers on the policy's last
            states, which it does not change.

    Raises:
        UsageError: the policy has no decoder to copy.
    """

    def __init__(self, policy: Any, kind: str = "model") -> None:
        super().__init__()
        width = policy.config.get_text_config().hidden_size
        decoder = decoder_of(policy) if kind == "model" else None
        if kind == "model" and decoder is None:
            raise UsageError(
                f"`critic` is 'model', a copy of the policy's decoder, and {type(policy).__name__} has none that gives "
                "its last states; expected 'head'. Pass --model.critic head."
            )
        self.decoder = None if decoder is None else copy.deepcopy(decoder).requires_grad_(True)
        hidden: list[nn.Module] = [] if kind == "model" else [nn.Linear(width, width), nn.SiLU()]
        last = nn.Linear(width, 1)
        nn.init.zeros_(last.weight)  # nothing is known at the start
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(*hidden, last).to(next(policy.parameters()).dtype)

    def forward(self, hidden: Tensor, layout: Layout) -> Tensor:
        """Values (n,) from the policy's states (n, D) and the rows they were computed from."""
        if self.decoder is None:
            return self.head(hidden.detach())[:, 0]
        if layout.packed:
            take_packed(self.decoder)
        own: Any = self.decoder.config  # not the policy's, which may read rows in another way by now
        inputs = attention_inputs(layout, own.get_text_config(), next(self.head.parameters()).dtype)
        wanted = taken(self.decoder, {**inputs, "position_ids": layout.position_ids})
        out = self.decoder(input_ids=layout.input_ids, use_cache=False, **wanted)
        return self.head(out.last_hidden_state.flatten(0, 1).index_select(0, layout.predict))[:, 0]
