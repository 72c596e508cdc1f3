"""Records of texts as tokens in a store."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np

from offpolicy.data.columns import smallest_type
from offpolicy.data.replay import Replay
from offpolicy.data.texts.formats import Faults, Record
from offpolicy.data.texts.parts import lengths
from offpolicy.data.texts.rendering import CALLS, Row, Text, written
from offpolicy.data.texts.sequences import SCORED
from offpolicy.data.texts.stops import turn_end
from offpolicy.data.texts.tokens import Encoded, Limits, encode, fingerprint
from offpolicy.errors import DataError


class Builder:
    """Puts encoded rows into the columns and tables of a replay; equal texts are stored once."""

    def __init__(self, tokenizer: Any, limits: Limits, template: dict, faults: Faults, counts: Counter[str]) -> None:
        self.tokenizer, self.limits, self.template = tokenizer, limits, template
        self.faults, self.counts = faults, counts
        self.texts: dict[tuple[bytes, bytes], int] = {}
        self.parts: list[np.ndarray] = []
        self.scored: list[np.ndarray] = []  # of each part: which tokens the model writes
        self.has_tools = False
        self.moved_tail = ""
        self.dtype = smallest_type(len(tokenizer))

    def __call__(self, made: list[Record], table: str) -> Replay:
        index: list[list[int]] = []
        kept: list[Record] = []
        for record, encoded in zip(made, self._encode(made)):
            fault = next((one for one in encoded if one.fault), None) or _same_text(encoded) or _cut_apart(encoded)
            if fault is not None:
                self.faults.add(record.row, fault.where, fault.fault, fault.found)
                continue
            # one row with all answers to its prompt, or a row for each side
            index.append([number for one in encoded for side in self._sides(one) for number in side])
            kept.append(record)
            self._count(encoded, isinstance(record.prompt, list))
        if not kept:
            return Replay({"token": np.zeros(1, self.dtype)}, meta={"doubts": []})  # the faults will speak
        pairs = np.asarray(index, dtype=np.int64)
        length = np.asarray([len(part) for part in self.parts], dtype=np.int64)
        meta = {
            "tokenizer": _facts(self.tokenizer),
            "lengths": lengths(pairs, length),
            "limits": vars(self.limits) | {},
            "doubts": self._doubts(kept, pairs),
        }
        steps = {"token": np.concatenate(self.parts)}
        if self.has_tools:
            steps[SCORED] = np.concatenate(self.scored)
        return Replay(
            steps,
            start=np.cumsum(length) - length,
            length=length,
            tables={table: pairs, **_columns(kept, table)},
            meta=meta,
        )

    def _encode(self, made: list[Record]) -> Iterator[list[Encoded]]:
        """The encoded rows of each record: one, or two where its sides have different prompts."""

        def rows() -> Iterable[Row]:
            for record in made:
                template = self.template | record.template
                if record.rejected_prompt is None:
                    yield Row(record.prompt, record.answers, template)
                else:
                    yield Row(record.prompt, record.answers[:1], template)
                    yield Row(record.rejected_prompt, record.answers[1:], template)

        encoded = encode(rows(), self.tokenizer, self.limits)
        for record in made:
            yield [next(encoded) for _ in range(1 if record.rejected_prompt is None else 2)]

    def _sides(self, row: Encoded) -> Iterator[tuple[int, int]]:
        """The numbers of prompt and answer in the store, for each answer of a row."""
        for i, answer in enumerate(row.answers):
            yield self._store(row.prompt), self._store(answer, None if row.scored is None else row.scored[i])

    def _store(self, ids: np.ndarray, scored: np.ndarray | None = None) -> int:
        small: np.ndarray = ids.astype(self.dtype)
        tools = scored is not None and not scored.all()
        scored = scored if scored is not None and tools else np.ones(len(small), bool)
        number = self.texts.setdefault((small.tobytes(), scored.tobytes() if tools else b""), len(self.texts))
        if number == len(self.parts):
            self.parts.append(small)
            self.scored.append(scored)
        self.has_tools |= tools
        return number

    def _count(self, encoded: list[Encoded], chat: bool) -> None:
        self.counts["prompts were cut"] += any(one.cut_prompt for one in encoded)
        self.counts["answers were cut, so they have no end"] += any(one.cut_answer for one in encoded)
        self.counts["rows have turns of tools in their answers; what the tools say is read, and not learned"] += any(
            one.scored is not None for one in encoded
        )
        moved = [one for one in encoded if one.moved]
        if moved and chat:
            self.counts["rows were rendered differently as prompt alone and with the answer"] += 1
            self.moved_tail = self.moved_tail or moved[0].tail
        elif moved:
            self.counts["rows have a token that spans prompt and answer; it counts to the answer"] += 1

    def _doubts(self, kept: list[Record], index: np.ndarray) -> list[str]:
        """What deserves a warning once the tokens are known."""
        doubts = []
        if self.moved_tail:
            doubts.append(
                f"the chat template ends prompts with {self.moved_tail!r}, which is missing where an answer follows; "
                "it was left out of the prompts. Templates of reasoning models do so; "
                "--data.chat_template_kwargs may help"
            )
        if len(np.unique(index, axis=0)) < len(index):
            doubts.append(f"rows that repeat another row: {len(index) - len(np.unique(index, axis=0)):,}")
        if index.shape[1] == 4:
            both = {tuple(row) for row in index.tolist()}
            turned = sum((c, d, a, b) in both for a, b, c, d in both)
            if turned:
                doubts.append(f"pairs that are there in both orders, so their labels contradict each other: {turned:,}")
        doubts += self._special(kept, index)
        return doubts + self._unwritten(kept)

    def _unwritten(self, kept: list[Record]) -> list[str]:
        """What the rows hold and the chat template leaves out."""
        turns = [turn for one in kept for text in (one.prompt, *one.answers) if isinstance(text, list) for turn in text]
        present = {k for turn in turns for k in CALLS if turn.get(k)} | {k for one in kept for k in one.template}
        left_out = sorted(present & {*CALLS, "tools"} - written(self.tokenizer, present))
        if not left_out:
            return []
        return [
            f"the chat template does not write {', '.join(left_out)}, which some rows have; the model will not see it"
        ]

    def _special(self, kept: list[Record], index: np.ndarray) -> list[str]:
        """Special tokens written in the texts, and answers that nothing ends."""
        marks = [t for t in self.tokenizer.all_special_tokens if t]
        prompts = sum(any(m in _flat(record.prompt) for m in marks) for record in kept)
        answers = sum(
            any(m in _body(text, self.tokenizer) for text in record.answers for m in marks) for record in kept
        )
        doubts = []
        if prompts:
            doubts.append(f"prompts that hold the text of a special token, which becomes that token: {prompts:,}")
        if answers:
            doubts.append(f"rows with the text of a special token in an answer, such as an early end: {answers:,}")
        if isinstance(kept[0].prompt, str):
            if self.tokenizer.chat_template:
                self.counts["rows are plain text, for which the tokenizer's chat template is not used"] += len(kept)
            if self.tokenizer.eos_token_id is None:
                doubts.append("the tokenizer has no EOS token, so the model does not learn where answers end")
        elif doubt := turn_end(self.tokenizer).doubt:
            doubts.append(doubt)
        elif not any(self._ends(self.parts[number]) for number in index[:64, 1]):
            doubts.append("the chat template writes no special token after answers, so the model does not learn to end")
        return doubts

    def _ends(self, ids: np.ndarray) -> bool:
        special = {*self.tokenizer.all_special_ids, *getattr(self.tokenizer, "added_tokens_decoder", {})}
        return bool(special & {int(i) for i in ids[-3:]})


def _same_text(encoded: list[Encoded]) -> Encoded | None:
    """The second of two rows with the same tokens, as a fault."""
    if len(encoded) < 2 or not all(np.array_equal(a, b) for a, b in zip(*((x.prompt, *x.answers) for x in encoded))):
        return None
    cut = any(one.cut_prompt or one.cut_answer for one in encoded)
    return replace(encoded[1], fault="identical_cut" if cut else "identical", found="the same tokens on both sides")


def _cut_apart(encoded: list[Encoded]) -> Encoded | None:
    """The first of two rows whose prompt was cut, as a fault."""
    cut = next((one for one in encoded if one.cut_prompt), None) if len(encoded) > 1 else None
    return cut and replace(cut, fault="cut_apart", where="prompt", found=f"{len(cut.prompt)} tokens are left")


def _flat(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(m["content"] for m in text)


def _body(text: Text, tokenizer: Any) -> str:
    """An answer without the end that may be written at its end."""
    return _flat(text).removesuffix(tokenizer.eos_token or "")


def _columns(kept: list[Record], table: str) -> dict[str, np.ndarray]:
    """Facts of the rows as columns of the table."""
    columns: dict[str, np.ndarray] = {f"{table}/row": np.asarray([r.row for r in kept], dtype=np.int64)}
    columns[f"{table}/prompt_hash"] = np.asarray([_hash(r.prompt) for r in kept], dtype=np.int64)
    types = {"label": bool, "group": np.int64}
    for name in kept[0].facts:
        values = [r.facts[name] for r in kept]
        sizes = {len(value) if isinstance(value, list) else 0 for value in values}
        if len(sizes) > 1:
            raise DataError(
                f"the {name} of an answer holds {' or '.join(map(str, sorted(sizes)))} numbers (0: no list); expected "
                "as many in all rows. Correct the column."
            )
        columns[f"{table}/{name}"] = np.asarray(values, dtype=types.get(name, np.float32))
    return columns


def _hash(prompt: Text) -> int:
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)
    return int.from_bytes(sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def _facts(tokenizer: Any) -> dict[str, Any]:
    return {
        "name": str(tokenizer.name_or_path),
        "fingerprint": fingerprint(tokenizer),
        "vocabulary": len(tokenizer),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
    }
