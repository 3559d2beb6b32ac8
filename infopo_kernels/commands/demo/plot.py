"""training.png: likelihoods of chosen and rejected responses under each loss, and the bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from infopo_kernels.commands.metrics_file import Record

# Okabe and Ito's palette: told apart with any colour vision, and by line style and marker in print.
_COLOURS: Final = ("#0072B2", "#D55E00")
_SIDES: Final = (("chosen", "-", "o"), ("rejected", "--", "X"))


def plot_runs(logs: Mapping[str, Sequence[Record]], path: Path, *, title: str, beta: float) -> None:
    """Three panels over the optimiser steps, one colour a run; lines are the steps' batches, markers held-out pairs.

    `logs` holds the records of the trainers, `step` and the metrics of `InfoPOTrainer`.
    """
    figure = Figure(figsize=(15, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    level, change, bound = figure.subplots(1, 3)
    for (name, records), colour in zip(logs.items(), _COLOURS, strict=False):
        for side, line, marker in _SIDES:
            label = f"{name}, {side}"
            _draw(level, records, f"logps/{side}", 1.0, label, colour, line, marker)
            _draw(change, records, f"rewards/{side}", 1 / beta, label, colour, line, marker)
        _draw(bound, records, "mi_lower_bound", 1.0, name, colour, "-", "o")
    for axes, text, unit in (
        (level, "Log-likelihood of the responses", "nats per response"),
        (change, "Log-ratio to the start", "nats per response"),
        (bound, "Lower bound of the mutual information (NWJ)", "nats"),
    ):
        axes.set_title(text)
        axes.set_ylabel(unit)
        axes.set_xlabel("optimiser steps done")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    change.axhline(0, color="0.4", linewidth=0.8)
    handles = [
        Line2D(
            [], [], color=colour, linestyle=line, marker=marker, linewidth=1.6, markersize=8, label=f"{name}, {side}"
        )
        for name, colour in zip(logs, _COLOURS, strict=False)
        for side, line, marker in _SIDES
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(f"{title}\nLines: the step's batch. Markers: held-out pairs.", fontsize=11)
    figure.savefig(path)


def _draw(
    axes: Any, records: Sequence[Record], key: str, scale: float, label: str, colour: str, line: str, marker: str
) -> None:
    # A step's metrics are those before its update, so they stand at the number of updates done by then.
    steps = [(record["step"] - 1, scale * record[key]) for record in records if record.get(key) is not None]
    held_out = [
        (record["step"], scale * record[f"eval_{key}"]) for record in records if record.get(f"eval_{key}") is not None
    ]
    if steps:
        axes.plot(*zip(*steps, strict=True), color=colour, linestyle=line, linewidth=1.6, label=label)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=colour, marker=marker, linestyle="none", markersize=8)
