"""Adapters of ``peft`` on a model: new adapters, trained adapters from a folder, and the adapters of a checkpoint.

Every field of an adapter's configuration that can be kept is kept; the others are refused by name.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offpolicy.errors import UsageError

# kinds of adapters that work layer by layer, whatever calls the layers, and start from their configuration alone
KINDS = tuple(
    "LORA IA3 LOHA LOKR OFT BOFT VERA HRA LN_TUNING TRAINABLE_TOKENS FOURIERFT VBLORA RANDLORA C3A SHIRA MISS ROAD "  # noqa: SIM905
    "HIRA GRALORA DELORA WAVEFT".split()
)
# fields of a LoRA configuration that survive; others must have their default
LORA = frozenset(
    "r target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save "  # noqa: SIM905
    "init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern trainable_token_indices use_dora "
    "lora_bias target_parameters ensure_weight_tying".split()
)
ABOUT = ("peft_version", "auto_mapping", "base_model_name_or_path", "revision", "runtime_config")  # not of the adapter
INITIAL = (True, False, "gaussian", "orthogonal", "eva")  # starts of LoRA that leave the base model as it is
FUSED = ("out_proj", "dt_proj")  # layers of state-space mixers whose weights are read without calling them


def import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UsageError(
            "LoRA needs the package peft, which is not installed. Run: pip install 'offpolicy[lora]'."
        ) from None
    return peft


def adapter_base(folder: str) -> str | None:
    """The model that the adapter in a folder belongs to; None where there is no adapter alone."""
    file = Path(folder, "adapter_config.json")
    if not file.is_file() or Path(folder, "config.json").is_file():
        return None
    try:
        return str(dict(json.loads(file.read_text("utf-8"))).get("base_model_name_or_path"))
    except (ValueError, TypeError, RecursionError, OSError) as error:
        raise UsageError(f"{file} is damaged ({first(error)}) Make or download it again.") from None


def lora_settings(rank: int, alpha: float | None, dropout: float, targets: Sequence[str] | None) -> dict[str, Any]:
    """Settings of ``peft.LoraConfig`` for the options of a language method.

    Args:
        rank: ≥ 1.
        alpha: None for twice the rank.
        dropout: in [0, 1).
        targets: names of layers; None for all linear layers but the head.
    """
    return {
        "r": rank,
        "lora_alpha": 2 * rank if alpha is None else alpha,
        "lora_dropout": dropout,
        "target_modules": list(targets) if targets else "all-linear",
    }


def new_adapter(model: Any, settings: Mapping[str, Any]) -> Any:
    """LoRA adapters on a model (arXiv:2106.09685): all other weights are frozen. They start as no change.

    Args:
        settings: of ``peft.LoraConfig``; with "all-linear" for ``target_modules``, layers whose weights are read
            without calling them get none.

    Raises:
        UsageError: peft is not installed, or a target is not in the model.
    """
    peft, targets = import_peft(), settings["target_modules"]
    head = model.get_output_embeddings()
    names = sorted(
        {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    )
    fused = [
        f"{name}.{layer}"
        for name, module in model.named_modules()
        if hasattr(module, "A_log")
        for layer in FUSED
        if isinstance(getattr(module, layer, None), nn.Linear)
    ]
    if targets == "all-linear" and fused:
        settings = {**settings, "exclude_modules": fused}
        plain = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head and n not in fused]
        settings["target_modules"] = sorted({name.rpartition(".")[2] for name in plain})
    try:
        for target in [] if isinstance(targets, str) else targets:
            if not any(f".{name}".endswith(f".{target}") for name, _ in model.named_modules()):
                raise ValueError(f"No layer is called {target}.")
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    except ValueError as error:
        raise UsageError(f"`lora_targets` cannot be used: {first(error)} The layers are {', '.join(names)}.") from None


def trained_adapter(model: Any, folder: str) -> Any:
    """A trained adapter on its base model, to be trained further.

    Raises:
        UsageError: a field of its configuration would be lost.
        Exception: of almost any kind, from a damaged folder.
    """
    peft = import_peft()
    check(peft.PeftConfig.from_pretrained(folder), f"`adapter` is '{folder}', which ")
    return peft.PeftModel.from_pretrained(model, folder, is_trainable=True)


def same_adapter(model: Any, settings: Mapping[str, Any]) -> Any:
    """The adapters that :func:`adapter_settings` described, whose weights are yet to be loaded.

    Raises:
        UsageError: a field would be lost.
    """
    peft = import_peft()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    settings = dict(settings)
    kind = str(settings.pop("peft_type", "LORA"))  # checkpoints of earlier versions hold LoRA alone
    if kind not in KINDS:
        raise UsageError(f"the checkpoint has an adapter of the kind {kind}; expected one of {', '.join(KINDS)}.")
    try:
        known: Any = PEFT_TYPE_TO_CONFIG_MAPPING
        config = known[kind](**{"task_type": "CAUSAL_LM", **settings})
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"the checkpoint's adapter cannot be built ({first(error)}) Install its version of peft."
        ) from None
    check(config, "the checkpoint ")
    return peft.get_peft_model(model, config)


def check(config: Any, what: str) -> None:
    """Refuse an adapter that would be another one after a checkpoint, or that this library does not run.

    Raises:
        UsageError: naming the field.
    """
    settings = _plain(config)
    kind, known = settings["peft_type"], type(config)
    if config.is_prompt_learning or kind not in KINDS:
        raise UsageError(
            f"{what}holds an adapter whose peft_type is {kind}; expected one that works layer by layer: "
            f"{', '.join(KINDS)}. Train with one of them, or merge it into its model first."
        )
    if (settings.get("megatron_core") or "megatron.core") != "megatron.core":
        raise UsageError(f"{what}holds an adapter whose configuration names a module to import (megatron_core).")
    fields: Mapping[str, Any] = getattr(known, "__dataclass_fields__", {})
    for name, value in settings.items():
        if kind == "LORA" and name in fields and name not in LORA and name not in ("peft_type", "task_type"):
            usual = fields[name].default
            if name in ("inference_mode", "eva_config", *ABOUT) or value in (usual, None, {}, []):
                continue
            raise UsageError(
                f"{what}holds an adapter whose `{name}` is {str(value)[:80]}; expected none, since it cannot be kept. "
                "Merge it into its model first, and train that."
            )
    if kind == "LORA" and settings["init_lora_weights"] not in INITIAL:
        raise UsageError(
            f"{what}holds an adapter whose `init_lora_weights` is '{settings['init_lora_weights']}', which changes the "
            "base model too; expected an adapter of the model as it is. Convert it with peft's "
            "path_initial_model_for_weight_conversion."
        )


def adapter_settings(model: Any) -> dict[str, Any] | None:
    """What rebuilds the adapters of a model, plain; None without adapters."""
    configs = getattr(model, "peft_config", None)
    if configs is None:
        return None
    return _kept(configs["default"])


def folder_settings(folder: str) -> dict[str, Any]:
    """What :func:`adapter_settings` gives of the adapter in a folder, or of the hub, once it is on a model.

    Raises:
        UsageError: peft is not installed, or a field would be lost.
        Exception: of almost any kind, from a damaged folder.
    """
    config = import_peft().PeftConfig.from_pretrained(folder)
    check(config, f"`adapter` is '{folder}', which ")
    return _kept(config)


def _kept(config: Any) -> dict[str, Any]:
    """The fields of a configuration that rebuild its adapters."""
    settings = {k: v for k, v in _plain(config).items() if k not in ABOUT and k not in ("inference_mode", "eva_config")}
    if settings["peft_type"] == "LORA":
        settings = {k: v for k, v in settings.items() if k in LORA or k == "peft_type"}
    return settings


def same_settings(now: Mapping[str, Any] | None, then: Mapping[str, Any] | None) -> bool:
    """Whether a checkpoint has these adapters; it may be of a version that noted fewer fields."""
    if now is None or then is None:
        return now is then
    return all(now.get(name) == value for name, value in then.items())


def adapter_names(model: Any) -> set[str]:
    """Names in the state of a model of all that belongs to its adapters, trained or not."""
    marks = (getattr(getattr(model, "base_model", None), "prefix", "lora_"), "modules_to_save.", "trainable_tokens_")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return trained | {name for name in model.state_dict() if any(mark in name for mark in marks)}


def drops_out(settings: Mapping[str, Any] | None) -> bool:
    """Whether adapters of these settings drop numbers out in training."""
    return any("dropout" in k and isinstance(v, float) and v > 0 for k, v in (settings or {}).items())


@torch.no_grad()
def merged(model: Any, vocabulary: int) -> Any:
    """A model with its adapters added to its weights, which changes the model given.

    Args:
        vocabulary: tokens the model knows.

    Raises:
        UsageError: adapters of this kind cannot be merged, or the merged model gives other numbers.
    """
    kind, training = adapter_settings(model)["peft_type"], model.training  # type: ignore[index]
    expected = probabilities(model.eval(), vocabulary)
    base = model.get_base_model()
    first_layer, last = base.get_input_embeddings(), base.get_output_embeddings()
    if hasattr(first_layer, "base_layer") and getattr(last, "weight", None) is first_layer.base_layer.weight:
        last.weight = nn.Parameter(
            last.weight.detach().clone(), requires_grad=False
        )  # the adapter is of one side alone
    try:
        whole = model.merge_and_unload()
    except (AttributeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"adapters of the kind {kind} cannot be merged ({first(error)}) Export without merging."
        ) from None
    check_merged(probabilities(whole, vocabulary), expected, 1e-3 if whole.dtype == torch.float32 else 0.1)
    _untie(whole)
    return whole.train(training)


@torch.no_grad()
def probabilities(model: Any, vocabulary: int) -> Tensor:
    """What a model gives for a few tokens, (1, 8, V), on the CPU; two models are compared by it."""
    ids = (torch.arange(3, 11, device="cpu") % vocabulary)[None].to(model.device)
    return model(input_ids=ids, use_cache=False).logits.float().softmax(-1).cpu()


def check_merged(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Refuse a model with its adapters merged that gives other probabilities than with them beside.

    Args:
        found, expected: of the two, as of :func:`probabilities`.
        tolerance: largest total variation distance at a place, in [0, 1].

    Raises:
        UsageError: they differ.
    """
    distance = float((found - expected).abs().sum(-1).max() / 2)
    if not distance <= tolerance:
        raise UsageError(
            "the model with its adapter merged gives other probabilities than with it beside (they differ by "
            f"{distance:.2g}); expected the same. Export without merging."
        )


def _untie(model: Any) -> None:
    """Let embeddings and output layer be two layers, where an adapter trained one of them alone."""
    first_layer, last = model.get_input_embeddings(), model.get_output_embeddings()
    config = model.config
    if last is not None and first_layer.weight is not last.weight:
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False


def _plain(config: Any) -> dict[str, Any]:
    """A configuration of peft in numbers, texts, lists and dicts."""

    def plain(value: Any) -> Any:
        if isinstance(value, enum.Enum):
            return value.value
        if isinstance(value, (set, frozenset)):
            return sorted(value)
        if isinstance(value, Mapping):
            return {key: plain(one) for key, one in value.items()}
        return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value

    return {name: plain(value) for name, value in config.to_dict().items()}


def first(error: Exception, longest: int = 300) -> str:
    """The first sentences of an error, with a full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > longest:
        cut = text[:longest]
        text = cut[: cut.rfind(". ") + 1] if ". " in cut else cut.rpartition(" ")[0] + " …"
    return text if text.endswith((".", "…")) else text + "."
