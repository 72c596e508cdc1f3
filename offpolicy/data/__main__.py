"""``python -m offpolicy.data make NAME | show X | convert X OUT``: data sets on the command line.

Exit codes: 0 done, 2 a mistake in the command, 3 data that cannot be used or written.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from pathlib import Path
from typing import NoReturn

from offpolicy.data.names import describe, known_names, resolve
from offpolicy.errors import DataError, UsageError, nearest

COMMANDS = ("make", "show", "convert")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. `{self.prog} --help` shows how.")


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
        return _fail(2, error)
    except DataError as error:
        return _fail(3, error)
    except BrokenPipeError:  # the reader of our output has seen enough (`| head`)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - or the interpreter complains once more at exit
    except OSError as error:
        return _fail(3, _write_fault(error))
    except KeyboardInterrupt:
        return _fail(130, "interrupted; nothing was left half-written")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m offpolicy.data", description="Make, look at and convert data sets.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="make|show|convert")
    make = commands.add_parser("make", help="make a set from its real environment and keep it")
    make.add_argument("name", help="a made set, such as pendulum-stitch-v0")
    make.add_argument("--out", metavar="FOLDER", help="write it there instead of the data folder")
    make.add_argument("--check", action="store_true", help="measure its reference scores again (a minute at most)")
    make.set_defaults(run=_make)
    show = commands.add_parser("show", help="print the data report of a set; without a name, list the known names")
    show.add_argument("data", nargs="?", help="a known name, a file or a folder")
    show.add_argument("--no-download", action="store_true", help="do not fetch a set that is not on disk")
    show.set_defaults(run=_show)
    convert = commands.add_parser("convert", help="write a set in another format")
    convert.add_argument("data", help="a known name, a file or a folder")
    convert.add_argument("out", help="a new folder (our format), or a new .hdf5 file (D4RL's layout)")
    convert.add_argument(
        "--on-bad", default="error", metavar="error|drop_episode", help="what to do with faulty content"
    )
    convert.add_argument("--clip-actions", action="store_true", help="clip actions outside the bounds")
    convert.add_argument("--timeout-step", metavar="drop|keep|self", help="the last step before a time limit")
    convert.set_defaults(run=_convert)
    return parser


def _make(options: argparse.Namespace) -> None:
    target = resolve(options.name)
    if target.kind != "made":
        raise UsageError(f"{describe(target)} Only made sets can be made: {', '.join(_made_names())}.")
    if options.out and Path(options.out).exists():
        raise UsageError(f"{options.out} exists; expected a new folder. Remove it or choose another.")
    from offpolicy.data.sources.make import generate, open_made, reference_returns
    from offpolicy.data.validate import report

    if options.out:
        replay = generate(target.name)
        replay.meta["file"] = str(replay.save(options.out))
    else:
        replay = open_made(target.name)
    print(report(replay))
    if options.check:
        for kind, returns in reference_returns(target.name).items():
            error = returns.std(ddof=1) / len(returns) ** 0.5
            print(f"  {kind:11}  return {returns.mean():.1f} ± {error:.1f} (standard error, {len(returns)} episodes)")


def _show(options: argparse.Namespace) -> None:
    if options.data is None:
        print("\n".join(known_names()))
        return
    target = resolve(options.data)  # before the imports, which take seconds
    print(describe(target))
    from offpolicy.data.sources import open_source
    from offpolicy.data.validate import report

    print(report(open_source(target, download=not options.no_download), fingerprint=True))


def _convert(options: argparse.Namespace) -> None:
    target, out = resolve(options.data), Path(options.out)
    if out.exists():
        raise UsageError(f"{out} exists; expected a new name. Remove it or choose another.")
    if out.suffix and out.suffix.lower() not in (".hdf5", ".h5"):
        raise UsageError(f"{out} has the type '{out.suffix}'; expected a folder (our format) or .hdf5 (D4RL's layout).")
    print(describe(target))
    from offpolicy.data.sources import open_source
    from offpolicy.data.sources.d4rl import write

    replay = open_source(
        target, on_bad=options.on_bad, clip_actions=options.clip_actions, timeout_step=options.timeout_step
    )
    if out.suffix:
        write(replay, out)
    else:
        replay.save(out)
    print(f"wrote {replay.num_steps:,} steps in {replay.num_episodes:,} episodes to {out}")


def _made_names() -> list[str]:
    return [name for name in known_names() if resolve(name).kind == "made"]


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


def _fail(code: int, message: object) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
