"""What a method for language models inherits: a policy that is a causal language model, tuned on texts.

``LanguageModule`` uses Lightning's automatic optimisation: a micro-batch per ``training_step``, gradients summed over
the micro-batches and processes of a step, one optimiser. A method says which view of the data it needs, whether it has
a reference, and writes one loss per row.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from offpolicy.data.sequences import PairView
from offpolicy.errors import UsageError, check_range
from offpolicy.modules import Metrics, Module

SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("float32", "bfloat16", "auto")


class LanguageModule(Module):
    """Base of methods for causal language models.

    A method declares ``view`` (:class:`PairView` or :class:`SingleView`) and the attributes below, and defines
    ``loss``. They may be properties that depend on the options.

    Attributes:
        view: what a row of the data is.
        uses_reference: whether ``ref_logps`` are needed.
        scores_prompt: whether ``prompt_logps`` of the chosen answers (of the answers, for singles) are needed.
        uses_mismatched: whether singles also need each answer scored under another prompt.

    Args:
        policy: Hugging Face id or folder of the causal language model that is tuned.
        lr: peak learning rate of AdamW.
        batch_size: rows per optimiser step over all processes, ≥ 1; the last step of an epoch has those that remain.
        micro_batch_size: rows per forward pass on one process; None for the whole step. Does not change the result.
        epochs: passes over the data, > 0; used when no ``max_steps`` are given.
        warmup_ratio: part of the steps in which the rate rises from 0, in [0, 1].
        lr_schedule: "cosine" or "linear" decay to 0 after that, or "constant".
        weight_decay: AdamW's, ≥ 0; not applied to biases and norms.
        adam_betas: AdamW's.
        lora_rank: rank of LoRA adapters, 0 to train all weights; needs the extra ``lora``.
        lora_alpha: their scale; None for twice the rank.
        lora_dropout: dropout in front of them, in [0, 1).
        lora_targets: names of layers that get one; None for all linear layers but the head.
        adapter: folder of a trained adapter to go on from; its starting point is the reference.
        gradient_checkpointing: recompute layers in the backward pass instead of keeping their activations.
        reference: "auto", "precomputed", "live" (a frozen copy), "adapter_off", or another model's id or folder.
        ref_cache: folder of reference log-probabilities shared by runs; None for a folder beside the user's caches.
        shared_prompt: compute a prompt that both answers share once; None where that is exact for the model.
        chunk: tokens whose logits exist at once.
        dtype: of the weights: "float32", "bfloat16" or "auto" (as stored).
        attn_implementation: of transformers, such as "sdpa" or "eager"; None for its default.
        group_by_length: put rows of similar length into one micro-batch.
    """

    view: ClassVar[Any] = PairView()
    uses_reference: bool = True
    scores_prompt: bool = False
    uses_mismatched: bool = False

    def __init__(
        self,
        *,
        policy: str = "",
        lr: float = 1e-6,
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        epochs: float = 1.0,
        warmup_ratio: float = 0.1,
        lr_schedule: str = "cosine",
        weight_decay: float = 0.0,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        lora_targets: list[str] | None = None,
        adapter: str | None = None,
        gradient_checkpointing: bool = False,
        reference: str = "auto",
        ref_cache: str | None = None,
        shared_prompt: bool | None = None,
        chunk: int = 256,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        group_by_length: bool = True,
    ) -> None:
        super().__init__()
        check_range("lr", lr, 0.0)
        check_range("batch_size", batch_size, 1)
        if micro_batch_size is not None:
            check_range("micro_batch_size", micro_batch_size, 1)
        check_range("epochs", epochs, 0.0, lower_open=True)
        check_range("warmup_ratio", warmup_ratio, 0.0, 1.0)
        check_range("weight_decay", weight_decay, 0.0)
        check_range("lora_rank", lora_rank, 0)
        check_range("lora_dropout", lora_dropout, 0.0, 1.0, upper_open=True)
        check_range("chunk", chunk, 1)
        for name, value, known in (("lr_schedule", lr_schedule, SCHEDULES), ("dtype", dtype, DTYPES)):
            if value not in known:
                raise UsageError(f"`{name}` is '{value}'; expected one of {', '.join(known)}.")
        self.save_hyperparameters()

    # -- to be written by a method -------------------------------------------------------------------------------------

    def loss(self, scores: Any) -> tuple[Tensor, Metrics]:
        """Loss per row, (B,), and metrics of (B,) each, detached.

        Args:
            scores: :class:`PairScores` or :class:`SingleScores` of :mod:`offpolicy.language.scores`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss(scores).")
