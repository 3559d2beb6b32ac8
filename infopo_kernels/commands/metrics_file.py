"""metrics.jsonl: the trainer's log, written line by line, so that an interrupted run keeps its records."""

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


def write_record(path: Path, record: Record) -> None:
    """Add one line. Numbers that are not finite become null: JSON has no NaN."""
    finite = {k: None if isinstance(v, float) and not abs(v) < float("inf") else v for k, v in record.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")


class MetricsFile(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Writes each log of the trainer as one JSON object with its `step` and `labels`, on the first process only.

    A resumed run keeps the records up to the step at which it begins, and drops later ones: it writes them again.
    Records with other labels belong to another run and stay.
    """

    def __init__(self, path: Path, **labels: str) -> None:
        self._path = path
        self._labels = labels

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop what this run is going to write again."""
        if not state.is_world_process_zero:
            return
        records = read_records(self._path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("", encoding="utf-8")
        for record in records:
            mine = all(record.get(name) == label for name, label in self._labels.items())
            if not mine or record["step"] <= state.global_step:
                write_record(self._path, record)

    def on_log(self, args: Any, state: Any, control: Any, logs: Record | None = None, **kwargs: Any) -> None:
        """One line."""
        if state.is_world_process_zero and logs:
            write_record(self._path, {"step": state.global_step, **self._labels, **logs})
