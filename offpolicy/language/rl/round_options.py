"""The options of rounds: their ranges, and what does not go together."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from offpolicy.errors import UsageError, check_choice, check_range
from offpolicy.language.rl.engine import engine_name

PAIRINGS = ("independent", "best_worst")
DEFAULTS: dict[str, Any] = {  # of the options that only rounds have
    "prompts": None,
    "answers": 8,
    "pairing": "independent",
    "rewards": None,
    "judge": None,
    "reward_seconds": 10.0,
    "max_new_tokens": 256,
    "temperature": 1.0,
    "engine": "transformers",
    "generation_batch": 256,
}
MADE = {  # of the answers of a round, where not pairs
    "lists": "all answers to a prompt with their rewards",
    "winners": "the best answer to each prompt by its rewards",
}
LEAST = {"rounds": 0, "prompts": 1, "answers": 2, "max_new_tokens": 1, "generation_batch": 1, "reward_seconds": 0}


def check_round_options(given: Mapping[str, Any], method: Any) -> None:
    """Raise :class:`UsageError` for an option of rounds that is out of its range, ignored, or not possible.

    Args:
        given: options of rounds by name.
        method: a :class:`offpolicy.language.rl.rounds.RoundModule` that has its options.
    """
    for name, least in LEAST.items():
        if given[name] is not None:
            check_range(name, given[name], least)
    check_range("temperature", given["temperature"], 0.0, lower_open=True)
    check_choice("pairing", given["pairing"], PAIRINGS)
    if not given["rounds"]:
        _check_without_rounds(given, method.hparams["reference"])
        return
    _check_made(given, method.makes, type(method).__name__)
    _check_reference(method)
    if engine_name(given["engine"]) == "replay":
        raise UsageError(
            "`engine` is 'replay', which reads answers, and every round draws its own; expected an engine that draws. "
            "The answers of a round can be trained on as data: --data RUN/rounds with `rounds` 0."
        )


def _check_made(given: Mapping[str, Any], makes: str, name: str) -> None:
    """What a round makes of its answers must follow from the options that say so."""
    if makes != "pairs":
        for option, usual in (("judge", "--model.rewards"), ("pairing", "it to be left out")):
            if given[option] != DEFAULTS[option]:
                raise UsageError(
                    f"`{option}` is '{given[option]}', which is about pairs of answers, and {name} learns from "
                    f"{MADE.get(makes, makes)}; expected {usual}, or a method on pairs (DPO, INPO)."
                )
    elif given["pairing"] == "independent" and given["answers"] % 2:
        raise UsageError(
            f"`answers` is {given['answers']} and `pairing` 'independent', which pairs the first with the second, the "
            f"third with the fourth; expected an even number. Pass --model.answers {given['answers'] + 1}."
        )


def _check_reference(method: Any) -> None:
    """The reference must be used, and be what it was at the start of the run."""
    h = method.hparams
    if not method.uses_reference and h["reference"] == "round":
        raise UsageError(
            f"`reference` is 'round', and {type(method).__name__} has no reference as it is set; expected it to be "
            "left out."
        )
    if method.uses_reference and h["reference"] in ("auto", "precomputed", "live") and h["quantize"] and h["adapter"]:
        raise UsageError(
            f"`quantize` and `adapter` are given, and `reference` is '{h['reference']}', the policy at the start of "
            "the run, opened again: the reference would be opened without quantisation. Expected a new adapter, or "
            "another reference. Pass --model.lora_rank in place of `adapter`, or --model.reference round."
        )


def _check_without_rounds(given: Mapping[str, Any], reference: str) -> None:
    changed = [name for name, usual in DEFAULTS.items() if given[name] != usual]
    if changed:
        raise UsageError(
            f"`{changed[0]}` was given and `rounds` is 0, so that nothing is drawn; expected rounds, or no option of "
            "them. Pass --model.rounds 1, or leave it out."
        )
    if reference == "round":
        raise UsageError(
            "`reference` is 'round', the policy at the start of a round, and `rounds` is 0; expected rounds. Pass "
            "--model.rounds, or leave `reference` out."
        )


def answering_options(h: Any) -> SimpleNamespace:
    """The options that :class:`offpolicy.language.rl.answering.Answering` takes."""
    names = ("rewards", "reward_seconds", "max_new_tokens", "temperature", "engine", "generation_batch")
    none: dict[str, Any] = {"records": None, "filter": None, "length_cycle": None}
    none |= {"demonstrations": 0, "demonstration_share": 1.0}
    return SimpleNamespace(group_size=h.answers, **none, **{name: h[name] for name in names})


def reference_words(h: Any) -> str:
    """What the reference of a round is, for the first screen."""
    words = {
        "round": "the policy at the start of each round",
        "live": "the policy at the start of the run, a frozen copy",
        "adapter_off": "the policy with its adapter off",
    }
    again = "the policy with its adapter off" if h.lora_rank else "opened again to score a round"
    return words.get(h.reference) or (
        f"the policy at the start of the run, {again}" if h.reference in ("auto", "precomputed") else str(h.reference)
    )
