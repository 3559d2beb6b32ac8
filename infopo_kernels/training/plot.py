"""training.png: what the losses did to the chosen and the rejected responses, and the bound."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from infopo_kernels.training.loop import History
from infopo_kernels.training.metrics import TITLES

# Okabe and Ito's palette: told apart with any colour vision, and by line style in print.
_COLOURS: Final = {"infopo": "#0072B2", "dpo": "#D55E00"}
_SIDES: Final = (("chosen", "-", "o"), ("rejected", "--", "X"))


def plot_history(history: History, losses: Sequence[str], path: Path, *, title: str, average: bool) -> None:
    """Three panels over the optimiser steps, one colour a loss; markers are the held-out pairs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    unit = "nats per token" if average else "nats per response"
    figure = Figure(figsize=(15, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    level, change, bound = figure.subplots(1, 3)
    for loss in losses:
        # A step's metrics are those before its update, so they stand at the number of updates done by then.
        steps = [{**record, "step": record["step"] - 1} for record in history.select(loss, "train")]
        held_out = history.select(loss, "held_out")
        for side, line, marker in _SIDES:
            label = f"{TITLES[loss]}, {side}"
            style: dict[str, Any] = {"color": _COLOURS[loss], "linestyle": line, "linewidth": 1.6, "label": label}
            spots: dict[str, Any] = {"color": _COLOURS[loss], "marker": marker, "linestyle": "none", "markersize": 8}
            for axes, key in ((level, f"{side}_logps"), (change, f"{side}_log_ratio")):
                axes.plot([r["step"] for r in steps], [r[key] for r in steps], **style)
                axes.plot([r["step"] for r in held_out], [r[key] for r in held_out], **spots)
        bound.plot(
            [r["step"] for r in steps], [r["mi_lower_bound"] for r in steps],
            color=_COLOURS[loss], linewidth=1.6, label=TITLES[loss],
        )  # fmt: skip
        bound.plot(
            [r["step"] for r in held_out], [r["mi_lower_bound"] for r in held_out],
            color=_COLOURS[loss], marker="o", linestyle="none", markersize=8,
        )  # fmt: skip
    level.set_ylabel(f"log-likelihood ({unit})")
    level.set_title("Log-likelihood of the responses")
    change.axhline(0, color="0.4", linewidth=0.8)
    change.set_ylabel(f"change since the start ({unit})")
    change.set_title("Log-ratio to the start")
    bound.set_ylabel("mutual information, lower bound (nats)")
    bound.set_title("NWJ bound")
    for axes in (level, change, bound):
        axes.set_xlabel("optimiser steps done")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    figure.suptitle(f"{title}. Lines: the step's batch; markers: held-out pairs")
    figure.savefig(path)
