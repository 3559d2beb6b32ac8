"""Tables of the records, as rich prints them and as Markdown: one builder, two renderers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

from rich.console import Console
from rich.table import Table as RichTable

from infopo_kernels.bench.batches import CASES
from infopo_kernels.bench.contenders import CONTENDERS, FLOOR, OURS
from infopo_kernels.bench.plan import MAIN_SHAPE, PARTS
from infopo_kernels.bench.shapes import SHAPES

Records = dict[str, dict[str, Any]]

_TITLES: Final = {
    "targets": "Targets",
    "speed": "Speed",
    "memory": "Memory",
    "long-context": "Long context",
    "accuracy": "Accuracy",
    "training": "Training",
}


@dataclass
class Table:
    """A title, columns (the first is left-aligned), rows and notes."""

    part: str
    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load(folder: Path) -> Records:
    """The records of a folder by part; those of a part that was measured in pieces (`speed-1.json`, ...) as one.

    Raises:
        OSError: there are none.
        ValueError: pieces of a part were measured on different machines or versions.
    """
    found = {part: [json.loads(path.read_text()) for path in sorted(folder.glob(f"{part}*.json"))] for part in PARTS}
    records = {part: _joined(part, pieces) for part, pieces in found.items() if pieces}
    if not records:
        raise FileNotFoundError(f"{folder} holds no record ({', '.join(f'{part}.json' for part in PARTS)}).")
    return records


def _joined(part: str, pieces: list[dict[str, Any]]) -> dict[str, Any]:
    first = pieces[0]
    if any(piece["machine_info"] != first["machine_info"] for piece in pieces):
        raise ValueError(f"the {part} records come from different machines or versions; measure them on one.")
    lists = [key for key in ("benchmarks", "skipped", "rows") if key in first]
    return {**first, **{key: [entry for piece in pieces for entry in piece[key]] for key in lists}}


@dataclass(frozen=True)
class Timing:
    """Repetitions of one contender at one point."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> float | None:
        """Half the interquartile range over the median; None for a single repetition."""
        if len(self.seconds) < 2:
            return None
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    @property
    def spread_text(self) -> str:
        return "–" if self.spread is None else f"± {self.spread:.1%}"


def timings(record: dict[str, Any]) -> dict[str, dict[str, Timing]]:
    """Timings of a pytest-benchmark record by point and contender."""
    result: dict[str, dict[str, Timing]] = defaultdict(dict)
    for entry in record["benchmarks"]:
        result[entry["group"]][entry["extra_info"]["contender"]] = Timing(tuple(entry["stats"]["data"]))
    return dict(result)


