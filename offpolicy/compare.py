"""Compare trained runs: ``python -m offpolicy.compare RUN RUN…`` prints a table of methods by tasks over seeds."""

from __future__ import annotations

from pathlib import Path

from offpolicy.cli import entry
from offpolicy.cli.reader import Parser
from offpolicy.errors import UsageError


def main(argv: list[str]) -> int:
    """Find the runs, print their table, and write it where asked; returns the exit code."""
    parser = Parser("python -m offpolicy.compare", description="A table of methods by tasks, over seeds.")
    parser.add_argument("runs", nargs="+", help="run folders, or folders that hold runs, such as runs/")
    parser.add_argument("--which", choices=("last", "best"), default="last", help="evaluation of each run that counts")
    parser.add_argument("--csv", help="also write one row per run into this file")
    args = parser.parse_args(argv)

    from offpolicy.files import atomic_write
    from offpolicy.report.runs import find_runs
    from offpolicy.report.tables import aggregate_lines, as_rows, as_text, compare_runs
    from offpolicy.report.writing import csv_text

    tables = compare_runs(find_runs(args.runs), args.which)
    if not any(table.cells for table in tables):
        notes = " ".join(note for table in tables for note in table.notes)
        raise UsageError(
            f"no run here has finished with an evaluation to compare by; expected one. {notes} Policies of data "
            "without an environment are compared by `python -m offpolicy.ope RUN RUN`."
        )
    print("\n\n".join(as_text(table, aggregate_lines(table)) for table in tables))
    if args.csv:
        atomic_write(Path(args.csv), csv_text([row for table in tables for row in as_rows(table)]))
        print(f"\nfile  {args.csv}")
    return 0


if __name__ == "__main__":
    entry.run(main)
