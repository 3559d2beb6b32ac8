"""Two speed records: what became slower, by its ratio to the floor of its own run.

Absolute times differ between machines and between hours; the bare products were timed in turn with the contender, so
their quotient does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pandas as pd

from benchmarks import records, report
from benchmarks.contenders import FLOOR, OURS

TOLERANCE: Final = 0.10
"""A ratio that grew by less is no regression; nor is one that grew by less than twice the spreads of all four."""

_KEY: Final = ["shape", "case", "dtype", "pairs", "length", "contender"]


def _ratios(path: Path) -> pd.DataFrame:
    """By point and contender: its time over the floor's, and the squared spreads of both."""
    record = records.load(path).get("speed") if path.is_dir() else records.read(path)
    if record is None or "floor" not in record.rows:
        raise ValueError(f"{path} is no speed record of pytest-benchmark.")
    rows = record.rows.fillna({"spread": 0.0})
    floors = rows[rows["contender"] == FLOOR].set_index(_KEY[:-1])["spread"].rename("floor_spread")
    rows = rows[rows["contender"] != FLOOR].join(floors, on=_KEY[:-1])
    values = {"ratio": rows["seconds"] / rows["floor"], "noise": rows["spread"] ** 2 + rows["floor_spread"] ** 2}
    return rows.assign(**values).set_index(_KEY)[["ratio", "noise"]].dropna()


def compare(old: Path, new: Path) -> pd.DataFrame:
    """Every contender at every point that both records (files, or folders of them) have: old, new, growth, allowed.

    Raises:
        ValueError, OSError: not a speed record, or nothing in common.
    """
    both = _ratios(old).add_suffix("_old").join(_ratios(new).add_suffix("_new"), how="inner")
    if both.empty:
        raise ValueError(f"{old} and {new} have no point in common: run both with the same sizes.")
    growth = both["ratio_new"] / both["ratio_old"] - 1
    allowed = (2 * (both["noise_old"] + both["noise_new"]) ** 0.5).clip(lower=TOLERANCE)
    changes = pd.DataFrame({"old": both["ratio_old"], "new": both["ratio_new"], "growth": growth, "allowed": allowed})
    return changes.sort_values("growth", ascending=False).reset_index()


def regressions(changes: pd.DataFrame, contender: str = OURS) -> pd.DataFrame:
    """Of `contender`, what grew by more than the noise."""
    return changes[(changes["contender"] == contender) & (changes["growth"] > changes["allowed"])]


def table(changes: pd.DataFrame) -> report.Table:
    """The changes, regressions first."""
    rows = []
    for change in changes.itertuples():
        slower, faster = change.growth > change.allowed, change.growth < -change.allowed
        verdict = "slower" if slower else "faster" if faster else "within noise"
        point = f"{change.shape}-{change.case}-{change.dtype}-{2 * change.pairs}x{change.length}"
        ratios = [f"{change.old:.2f}", f"{change.new:.2f}", f"{change.growth:+.1%}"]
        rows.append([point, change.contender, *ratios, f"{verdict} (allowed {change.allowed:.0%})"])
    return report.Table(
        "speed", "Times the floor, old and new", ["point", "contender", "old", "new", "change", ""], rows
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m benchmarks compare OLD NEW`: 1 if this library became slower, else 0."""
    parser = records.parser("compare", __doc__, None)
    for name in ("old", "new"):
        parser.add_argument(name, type=Path, help="a speed record, or a folder of records")
    args = parser.parse_args(argv)
    changes = compare(args.old, args.new)
    report.render(report.console(), [table(changes)])
    return int(len(regressions(changes)) > 0)
