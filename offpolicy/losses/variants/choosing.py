"""The parts of a published variant together with the options that stand beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offpolicy.errors import UsageError, known_as, nearest
from offpolicy.losses.components import COMPONENTS
from offpolicy.losses.policy.trust import PPO, Centred
from offpolicy.losses.variants import VARIANTS, Variant
from offpolicy.losses.variants.absent import ABSENT
from offpolicy.registry import Spec

USUAL_TRUST = {"name": "ppo", "low": 0.2}
AGE_CAP = 3.0  # of importance weights with a lag; the bound that TRL gives weights of an engine
CORRECTS_AGE = ("age", "vcpo")  # weights


def variant_of(name: str) -> Variant:
    """A variant by name, whose case, '-' and '_' do not matter.

    Raises:
        UsageError: there is none, or it is a method of its own.
    """
    key, absent = known_as(str(name), VARIANTS), known_as(str(name), ABSENT)
    if absent and not key:
        row = ABSENT[absent]
        raise UsageError(
            f"`variant` is '{name}' ({row.title}), which is not here: {row.reason}; expected another "
            "one. `python -m offpolicy.fit --model.help variants` tells what there is."
        )
    if key is None:
        known = [row.name for row in VARIANTS.values() if not row.method]
        raise UsageError(
            f"`variant` is '{name}'; expected one of {', '.join(known)}.{nearest(str(name), VARIANTS)} "
            "`python -m offpolicy.fit --model.help variants` tells what they are."
        )
    found = VARIANTS[key]
    if found.method:
        told = (f" --model.{option} {value}" for option, value in found.options.items() if isinstance(value, str))
        raise UsageError(
            f"`variant` is '{name}', which is more than an objective; expected its method. Pass --model {found.method}"
            f"{''.join(told)}."
        )
    return found


def chosen(
    variant: Variant, *, clip: float | None, clip_high: float | None, anchor: Spec | None, bonus: Spec | None, lag: int
) -> dict[str, Any]:
    """Slot → component.

    Args:
        variant: published.
        clip, clip_high: in place of those of its trust region; None for them.
        anchor: beside its own; None for none.
        bonus: on the entropy; None for none.
        lag: iterations between drawing answers and learning from them.

    Raises:
        UsageError: an option and the variant exclude each other.
    """
    parts = dict(variant.parts)
    parts["trust"] = clipped(variant.name, parts.get("trust", USUAL_TRUST), clip, clip_high)
    if anchor is not None:
        parts["anchors"] = (*_listed(parts.get("anchors", ())), anchor)
    if bonus is not None and parts.get("entropy", "none") != "none":
        raise UsageError(
            f"`entropy` is given, and the variant '{variant.name}' has an entropy term of its own; expected one of "
            "them. Leave `entropy` out, or name the part in --model.objective."
        )
    return parts | ({} if bonus is None else {"entropy": bonus}) | (_aged(parts) if lag else {})


def clipped(variant: str, trust: Any, clip: float | None, clip_high: float | None) -> Any:
    """A trust region with other bounds.

    Raises:
        UsageError: it has no such bounds.
    """
    if clip is None and clip_high is None:
        return trust
    given = {"name": trust} if isinstance(trust, str) else dict(trust)
    kind: Any = COMPONENTS["trust"].get(given["name"])
    if not (isinstance(kind, type) and issubclass(kind, PPO | Centred)):
        raise UsageError(
            f"`clip` is given, and the trust region of the variant '{variant}' is '{given['name']}', which does not "
            "clip the ratio between 1 − `clip` and 1 + `clip_high`; expected no `clip`. Leave it out, or choose "
            "another trust region with --model.objective."
        )
    if clip is not None:
        given |= {"low": clip, "high": clip}
    return given | ({} if clip_high is None else {"high": clip_high})


def _aged(parts: Mapping[str, Any]) -> dict[str, Any]:
    """What corrects for answers of an earlier policy, unless the parts do it themselves."""
    weights = _listed(parts.get("weight", ()))
    names = [one if isinstance(one, str) else one["name"] for one in weights]
    if set(names) & set(CORRECTS_AGE):
        return {}
    if "ratio" not in parts:
        return {"ratio": {"name": "decoupled", "cap": AGE_CAP}}
    ratio = {"name": parts["ratio"]} if isinstance(parts["ratio"], str) else dict(parts["ratio"])
    kind = COMPONENTS["ratio"][ratio["name"]]
    denominator = ratio.get(
        "denominator", getattr(kind, "denominator", "previous" if ratio["name"] == "none" else None)
    )
    return {"weight": (*weights, {"name": "age", "cap": AGE_CAP})} if denominator == "previous" else {}


def _listed(given: Any) -> tuple[Any, ...]:
    return (given,) if isinstance(given, str | Mapping) else tuple(given)


def spec_words(spec: Any, gap: str = " ") -> str:
    """A component with its parameters, several joined by "+"; ``gap`` stands before the parameters."""
    if isinstance(spec, str):
        return spec
    if isinstance(spec, Mapping):
        more = ", ".join(f"{name} {value}" for name, value in spec.items() if name != "name")
        return f"{spec['name']}{gap}({more})" if more else str(spec["name"])
    return " + ".join(spec_words(one, gap) for one in spec)


def variant_words(variant: Variant, options: Mapping[str, Any]) -> str:
    """A variant in a line: its paper, its parts, and the options that it sets."""
    parts = [f"{slot} {spec_words(spec)}" for slot, spec in variant.parts.items()]
    sets = [f"--model.{name} {value}" for name, value in options.items()]
    paper = f"arXiv:{variant.paper}" if variant.paper[:1].isdigit() else variant.paper
    told = f"{variant.title} ({paper})" + (": " + ", ".join(parts) if parts else "")
    return told + ("; sets " + ", ".join(sets) if sets else "")
