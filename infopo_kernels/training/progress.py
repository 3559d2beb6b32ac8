"""How far a run is: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from infopo_kernels.training.metrics import TITLES


class Advance(Protocol):
    """Tells a stage that `count` more is done, with the records that came of it."""

    def __call__(self, count: int, records: Sequence[dict[str, Any]] = ()) -> None: ...


def summary(records: Sequence[dict[str, Any]]) -> str:
    """The records of one step in a line: by how much the log-likelihoods changed since the start, as far as known."""

    def changes(record: dict[str, Any]) -> str:
        sides = ((side, record[f"{side}_log_ratio"]) for side in ("chosen", "rejected"))
        return ", ".join(f"{side} {change:+.1f} nats" for side, change in sides if change == change)

    return "   ".join(f"{TITLES[r['objective']]}: {changes(r)}" for r in records)


class Progress:
    """Stages of a run, one after the other or inside each other."""

    def __init__(self, console: Console, seconds_between_lines: float = 10.0) -> None:
        self._console = console
        self._seconds_between_lines = seconds_between_lines
        self._bars = Bars(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        """A stage of `total` units."""
        if total == 0:
            yield lambda count, records=(): None
        elif self._console.is_terminal:
            task = self._bars.add_task(title, total=total, note="")
            yield lambda count, records=(): self._bars.update(task, advance=count, note=summary(records))
        else:
            yield self._lines(title, total)

    def _lines(self, title: str, total: int) -> Advance:
        done, last = 0, time.perf_counter()

        def advance(count: int, records: Sequence[dict[str, Any]] = ()) -> None:
            nonlocal done, last
            done += count
            now = time.perf_counter()
            if done == total or now - last >= self._seconds_between_lines:
                last = now
                text = f"{title} {done}/{total}" + (f"   {summary(records)}" if records else "")
                self._console.print(text, highlight=False, soft_wrap=True)

        return advance
