"""Plots of the records: legible in print and without colour, units on the axes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from infopo_kernels.bench.contenders import CONTENDERS, FLOOR, OURS
from infopo_kernels.bench.plan import MAIN_SHAPE
from infopo_kernels.bench.report import PLOTS, Records, points, timings

# Colours that stay apart for the colour-blind (Okabe and Ito), with a marker and a hatch of its own for each.
_COLOURS: Final = ("#D55E00", "#000000", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
_MARKERS: Final = "osDv^<>P"
_HATCHES: Final = ("", "//", "..", "xx", "\\\\", "--", "++", "oo")
_STYLE: Final = {
    name: {"color": colour, "marker": marker, "hatch": hatch}
    for name, colour, marker, hatch in zip(CONTENDERS, _COLOURS, _MARKERS, _HATCHES, strict=True)
}


def _bars(axes: Axes, groups: list[str], values: dict[str, list[float | None]]) -> None:
    width = 0.8 / max(1, len(values))
    for i, (name, heights) in enumerate(values.items()):
        x = [g + (i - (len(values) - 1) / 2) * width for g in range(len(groups))]
        style = _STYLE[name]
        axes.bar(
            x, [h or 0.0 for h in heights], width, label=name, facecolor=style["color"] if name == OURS else "white",
            edgecolor=style["color"], hatch=style["hatch"], linewidth=1.0,
        )  # fmt: skip
        for at, height in zip(x, heights, strict=True):
            if height is None:
                bottom = axes.get_xaxis_transform()  # a value of 0 is nowhere on a logarithmic axis
                axes.text(at, 0, " not run", rotation=90, ha="center", va="bottom", fontsize=6, transform=bottom)
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _lines(axes: Axes, rows: list[dict[str, Any]], x: str, y: Callable[[dict[str, Any]], float | None]) -> None:
    for name in dict.fromkeys(row["contender"] for row in rows):
        own = [(row[x], value) for row in rows if row["contender"] == name and (value := y(row)) is not None]
        if not own:
            continue
        style = _STYLE[name]
        xs, ys = zip(*own, strict=True)
        axes.plot(
            xs, ys, color=style["color"], marker=style["marker"], label=name, linewidth=2.2 if name == OURS else 1.2
        )
        failed = [row for row in rows if row["contender"] == name and "failed" in row]
        if failed:
            axes.plot([xs[-1], failed[0][x]], [ys[-1]] * 2, ":", color=style["color"])
            axes.text(failed[0][x], ys[-1], "✕", color=style["color"], ha="center", va="center", fontsize=11)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    ticks = sorted({row[x] for row in rows if y(row) is not None or "failed" in row})
    axes.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 and t % 1024 == 0 else str(t) for t in ticks])


def _plain_logarithmic(axes: Axes) -> None:
    """A logarithmic axis labelled 20, 50, 100 rather than in powers of ten, of which a narrow one has none."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _speed(record: dict[str, Any]) -> plt.Figure:
    measured, about = timings(record), points(record)
    shape = (
        MAIN_SHAPE
        if any(info["shape"] == MAIN_SHAPE for info in about.values())
        else next(iter(about.values()))["shape"]
    )
    dtypes = list(dict.fromkeys(info["dtype"] for info in about.values() if info["shape"] == shape))
    figure, all_axes = plt.subplots(len(dtypes), 1, figsize=(9, 3.4 * len(dtypes)), squeeze=False, layout="constrained")
    for axes, dtype in zip(all_axes[:, 0], dtypes, strict=True):
        own = {
            info["case"]: measured[p] for p, info in about.items() if (info["shape"], info["dtype"]) == (shape, dtype)
        }
        names = [name for name in CONTENDERS if any(name in by for by in own.values())]
        ratios: dict[str, list[float | None]] = {
            name: [by[name].median / by[FLOOR].median if name in by else None for by in own.values()] for name in names
        }
        _bars(axes, list(own), ratios)
        axes.axhline(1.0, color="black", linewidth=1, linestyle="--")
        axes.set_yscale("log")
        ticks = [
            t for t in (0.5, 1, 2, 3, 5, 10, 20, 50, 100) if t <= 1.3 * max(v or 0 for r in ratios.values() for v in r)
        ]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.set_ylabel("time / bare products (1)")
        axes.set_title(f"{shape}, {dtype}", fontsize=10)
    handles = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=8, ncols=4, loc="outside upper center")
    return figure


