"""Language data for a Lightning fit: pairs, scored lists or single answers from any file, tokenised for a policy."""

from __future__ import annotations

from typing import Any

from offpolicy.data.replay import Replay
from offpolicy.data.texts.preview import report, samples
from offpolicy.data.texts.tokenised import TokenisedData

__all__ = ["TextData", "report", "samples"]


class TextData(TokenisedData):
    """Texts for the Trainer; ``.replay`` is the training part, ``.eval_replay`` the held-out part or None.

    Args:
        name: a file (.jsonl[.gz], .json[.gz], .parquet, .arrow), a folder written by ``datasets`` or by ``convert``,
            or a data set of the Hugging Face hub ("org/name", "org/name:configuration").
        download: fetch a set of the hub that is not on disk.
        on_bad: "error" stops at rows that carry no signal or a wrong one; "drop" leaves them out and counts them.
        columns: our name → the source's name, where they differ ({"prompt": "question"}); None as a name leaves a
            column out ({"prompt": None}). Ours: prompt, chosen, rejected, completion, label, messages, completions,
            scores, score_chosen, score_rejected, weight, system, tools, chat_template_kwargs, prompt_chosen,
            prompt_rejected, agreement.
        split: part of a set that has several ("train_prefs"); None takes "train" or the only one.
        tokenizer: folder or hub name; None is the policy's.
        max_length: longest prompt with answer, in tokens, ≥ 2.
        max_prompt_length: what ``truncation="prompt_first"`` shortens prompts to; None is half of ``max_length``.
        truncation: what gives way in texts longer than ``max_length``. "prompt_first": the beginning of the prompt,
            then the end of the answers; "keep_start": the end of the answers; "keep_end": the beginning of the prompt.
            Decided from the longer answer of a pair, so that both sides keep the same prompt.
        chat_template_kwargs: passed to the chat template of the tokenizer ({"enable_thinking": False}).
        pair_strategy: how a list of scored answers becomes pairs: "best_vs_worst", "best_vs_random", "all_pairs",
            "adjacent" (neighbours in the order of scores), "independent" (the first with the second, the third with
            the fourth, whatever their scores), or "none" (single answers with ``score`` and ``group``).
        min_score_gap: leave out pairs whose scores differ by less; equal scores in a list never make a pair.
        max_bad: largest share of rows that ``on_bad="drop"`` may drop, in [0, 1].
        eval_data: held-out data, named as ``name`` and read with the same options; "NAME@SPLIT" takes another split.
        eval_fraction: without ``eval_data``, share of the prompts that is held out, in [0, 1); chosen by a hash of the
            prompt, so that no prompt is on both sides.
        separator: text put between every prompt and answer of plain text, as sources without white space at that place
            need it ("\\n" is a line break).
        show: texts printed before training, with the boundary between prompt and answer.
    """

    def __init__(
        self,
        name: str,
        *,
        download: bool = True,
        on_bad: str = "error",
        columns: dict[str, str | None] | None = None,
        split: str | None = None,
        tokenizer: str | None = None,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        truncation: str = "prompt_first",
        chat_template_kwargs: dict[str, Any] | None = None,
        pair_strategy: str = "best_vs_worst",
        min_score_gap: float = 0.0,
        max_bad: float = 0.1,
        eval_data: str | None = None,
        eval_fraction: float = 0.05,
        separator: str = "",
        show: int = 2,
    ) -> None:
        options = {
            "download": download,
            "on_bad": on_bad,
            "columns": columns,
            "split": split,
            "tokenizer": tokenizer,
            "max_length": max_length,
            "max_prompt_length": max_prompt_length,
            "truncation": truncation,
            "chat_template_kwargs": chat_template_kwargs,
            "pair_strategy": pair_strategy,
            "min_score_gap": min_score_gap,
            "max_bad": max_bad,
            "eval_data": eval_data,
            "eval_fraction": eval_fraction,
            "separator": separator,
            "show": show,
        }
        super().__init__(name, options)

    def load(self) -> Replay:
        """Open, check and tokenise the texts if that has not happened yet, and hold some out."""
        if self.replay is None:
            from offpolicy.data.texts.opening import open_texts, warn_of_overlap
            from offpolicy.data.texts.parts import split_by_prompt

            options: dict[str, Any] = {
                k: v for k, v in self.options.items() if k not in ("eval_data", "eval_fraction", "show")
            }
            options["tokenizer"] = self.tokenizer
            replay = open_texts(str(self.name), **options)
            self._check_tokenizer(replay)
            if self.options["eval_data"] is not None:
                name, _, part = str(self.options["eval_data"]).partition("@")
                self.eval_replay = open_texts(name, **options | ({"split": part} if part else {}))
                self._check_tokenizer(self.eval_replay)
                warn_of_overlap(self.eval_replay, replay)
            elif self.options["eval_fraction"] > 0:
                replay, self.eval_replay = split_by_prompt(replay, self.options["eval_fraction"])
            self.replay = replay
        return self.replay

    def __repr__(self) -> str:
        """The data report, once the texts are open."""
        open_ = self.replay is not None and "format" in self.replay.meta
        return report(self.replay) if open_ else super().__repr__()  # type: ignore[arg-type]

    __str__ = __repr__
