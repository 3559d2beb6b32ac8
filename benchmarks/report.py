"""Tables of the records. One part of the file builds them; two renderers write them, with rich and as Markdown.

Functions import here what they use of pandas, rich and matplotlib: a GPU machine measures and writes Markdown without.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks import records, targets
from benchmarks.cases import CASES, MAIN_SHAPE, SHAPES
from benchmarks.contenders import CONTENDERS, FLOOR, OURS
from benchmarks.measure.timing import spread
from benchmarks.records import Record, Records, absent

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console


@dataclass
class Table:
    """A title, columns (the first is left-aligned), rows and notes."""

    part: str
    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def milliseconds(seconds: float) -> str:
    """A time as the tables write it."""
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.2f}"


def _over(figure: float, other: float, unit: str = "") -> str:
    return "–" if absent(figure / other) else f"{figure / other:.2f}{unit}"


def _spread(share: float) -> str:
    return "–" if absent(share) else f"± {share:.1%}"


def points(record: Record) -> Iterable[tuple[pd.Series, pd.DataFrame]]:
    """For each group of timings in the speed record: its first row, and its rows by contender."""
    for _, group in record.rows.groupby(["shape", "dtype", "case", "pairs", "length"], sort=False):
        yield group.iloc[0], group.set_index("contender")


def _speed(record: Record) -> list[Table]:
    tables = []
    for info, rows in points(record):
        shape, case = SHAPES[info["shape"]], CASES[info["case"]]
        title = (
            f"{shape.name} (H {shape.hidden}, V {shape.vocab}), {info['dtype']}, {2 * info['pairs']} sequences of "
            f"{info['length']} tokens: {case.text}"
        )
        cells = [
            [
                str(name), milliseconds(row["seconds"]), _spread(row["spread"]), f"{row['repetitions']:.0f}",
                _over(row["seconds"], row["ours"]), _over(row["seconds"], row["floor"]),
            ]
            for name, row in rows[rows["why"].isna()].sort_values("seconds").iterrows()
        ]  # fmt: skip
        notes = [f"{name} not run: {row['reason']}" for name, row in rows[rows["why"].notna()].iterrows()]
        columns = ["", "median, ms", "spread", "repetitions", "times ours", "times the floor"]
        tables.append(Table("speed", title, columns, cells, notes))
    return tables


def _summary(record: Record) -> Table:
    """A row for each point: this library against the fastest other implementation and the floor."""
    columns = [
        "",
        "type",
        "case",
        "scored tokens",
        "ours, ms",
        "fastest other",
        "its ms",
        "other / ours",
        "ours / floor",
    ]
    table = Table("speed", "All points: this library against the fastest other implementation of each", columns)
    for info, rows in points(record):
        peers = rows.drop(index=[OURS, FLOOR], errors="ignore")["seconds"].dropna()
        if peers.empty or absent(info["ours"] / info["floor"]):
            continue
        case, best = CASES[info["case"]], peers.min()
        scored = (1.5 if case.packed else 2) * info["pairs"] * info["length"] * (1 - case.prompt)
        table.rows.append(
            [
                info["shape"], info["dtype"], info["case"], f"{scored:,.0f}", milliseconds(info["ours"]),
                str(peers.idxmin()), milliseconds(best), _over(best, info["ours"]), _over(info["ours"], info["floor"]),
            ]
        )  # fmt: skip
    return table


def overview(records: Records) -> Table:
    """A row for each contender, at the main shape: its time divided by ours, its peak memory, its training step."""
    columns: dict[str, dict[str, str]] = {}
    titles = []
    for info, rows in points(records["speed"]):
        if info["shape"] == MAIN_SHAPE and info["case"] in ("step", "frozen"):
            titles += [f"time of {2 * info['pairs'] * info['length']:,} tokens over this library's"]
            figures = rows["seconds"].dropna()
            columns[f"{info['case']}, {info['dtype']}"] = {
                str(name): _over(seconds, figures.get(OURS, float("nan")), " ×") for name, seconds in figures.items()
            }
    if "memory" in records:
        frame = records["memory"].rows
        for dtype, rows in frame[(frame["sweep"] == "peak") & (frame["case"] == "step")].groupby("dtype", sort=False):
            titles += [f"peak memory of a step of {rows['tokens'].iloc[0]:,} tokens beyond inputs and gradients"]
            figures = rows.set_index("contender")["peak_mib"].dropna()
            columns[f"peak, {dtype}"] = {str(name): f"{peak:,.0f} MiB" for name, peak in figures.items()}
    if "training" in records:
        for dtype, rows in records["training"].rows.groupby("dtype", sort=False):
            titles += [
                f"time of a whole training step (backbone and AdamW too) of "
                f"{rows['sequences'].iloc[0] * rows['length'].iloc[0]:,} tokens over this library's"
            ]
            figures = rows.set_index("contender")["seconds"].dropna()
            columns[f"training step, {dtype}"] = {
                str(name): _over(seconds, figures.get(OURS, float("nan")), " ×") for name, seconds in figures.items()
            }
    rows = [[name, *(cells.get(name, "–") for cells in columns.values())] for name in (*CONTENDERS, FLOOR)]
    title = f"{MAIN_SHAPE}: {'; '.join(dict.fromkeys(titles))}"
    return Table("speed", title, ["", *columns], [row for row in rows if set(row[1:]) - {"–"}])


def _pivot(part: str, title: str, rows: pd.DataFrame, head: Callable[[Any], str], figure: str, form: str) -> Table:
    """A table with a row for each contender and a column for each `head`. Cells hold `figure`; notes below the table
    say why a figure is missing."""
    rows = rows.assign(head=rows.apply(head, axis=1))
    heads = list(dict.fromkeys(rows["head"]))
    table = Table(part, title, ["", *heads])
    for name, own in rows.groupby("contender", sort=False):
        cells = own.set_index("head").reindex(heads)
        missing = cells["why"].dropna()
        shown = [
            missing[at].partition(":")[0] if at in missing else "–" if absent(value) else form.format(value)
            for at, value in cells.get(figure, dict.fromkeys(heads)).items()
        ]
        table.rows.append([str(name), *shown])
        table.notes += [f"{name}, {missing.index[0]}: {missing.iloc[0]}"] if len(missing) else []
    return table


_SWEEPS: Final = {
    "tokens": ("{tokens:,} tokens", "2 pairs, V {vocab:,}"),
    "vocabulary": ("{vocab:,} words", "{tokens:,} tokens"),
    "pairs": ("{pairs:,} pairs", "{length} tokens a sequence, V {vocab:,}"),
}
"""For each sweep: the heading of its columns, and the sizes that stay fixed."""


def _formatted(form: str, row: Any) -> str:
    return form.format(**row)


def _memory(record: Record) -> list[Table]:
    rows, tables = record.rows, []
    peak = rows[rows["sweep"] == "peak"]
    if len(peak):
        one = peak.iloc[0]
        title = f"Peak beyond inputs and gradients, MiB: {one['shape']}, {one['tokens']:,} tokens"
        tables.append(
            _pivot("memory", title, peak, lambda row: f"{row['case']}, {row['dtype']}", "peak_mib", "{:,.0f}")
        )
    for sweep, (head, held) in _SWEEPS.items():
        chosen = rows[rows["sweep"] == sweep]
        if chosen.empty:
            continue
        one = chosen.iloc[0]
        title = f"Peak with growing {sweep}, MiB: step, {one['dtype']}, H {one['hidden']}, {held.format(**one)}"
        tables.append(_pivot("memory", title, chosen, partial(_formatted, head), "peak_mib", "{:,.0f}"))
    return tables


def _long(record: Record) -> list[Table]:
    rows, one = record.rows, record.rows.iloc[0]
    what = (
        f"{one['shape']} (H {one['hidden']}, V {one['vocab']}), {one['dtype']}, one pair, forward and backward; limit "
        f"{record.settings['memory_gib']:g} GiB"
    )
    rows = rows.assign(microseconds=rows["seconds"] / rows["tokens"] * 1e6)
    return [
        _pivot("long-context", f"{title}: {what}", rows, lambda row: f"{row['tokens']:,}", figure, "{:,.0f}")
        for title, figure in (
            ("Time per token, µs", "microseconds"),
            ("Peak beyond inputs and gradients, MiB", "peak_mib"),
        )
    ]


_ERRORS: Final = {
    "sequence": "Largest error of a sequence log-probability, nats",
    "token": "Largest error of a token log-probability, nats",
    "hidden": "Error of dX over its norm",
    "weight": "Error of dW over its norm",
}


def _accuracy(record: Record) -> list[Table]:
    rows = record.rows
    what = f"{rows['shape'].iloc[0]}, by type and tokens"
    return [
        _pivot("accuracy", f"{title}: {what}", rows, lambda row: f"{row['dtype']}, {row['length']}", key, "{:.1e}")
        for key, title in _ERRORS.items()
    ]


def _training(record: Record) -> list[Table]:
    one = record.rows.iloc[0]
    title = f"Whole steps of {MAIN_SHAPE} (AdamW, all weights), {one['sequences']} sequences of {one['length']} tokens"
    cells = [
        [row["contender"], row["dtype"], *(
            [f"{row['seconds']:.2f}", _spread(spread(row["each"])), str(len(row["each"])), f"{row['peak_mib']:,.0f}"]
            if absent(row["why"]) else [row["why"], "", "", ""]
        )]
        for row in record.rows.to_dict("records")
    ]  # fmt: skip
    peak = "peak beyond weights and optimiser state, MiB"
    return [Table("training", title, ["", "type", "s a step", "spread", "repetitions", peak], cells)]


_BUILDERS: Final = {"memory": _memory, "long-context": _long, "accuracy": _accuracy, "training": _training}


def tables(records: Records) -> list[Table]:
    """Every table of a comparison."""
    columns = ["", "against", "target", "measured", ""]
    result = [Table("targets", "Targets, against the best other contender", columns, targets.rows(records))]
    if "speed" in records and len(records["speed"].rows):
        speed = records["speed"]
        result += [overview(records), _summary(speed), *_speed(speed)]
    for part, build in _BUILDERS.items():
        if part in records and len(records[part].rows):
            result += build(records[part])
    return [table for table in result if table.rows]


def machine(info: dict[str, Any]) -> list[str]:
    """Lines that describe the machine and the versions."""
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    lines = [f"{info['cpu']}, {info['threads']} of {info['cores']} cores, {info['cpu_capability']}, {info['system']}"]
    if "gpu" in info:
        lines.append(f"{info['gpu']}, driver {info['driver']}, CUDA {info['cuda']}")
    lines.append(f"infopo_kernels {info['infopo_kernels']} (backend {info['backend']}), Python {info['python']}")
    return [*lines, versions]


def console() -> Console:
    """A console with 140 columns if the output is no terminal: rich would take 80, and the tables need more."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