def _memory(record: dict[str, Any]) -> plt.Figure:
    sweeps = (
        ("tokens", "tokens", "tokens in the batch"),
        ("vocabulary", "vocab", "vocabulary (words)"),
        ("pairs", "pairs", "pairs"),
    )
    figure, all_axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained", sharey=True)
    for axes, (sweep, column, label) in zip(all_axes, sweeps, strict=True):
        rows = [row for row in record["rows"] if row["sweep"] == sweep]
        _lines(axes, rows, column, lambda row: max(row["peak_mib"], 1.0) if "peak_mib" in row else None)
        _plain_logarithmic(axes)
        axes.set_xlabel(label)
    all_axes[0].set_ylabel("peak beyond inputs and gradients (MiB)")
    figure.legend(*all_axes[0].get_legend_handles_labels(), fontsize=7, ncols=8, loc="outside upper center")
    return figure


def _long(record: dict[str, Any]) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rows = record["rows"]
    _lines(left, rows, "tokens", lambda row: row["seconds"] / row["tokens"] * 1e6 if "seconds" in row else None)
    _lines(right, rows, "tokens", lambda row: max(row["peak_mib"], 1.0) if "peak_mib" in row else None)
    left.set_ylabel("time per token (µs)")
    right.set_ylabel("peak beyond inputs and gradients (MiB)")
    for axes in (left, right):
        axes.set_xlabel("tokens of one pair (✕: failed)")
        _plain_logarithmic(axes)
    left.legend(fontsize=7)
    return figure


def _accuracy(record: dict[str, Any]) -> plt.Figure:
    dtypes = list(dict.fromkeys(row["dtype"] for row in record["rows"]))
    figure, all_axes = plt.subplots(1, len(dtypes), figsize=(5 * len(dtypes), 3.8), squeeze=False, layout="constrained")
    for axes, dtype in zip(all_axes[0], dtypes, strict=True):
        rows = [row for row in record["rows"] if row["dtype"] == dtype]
        _lines(axes, rows, "length", lambda row: max(row["sequence"], 1e-9) if "sequence" in row else None)
        axes.set_yscale("log")
        axes.set_xlabel("tokens of the sequence")
        axes.set_title(dtype, fontsize=10)
    all_axes[0, 0].set_ylabel("error of the sequence log-probability (nats)")
    all_axes[0, 0].legend(fontsize=7)
    return figure


def _training(record: dict[str, Any]) -> plt.Figure:
    rows = record["rows"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, all_axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    names = [name for name in CONTENDERS if any(row["contender"] == name and "seconds" in row for row in rows)]
    for axes, key, label in (
        (all_axes[0], "seconds", "one training step (s)"),
        (all_axes[1], "peak_mib", "peak beyond weights and optimiser state (MiB)"),
    ):
        values = {
            name: [next((r.get(key) for r in rows if (r["contender"], r["dtype"]) == (name, d)), None) for d in dtypes]
            for name in names
        }
        _bars(axes, dtypes, values)
        axes.set_ylabel(label)
    all_axes[0].legend(fontsize=7)
    return figure


def draw(records: Records, folder: Path) -> list[Path]:
    """Write the plots of what was measured; their paths."""
    drawers = {"speed": _speed, "memory": _memory, "long-context": _long, "accuracy": _accuracy, "training": _training}
    paths = []
    for part, drawer in drawers.items():
        if part not in records or not (records[part].get("rows") or records[part].get("benchmarks")):
            continue
        with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
            figure = drawer(records[part])
            path = folder / PLOTS[part][0]
            figure.savefig(path, dpi=160, metadata={"Software": None})
            plt.close(figure)
        paths.append(path)
    return paths
