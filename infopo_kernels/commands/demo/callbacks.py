"""Callbacks of the demo: print a line now and then, and stop when the time is up."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from transformers import TrainerCallback


class Lines(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Prints, at most every `seconds`, how much the likelihoods of the step's batch have changed since the start."""

    def __init__(self, console: Console, title: str, beta: float, seconds: float = 10.0) -> None:
        self._console, self._title, self._beta, self._seconds = console, title, beta, seconds
        self._last = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """A line for a step, if it is time or the last one."""
        now = time.perf_counter()
        if "rewards/chosen" not in logs or (now - self._last < self._seconds and state.global_step < state.max_steps):
            return
        self._last = now
        changes = (f"{side} {logs[f'rewards/{side}'] / self._beta:+.1f} nats" for side in ("chosen", "rejected"))
        self._console.print(
            f"{self._title}, step {state.global_step} of {state.max_steps}: {', '.join(changes)}", highlight=False
        )


class Stop(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Ends training after `steps` steps, or (never before the first) when another would not end within `seconds`."""

    def __init__(self, *, seconds: float | None = None, steps: int | None = None) -> None:
        self._seconds, self._steps = seconds, steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The time runs from here."""
        self._begin = self._step_begin = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when the step began."""
        self._step_begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop here?"""
        now = time.perf_counter()
        late = self._seconds is not None and now - self._begin + (now - self._step_begin) > self._seconds
        if late or state.global_step == self._steps:
            control.should_training_stop = True
