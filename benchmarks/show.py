"""Tables and plots of records, without measuring."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import plots, records, report


def show(folder: Path, console: Console) -> None:
    """Print the tables of one processor's records, and draw their plots beside them.

    Raises:
        OSError, ValueError: there are none, or they do not belong together.
    """
    found = records.load(folder)
    report.render(console, report.tables(found))
    for path in plots.draw(found, folder):
        console.print(f"wrote {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m benchmarks show FOLDER`."""
    parser = records.parser("show", __doc__, None)
    parser.add_argument("folder", type=Path, help="of one processor, such as benchmarks/results/intel-6-207-2")
    show(parser.parse_args(argv).folder, report.console())
    return 0