def render(out: Console, tables: Sequence[Table]) -> None:
    """Print with rich."""
    from rich.table import Table as RichTable

    for table in tables:
        shown = RichTable(title=table.title, title_justify="left")
        for i, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
        for row in table.rows:
            shown.add_row(*row, style="bold" if row[0] == OURS else None)
        out.print(shown)
        for note in table.notes:
            out.print(f"  {note}")


def markdown(table: Table) -> str:
    """The table in Markdown, without title and notes."""
    head = [f"| {' | '.join(table.columns)} |", "|" + " --- |" + " ---: |" * (len(table.columns) - 1)]
    body = [
        f"| {' | '.join(f'**{cell}**' if row[0] == OURS and cell else cell for cell in row)} |" for row in table.rows
    ]
    return "\n".join(head + body)


def show(folder: Path, out: Console) -> None:
    """Print the tables of one processor's records, and draw their plots beside them where matplotlib is there.

    Raises:
        OSError, ValueError: there are none, or they do not belong together.
    """
    found = records.load(folder)
    render(out, tables(found))
    if importlib.util.find_spec("matplotlib") is None:
        out.print("matplotlib is not installed: no plots are drawn")
        return
    from benchmarks import plots

    for path in plots.draw(found, folder):
        out.print(f"wrote {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m benchmarks show FOLDER`."""
    parser = records.parser("show", "Tables and plots of records, without measuring.", None)
    parser.add_argument("folder", type=Path, help="of one processor, such as benchmarks/results/intel-6-207-2")
    show(parser.parse_args(argv).folder, console())
    return 0
