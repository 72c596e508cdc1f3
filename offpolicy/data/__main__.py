"""``python -m offpolicy.data make NAME… | show X | convert X OUT | compare X Y``: data sets on the command line.

Exit codes: 0 done, 2 a mistake in the command, 3 data that cannot be used or written.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from offpolicy.cli.entry import CTRL_C, DATA, USAGE, say
from offpolicy.cli.reader import Parser
from offpolicy.data.guard import read_json
from offpolicy.data.names import Target, describe, known_names, resolve
from offpolicy.errors import DataError, UsageError, amount, nearest
from offpolicy.files import WriteError
from offpolicy.trust import trusting

COMMANDS = ("make", "show", "convert", "compare")


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
            raise UsageError(
                f"'{arguments[0]}' is no command; expected {', '.join(COMMANDS)}.{nearest(arguments[0], COMMANDS)}"
            )
        options = _parser().parse_args(arguments)
        options.run(options)
    except UsageError as error:
        return say(error, USAGE)
    except DataError as error:
        return say(error, DATA)
    except BrokenPipeError:  # the reader of our output has seen enough (`| head`)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - or the interpreter complains once more at exit
    except WriteError as error:
        return say(error, DATA)
    except OSError as error:
        return say(_write_fault(error), DATA)
    except KeyboardInterrupt as stop:
        return say(str(stop) or "Interrupted; nothing was left half-written.", CTRL_C)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m offpolicy.data", description="Make, look at and convert data sets.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    make = commands.add_parser("make", help="make a set from its real environment and keep it")
    make.add_argument(
        "names", nargs="+", metavar="NAME", help="made sets, such as pendulum-stitch-v0; those of policies that are "
        "trained for them, hopper-medium-made-v0; OGBench's mazes and arms",
    )  # fmt: skip
    played = make.add_argument_group("sets of OGBench, and of policies that are trained here")
    played.add_argument("--steps", type=int, metavar="N", help="least number of transitions, or steps of the training")
    played.add_argument("--rows", type=int, metavar="N", help="least number of transitions that a trained policy plays")
    played.add_argument("--seed", type=int, metavar="S", help="of the training and the episodes (0)")
    played.add_argument("--jobs", type=int, metavar="J", help="processes that play; any number makes the same set (1)")
    make.add_argument("--out", metavar="FOLDER", help="write it there instead of the data folder")
    texts = "texts that `make instructions` makes pairs of prompts from (for MAPL), into the file --out"
    make.add_argument("--from", dest="source", metavar="TEXTS", help=texts)
    make.add_argument("--check", action="store_true", help="measure its reference scores again (a minute or two)")
    make.set_defaults(run=_make)
    show = commands.add_parser("show", help="print the data report of a set; without a name, list the known names")
    show.add_argument("data", nargs="?", help="a known name, a file or a folder")
    show.add_argument("--no_download", action="store_true", help="do not fetch a set that is not on disk")
    page = "write a page with figures (NAME-data.html unless FILE is given)"
    show.add_argument("--html", nargs="?", const="", metavar="FILE", help=page)
    show.add_argument("--eval_data", metavar="NAME", help="held-out texts whose prompts the page looks for in these")
    _add_text_options(show)
    show.set_defaults(run=_show)
    convert = commands.add_parser("convert", help="write a set in another format")
    convert.add_argument("data", help="a known name, a file or a folder")
    convert.add_argument("out", help="a new folder (our format), or a new .hdf5 file (D4RL's layout)")
    convert.add_argument(
        "--on_bad", default="error", metavar="error|drop_episode|drop", help="what to do with faulty content"
    )
    convert.add_argument("--clip_actions", action="store_true", help="clip actions outside the bounds")
    convert.add_argument("--timeout_step", metavar="drop|keep|self", help="the last step before a time limit")
    _add_text_options(convert)
    convert.set_defaults(run=_convert)
    compare = commands.add_parser("compare", help="measure synthetic sets against the data that they imitate")
    compare.add_argument("real", help="a known name, a file or a folder")
    compare.add_argument("synthetic", nargs="+", help="files or folders; several are shown side by side")
    compare.add_argument(
        "--policy", metavar="RUN", help="run folder or checkpoint: how likely are the actions under it?"
    )
    compare.add_argument("--rows", type=int, default=4000, metavar="N", help="transitions measured of each set")
    compare.add_argument("--plot", metavar="FILE", help="draw quantiles, likelihood and dynamics error as a PNG")
    compare.add_argument("--json", metavar="FILE", help="write all numbers there; - prints them instead of the table")
    compare.add_argument("--trust", metavar="PACKAGES", help="run code of these packages where a file names it (none)")
    compare.set_defaults(run=_compare)
    return parser


def _add_text_options(parser: argparse.ArgumentParser) -> None:
    texts = parser.add_argument_group("texts")
    texts.add_argument("--tokenizer", metavar="DIR", help="folder or hub name of the tokenizer")
    texts.add_argument("--columns", metavar="JSON", help='our names → the source\'s, as \'{"prompt": "question"}\'')
    texts.add_argument("--split", metavar="NAME", help="part of a set that has several")
    strategy = "how a list of scored answers becomes pairs, as of --data.pair_strategy (best_vs_worst)"
    texts.add_argument("--pair_strategy", default="best_vs_worst", metavar="NAME", help=strategy)
    texts.add_argument("--separator", default="", metavar="TEXT", help="text between plain prompts and answers")
    texts.add_argument("--max_length", type=int, default=1024, metavar="N", help="tokens of prompt and answer together")


def _make(options: argparse.Namespace) -> None:
    if options.names == ["instructions"]:
        return _make_instructions(options)
    if options.source is not None:
        raise UsageError("--from was given, which is for `make instructions`; expected no other set. Leave it out.")
    targets = [resolve(name) for name in options.names]
    if options.out and len(targets) > 1:
        raise UsageError(f"--out was given for {len(targets)} sets; expected one. Make them one by one.")
    other = next((target for target in targets if target.kind not in ("made", "ogbench")), None)
    if other is not None:
        raise UsageError(
            f"{describe(other)} Only made sets can be made: {', '.join(_made_names())}; FAMILY-LEVEL-made-v0, such as "
            "hopper-medium-made-v0; and OGBench's mazes and arms."
        )
    for target in targets:
        if target.kind == "ogbench":
            _make_ogbench(target, options)
        elif target.info:
            _make_simulated(target, options)
        else:
            _make_fixed(target, options)


def _make_instructions(options: argparse.Namespace) -> None:
    for name in ("steps", "rows", "jobs"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name} was given, and every row of --from is used. Leave it out.")
    if not options.source or not options.out or options.check:
        raise UsageError(
            "`make instructions` was not told its texts and a new file, or has --check; expected --from TEXTS --out "
            "FILE.jsonl."
        )
    from offpolicy.data.texts.instructions import make_instructions

    found = make_instructions(options.source, options.out, seed=options.seed or 0)
    told = {"ordinary": "as they are", "intra": "one answer to two prompts", "inter": "two answers under two prompts"}
    words = ", ".join(f"{found[kind]:,} {word}" for kind, word in told.items() if found[kind])
    print(f"{options.out}: {amount(found.total(), 'pair')} ({words}), for --model MAPL")


def _make_fixed(target: Target, options: argparse.Namespace) -> None:
    for name in ("steps", "rows", "seed", "jobs"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name} was given, but the recipe of {target.name} is fixed. Leave it out.")
    if options.out and Path(options.out).exists():
        raise UsageError(f"{options.out} exists; expected a new folder. Remove it or choose another.")
    from offpolicy.data.report import report
    from offpolicy.data.sources.make import generate, open_made, reference_returns

    if options.out:
        replay = generate(target.name)
        replay.meta["file"] = str(replay.save(options.out))
    else:
        replay = open_made(target.name, must_keep=True)
    print(report(replay))
    if options.check:
        _print_returns(reference_returns(target.name))


def _make_simulated(target: Target, options: argparse.Namespace) -> None:
    from offpolicy.cli.making import make_simulated, returns_again
    from offpolicy.data.report import report

    given = {name: getattr(options, name) for name in ("steps", "rows", "seed", "out")}
    replay = make_simulated(target, jobs=1 if options.jobs is None else options.jobs, **given)
    print(report(replay))
    if options.check:
        _print_returns(returns_again(replay))


def _print_returns(found: dict[str, Any]) -> None:
    for kind, returns in found.items():
        error = returns.std(ddof=1) / len(returns) ** 0.5
        episodes = amount(len(returns), "episode")
        print(f"  {kind:11}  return {returns.mean():.1f} ± {error:.1f} (standard error, {episodes})")


def _make_ogbench(target: Target, options: argparse.Namespace) -> None:
    from offpolicy.data.report import report
    from offpolicy.data.sources import open_source
    from offpolicy.data.sources.ogbench_make import make, recipe_of

    if options.rows is not None:
        raise UsageError(f"--rows was given for {target.name}, whose transitions --steps counts. Pass --steps.")
    if options.check:
        raise UsageError(f"--check was given, but {target.name} has no reference scores. Leave it out.")
    recipe = recipe_of(target.name, target.info["env_id"], steps=options.steps, seed=options.seed or 0)
    place = target.location()
    assert place is not None  # only texts have none
    path = Path(options.out) / f"{target.name}.npz" if options.out else place
    make(recipe, path, jobs=1 if options.jobs is None else options.jobs)
    print(report(open_source(path)))


def _show(options: argparse.Namespace) -> None:
    if options.data is None:
        if options.html is not None:
            raise UsageError(
                f"--html took '{options.html}' as its file, and no data are named; expected NAME before it: show NAME "
                "--html."
            )
        print("\n".join(known_names()))
        return
    target = resolve(options.data, language=bool(options.tokenizer))  # before the imports, which take seconds
    if options.eval_data and (options.html is None or not _is_text(target)):
        raise UsageError(
            "--eval_data was given, which the page on texts looks at; expected texts and --html. Leave it out."
        )
    print(describe(target))
    if _is_text(target):
        _show_texts(target, options)
        return
    from offpolicy.data.report import report
    from offpolicy.data.sources import open_source

    replay = open_source(target, download=not options.no_download)
    print(report(replay, fingerprint=True))
    if options.html is not None:
        from offpolicy.report.data_page import data_page_sections

        _write_page(target, options, data_page_sections(replay))


def _write_page(target: Target, options: argparse.Namespace, sections: Any) -> None:
    from offpolicy.report.data_page import write_data_page

    name = re.sub(r"[^\w.-]+", "-", target.name)
    file = options.html or f"{name}-data.html"
    print(f"  page         {write_data_page(file, target.name, sections)}")


def _is_text(target: Target) -> bool:
    """Whether a target holds texts; a folder of our format says so in its index of columns."""
    if target.kind == "replay" and target.path is not None:
        return "token" in (read_json(target.path / "meta.json").get("columns") or {})
    return target.kind == "language"


def _text_options(options: argparse.Namespace) -> dict[str, Any]:
    try:
        columns = json.loads(options.columns or "null")
    except ValueError:
        columns = options.columns
    if columns is not None and not isinstance(columns, dict):
        raise UsageError(f'--columns is {options.columns!r}; expected JSON such as \'{{"prompt": "question"}}\'.')
    return {"columns": columns, "split": options.split, "pair_strategy": options.pair_strategy}


def _show_texts(target: Target, options: argparse.Namespace) -> None:
    from offpolicy.data.texts.opening import open_texts, sketch
    from offpolicy.data.texts.preview import report, samples
    from offpolicy.data.texts.tokens import load_tokenizer

    given = _text_options(options) | {"download": not options.no_download}
    if options.html is not None:
        _show_text_page(target, options, given)
        return
    if "hub" in target.info:  # problems, which are no texts to imitate
        from offpolicy.data.texts.problems import sketch_problems

        del given["pair_strategy"]
        print(sketch_problems(target, **given))
        return
    if options.tokenizer is None and target.kind != "replay":
        print(sketch(target, **given))
        return
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    replay = open_texts(
        target, tokenizer=tokenizer, separator=options.separator, max_length=options.max_length, **given,
    )  # fmt: skip
    print(report(replay))
    if tokenizer is not None:
        print(samples(replay, tokenizer))


def _show_text_page(target: Target, options: argparse.Namespace, given: dict[str, Any]) -> None:
    """The page on texts; its warnings are printed as well."""
    from offpolicy.data.replay import Replay
    from offpolicy.data.texts.survey import survey_stored, survey_texts
    from offpolicy.report.data_page import text_page_sections

    if target.kind == "replay":
        assert target.path is not None
        if options.eval_data:
            raise UsageError(
                f"--eval_data was given, but {target.name} holds tokens. Show the texts they were made of."
            )
        found = survey_stored(Replay.load(target.path, mmap=True))
    else:
        given |= {name: getattr(options, name) for name in ("separator", "max_length", "eval_data", "tokenizer")}
        found = survey_texts(target, **given)
    print(f"  rows         {found.kept:,} of {found.rows:,}: {found.form}")
    for doubt in found.doubts:
        print(f"  warning      {doubt}")
    _write_page(target, options, text_page_sections(found, options.tokenizer))


def _convert_texts(target: Target, out: Path, options: argparse.Namespace) -> None:
    from offpolicy.data.texts.opening import open_texts

    if options.tokenizer is None:
        raise UsageError("texts are stored as tokens; expected a tokenizer. Pass --tokenizer DIR, the policy's.")
    if out.suffix:
        raise UsageError(f"{out} has the type '{out.suffix}'; expected a folder (our format) for texts.")
    replay = open_texts(
        target, tokenizer=options.tokenizer, on_bad=options.on_bad, separator=options.separator,
        max_length=options.max_length, **_text_options(options),
    )  # fmt: skip
    replay.save(out)
    print(f"wrote {amount(replay.num_steps, 'token')} in {amount(replay.num_episodes, 'text')} to {out}")


def _convert(options: argparse.Namespace) -> None:
    target, out = resolve(options.data, language=bool(options.tokenizer)), Path(options.out)
    if out.exists():
        raise UsageError(f"{out} exists; expected a new name. Remove it or choose another.")
    if out.suffix and out.suffix.lower() not in (".hdf5", ".h5"):
        raise UsageError(f"{out} has the type '{out.suffix}'; expected a folder (our format) or .hdf5 (D4RL's layout).")
    print(describe(target))
    if target.kind == "language":
        _convert_texts(target, out, options)
        return
    from offpolicy.data.sources import open_source
    from offpolicy.data.sources.d4rl import write

    replay = open_source(
        target, on_bad=options.on_bad, clip_actions=options.clip_actions, timeout_step=options.timeout_step
    )
    if out.suffix:
        write(replay, out)
    else:
        replay.save(out)
    print(f"wrote {amount(replay.num_steps, 'step')} in {amount(replay.num_episodes, 'episode')} to {out}")


def _compare(options: argparse.Namespace) -> None:
    targets = [resolve(name) for name in (options.real, *options.synthetic)]
    texts = next((target for target in targets if _is_text(target)), None)
    if texts is not None:
        raise UsageError(f"{texts.name} holds texts; expected steps of an environment. Compare sets of one task.")
    from offpolicy.data.sources import open_source
    from offpolicy.diffusion.measures import compare, plot
    from offpolicy.files import atomic_write

    policy = None
    with trusting(options.trust):
        if options.policy:
            from offpolicy.diffusion.opening import open_method

            policy = open_method(options.policy)
        real, *sets = (open_source(target) for target in targets)
    names = [Path(name).name for name in options.synthetic]
    names = names if len(set(names)) == len(names) else options.synthetic
    found = compare(real, dict(zip(names, sets)), policy, rows=options.rows)
    text = json.dumps(found.as_dict(), indent=1)
    print(text if options.json == "-" else found)
    if options.json not in (None, "-"):
        atomic_write(options.json, text + "\n")
    if options.plot:
        plot(found, options.plot)


def _made_names() -> list[str]:
    """Made sets that no policy has to be trained for."""
    targets = [resolve(name) for name in known_names()]
    return [target.name for target in targets if target.kind == "made" and not target.info]


def _write_fault(error: OSError) -> str:
    """Cause, place and remedy; NumPy's short writes carry no number and mean a full disk."""
    barred = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
    remedy = (
        "Choose a folder you may read and write"
        if error.errno in barred
        else "Free some space or choose another folder"
    )
    cause = error.strerror or f"the data could not be written ({str(error).rstrip('.')})"
    where = f" ({os.fsdecode(error.filename)})" if error.filename else ""
    return f"{cause}{where}. {remedy}; nothing was left half-written."


if __name__ == "__main__":
    sys.exit(main())
