"""Evaluations before and after training, as a table. Every figure is taken from the trainer's own log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from rich.table import Table

from infopo_kernels.commands.metrics_file import Record

_ROWS: Final = (
    ("Chosen log-likelihood (nats)", "eval_logps/chosen", "{:.2f}"),
    ("Rejected log-likelihood (nats)", "eval_logps/rejected", "{:.2f}"),
    ("Reward accuracy", "eval_rewards/accuracies", "{:.0%}"),
    ("Reward margin", "eval_rewards/margins", "{:.3f}"),
    ("Mutual information, lower bound (nats)", "eval_mi_lower_bound", "{:+.3f}"),
)


def evaluations(records: Sequence[Record]) -> list[Record]:
    """The evaluations of a log, in their order."""
    return [record for record in records if "eval_logps/chosen" in record]


def evaluation_table(logs: Mapping[str, Sequence[Record]], title: str = "Held-out pairs") -> Table:
    """One column a run: its first and its last evaluation."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in logs:
        table.add_column(name, justify="right")
    found = [evaluations(records) for records in logs.values()]
    for label, key, form in _ROWS:
        cells = [
            f"{form.format(each[0][key])} → {form.format(each[-1][key])}" if each and key in each[0] else "–"
            for each in found
        ]
        if any(cell != "–" for cell in cells):
            table.add_row(label, *cells)
    return table
