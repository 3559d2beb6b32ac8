"""What was measured, as files: one folder for each processor (or GPU), one JSON file for each part.

    results/intel-6-207-2/speed.json     pytest-benchmark's own record
    results/intel-6-207-2/memory.json    {"machine_info": ..., settings, "rows": [...]}, as all others

A run on another processor writes into another folder, so records of several lie side by side.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

try:
    import pandas as pd
except ModuleNotFoundError:  # a GPU machine without it measures and writes records; tables are drawn elsewhere
    pd = None  # type: ignore[assignment]

from benchmarks.contenders import FLOOR, OURS
from benchmarks.measure.timing import spread

RESULTS: Final = Path(__file__).parent / "results"
"""The committed records."""

_POINT: Final = ["shape", "case", "dtype", "pairs", "length"]
"""What tells the points of the speed record apart."""

_FIGURES: Final = {
    "speed": ("seconds", "spread", "repetitions"),
    "memory": ("peak_mib",),
    "long-context": ("seconds", "peak_mib"),
    "accuracy": ("sequence", "token", "hidden", "weight"),
    "training": ("seconds", "peak_mib"),
    "long-context-training": ("seconds", "peak_mib", "held_mib", "asked_mib"),
}
"""Columns that a record has even if nobody has a figure there."""

_NO_FIGURE: Final = ("failed", "skipped", "not_run")


@dataclass(frozen=True)
class Record:
    """The record of one part."""

    part: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: pd.DataFrame
    """A row a figure. `why` says why there is none ("failed: ..."), else it is NaN. In the speed record `seconds` is a
    median, `floor` that of the bare products of the same point, and `ours` that of this library."""


Records = dict[str, Record]
"""By part."""


def parser(name: str, text: str | None, output: Path | None = RESULTS) -> argparse.ArgumentParser:
    """Options of the command `name`, described by a module's text; `--output` where it writes records."""
    made = argparse.ArgumentParser(
        f"python -m benchmarks {name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if output is not None:
        made.add_argument("--output", type=Path, default=output, help=f"folder of folders by processor ({output})")
    return made


def _frame(part: str, rows: list[dict[str, Any]]) -> pd.DataFrame:
    why = [next((f"{key.replace('_', ' ')}: {row[key]}" for key in _NO_FIGURE if row.get(key)), None) for row in rows]
    frame = pd.DataFrame(rows).assign(why=why)
    return frame.assign(**{name: float("nan") for name in _FIGURES.get(part, ()) if name not in frame})


def _speed_frame(content: dict[str, Any]) -> pd.DataFrame:
    rows = []
    for entry in content["benchmarks"]:
        each = entry["stats"]["data"]
        rows.append({**entry["extra_info"], "seconds": median(each), "spread": spread(each), "repetitions": len(each)})
    rows += [{**entry, "skipped": entry["reason"]} for entry in content.get("skipped", ())]
    frame = _frame("speed", rows)
    for column, name in (("floor", FLOOR), ("ours", OURS)):
        of_point = frame[frame["contender"] == name].groupby(_POINT)["seconds"].first().rename(column)
        frame = frame.join(of_point, on=_POINT)
    return frame


def _load(part: str, pieces: Sequence[dict[str, Any]]) -> Record:
    """The pieces of a part (`speed-1.json`, `speed-2.json`) as one.

    Raises:
        ValueError: they were measured on different machines or versions.
    """
    first = pieces[0]
    if any(piece["machine_info"] != first["machine_info"] for piece in pieces):
        raise ValueError(f"the {part} records come from different machines or versions; measure them on one.")
    lists = [key for key in ("benchmarks", "skipped", "rows") if key in first]
    content = dict(first)
    for key in lists:
        content[key] = [entry for piece in pieces for entry in piece[key]]
    rows = _speed_frame(content) if "benchmarks" in content else _frame(part, content["rows"])
    settings = {key: value for key, value in content.items() if key not in ("machine_info", *lists)}
    return Record(part, content["machine_info"], settings, rows)


def read(path: Path) -> Record:
    """One file.

    Raises:
        OSError: there is none.
        ValueError: it is no record.
    """
    content = json.loads(path.read_text())
    if "machine_info" not in content:
        raise ValueError(f"{path} is no record: it does not say what was measured on.")
    return _load(path.stem, [content])


def load(folder: Path) -> Records:
    """The records of one processor's folder, by part.

    Raises:
        OSError: there are none.
        ValueError: pieces of a part were measured on different machines or versions.
    """
    pieces: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        stem, _, number = path.stem.rpartition("-")
        pieces.setdefault(stem if number.isdigit() else path.stem, []).append(json.loads(path.read_text()))
    if not pieces:
        raise FileNotFoundError(f"{folder} holds no record (such as speed.json).")
    return {part: _load(part, contents) for part, contents in pieces.items()}


def load_all(folder: Path) -> dict[str, Records]:
    """The records below `folder` (or in it) by processor.

    Raises:
        OSError, ValueError: as `load`.
    """
    folders = sorted({path.parent for path in folder.glob("*/*.json")}) or [folder]
    return {each.name: load(each) for each in folders}


def path_of(folder: Path, part: str, machine: dict[str, Any]) -> Path:
    """Where the record of `part` lies; its folder is made."""
    path = folder / str(machine["processor"]) / f"{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def save(folder: Path, part: str, machine: dict[str, Any], rows: list[dict[str, Any]], **settings: Any) -> Path:
    """Write a record in place of what was there."""
    content = {"machine_info": machine, **settings, "rows": rows}
    path = path_of(folder, part, machine)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def write(folder: Path, part: str, machine: dict[str, Any], rows: list[dict[str, Any]], **settings: Any) -> Record:
    """`save`, and the record as it is read."""
    return read(save(folder, part, machine, rows, **settings))


def merge(
    folder: Path, part: str, machine: dict[str, Any], rows: list[dict[str, Any]], by: tuple[str, ...], **settings: Any
) -> Record:
    """Write a record; rows that are there stay unless they have the same `by`, or other settings or another machine."""
    path = path_of(folder, part, machine)
    old = json.loads(path.read_text()) if path.exists() else {"rows": []}
    alike = old.get("machine_info") == machine and all(old.get(key) == value for key, value in settings.items())
    new = {tuple(row[key] for key in by) for row in rows}
    kept = [row for row in old["rows"] if alike and tuple(row[key] for key in by) not in new]
    return write(folder, part, machine, kept + rows, **settings)
