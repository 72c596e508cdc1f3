"""What attention sees of the rows of a layout: which tokens are hidden from it, and where rows lie that are packed.

All tokens of packed rows stand one after another in a single row, without padding. Every part of a model but attention
treats a token by itself, so attention alone has to know where each row lies. FlashAttention takes the rows' lengths.
For PyTorch's scaled dot products the tokens are laid out in their rows once more, for as long as the product takes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from offpolicy.language.layout import Layout

# kinds of attention layers (``config.layer_types``) that see the whole past, and no more
WHOLE_PAST = ("full_attention", "attention")
# configuration entries of recurrent layers and of windows or chunks of attention
LIMITED_PAST = ("sliding_window", "attention_window_size", "attention_chunk_size", "window_size", "local_attention")
RECURRENT = ("ssm_state_size", "state_size", "mamba_d_state", "linear_num_key_heads", "conv_L_cache")
# positions enter these models through the attention mask or as a bias on the distance in the row
OWN_POSITIONS = ("bloom", "mpt", "opt", "xlnet", "ctrl", "xglm")
# the attention of ``transformers`` named "sdpa", which also takes packed rows
PACKED = "sdpa_packed"
NOT_PACKED = "rows as they are, nothing hidden"


def shares_prompt(config: Any) -> bool:
    """Whether a model of this `transformers` configuration gives the same numbers with a shared prompt.

    It does where attention sees the whole past and nothing but it, positions are given by ``position_ids``, and the
    attention takes a mask (R, 1, T, T): implementations "sdpa" and "eager".
    """
    return _attention(config) in ("sdpa", PACKED, "eager") and _sees_whole_past(config)


def packs_rows(config: Any) -> bool:
    """Whether a model of this `transformers` configuration gives the same numbers when rows are packed.

    It does where attention sees the whole past and nothing but it, positions are given by ``position_ids``, and the
    attention can be told where rows lie: implementations "sdpa" and "flash_attention_2" or later ones.
    """
    name = _attention(config)
    return (name in ("sdpa", PACKED) or name.startswith("flash_attention")) and _sees_whole_past(config)


def _attention(config: Any) -> str:
    return getattr(config.get_text_config(), "_attn_implementation", None) or ""


def _sees_whole_past(config: Any) -> bool:
    config = config.get_text_config()
    if config.model_type in OWN_POSITIONS or getattr(config, "alibi", False):
        return False
    if any(getattr(config, name, None) for name in RECURRENT):
        return False
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return all(kind in WHOLE_PAST for kind in kinds)
    return not any(getattr(config, name, None) for name in LIMITED_PAST)


def attention_inputs(layout: Layout, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What a decoder is told beside ids and positions so that its attention sees a layout right.

    Args:
        layout: on the device of the decoder.
        config: of the decoder; packed rows need one that went through :func:`take_packed`.
        dtype: of its numbers.
    """
    # of a shape that fits no attention but the one that reads `packed_rows`
    unusable = torch.ones(1, 1, 0, 0, dtype=torch.bool, device=layout.input_ids.device)
    if layout.place is None or layout.starts is None:
        mask = mask_of(layout, config, dtype)
        if mask is None and config._attn_implementation == PACKED:
            # transformers would look in the positions for texts that were packed, for which a GPU is waited for
            return {"attention_mask": unusable, "packed_rows": NOT_PACKED}
        return {"attention_mask": mask}
    rows, width = layout.attention_mask.shape[0], layout.attention_mask.shape[-1]
    if config._attn_implementation.startswith("flash_attention"):
        lengths = {"cu_seq_lens_q": layout.starts, "cu_seq_lens_k": layout.starts}
        return {"attention_mask": None, **lengths, "max_length_q": width, "max_length_k": width}
    mask = layout.attention_mask if layout.shared else None
    return {"attention_mask": unusable, "packed_rows": PackedRows(layout.place, rows, width, mask)}


def mask_of(layout: Layout, config: Any, dtype: torch.dtype) -> Tensor | None:
    """The attention mask of a layout, whose rows are not packed, as a model of this configuration and type takes it."""
    if layout.shared and config._attn_implementation == "eager":
        mask = torch.zeros(layout.attention_mask.shape, dtype=dtype, device=layout.input_ids.device)
        return mask.masked_fill_(~layout.attention_mask, torch.finfo(dtype).min)
    if not layout.shared and shares_prompt(config):
        return None  # padding on the right is behind every answer; without a mask attention takes its fast path
    return layout.attention_mask


class PackedRows(NamedTuple):
    """Where T packed tokens lie in R rows of W places.

    Attributes:
        place: row · W + column of each token, (T,) int64.
        rows: R.
        width: W.
        mask: True = may look, (R, 1, W, W) bool; None where every token sees what is before it in its row.
    """

    place: Tensor
    rows: int
    width: int
    mask: Tensor | None

    def lay_out(self, x: Tensor) -> Tensor:
        """Tokens in their rows with zeros as padding: (1, H, T, D) → (R, H, W, D)."""
        flat = x[0].transpose(0, 1)
        laid = flat.new_zeros(self.rows * self.width, *flat.shape[1:]).index_copy_(0, self.place, flat)
        return laid.unflatten(0, (self.rows, self.width)).transpose(1, 2)

    def pack(self, x: Tensor) -> Tensor:
        """Tokens behind each other again: (R, W, H, D) → (1, T, H, D)."""
        return x.flatten(0, 1).index_select(0, self.place)[None]


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_rows: PackedRows | str | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention "sdpa" of `transformers`, which also takes packed rows, and rows without a mask (`NOT_PACKED`)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packed_rows is None or isinstance(packed_rows, str):
        mask = attention_mask if packed_rows is None else None
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    query, key, value = (packed_rows.lay_out(x) for x in (query, key, value))
    seen, _ = sdpa_attention_forward(module, query, key, value, packed_rows.mask, **options)
    return packed_rows.pack(seen), None


def take_packed(model: Any) -> None:
    """Let a model with the attention "sdpa" take packed rows too; nothing else changes."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
    config._attn_implementation = PACKED


__all__ = [
    "PackedRows",
    "attention_inputs",
    "mask_of",
    "packed_attention",
    "packs_rows",
    "shares_prompt",
    "take_packed",
]