def points(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is known of each point of a pytest-benchmark record."""
    return {entry["group"]: entry["extra_info"] for entry in record["benchmarks"]}


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.2f}"


def _speed(record: dict[str, Any]) -> list[Table]:
    tables = []
    skipped: dict[str, dict[str, str]] = defaultdict(dict)
    for entry in record.get("skipped", ()):
        skipped[entry["point"]][entry["contender"]] = entry["reason"]
    about = points(record)
    for point, by_contender in timings(record).items():
        info, ours, floor = about[point], by_contender.get(OURS), by_contender.get(FLOOR)
        shape, case = SHAPES[info["shape"]], CASES[info["case"]]
        table = Table(
            "speed",
            f"{shape.name} (H {shape.hidden}, V {shape.vocab}), {info['dtype']}, {2 * info['pairs']} sequences of "
            f"{info['length']} tokens: {case.text}",
            ["", "median, ms", "spread", "repetitions", "times ours", "times the floor"],
        )
        for name in sorted(by_contender, key=lambda name: by_contender[name].median):
            timing = by_contender[name]
            table.rows.append(
                [
                    name,
                    _ms(timing.median),
                    timing.spread_text,
                    str(len(timing.seconds)),
                    f"{timing.median / ours.median:.2f}" if ours else "–",
                    f"{timing.median / floor.median:.2f}" if floor else "–",
                ]
            )
        table.notes += [f"{name} not run: {reason}" for name, reason in skipped[point].items()]
        tables.append(table)
    return tables


def _best_peer(by_contender: dict[str, Timing]) -> str | None:
    peers = [name for name in by_contender if name not in (OURS, FLOOR)]
    return min(peers, key=lambda name: by_contender[name].median) if peers else None


def summary(record: dict[str, Any]) -> Table:
    """Every point in one row: ours against the best peer and the floor."""
    table = Table(
        "speed",
        "All points: this library against the fastest other implementation of each",
        ["", "type", "case", "scored tokens", "ours, ms", "fastest other", "its ms", "other / ours", "ours / floor"],
    )
    about = points(record)
    for point, by_contender in timings(record).items():
        best, ours, floor = _best_peer(by_contender), by_contender.get(OURS), by_contender.get(FLOOR)
        if best is None or ours is None or floor is None:
            continue
        info, case = about[point], CASES[about[point]["case"]]
        lengths = (1.5 if case.packed else 2) * info["pairs"] * info["length"]
        table.rows.append(
            [
                info["shape"], info["dtype"], info["case"], f"{lengths * (1 - case.prompt):,.0f}", _ms(ours.median),
                best,
                _ms(by_contender[best].median), f"{by_contender[best].median / ours.median:.2f}",
                f"{ours.median / floor.median:.2f}",
            ]
        )  # fmt: skip
    return table


def overview(speed: dict[str, Any], memory: dict[str, Any]) -> Table:
    """Every contender in one row: its times over ours at the main shape, and its peak memory."""
    about, measured = points(speed), timings(speed)
    chosen = [p for p, info in about.items() if info["shape"] == MAIN_SHAPE and info["case"] in ("step", "frozen")]
    rows = [row for row in memory["rows"] if row["sweep"] == "peak" and row["case"] == "step"]
    peaks = {
        dtype: {row["contender"]: row for row in rows if row["dtype"] == dtype}
        for dtype in dict.fromkeys(row["dtype"] for row in rows)
    }
    titles = []
    if chosen:
        info = about[chosen[0]]
        titles.append(f"time of {2 * info['pairs'] * info['length']:,} tokens over this library's")
    if rows:
        titles.append(f"peak memory of a step of {rows[0]['tokens']:,} tokens beyond inputs and gradients")
    table = Table(
        "speed",
        f"{MAIN_SHAPE}: {', and '.join(titles)}",
        ["", *(f"{about[p]['case']}, {about[p]['dtype']}" for p in chosen), *(f"peak, {dtype}" for dtype in peaks)],
    )
    for name in (*CONTENDERS, FLOOR):
        cells = [
            f"{by[name].median / by[OURS].median:.2f} ×" if {name, OURS} <= by.keys() else "–"
            for by in (measured[p] for p in chosen)
        ]
        cells += [
            f"{by[name]['peak_mib']:,.0f} MiB" if "peak_mib" in by.get(name, {}) else "–" for by in peaks.values()
        ]
        if set(cells) - {"–"}:
            table.rows.append([name, *cells])
    return table


def _no_figure(row: dict[str, Any]) -> str | None:
    """Why a row has no figure; None if it has one."""
    return next(
        (f"{key.replace('_', ' ')}: {row[key]}" for key in ("failed", "skipped", "not_run") if key in row), None
    )


def _pivot(
    part: str, title: str, rows: Iterable[dict[str, Any]], column: str, unit: str, figure: str, form: str
) -> Table:
    """Contenders down, values of `column` across, `figure` in each cell; why one is missing, below."""
    rows = list(rows)
    heads = list(dict.fromkeys(row[column] for row in rows))
    table = Table(part, title, ["", *(f"{head:,}{unit}" if isinstance(head, int) else f"{head}" for head in heads)])
    for name in dict.fromkeys(row["contender"] for row in rows):
        cells = {row[column]: row for row in rows if row["contender"] == name}
        missing = {head: why for head, row in cells.items() if (why := _no_figure(row)) is not None}
        table.rows.append(
            [name]
            + [
                form.format(cells[head][figure])
                if figure in cells.get(head, {})
                else missing.get(head, "–").partition(":")[0]
                for head in heads
            ]
        )
        if missing:
            head = next(iter(missing))
            table.notes.append(f"{name}, {table.columns[1 + heads.index(head)]}: {missing[head]}")
    return table


def _memory(record: dict[str, Any]) -> list[Table]:
    rows = record["rows"]
    peak = [{**row, "column": f"{row['case']}, {row['dtype']}"} for row in rows if row["sweep"] == "peak"]
    one = peak[0]
    tables = [
        _pivot(
            "memory",
            f"Peak beyond inputs and gradients, MiB: {one['shape']}, {one['tokens']:,} tokens",
            peak, "column", "", "peak_mib", "{:,.0f}",
        )
    ]  # fmt: skip
    for sweep, column, unit in (
        ("tokens", "tokens", " tokens"),
        ("vocabulary", "vocab", " words"),
        ("pairs", "pairs", " pairs"),
    ):
        chosen = [row for row in rows if row["sweep"] == sweep]
        if not chosen:
            continue
        held = {
            "tokens": f"2 pairs, V {chosen[0]['vocab']:,}",
            "vocabulary": f"{chosen[0]['tokens']:,} tokens",
            "pairs": f"{chosen[0]['length']} tokens a sequence, V {chosen[0]['vocab']:,}",
        }[sweep]
        title = f"Peak with growing {sweep}, MiB: step, {chosen[0]['dtype']}, H {chosen[0]['hidden']}, {held}"
        tables.append(_pivot("memory", title, chosen, column, unit, "peak_mib", "{:,.0f}"))
    return tables


def _long(record: dict[str, Any]) -> list[Table]:
    rows = [
        {**row, "microseconds": row["seconds"] / row["tokens"] * 1e6} if "seconds" in row else row
        for row in record["rows"]
    ]
    one = rows[0]
    head = f"{one['shape']} (H {one['hidden']}, V {one['vocab']})"
    what = f"{head}, {one['dtype']}, one pair, forward and backward; limit {record['memory_gib']:g} GiB"
    return [
        _pivot("long-context", f"Time per token, µs: {what}", rows, "tokens", "", "microseconds", "{:,.0f}"),
        _pivot(
            "long-context", f"Peak beyond inputs and gradients, MiB: {what}", rows, "tokens", "", "peak_mib", "{:,.0f}"
        ),
    ]


_ERRORS: Final = {
    "sequence": "Largest error of a sequence log-probability, nats",
    "token": "Largest error of a token log-probability, nats",
    "hidden": "Error of dX over its norm",
    "weight": "Error of dW over its norm",
}


def _accuracy(record: dict[str, Any]) -> list[Table]:
    rows = [{**row, "column": f"{row['dtype']}, {row['length']}"} for row in record["rows"]]
    return [
        _pivot("accuracy", f"{title}: {rows[0]['shape']}, by type and tokens", rows, "column", "", key, "{:.1e}")
        for key, title in _ERRORS.items()
    ]


def _training(record: dict[str, Any]) -> list[Table]:
    one = record["rows"][0]
    table = Table(
        "training",
        f"Whole steps of SmolLM2-135M (AdamW, all weights), {one['sequences']} sequences of {one['length']} tokens",
        ["", "type", "s a step", "spread", "repetitions", "peak beyond weights and optimiser state, MiB"],
    )
    for row in record["rows"]:
        if "each" in row:
            timing = Timing(tuple(row["each"]))
            figures = [f"{timing.median:.2f}", timing.spread_text, str(len(row["each"])), f"{row['peak_mib']:,.0f}"]
        else:
            figures = [_no_figure(row) or "–", "", "", ""]
        table.rows.append([row["contender"], row["dtype"], *figures])
    return [table]


def tables(records: Records) -> list[Table]:
    """Every table of the records."""
    from infopo_kernels.bench import targets

    builders = {"memory": _memory, "long-context": _long, "accuracy": _accuracy, "training": _training}
    result = [aim] if (aim := targets.table(records)).rows else []
    if "speed" in records and records["speed"]["benchmarks"]:
        result += [overview(records["speed"], records["memory"])] if "memory" in records else []
        result += [summary(records["speed"]), *_speed(records["speed"])]
    for part, build in builders.items():
        if part in records and records[part]["rows"]:
            result += build(records[part])
    return result


def _machine(info: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    lines = [f"{info['cpu']}, {info['threads']} of {info['cores']} cores, {info['cpu_capability']}, {info['system']}"]
    if "gpu" in info:
        lines.append(f"{info['gpu']}, driver {info['driver']}, CUDA {info['cuda']}")
    lines.append(f"infopo_kernels {info['infopo_kernels']} (backend {info['backend']}), Python {info['python']}")
    return [*lines, versions]


def render(console: Console, tables: Sequence[Table]) -> None:
    """Print with rich."""
    for table in tables:
        out = RichTable(title=table.title, title_justify="left")
        for i, column in enumerate(table.columns):
            out.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
        for row in table.rows:
            out.add_row(*row, style="bold" if row[0] == OURS else None)
        console.print(out)
        for note in table.notes:
            console.print(f"  {note}")


def markdown_rows(table: Table) -> str:
    """The table alone, in Markdown."""
    head = [f"| {' | '.join(table.columns)} |", "|" + " --- |" + " ---: |" * (len(table.columns) - 1)]
    body = [
        f"| {' | '.join(f'**{cell}**' if row[0] == OURS and cell else cell for cell in row)} |" for row in table.rows
    ]
    return "\n".join(head + body)


def _markdown_table(table: Table) -> str:
    notes = [f"- {note}" for note in table.notes]
    return "\n".join([f"### {table.title}", "", markdown_rows(table), *([""] if notes else []), *notes, ""])


PLOTS: Final = {
    "speed": ("speed.png",),
    "memory": ("memory.png",),
    "long-context": ("long-context.png",),
    "accuracy": ("accuracy.png",),
    "training": ("training.png",),
}

_METHOD: Final = """\
Random inputs with logits of standard deviation 3, labels at random; reference-free InfoPO on mean log-probabilities, so
that rejected weights are of order one (or, with a large beta, underflowed). Every contender's loss and gradients are
checked against plain PyTorch in float32 before it is timed; wrong values are not timed. Repetitions of all contenders
are interleaved in an order that rotates; a figure is their median, the spread half the interquartile range over it. The
floor is the bare `torch.mm` products that the case needs (3 of size N V H for a scored token with a trainable head, 2
with a frozen one, 1 forward), at full size, in the type of the inputs, into memory that is there already. Memory is
measured in a fresh process for each figure, by the allocator on a GPU and by the resident set on a CPU; whole training
steps in one process, in turns on one model.
"""


def markdown(records: Records) -> str:
    """The page `docs/benchmarks.md`."""
    parts = ["# Benchmarks", ""]
    parts.append(
        "Generated by `python -m infopo_kernels bench --show benchmarks/results --docs docs/benchmarks.md` from the"
    )
    parts.append("records in `benchmarks/results/`; do not edit. `make bench` measures anew, at sizes chosen to fit")
    parts.append("15 minutes on 2 cores; `--product-gflop`, `--memory-length` and the like ask for others.")
    parts += ["", _METHOD, "## Contenders", "", "| | interface and setting |", "| --- | --- |"]
    parts += [f"| {name} | {contender.setting} |" for name, contender in CONTENDERS.items()]
    parts.append("")
    all_tables = tables(records)
    machines: dict[str, list[str]] = {}
    for part, record in records.items():
        own = _machine(record["machine_info"])
        machines.setdefault("\n".join(own), []).append(part)
    parts += ["## Machine", ""]
    for text, which in machines.items():
        parts += [
            f"{', '.join(_TITLES[part].lower() for part in which)}:",
            "",
            *(f"- {x}" for x in text.split("\n")),
            "",
        ]
    for part, title in _TITLES.items():
        own_tables = [table for table in all_tables if table.part == part]
        if not own_tables:
            continue
        parts += [f"## {title}", ""]
        parts += [f"![{title}](../benchmarks/results/{name})\n" for name in PLOTS.get(part, ())]
        parts += [_markdown_table(table) for table in own_tables]
    return "\n".join(parts).rstrip() + "\n"
