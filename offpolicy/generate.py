"""Draw answers from a tuned language model: ``python -m offpolicy.generate RUN [--data FILE]``.

Prompts are those held out in training, all of a file (with answers or without), or given with ``--prompt``. Answers go
to a JSON-lines file of scored lists, which can be given to ``--data`` again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from offpolicy.cli import entry
from offpolicy.errors import DataError, UsageError, nearest
from offpolicy.trust import Trust

if TYPE_CHECKING:
    from offpolicy.data.texts.prompts import Asking
    from offpolicy.language.generation import Prompt

OF_A_FILE = ("columns", "split", "eval_data", "eval_fraction")  # options that another file does not share


def main(argv: list[str]) -> int:
    """Draw, score, write and print a summary; returns the exit code."""
    from offpolicy.cli.reader import Parser, add_trust
    from offpolicy.language.rl.verifiers import VERIFIERS

    parser = Parser(
        "python -m offpolicy.generate",
        description="Draw answers from a language model.",
        epilog="--data.OPTION VALUE reads the prompts as in training (columns, max_prompt_length, separator, …).",
    )
    parser.add_argument("run", help="run folder, checkpoint file, or folder of a causal language model")
    parser.add_argument("--data", help="texts, problems or prompts that are answered (those held out in training)")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    parser.add_argument("--prompts", type=int, default=64, help="how many prompts, 0 for all")
    parser.add_argument("--num_samples", type=int, default=4, help="answers per prompt")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 for the most likely tokens")
    parser.add_argument("--top_k", type=int, default=0, help="draw from the k most likely tokens, 0 for all")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the likely tokens of this share")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--batch_size", type=int, default=32, help="answers drawn at once")
    known = ", ".join(VERIFIERS)
    parser.add_argument(
        "--verifier", default="auto", help=f"auto, none, {known}, or an import path of your own function"
    )
    parser.add_argument("--revisions", type=int, default=0, help="how often the model revises its answers (SRPO)")
    parser.add_argument(
        "--revision_request", metavar="TEXT", help="what asks for a revision (as in the run's training)"
    )
    parser.add_argument("--out", help="file to write (in the run folder, else answers.jsonl)")
    add_trust(parser)
    args, rest = parser.parse_known_args(argv)
    asked = data_options(rest)

    import torch

    from offpolicy.files import atomic_write
    from offpolicy.language.generation import answer_prompts, answer_text
    from offpolicy.language.rl.rewards import resolve_verifier
    from offpolicy.language.rl.verifiers import choose_verifier
    from offpolicy.training import screen

    verifier = None if args.verifier in ("auto", "none") else resolve_verifier(args.verifier)
    model, tokenizer, settings, file, words = open_run(args.run, args.seed, args.trust)
    prompts, how = find_prompts(args, settings, asked, tokenizer)
    if args.verifier == "auto":
        references = [None if p.reference is None else answer_text(tokenizer, p.token, p.reference) for p in prompts]
        verifier = choose_verifier(references)

    model.to("cuda" if torch.cuda.is_available() else "cpu")
    names = ("num_samples", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "batch_size")
    options = {name: getattr(args, name) for name in names}
    revising, request = revisions_of(args, settings, asked, tokenizer)
    rows, numbers = answer_prompts(model, tokenizer, prompts, verifier=verifier, **revising, **options)
    file = Path(args.out) if args.out else file
    atomic_write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    summary = {"model": args.run, "prompts": len(prompts), **options, **numbers}
    atomic_write(file.with_suffix(".json"), json.dumps(summary, indent=2) + "\n")

    print(f"{words}, {len(prompts):,} prompts, {args.num_samples} answers each")
    if how:
        print(screen.line("prompts", how))
    if request:
        print(screen.line("revisions", f"{args.revisions}, each asked for by {request!r}"))
    for name in sorted(name for name in numbers if name.startswith("score_")):
        print(screen.line(name, f"{numbers[name]:.4g} before revision {int(name.removeprefix('score_')) + 1}"))
    print(first_answers(rows))
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


def find_prompts(
    args: argparse.Namespace, settings: dict[str, Any], asked: dict[str, Any], tokenizer: Any
) -> tuple[list[Prompt], str]:
    """The prompts that a command means, and how those without answers are put.

    Args:
        args: of the command: ``data``, ``prompt`` and ``prompts``.
        settings: the options of the data of the run; empty for a folder of ``transformers``.
        asked: options of the data in the command.
        tokenizer: of the model.

    Raises:
        UsageError: no prompts, or both a file and given ones.
        DataError: a file without prompts.
    """
    from offpolicy.data.texts import prompts as asking
    from offpolicy.language.generation import Prompt, prompts_of

    if args.prompt and args.data:
        raise UsageError("--prompt and --data were given; expected one of them. Leave the other out.")
    trained_on = settings or data_of_run(Path(args.run).resolve().parent)  # of RUN/hf
    if args.data:
        settings = {k: v for k, v in settings.items() if k not in OF_A_FILE} | {"name": args.data, "eval_fraction": 0.0}
    source = None
    if args.data:
        split, download = asked.get("split"), asked.get("download", settings.get("download", True))
        source = asking.rows_of(args.data, split, download=download)
    kind = asking.kind_of_rows(source, asked.get("columns") or {}) if source is not None else "texts"
    problems = "template" in settings | asked
    if not args.prompt and (source is None or kind == ("problems" if problems else "texts")):
        if "chat" in asked and not problems:
            raise UsageError("--data.chat is for prompts of plain text without answers; these have some. Leave it out.")
        return prompts_of(read_texts(settings | asked, tokenizer), args.prompts), ""
    put, words = _asking(settings | asked, trained_on, asked, tokenizer)
    if args.prompt:
        return [Prompt(ids, None) for ids in asking.given_prompts(args.prompt, tokenizer, put)], words
    assert source is not None
    if kind == "problems":
        shared = ("download", "on_bad", "max_bad", "chat_template_kwargs")
        options = {k: settings[k] for k in shared if k in settings} | asked
        options |= {"name": args.data, "chat": put.chat, "template": options.get("template"), "eval_fraction": 0.0}
        return prompts_of(read_texts(options, tokenizer), args.prompts), words
    options = {k: v for k, v in (settings | asked).items() if k in ("on_bad", "max_bad")}
    found = asking.read_prompts(source, tokenizer, put, columns=asked.get("columns"), **options)
    return [Prompt(ids, None) for ids in found[: args.prompts or None]], words


def revisions_of(
    args: argparse.Namespace, settings: dict[str, Any], asked: dict[str, Any], tokenizer: Any
) -> tuple[dict[str, Any], str]:
    """Arguments of :func:`answer_prompts` for the revisions that a command asks for, and the request.

    Raises:
        UsageError: a request without revisions.
    """
    from offpolicy.cli.arguments import read_settings
    from offpolicy.data.texts.conditioning import REQUEST, Revisions
    from offpolicy.errors import check_range

    check_range("revisions", args.revisions, 0)
    if not args.revisions:
        if args.revision_request:
            raise UsageError("--revision_request was given without --revisions; expected both. Pass --revisions 1.")
        return {}, ""
    folder = run_behind(args.run)
    trained = read_settings(str(folder)) if (folder / "config.yaml").is_file() else {}
    request = args.revision_request or str(trained.get("model.template") or REQUEST)
    trained_on = settings or data_of_run(folder)
    chat = asked.get("chat", bool(tokenizer.chat_template) and _trained_on_messages(trained_on))
    revise = Revisions(tokenizer, request, chat=bool(chat))
    return {"revisions": args.revisions, "revise": revise.prompt_after}, request


def _asking(
    options: dict[str, Any], trained_on: dict[str, Any], asked: dict[str, Any], tokenizer: Any
) -> tuple[Asking, str]:
    """How prompts of plain text are put, as in training where that is known, and in words."""
    from offpolicy.data.texts.prompts import Asking

    template, chat = options.get("template"), asked.get("chat")
    if chat is None:
        chat = bool(tokenizer.chat_template) and _trained_on_messages(trained_on)
    if "template" in options and template is None:
        template = _template_of(trained_on, tokenizer)
    words = "plain text is a turn of the user in the chat template" if chat else "plain text is put as it is"
    if template not in (None, "{prompt}"):
        words += f", inside {template!r}"
    other = "" if not tokenizer.chat_template else f" (--data.chat {'false' if chat else 'true'} changes that)"
    length = options.get("max_prompt_length")
    return Asking(chat, template or "{prompt}", options.get("chat_template_kwargs"), length), words + other


def _trained_on_messages(options: dict[str, Any]) -> bool:
    """Whether training had messages; a model of which that is not known counts as one of a chat."""
    from offpolicy.data.texts.formats import detect
    from offpolicy.data.texts.prompts import rows_of

    if "template" in options:
        return bool(options.get("chat"))
    if not options.get("name"):
        return True
    try:
        source = rows_of(options["name"], options.get("split"), download=False)
        return source is None or detect(source, options.get("columns")).style == "chat"
    except (UsageError, DataError):  # the data of training are gone
        return True


def _template_of(options: dict[str, Any], tokenizer: Any) -> str | None:
    """What the problems of training were put into; None where they are gone."""
    from offpolicy.data.texts.problems import open_problems

    names = ("columns", "split", "on_bad", "max_bad")
    try:
        given = {k: options[k] for k in names if k in options}
        return open_problems(options.get("name") or "", tokenizer=tokenizer, download=False, **given).meta["template"]
    except (UsageError, DataError):
        return None


def first_answers(rows: list[dict[str, Any]], number: int = 2, longest: int = 1000) -> str:
    """The first answers with their prompts, of different prompts where there are several, as lines for the screen."""
    from offpolicy.training import screen

    pairs = [(row["prompt"], row["completions"][0]) for row in rows[:number]]
    if len(rows) == 1:
        pairs = [(rows[0]["prompt"], completion) for completion in rows[0]["completions"][:number]]

    def shown(label: str, text: str) -> str:
        plain = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)  # nothing steers a terminal
        return screen.line(label, plain.replace("\n", "\n" + " " * (screen.LABEL + 2)))

    lines = []
    for prompt, answer in pairs:
        lines.append(shown("prompt", prompt if len(prompt) <= longest else "…" + prompt[-longest:]))
        lines.append(shown("answer", answer if len(answer) <= longest else answer[:longest] + "…"))
    return "\n".join(lines)


def open_run(run: str, seed: int = 0, trust: Trust = None) -> tuple[Any, Any, dict[str, Any], Path, str]:
    """The model and tokenizer behind a run, a checkpoint or a folder of ``transformers``.

    Returns:
        Model, tokenizer, the options of the data it was trained on, a file for its answers, and a few words on it.

    Raises:
        UsageError: there is nothing of that kind.
    """
    from offpolicy.data.texts.tokens import load_tokenizer
    from offpolicy.language.module import LanguageModule
    from offpolicy.language.policy import adapter_base, open_adapter, open_model
    from offpolicy.training.checkpoints import read_checkpoint, resolve_checkpoint, run_of
    from offpolicy.training.opening import load

    base = adapter_base(run)
    if base is not None:
        return open_adapter(open_model(base), run), load_tokenizer(run), {}, Path("answers.jsonl"), run
    if (Path(run) / "config.json").is_file():
        return open_model(run, dtype="auto"), load_tokenizer(run), {}, Path("answers.jsonl"), run
    path = resolve_checkpoint(run)
    method = load(path, trust=trust)
    if not isinstance(method, LanguageModule) or method.tokenizer is None:
        raise UsageError(
            f"{run} is a run of {type(method).__name__} without a language model and tokenizer; expected one of DPO, "
            "SimPO and the like."
        )
    folder = run_of(path)
    updates = int(read_checkpoint(path)["global_step"])
    file = folder / f"answers-step{updates:08d}-seed{seed}.jsonl"
    return method.model, method.tokenizer, data_of_run(folder), file, f"{path}, {updates:,} updates"


def run_behind(run: str) -> Path:
    """The run folder of a run, a checkpoint, or the ``hf`` folder in a run; the parent of another folder."""
    from offpolicy.training.checkpoints import resolve_checkpoint, run_of

    if any((Path(run) / name).is_file() for name in ("config.json", "adapter_config.json")):
        return Path(run).resolve().parent
    return run_of(resolve_checkpoint(run))


def data_of_run(folder: Path) -> dict[str, Any]:
    """The options of the data that a run was trained on; empty where the folder is none of a run."""
    from offpolicy.cli.arguments import read_settings

    stored = read_settings(str(folder)) if (folder / "config.yaml").is_file() else {}
    return {key.removeprefix("data."): value for key, value in stored.items() if key.startswith("data.")}


def read_texts(options: dict[str, Any], tokenizer: Any) -> Any:
    """The held-out replay of these data, or all of them when nothing is held out."""
    from offpolicy.data.texts.module import TextData
    from offpolicy.data.texts.problems import ProblemData

    if not options.get("name"):
        raise UsageError("no prompts are known; expected texts. Pass --data FILE or --prompt TEXT.")
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

    from offpolicy.cli.arguments import split
    from offpolicy.data.texts.module import TextData
    from offpolicy.data.texts.problems import ProblemData

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
