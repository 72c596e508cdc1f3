"""A tuned language model as a folder of Hugging Face: ``python -m offpolicy.export RUN OUT [--merge]``.

``transformers.AutoModelForCausalLM.from_pretrained(OUT)`` opens it, and so does everything that reads such folders.
"""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

from offpolicy.cli import entry
from offpolicy.errors import UsageError
from offpolicy.files import WriteError
from offpolicy.trust import Trust


def main(argv: list[str]) -> int:
    """Write the folder; returns the exit code."""
    from offpolicy.evaluate import Parser, add_trust

    parser = Parser("python -m offpolicy.export", description="Write a tuned language model for transformers.")
    parser.add_argument("run", help="run folder (its newest checkpoint) or checkpoint file")
    parser.add_argument("out", help="folder to write; must not hold anything yet")
    parser.add_argument("--merge", action="store_true", help="add LoRA adapters to the weights instead of beside them")
    add_trust(parser)
    args = parser.parse_args(argv)

    from offpolicy.training import screen

    out = export(args.run, args.out, merge=args.merge, trust=args.trust)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    kind = "adapter, which needs its base model" if (out / "adapter_config.json").is_file() else "whole model"
    print(screen.line("written", f"{out}, {size / 1e6:,.1f} MB, {kind}"))
    print(screen.line("open with", f"transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})"))
    return 0


def export(
    method: Any, out: str | os.PathLike[str], *, merge: bool = False, replace: bool = False, trust: Trust = None
) -> Path:
    """Write a tuned language model with its tokenizer. The folder is whole or absent.

    Args:
        method: a method for language models, or a run folder or checkpoint file of one.
        out: folder to write; must be absent or empty.
        merge: add adapters to the weights of the base model. Otherwise a model with adapters is written as adapters
            alone, which name their base model; they take a few megabytes. Without adapters there is no difference.
        replace: remove what the folder holds, once its successor is complete.
        trust: packages that the run may name, as of :func:`offpolicy.load`.

    Returns:
        The folder.

    Raises:
        UsageError: the folder holds something, or the method is no language model.
    """
    from offpolicy.data.texts.stops import stop_ids
    from offpolicy.language.adapters import adapter_settings, merged
    from offpolicy.language.module import LanguageModule
    from offpolicy.language.policy import base_of, save_tokenizer, silent, vocabulary_of
    from offpolicy.training.opening import load

    out = Path(out)
    if out.exists() and not replace and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists already; expected a new or empty folder. Pass another, or remove it.")
    owned = isinstance(method, (str, os.PathLike))  # opened here, so that it may be changed
    method = load(method, trust=trust) if owned else method
    if not isinstance(method, LanguageModule):
        raise UsageError(
            f"{type(method).__name__} has no language model; expected a run of one, such as DPO. A control method is "
            "opened with offpolicy.load(RUN)."
        )
    model = method.model
    if model is None:
        raise UsageError("the method has no model yet; expected a trained one. Fit it or load a checkpoint.")
    if merge and adapter_settings(model) is not None:
        model = merged(model if owned else copy.deepcopy(model), vocabulary_of(model))

    temporary, former = (out.with_name(f".{out.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old.tmp"))
    config = base_of(model).config
    cached, config.use_cache = config.use_cache, True  # off in training only
    try:
        with silent():
            _take_generation_settings(base_of(model), method.hparams.policy)
            if method.tokenizer is not None and hasattr(base_of(model), "generation_config"):
                base_of(model).generation_config.eos_token_id = stop_ids(base_of(model), method.tokenizer) or None
            for adapter in getattr(model, "peft_config", {}).values():
                if Path(method.hparams.policy).is_dir():  # found from any working folder
                    adapter.base_model_name_or_path = os.path.abspath(method.hparams.policy)
            model.save_pretrained(temporary)
        if method.tokenizer is not None:
            save_tokenizer(method.tokenizer, temporary)
        if out.exists():
            os.replace(out, former)
        os.replace(temporary, out)
        shutil.rmtree(former, ignore_errors=True)
    except OSError as error:
        raise WriteError.of(error, out) from None
    finally:
        config.use_cache = cached
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _take_generation_settings(model: Any, policy: str) -> None:
    """Stop tokens and the like, which a model rebuilt from a checkpoint has lost, where the policy is still at hand."""
    from transformers import GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_pretrained(policy, local_files_only=True)
    except (OSError, ValueError):  # no such file, or a model that is not on this disk
        return


if __name__ == "__main__":
    entry.run(main)
