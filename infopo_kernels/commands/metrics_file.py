"""metrics.jsonl: what the trainer logs, written as it comes, so that a run that is cut short leaves what it had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """The records of a file; a last line that a killed run left unfinished is not one of them."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class MetricsFile(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Writes each log of the trainer as one JSON object with its `step`, on the first process only.

    A run that resumes keeps the records up to the step at which it goes on. Numbers that are not finite become null:
    JSON has no NaN.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._first = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the file, or go on with it."""
        if state.is_world_process_zero and self._first:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            kept = [r for r in read_records(self._path) if r["step"] <= state.global_step] if state.global_step else []
            self._path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            self._first = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Record | None = None, **kwargs: Any) -> None:
        """One line."""
        if state.is_world_process_zero and logs:
            finite = {k: None if isinstance(v, float) and not abs(v) < float("inf") else v for k, v in logs.items()}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **finite}) + "\n")
