"""Where the documentation explains a message: the one place that knows its address."""

from __future__ import annotations

DOCS = "https://github.com/offpolicy/offpolicy/blob/main/docs/"
TOPICS = {  # part of a message → heading of docs/faq.md, as links name it
    "does not say whether the environment ended an episode": "which-kind-of-end",
    "keys of D4RL (observations, actions, rewards, terminals) or ours": "columns-with-other-names",
    "Steps of control in such a table are read in Python": "steps-in-a-csv-file",
    "the columns have unequal lengths": "unequal-lengths",
    "values other than 0 and 1 (first at row": "flags-that-are-no-flags",
    "would take for real numbers; expected float actions": "discrete-actions",
    "takes vectors; expected (N, O)": "images",
    "For texts choose a method of language models": "texts-for-a-control-method-or-steps-for-a-language-method",
    "it is truncated, damaged or of another": "a-damaged-file",
    "steps without an end; expected a step limit": "an-episode-without-an-end",
    "is being trained by": "trained-by-another-process",
    "the checkpoint was trained on other data": "other-data-than-before",
    "The last finite checkpoint is": "training-diverged",
    "a file may only name what belongs to this library": "a-name-in-a-file-is-not-trusted",
    "chosen and rejected (pairs), completions and scores (lists)": "columns-of-texts",
    "which returns the number for one answer": "the-signature-of-a-reward",
    "--model.check_memory false tries it all the same": "no-room",
}


def page(name: str = "") -> str:
    """The address of a page of the documentation, such as "getting-started.md"."""
    return DOCS + name


def page_for(message: str) -> str:
    """The address of what the documentation says of a message; empty where it says nothing of its own."""
    return next((page(f"faq.md#{topic}") for part, topic in TOPICS.items() if part in message), "")
