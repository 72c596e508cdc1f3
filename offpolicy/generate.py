"""Draw answers from a tuned language model: ``python -m offpolicy.generate RUN [--data FILE]``.

Prompts are those held out in training, or all of a file. Answers go to a JSON-lines file of scored lists, which can
be given to ``--data`` again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from offpolicy import entry
from offpolicy.errors import UsageError, nearest
from offpolicy.trust import Trust

OF_A_FILE = ("columns", "split", "eval_data", "eval_fraction")  # options that another file does not share


def main(argv: list[str]) -> int:
    """Draw, score, write and print a summary; returns the exit code."""
    from offpolicy.evaluate import Parser, add_trust
    from offpolicy.language.rewards import VERIFIERS

    parser = Parser(
        "python -m offpolicy.generate",
        description="Draw answers from a language model.",
        epilog="--data.OPTION VALUE reads the prompts as in training (columns, max_prompt_length, separator, …).",
    )
    parser.add_argument("run", help="run folder, checkpoint file, or folder of a causal language model")
    parser.add_argument("--data", help="texts whose prompts are answered (those held out in training)")
    parser.add_argument("--prompts", type=int, default=64, help="how many prompts, 0 for all (64)")
    parser.add_argument("--num_samples", type=int, default=4, help="answers per prompt (4)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer (256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 for the most likely tokens (1)")
    parser.add_argument("--top_k", type=int, default=0, help="draw from the k most likely tokens, 0 for all (0)")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the likely tokens of this share (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--batch_size", type=int, default=32, help="answers drawn at once (32)")
    known = ", ".join(VERIFIERS)
    parser.add_argument(
        "--verifier", default="auto", help=f"auto, none, {known}, or an import path of your own function (auto)"
    )
    parser.add_argument("--out", help="file to write (in the run folder, else answers.jsonl)")
    add_trust(parser)
    args, rest = parser.parse_known_args(argv)
    asked = data_options(rest)

    import torch

    from offpolicy import screen
    from offpolicy.files import atomic_write
    from offpolicy.language.generation import answer_prompts, answer_text, prompts_of
    from offpolicy.language.rewards import choose_verifier, resolve_verifier

    verifier = None if args.verifier in ("auto", "none") else resolve_verifier(args.verifier)
    model, tokenizer, settings, file, words = open_run(args.run, args.seed, args.trust)
    if args.data:
        settings = {k: v for k, v in settings.items() if k not in OF_A_FILE} | {"name": args.data, "eval_fraction": 0.0}
    prompts = prompts_of(read_texts(settings | asked, tokenizer), args.prompts)
    if args.verifier == "auto":
        references = [None if p.reference is None else answer_text(tokenizer, p.token, p.reference) for p in prompts]
        verifier = choose_verifier(references)

    model.to("cuda" if torch.cuda.is_available() else "cpu")
    names = ("num_samples", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "batch_size")
    options = {name: getattr(args, name) for name in names}
    rows, numbers = answer_prompts(model, tokenizer, prompts, verifier=verifier, **options)
    file = Path(args.out) if args.out else file
    atomic_write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    summary = {"model": args.run, "prompts": len(prompts), **options, **numbers}
    atomic_write(file.with_suffix(".json"), json.dumps(summary, indent=2) + "\n")

    print(f"{words}, {len(prompts):,} prompts, {args.num_samples} answers each")
    for name, label, meaning in (
        ("score", "score", f"mean over answers ({getattr(verifier, '__name__', 'verifier')})"),
        ("best_score", "best", "mean over prompts of the best answer"),
        ("length_mean", "length", "tokens per answer"),
        ("ended", "ended", "of the answers ended by themselves"),
        ("distinct_1", "distinct", "of the tokens are different ones"),
        ("distinct_2", "", "of the pairs of neighbours are different ones"),
    ):
        if name in numbers:
            print(screen.line(label, f"{numbers[name]:.4g} {meaning}"))
    print(screen.line("file", str(file)))
    return 0


def open_run(run: str, seed: int = 0, trust: Trust = None) -> tuple[Any, Any, dict[str, Any], Path, str]:
    """The model and tokenizer behind a run, a checkpoint or a folder of ``transformers``.

    Returns:
        Model, tokenizer, the options of the data it was trained on, a file for its answers, and a few words on it.

    Raises:
        UsageError: there is nothing of that kind.
    """
    from offpolicy import api
    from offpolicy.arguments import read_settings
    from offpolicy.checkpoint import read_checkpoint, resolve_checkpoint
    from offpolicy.language.module import LanguageModule
    from offpolicy.language.policy import adapter_base, open_adapter, open_model
    from offpolicy.language.tokens import load_tokenizer

    base = adapter_base(run)
    if base is not None:
        return open_adapter(open_model(base), run), load_tokenizer(run), {}, Path("answers.jsonl"), run
    if (Path(run) / "config.json").is_file():
        return open_model(run, dtype="auto"), load_tokenizer(run), {}, Path("answers.jsonl"), run
    path = resolve_checkpoint(run)
    method = api.load(path, trust=trust)
    if not isinstance(method, LanguageModule) or method.tokenizer is None:
        raise UsageError(
            f"{run} is a run of {type(method).__name__} without a language model and tokenizer; expected one of DPO, "
            "SimPO and the like."
        )
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    stored = read_settings(str(folder)) if (folder / "config.yaml").is_file() else {}
    options = {key.removeprefix("data."): value for key, value in stored.items() if key.startswith("data.")}
    updates = int(read_checkpoint(path)["global_step"])
    file = folder / f"answers-step{updates:08d}-seed{seed}.jsonl"
    return method.model, method.tokenizer, options, file, f"{path}, {updates:,} updates"


def read_texts(options: dict[str, Any], tokenizer: Any) -> Any:
    """The held-out replay of these data, or all of them when nothing is held out."""
    from offpolicy.data.problems import ProblemData
    from offpolicy.data.text import TextData

    if not options.get("name"):
        raise UsageError("no prompts are known; expected texts. Pass --data FILE.")
    try:
        data = (ProblemData if "template" in options else TextData)(**options)
    except TypeError as error:  # of a run's own config.yaml
        raise UsageError(f"the options of the data do not fit ({error}). Pass --data FILE.") from None
    data.bind_tokenizer(tokenizer)
    replay = data.load()
    return replay if data.eval_replay is None else data.eval_replay


def data_options(argv: list[str]) -> dict[str, Any]:
    """``--data.OPTION VALUE`` as arguments of ``TextData``; ``--data.columns.prompt question`` goes into a dict."""
    import inspect

    from offpolicy.arguments import split
    from offpolicy.data.problems import ProblemData
    from offpolicy.data.text import TextData

    known = {**inspect.signature(ProblemData).parameters, **inspect.signature(TextData).parameters}
    options: dict[str, Any] = {}
    for name, value in split(argv):
        group, _, rest = name.partition(".")
        option, _, key = rest.partition(".")
        if group != "data" or option not in known:
            guess = nearest(option, known).replace("'", "'--data.", 1) if group == "data" else ""
            raise UsageError(f"--{name} is not an option.{guess} See --help.")
        text = not key and str(known[option].annotation).startswith("str") and value != "null"  # no line break is lost
        parsed = value if text else yaml.safe_load(str(value))
        options[option] = {**options.get(option, {}), key: parsed} if key else parsed
    return options


if __name__ == "__main__":
    entry.run(main)
