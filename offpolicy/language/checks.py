"""What language methods refuse, or have a word on, before they train."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from offpolicy.errors import DataError, UsageError
from offpolicy.language.attention import packs_rows, shares_prompt
from offpolicy.language.head_checks import packed_fault, shared_fault
from offpolicy.language.layout import WASTE
from offpolicy.language.policy import base_of, vocabulary_of


def check_trainer(trainer: Any, *, compiles: bool | str, graph: bool | str = "auto") -> None:
    """Raise :class:`UsageError` for settings of the Trainer and the run that language methods do not have."""
    if compiles:
        given = "true" if compiles is True else repr(compiles)
        raise UsageError(
            f"`run.compile` is {given}, which is for control methods; expected false: compiled layers of language "
            "models gained too little for what compiling takes (docs/performance.md). Leave it out."
        )
    if graph in (True, "dry"):
        raise UsageError(
            f"`run.graph` is {graph!r}, and CUDA graphs are of control methods; expected 'auto'. Leave it out."
        )
    if trainer.accumulate_grad_batches not in (None, 1):
        raise UsageError(
            f"the Trainer has accumulate_grad_batches={trainer.accumulate_grad_batches}; expected none, as it follows "
            "from `batch_size` and `micro_batch_size` of the method."
        )


def check_suited(data: Any, method: str, policy: str) -> None:
    """Raise :class:`UsageError` unless a policy is named and the data module is one of texts."""
    if not policy:
        raise UsageError(
            f"{method} was given no policy; expected a model to tune. Pass --model.policy with a folder or a hub id."
        )
    if not hasattr(data, "bind_tokenizer"):
        raise UsageError(
            f"{method} trains on texts and was given a {type(data).__name__} ({data.name}); expected TextData, such as "
            "--data pairs.jsonl."
        )


def check_texts_given(data: Any) -> None:
    """Raise :class:`UsageError` unless a data module holds texts that stay as they are."""
    if getattr(data, "replay", None) is None:
        raise UsageError("fit was given no texts; expected a data module, such as TextData('pairs.jsonl').")
    if getattr(data, "change_every", 0):
        raise UsageError("`change_every` is set, but texts cannot change during training yet; expected 0.")


def check_tokens(replay: Any, model: Any, policy: str, what: str) -> None:
    """Every token of a replay must be one that the model knows.

    Args:
        replay: of texts.
        model: the policy.
        policy: folder or id that it was opened from, for the message.
        what: the replay holds, for the message.

    Raises:
        DataError: one is not.
    """
    largest = int(np.asarray(replay.steps["token"]).max())
    size = vocabulary_of(model)
    if largest >= size:
        raise DataError(
            f"the {what} have the token id {largest}, but {policy} knows ids below {size}; expected {what} tokenised "
            "for this model. Leave `--data.tokenizer` out; if the tokenizer is the policy's own, give the model "
            "embeddings for all of its tokens."
        )


def refuse_half_weights(model: Any, dtype: str, policy: str) -> None:
    """Raise :class:`UsageError` for a policy stored in float16, which dtype "auto" would train in float16."""
    if any(p.dtype == torch.float16 for p in model.parameters() if p.requires_grad):
        raise UsageError(
            f"`dtype` is '{dtype}' and {policy} is stored in float16, which needs loss scaling; expected 'bfloat16' or "
            "'float32'. Pass --model.dtype bfloat16."
        )


def prompt_is_shared(model: Any, wanted: bool | None) -> bool:
    """Whether prompts that two answers share are computed once.

    Args:
        model: the policy.
        wanted: what the user says; None for wherever it is exact.

    Raises:
        UsageError: it is wanted, and would change the numbers.
    """
    exact = wanted is not False and shares_prompt(base_of(model).config)
    if exact and not wanted:
        exact = not shared_fault(model)
    if wanted and not exact:
        raise UsageError(
            "`shared_prompt` is true, but with this model or attention it would change the numbers; expected null, "
            "or attn_implementation 'sdpa' or 'eager' and a model that attends to its whole past."
        )
    return exact if wanted is None else wanted


def padding_is_left_out(model: Any, wanted: bool | None) -> bool | None:
    """Whether rows are packed without padding; None for wherever much of them would be padding.

    Args:
        model: the policy.
        wanted: what the user says; None for wherever it is exact and pays.

    Raises:
        UsageError: it is wanted, and would change the numbers.
    """
    config = base_of(model).config
    exact = wanted is not False and packs_rows(config) and not packed_fault(model)
    if wanted and not exact:
        raise UsageError(
            f"`padding_free` is true, but packed rows would change the numbers of {type(base_of(model)).__name__} with "
            f"the attention {config._attn_implementation}; expected null, or attn_implementation 'sdpa' or "
            "'flash_attention_2' and a model that attends to its whole past and nothing else."
        )
    return wanted if exact else False


def padding_in_words(model: Any, wanted: bool | None) -> str:
    """What becomes of padding, for the first screen; arguments as of :func:`padding_is_left_out`."""
    free = padding_is_left_out(model, wanted)
    if free is None:
        return f"left out of forward passes of which it would be more than {WASTE:.0%}"
    if free or wanted is False:
        return "none, rows are packed" if free else "kept, as asked for"
    name, attention = type(base_of(model)).__name__, base_of(model).config._attn_implementation
    return f"kept: packed rows would change the numbers of {name} with the attention {attention}"


def precision_notes(model: Any, lr: float, *, has_adapters: bool) -> list[str]:
    """A sentence where the weights can hardly move."""
    dtype = next(base_of(model).parameters()).dtype
    if dtype != torch.bfloat16 or has_adapters:
        return []
    return [
        f"All weights are bfloat16, whose steps are 1/256 of a value: a rate of {lr:g} may move few of them. Small "
        "steps are kept by --model.dtype float32 with --trainer.precision bf16-mixed, or by adapters."
    ]
