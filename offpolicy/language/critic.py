"""What an answer will be worth, judged before each of its tokens."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from offpolicy.language.layout import Layout, shares_prompt

CRITICS = ("model", "head")


class Critic(nn.Module):
    """Values of states, the ones that predict the scored tokens of a layout.

    Args:
        policy: a causal language model of ``transformers``, without adapters.
        kind: "model", a decoder of its own that starts as the policy's; or "head", two layers on the policy's last
            states, which it does not change.
    """

    def __init__(self, policy: Any, kind: str = "model") -> None:
        super().__init__()
        self.config = policy.config.get_text_config()
        width = self.config.hidden_size
        self.decoder = copy.deepcopy(policy.get_decoder()).requires_grad_(True) if kind == "model" else None
        hidden: list[nn.Module] = [] if kind == "model" else [nn.Linear(width, width), nn.SiLU()]
        last = nn.Linear(width, 1)
        nn.init.zeros_(last.weight)  # nothing is known at the start
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(*hidden, last).to(next(policy.parameters()).dtype)

    def forward(self, hidden: Tensor, layout: Layout) -> Tensor:
        """Values (n,) from the policy's states (n, D) and the rows they were computed from."""
        if self.decoder is None:
            return self.head(hidden.detach())[:, 0]
        mask = None if shares_prompt(self.config) else layout.attention_mask
        out = self.decoder(
            input_ids=layout.input_ids, attention_mask=mask, position_ids=layout.position_ids, use_cache=False
        )
        return self.head(out.last_hidden_state.flatten(0, 1).index_select(0, layout.predict))[:, 0]
