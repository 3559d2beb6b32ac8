"""The table at the end of a run. Every figure in it is taken from the run's own records."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Final

from rich.table import Table

from infopo_kernels.training.loop import History
from infopo_kernels.training.metrics import TITLES

_LIKELIHOODS: Final = (
    ("Chosen log-likelihood, held out", "chosen_logps"),
    ("Rejected log-likelihood, held out", "rejected_logps"),
)
_BEFORE_AND_AFTER: Final = (
    ("Reward accuracy, held out", "reward_accuracy", "{:.0%}"),
    ("Mutual information, lower bound, held out (nats)", "mi_lower_bound", "{:+.3f}"),
)


def _first_and_last(history: History, loss: str, key: str) -> tuple[float, float]:
    records = history.select(loss, "held_out")
    return records[0][key], records[-1][key]


def chosen_change(history: History, loss: str) -> float:
    """Change of the held-out chosen log-likelihood from the first to the last evaluation, nats."""
    before, after = _first_and_last(history, loss, "chosen_logps")
    return after - before


def result_table(history: History, losses: Sequence[str], *, average: bool) -> Table:
    """One column a loss: held-out figures before and after, time and memory."""
    table = Table(title="Result", title_justify="left")
    table.add_column("")
    for loss in losses:
        table.add_column(TITLES[loss], justify="right")
    if all(history.select(loss, "held_out") for loss in losses):
        unit = "nats per token" if average else "nats per response"
        for name, key in _LIKELIHOODS:
            pairs = [_first_and_last(history, loss, key) for loss in losses]
            table.add_row(
                f"{name} ({unit})", *(f"{before:.2f} → {after:.2f}  ({after - before:+.2f})" for before, after in pairs)
            )
        for name, key, form in _BEFORE_AND_AFTER:
            pairs = [_first_and_last(history, loss, key) for loss in losses]
            table.add_row(name, *(f"{form.format(before)} → {form.format(after)}" for before, after in pairs))
    steps = [history.select(loss, "train") for loss in losses]
    # The first step allocates gradients and the optimiser's state.
    usual = [records[1:] or records for records in steps]
    table.add_row("Time per step, median (s)", *(f"{median(r['seconds'] for r in rs):.2f}" for rs in usual))
    table.add_row(
        "Peak memory of a step (MiB)", *(f"{max(r['peak_memory_mib'] for r in records):,.0f}" for records in steps)
    )
    return table


def claim(history: History) -> str:
    """What the run shows of the paper's claim, as it came out."""
    infopo, dpo = chosen_change(history, "infopo"), chosen_change(history, "dpo")
    kept, lost = infopo >= 0, dpo < 0
    if kept and lost:
        verdict = "as the paper says"
    elif kept and infopo > dpo:
        verdict = "InfoPO keeps it as the paper says; DPO does not lose it in this run"
    else:
        verdict = "this run does not show what the paper says"
    return (
        f"Likelihood of the held-out chosen responses: {infopo:+.2f} nats under InfoPO, {dpo:+.2f} nats under DPO "
        f"({verdict})."
    )
