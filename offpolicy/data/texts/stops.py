"""Where an answer ends: EOS, what the model's settings for generation name, and the end of a turn of the chat template.

What ends a turn is found by having the template write a conversation: it is the first special token behind the
assistant's words. A template that ends turns otherwise, or not at all, leaves a doubt, which is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

CHAT = "stopword"  # what the assistant says in the conversation that is rendered


class TurnEnd(NamedTuple):
    """How a chat template ends an answer: the ``token`` id, or None, and what is doubtful about it, or ""."""

    token: int | None
    doubt: str


_known: dict[tuple[str, int, str], TurnEnd] = {}


def stop_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's EOS, EOS of the model's generation settings, and the end of a turn."""
    settings: Any = getattr(model, "generation_config", None)
    found = [tokenizer.eos_token_id, getattr(settings, "eos_token_id", None), turn_end(tokenizer).token]
    listed = [item for one in found for item in (one if isinstance(one, (list, tuple)) else [one])]
    return sorted({int(item) for item in listed if item is not None})


def turn_end(tokenizer: Any) -> TurnEnd:
    """What the tokenizer's chat template writes behind an answer; nothing where there is no template."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return TurnEnd(None, "")
    key = str(template), len(tokenizer), str(tokenizer.eos_token)
    if key not in _known:
        _known[key] = _found(tokenizer)
    return _known[key]


def _found(tokenizer: Any) -> TurnEnd:
    refused = ""
    for turns in _conversations():
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:  # templates raise their own errors, and any of Python
            refused = refused or " ".join(str(error).split())[:150] or type(error).__name__
            continue
        if CHAT in text.lower():
            return _behind(text[text.lower().rindex(CHAT) + len(CHAT) :], tokenizer)
    why = f"it refuses a conversation of two turns: {refused}" if refused else "it leaves the assistant's words out"
    return TurnEnd(None, f"the end of turn of the chat template is not known ({why}), so only EOS stops answers")


def _conversations() -> Iterator[list[dict[str, Any]]]:
    """A question and an answer, in the ways that templates take them."""
    for content in (str, lambda text: [{"type": "text", "text": text}]):
        turns = [{"role": "user", "content": content("Hello")}, {"role": "assistant", "content": content(CHAT)}]
        yield turns
        yield [{"role": "system", "content": content("Help.")}, *turns]
    yield [{"role": "user", "content": "Hello"}, {"role": "model", "content": CHAT}]


def _behind(tail: str, tokenizer: Any) -> TurnEnd:
    """The end of a turn, from the text that follows the assistant's words."""
    ids = _ids(tail, tokenizer)
    added = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    mark, words = next((token for token in ids if token in added), None), tail.strip()
    unknown = mark is not None and mark == getattr(tokenizer, "unk_token_id", None)
    if mark is not None and not unknown:
        return TurnEnd(mark, "")
    if not words:
        doubt = "writes no special token after answers, no end of turn, so the model does not learn to end"
    elif unknown:
        doubt = f"ends a turn with {words[:40]!r}, which the tokenizer does not know, so only EOS stops answers"
    elif len(_ids(words, tokenizer)) == 1 and len(words) > 2 and words[0] in "<[{|" and words[-1] in ">]}|":
        return TurnEnd(_ids(words, tokenizer)[0], "")  # a mark that is an ordinary token of the vocabulary
    else:
        doubt = (
            f"ends a turn with {words[:40]!r}, which is text of {len(_ids(words, tokenizer))} tokens and no special "
            "token, so answers do not stop at the turn's end; make it a special token of the tokenizer"
        )
    return TurnEnd(None, f"the chat template {doubt}")


def _ids(text: str, tokenizer: Any) -> list[int]:
    return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]] if text else []
