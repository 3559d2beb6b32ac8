"""The one look of all plots: points, or bars from zero; the legend outside; colours that everybody tells apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from benchmarks.contenders import CONTENDERS, OURS

# Okabe and Ito's palette, which keeps its colours apart for the colour-blind.
VERMILLION, BLACK, BLUE, GREEN = "#D55E00", "#000000", "#0072B2", "#009E73"
PURPLE, ORANGE, SKY, GREY = "#CC79A7", "#E69F00", "#56B4E9", "#999999"

_LOOKS: Final[dict[str, Any]] = {
    name: {"color": colour, "marker": marker}
    for name, colour, marker in zip(
        CONTENDERS, (VERMILLION, BLACK, BLUE, GREEN, PURPLE, ORANGE, SKY, GREY), "osDv^<>P", strict=True
    )
}

_RC: Final = {
    "font.size": 9,
    "axes.titlesize": 10,
    "figure.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


@contextmanager
def drawing(
    path: Path, title: str, columns: int, rows: int = 1, height: float = 3.8, sharey: bool = False
) -> Iterator[tuple[Figure, Any]]:
    """A figure under `title`, its axes [rows, columns]; written to `path` when done."""
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(10, height * rows), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title)
        yield figure, figure.subplots(rows, columns, sharey=sharey, squeeze=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, metadata={"Software": None})  # the same bytes from the same record


def line(name: str) -> dict[str, Any]:
    """Arguments of a contender's line: others are hollow and thin, so that those which coincide are all seen."""
    ours = name == OURS
    return {
        **_LOOKS[name],
        "linewidth": 2.4 if ours else 1.0,
        "markersize": 6 if ours else 7,
        "markerfacecolor": _LOOKS[name]["color"] if ours else "none",
        "markeredgewidth": 1.5,
        "label": name,
    }


def bars(axes: Axes, groups: list[str], values: dict[str, list[float | None]], why: dict[tuple[str, int], str]) -> None:
    """A bar for each contender in each group, from zero; where there is none, `why` stands in its place."""
    width = 0.84 / max(1, len(values))
    for i, (name, heights) in enumerate(values.items()):
        x = [group + (i - (len(values) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(x, [height or 0.0 for height in heights], width * 0.9, label=name, color=_LOOKS[name]["color"])
        for group, (at, height) in enumerate(zip(x, heights, strict=True)):
            if height is None:
                text, colour = f" {why.get((name, group), 'not run')}", _LOOKS[name]["color"]
                axes.text(at, 0, text, rotation=90, ha="center", va="bottom", fontsize=6.5, color=colour)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(bottom=0)
    axes.grid(visible=False, axis="x")


def failures(axes: Axes, failed: Iterable[tuple[float, str]]) -> None:
    """Above the axes, where a contender failed: no value is made up for it."""
    stacked: Counter[float] = Counter()
    for x, name in failed:
        y = 1.05 + 0.07 * stacked[x]
        stacked[x] += 1
        place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False, "linestyle": "none"}
        look = _LOOKS[name]
        axes.plot(x, y, markersize=8, markerfacecolor="none", label=name, **look, **place)
        axes.plot(x, y, marker="x", color=look["color"], markersize=10, markeredgewidth=1.5, **place)
    if stacked:
        axes.text(0, 1.05, "failed ", ha="right", va="center", transform=axes.transAxes)


def doubling(axes: Axes, ticks: Iterable[int]) -> None:
    """A logarithmic x axis that names the values measured: 512, 4k, 256k."""
    ticks = sorted(set(ticks))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 and t % 1024 == 0 else str(t) for t in ticks])
    axes.minorticks_off()


def logarithmic(axes: Axes) -> None:
    """A logarithmic y axis labelled 20, 50, 100 rather than in powers of ten, of which a narrow one has none."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, *axes: Axes, columns: int = 7) -> None:
    """Below all axes, each name once, contenders in the order of their table."""
    handles: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    names = sorted(handles, key=lambda name: list(CONTENDERS).index(name) if name in CONTENDERS else len(CONTENDERS))
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=columns, fontsize=8)
