"""Further texts made of the tokens of a replay: prompts under another system message, and requests to revise an answer.

They are put together from tokens, so an old answer stays what it was, whatever is written in it. What a chat template
writes around a turn is found by having it write a small conversation with the turn and without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from offpolicy.data.columns import to_numpy
from offpolicy.data.replay import Replay
from offpolicy.data.texts.sequences import SCORED
from offpolicy.data.texts.tokens import tokenise
from offpolicy.errors import DataError

REQUEST = "Improve the answer above."  # unless a user words it otherwise
ASKED, SAID = {"role": "user", "content": "question_"}, {"role": "assistant", "content": "answer_"}


def is_chat(replay: Replay) -> bool:
    """Whether texts were written as messages by a chat template."""
    found = replay.meta.get("style")  # data converted by an earlier version say it in their format alone
    return found == "chat" if found is not None else ", messages," in str(replay.meta.get("format", ""))


def with_texts(replay: Replay, texts: Sequence[np.ndarray]) -> Replay:
    """The same texts and then these, (T,) int64 each, which have the next numbers; tables and facts stay."""
    token = to_numpy(replay.steps["token"])
    length = np.array([len(text) for text in texts], dtype=np.int64)
    steps = {"token": np.concatenate([token, *(text.astype(token.dtype) for text in texts)])}
    if SCORED in replay.steps:
        steps[SCORED] = np.concatenate([to_numpy(replay.steps[SCORED]), np.ones(int(length.sum()), dtype=bool)])
    start = np.concatenate([replay.start, len(token) + np.cumsum(length) - length])
    lengths = np.concatenate([replay.length, length])
    return Replay(steps, start=start, length=lengths, tables=replay.tables, meta=replay.meta)


class Numbered:
    """Texts that are made, each once, with the numbers they get behind those of a replay."""

    def __init__(self, replay: Replay) -> None:
        self.first = replay.num_episodes
        self.known: dict[bytes, int] = {}
        self.texts: list[np.ndarray] = []

    def number(self, text: np.ndarray) -> int:
        """The number of a text, which is kept where it is new."""
        found = self.known.setdefault(text.tobytes(), self.first + len(self.texts))
        if found == self.first + len(self.texts):
            self.texts.append(text)
        return found


class Revisions:
    """Prompts that ask for a revision of an answer: prompt, answer, request.

    Args:
        tokenizer: of the texts.
        request: a turn of the user in a chat, else a line of text.
        chat: whether the texts are messages.

    Raises:
        DataError: the chat template does not write a conversation as the beginning of a longer one.
    """

    def __init__(self, tokenizer: Any, request: str, *, chat: bool) -> None:
        self.end = None if chat else tokenizer.eos_token_id  # which stands after plain answers and not within a text
        self.close, self.request = _request(tokenizer, request, chat)

    def prompt(self, prompt: np.ndarray, answer: np.ndarray) -> np.ndarray:
        """The tokens after which the model writes its revision, int64 (T,)."""
        ends = self.end is not None and len(answer) and answer[-1] == self.end
        return np.concatenate([prompt, answer[:-1] if ends else answer, self.request])

    def prompt_after(self, prompt: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """The same for an answer that was drawn, without the stop token that ended it."""
        return self.prompt(prompt, np.concatenate([drawn, self.close]))


def _request(tokenizer: Any, request: str, chat: bool) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that close a turn of the assistant, and those between it and its revision, int64 (T,) each."""
    if not chat:
        text = f"\n\n{request}\n"
        return np.empty(0, dtype=np.int64), tokenise([text], tokenizer)[text]
    before = tokenizer.apply_chat_template([ASKED, SAID], tokenize=False)
    turns = [ASKED, SAID, {"role": "user", "content": request}]
    after = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if not after.startswith(before) or not after[len(before) :]:
        raise DataError(
            "the chat template writes an answer otherwise once a turn follows it; expected one that goes on. Pass "
            "--data.chat_template_kwargs that change this, or use another model."
        )
    close, text = before.rpartition(SAID["content"])[2], after[len(before) :]
    ids = tokenise([close, text], tokenizer)
    return ids[close], ids[text]


class SystemMessages:
    """Puts a system message in front of prompts: as a turn in a chat, else as a line of text behind BOS.

    Args:
        tokenizer: of the texts.
        chat: whether they are messages.
    """

    def __init__(self, tokenizer: Any, *, chat: bool) -> None:
        self.tokenizer, self.chat = tokenizer, chat
        self._heads: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def _head(self, message: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What prompts begin with, what stands there instead with the message, and how the turn behind it opens."""
        bos = self.tokenizer.bos_token_id
        if not self.chat:
            begin = np.array([] if bos is None else [bos], dtype=np.int64)
            line = tokenise([message + "\n"], self.tokenizer)[message + "\n"]
            return begin, np.concatenate([begin, line]), begin[:0]
        plain, told = (
            self.tokenizer.apply_chat_template(turns, tokenize=False)
            for turns in ([ASKED], [{"role": "system", "content": message}, ASKED])
        )
        shared = 0  # characters at the end that both have
        while shared < min(len(plain), len(told)) and plain[-1 - shared] == told[-1 - shared]:
            shared += 1
        texts = [plain[: len(plain) - shared], told[: len(told) - shared]]
        texts.append(plain[len(texts[0]) :].partition(ASKED["content"])[0].rstrip())
        ids = tokenise(texts, self.tokenizer)
        return ids[texts[0]], ids[texts[1]], ids[texts[2]]

    def put(self, prompt: np.ndarray, message: str) -> np.ndarray:
        """The tokens of a prompt with the message in front.

        Raises:
            DataError: the prompt begins otherwise, as one with a system message of its own does.
        """
        if message not in self._heads:
            self._heads[message] = self._head(message)
        begin, instead, opening = self._heads[message]
        if not self.chat and not np.array_equal(prompt[: len(begin)], begin):  # a prompt without BOS stays without
            begin, instead = begin[:0], instead[len(begin) :]
        whole = np.concatenate([begin, opening])
        if not np.array_equal(prompt[: len(whole)], whole):
            raise DataError(
                "a prompt does not begin as the chat template begins one without a system message; expected prompts "
                "without their own, and not cut. Leave system messages out of the data, or raise --data.max_length."
            )
        return np.concatenate([instead, prompt[len(begin) :]])
