"""Rows that cannot be trained on: what is wrong with them, and when they stop a load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from offpolicy.data.texts.messages import shorten
from offpolicy.errors import DataError, UsageError

FAULTS = {  # kind → what is wrong, what was expected
    "none": ("nothing (None)", "text"),
    "empty": ("no text", "an answer with more than white space"),
    "no_prompt": ("no text or turn", "a prompt"),
    "no_beginning": (
        "no common prefix with the rejected side, from which a prompt could be inferred,",
        'a prompt in both, or the name of the prompt column (--data.columns \'{"prompt": "…"}\')',
    ),
    "other_keys": (
        "a turn that differs between the sides, and not in what is said,",
        "the same turn before the answers; remove the keys that differ",
    ),
    "last_prompt_role": ("a prompt that ends with a turn of the assistant", "a turn of the user at its end"),
    "identical": (
        "two equal answers (white space at their ends aside)",
        "chosen and rejected that differ, or one answer to two prompts",
    ),
    "repeated": (
        "the prompt repeated in the answer",
        "the answer alone; where every row repeats it, pass --data.columns '{\"prompt\": null}'",
    ),
    "other_question": (
        "a conversation with a turn that is not in the prompt",
        "the turns of the prompt and then the assistant's, or these alone",
    ),
    "answer_kind": (
        "a right answer of a kind that no answer can be compared with",
        "text, a number, a list of these (each is right) or an object with `ground_truth`; an own reward gets the "
        "column by its name, with --data.columns '{\"answer\": null}'",
    ),
    "no_mark": (
        "a solution without a marked answer ('####' or \\boxed{…})",
        'the right answer so marked, or a column that holds it (--data.columns \'{"answer": "…"}\')',
    ),
    "last_role": ("a last turn that is not the assistant's", "a turn with the role 'assistant'"),
    "other_turn": ("an answer that holds a turn of the user or system", "turns of the assistant after the prompt"),
    "left_out": (
        "an answer that a `weight` other than 1, or `loss`, `train` or `trainable` false, leaves out of training,",
        "answers that are learned from; remove such rows or keys, or put a number into a column `weight` of the rows",
    ),
    "prompt_mismatch": (
        "a text that does not occur in the conversations",
        "the same question in both; pass --data.columns '{\"prompt\": null}' to take the conversations",
    ),
    "no_turn": ("sides without a common '\\n\\nAssistant:'", "dialogues that share everything up to an answer"),
    "scores": ("scores that do not fit the answers", "one number for each of at least two answers"),
    "nan": ("a score or weight that is not a finite number", "a number, of float32"),
    "negative": ("a negative weight", "a number ≥ 0; an answer to be unlearned is the rejected one of a pair"),
    "share": ("a number that is no share", "the share of judges who prefer the chosen answer, in [0, 1]"),
    "label": ("no label", "true or false"),
    "surrogate": ("half of a surrogate pair, which is no character", "whole characters; write the text again"),
    "template": ("turns that the chat template refuses", "roles in the order it wants"),
    "tool_turns": (
        "a turn of a tool whose place in the text cannot be told, so that it would be learned,",
        "a chat template that writes a conversation up to that turn as it writes the whole one",
    ),
    "long_prompt": ("a prompt longer than there is room", "a shorter one; raise --data.max_prompt_length"),
    "logps": ("log-probabilities that do not fit the demonstration", "one ≤ 0 for each of its tokens and for EOS"),
    "known_test": ("a question of the test set", "questions of the training set alone"),
    "no_prompt_token": ("a prompt without a token of its own", "a prompt that ends before the answer begins"),
    "truncated": ("an answer of which truncation leaves nothing", "room for it; raise --data.max_length"),
    "cut_apart": (
        "a text that was cut in a pair with two prompts, which may have lost what tells these apart,",
        "room for both prompts; raise --data.max_length",
    ),
    "identical_cut": ("answers that are equal after truncation", "room for both; raise --data.max_length"),
}


class Faults:
    """Collects faulty rows, and stops or counts them.

    Args:
        where: the source, for messages.
        rows: how many there are.
        on_bad: "error" or "drop".
        max_bad: largest share of the rows that may be dropped.
    """

    def __init__(self, where: str, rows: int, on_bad: str = "error", max_bad: float = 0.1) -> None:
        if on_bad not in ("error", "drop"):
            raise UsageError(f"`on_bad` is '{on_bad}'; expected 'error' or 'drop'. Pass one of them.")
        self.where, self.rows, self.on_bad, self.max_bad = where, rows, on_bad, max_bad
        self.unread: list[str] = []  # columns that may be what is missing
        self.found: dict[tuple[str, str], list[tuple[int, str]]] = {}

    def add(self, row: int, column: str, kind: str, found: Any = "") -> None:
        self.found.setdefault((column, kind), []).append((row, shorten(found)))

    @property
    def bad(self) -> int:
        return len({row for rows in self.found.values() for row, _ in rows})

    def counts(self) -> dict[str, int]:
        """Number of faulty rows by what is wrong with them."""
        return {f"`{column}` has {FAULTS[kind][0]}": len(rows) for (column, kind), rows in self.found.items()}

    def table(self) -> str:
        """Each reason with its count and first rows."""
        lines = []
        for (column, kind), rows in sorted(self.found.items(), key=lambda item: -len(item[1])):
            what, expected = FAULTS[kind]
            expected += f" from {listing(self.unread)}" if kind == "no_beginning" and self.unread else ""
            first = f"row {rows[0][0]}" + (f": {rows[0][1]}" if rows[0][1] else "")
            first += ", then " + ", ".join(str(row) for row, _ in rows[1:3]) if rows[1:] else ""
            count = f"{len(rows)} row{'s' if rows[1:] else ''}"
            lines.append(f"`{column}` has {what} in {count} (first: {first}), expected {expected}")
        return "; ".join(lines)

    def check(self) -> None:
        """Stop unless there are no faults, or few and ``on_bad`` is "drop".

        Raises:
            DataError: every reason with its count, its first rows and what to do.
        """
        bad = self.bad
        if bad and self.on_bad == "error":
            raise DataError(
                f"{self.where}: {bad} of {self.rows} rows cannot be trained on: {self.table()}. Correct the rows, or "
                "pass `--data.on_bad drop` to leave them out and count them."
            )
        if bad and bad == self.rows:
            raise DataError(f"{self.where}: no row is left, as all {bad} are faulty: {self.table()}. Correct them.")
        if bad > self.max_bad * self.rows:
            raise DataError(
                f"{self.where}: {bad} of {self.rows} rows are faulty, more than the share of {self.max_bad:g} that may "
                f"be dropped: {self.table()}. Correct the rows or raise `--data.max_bad`."
            )


def listing(names: Sequence[str]) -> str:
    """Names of columns side by side."""
    return ", ".join(names) or "no column"
