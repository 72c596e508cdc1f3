"""What was trained, for others to run: ``python -m offpolicy.export RUN OUT``.

A tuned language model becomes a folder of Hugging Face, which ``transformers.AutoModelForCausalLM.from_pretrained``
opens, and so does everything that reads such folders. The policy of a control method becomes one file, ``.onnx`` or
``.pt2``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from offpolicy.cli import entry
from offpolicy.errors import UsageError
from offpolicy.trust import Trust


def main(argv: list[str]) -> int:
    """Write the folder, or the file of a policy; returns the exit code."""
    from offpolicy.cli.reader import Parser, add_trust, add_which

    parser = Parser(
        "python -m offpolicy.export",
        description="Write a tuned language model for transformers, or a policy as one file.",
    )
    parser.add_argument("run", help="run folder or checkpoint file")
    parser.add_argument("out", help="folder to write; of a control method a file .onnx or .pt2; must not exist yet")
    parser.add_argument("--merge", action="store_true", help="add LoRA adapters to the weights instead of beside them")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (that of the policy's files)")
    add_which(parser)
    add_trust(parser)
    args = parser.parse_args(argv)

    from offpolicy.training import screen

    if Path(args.out).suffix in (".onnx", ".pt2"):
        if args.dtype is not None:
            raise UsageError(f"--dtype is '{args.dtype}', and policies of control methods are float32. Leave it out.")
        return write_policy(args.run, Path(args.out), args.which, args.trust)
    out = export(args.run, args.out, merge=args.merge, trust=args.trust, which=args.which, dtype=args.dtype)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(screen.line("written", f"{out}, {size / 1e6:,.1f} MB, {kind_of(out, asked=args.dtype is not None)}"))
    print(screen.line("open with", f"transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})"))
    return 0


def kind_of(out: Path, *, asked: bool) -> str:
    """What a folder holds, in words.

    Args:
        out: the folder.
        asked: whether the type of the weights was given.
    """
    if (out / "adapter_config.json").is_file():
        return "adapter, which needs its base model"
    dtype = json.loads((out / "config.json").read_text("utf-8")).get("dtype")
    return f"whole model, {dtype} as {'asked' if asked else 'the files of the policy (another: --dtype)'}"


def write_policy(run: str, out: Path, which: str, trust: Trust) -> int:
    """Write the policy of a control method as one file that runs without this library; returns the exit code."""
    from offpolicy.training import screen
    from offpolicy.training.deploy import STATES, deploy
    from offpolicy.training.goals import GoalModule
    from offpolicy.training.opening import load

    method = load(run, trust=trust, which=which)
    worst = deploy(method, out)
    names = ["obs", "goal"] if isinstance(method, GoalModule) else ["obs"]
    each = f"(n, {method.sizes.obs_dim})"
    print(screen.line("written", f"{out}, {out.stat().st_size / 1e3:,.1f} kB, {type(method).__name__}"))
    print(screen.line("takes", f"{' and '.join(names)} {each} as the environment gives them, float32"))
    print(screen.line("gives", f"actions (n, {method.sizes.action_dim}) in the units of the environment"))
    print(screen.line("checked", f"{STATES:,} states: actions differ by at most {worst:.1g} of their range"))
    if out.suffix == ".onnx":
        feed = ", ".join(f"{name!r}: {name}" for name in names)
        print(screen.line("run with", f"onnxruntime.InferenceSession({str(out)!r}).run(None, {{{feed}}})[0]"))
    else:
        print(screen.line("run with", f"torch.export.load({str(out)!r}).module()({', '.join(names)})"))
    return 0


def export(
    method: Any,
    out: str | os.PathLike[str],
    *,
    merge: bool = False,
    replace: bool = False,
    trust: Trust = None,
    which: str | int = "last",
    dtype: str | None = None,
) -> Path:
    """Write a tuned language model with its tokenizer. The folder is whole or absent.

    Weights have the type of the policy's files, to which they are rounded where they were trained in another one.

    Args:
        method: a method for language models, or a run folder or checkpoint file of one.
        out: folder to write; must be absent or empty.
        merge: add adapters to the weights of the base model. Otherwise a model with adapters is written as adapters
            alone, which name their base model; they take a few megabytes. Without adapters there is no difference.
        replace: remove what the folder holds, once its successor is complete.
        trust, which: packages that the run may name, and its checkpoint, as of :func:`offpolicy.load`.
        dtype: of the weights of a whole model: "float32", "bfloat16" or "float16"; None for that of the policy's files.

    Returns:
        The folder.

    Raises:
        UsageError: the folder holds something, the method is no language model, or `dtype` is given for adapters alone.
    """
    from offpolicy.language.export import check_free, export_model
    from offpolicy.language.module import LanguageModule
    from offpolicy.training.opening import load

    check_free(Path(out), replace)
    opened = isinstance(method, (str, os.PathLike))  # by us, so that it may be changed
    method = load(method, trust=trust, which=which) if opened else method
    if not isinstance(method, LanguageModule):
        raise UsageError(
            f"{type(method).__name__} has no language model; expected a run of one, such as DPO. A control method goes "
            "to a file: policy.onnx or policy.pt2."
        )
    if method.model is None:
        raise UsageError("the method has no model yet; expected a trained one. Fit it or load a checkpoint.")
    policy = method.hparams.policy
    how: dict[str, Any] = {"policy": policy, "keep": not opened, "replace": replace, "dtype": dtype}
    return export_model(method.model, method.tokenizer, out, merge, **how)


if __name__ == "__main__":
    entry.run(main)
