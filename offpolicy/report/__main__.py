"""A report of trained runs: ``python -m offpolicy.report runs/ --out report`` writes one page, figures and tables."""

from __future__ import annotations

from offpolicy.cli import entry
from offpolicy.cli.reader import Parser


def main(argv: list[str]) -> int:
    """Find the runs and write their report; returns the exit code."""
    parser = Parser("python -m offpolicy.report", description="One page, figures and tables of all runs in a folder.")
    parser.add_argument("runs", nargs="+", help="run folders, or folders that hold runs, such as runs/")
    parser.add_argument("--out", default="report", help="folder of the report")
    parser.add_argument("--x", default="updates", help="axis of curves: updates, samples, steps or hours")
    parser.add_argument("--title", default="Report of runs", help="of the page")
    args = parser.parse_args(argv)

    from offpolicy.report.build import write_report

    print(f"page  {write_report(args.runs, args.out, x=args.x, title=args.title)}")
    return 0


if __name__ == "__main__":
    entry.run(main)
