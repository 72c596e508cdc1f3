"""A tuned language model as a folder of Hugging Face: ``python -m offpolicy.export RUN OUT [--merge]``.

``transformers.AutoModelForCausalLM.from_pretrained(OUT)`` opens it, and so does everything that reads such folders.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from offpolicy.cli import entry
from offpolicy.errors import UsageError
from offpolicy.trust import Trust


def main(argv: list[str]) -> int:
    """Write the folder; returns the exit code."""
    from offpolicy.cli.reader import Parser, add_trust, add_which

    parser = Parser("python -m offpolicy.export", description="Write a tuned language model for transformers.")
    parser.add_argument("run", help="run folder or checkpoint file")
    parser.add_argument("out", help="folder to write; must not hold anything yet")
    parser.add_argument("--merge", action="store_true", help="add LoRA adapters to the weights instead of beside them")
    add_which(parser)
    add_trust(parser)
    args = parser.parse_args(argv)

    from offpolicy.training import screen

    out = export(args.run, args.out, merge=args.merge, trust=args.trust, which=args.which)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    kind = "adapter, which needs its base model" if (out / "adapter_config.json").is_file() else "whole model"
    print(screen.line("written", f"{out}, {size / 1e6:,.1f} MB, {kind}"))
    print(screen.line("open with", f"transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})"))
    return 0


def export(
    method: Any,
    out: str | os.PathLike[str],
    *,
    merge: bool = False,
    replace: bool = False,
    trust: Trust = None,
    which: str | int = "last",
) -> Path:
    """Write a tuned language model with its tokenizer. The folder is whole or absent.

    Args:
        method: a method for language models, or a run folder or checkpoint file of one.
        out: folder to write; must be absent or empty.
        merge: add adapters to the weights of the base model. Otherwise a model with adapters is written as adapters
            alone, which name their base model; they take a few megabytes. Without adapters there is no difference.
        replace: remove what the folder holds, once its successor is complete.
        trust, which: packages that the run may name, and its checkpoint, as of :func:`offpolicy.load`.

    Returns:
        The folder.

    Raises:
        UsageError: the folder holds something, or the method is no language model.
    """
    from offpolicy.language.export import check_free, export_model
    from offpolicy.language.module import LanguageModule
    from offpolicy.training.opening import load

    check_free(Path(out), replace)
    opened = isinstance(method, (str, os.PathLike))  # by us, so that it may be changed
    method = load(method, trust=trust, which=which) if opened else method
    if not isinstance(method, LanguageModule):
        raise UsageError(
            f"{type(method).__name__} has no language model; expected a run of one, such as DPO. A control method is "
            "opened with offpolicy.load(RUN)."
        )
    if method.model is None:
        raise UsageError("the method has no model yet; expected a trained one. Fit it or load a checkpoint.")
    policy = method.hparams.policy
    return export_model(method.model, method.tokenizer, out, merge, policy=policy, keep=not opened, replace=replace)


if __name__ == "__main__":
    entry.run(main)
