"""Records: the measurements as files. There is a folder for each processor (or GPU), with a JSON file for each part.

    results/intel-6-207-2/speed.json     pytest-benchmark's own record
    results/intel-6-207-2/memory.json    {"machine_info": ..., settings, "rows": [...]}, like all others

A run on another processor writes into another folder, so the records of several processors do not overwrite each other.
Writing them needs no pandas, reading them does: GPU machines often lack it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from benchmarks.contenders import FLOOR, OURS
from benchmarks.measure.timing import spread

if TYPE_CHECKING:
    import pandas as pd

RESULTS: Final = Path(__file__).parent / "results"
"""The committed records."""

_POINT: Final = ["shape", "case", "dtype", "pairs", "length"]
"""The fields that identify a point of the speed record."""

_FIGURES: Final = {
    "speed": ("seconds", "spread", "repetitions"),
    "memory": ("peak_mib",),
    "long-context": ("seconds", "peak_mib"),
    "accuracy": ("sequence", "token", "hidden", "weight"),
    "training": ("seconds", "peak_mib"),
    "long-context-training": ("seconds", "peak_mib", "held_mib", "asked_mib"),
}
"""Columns that a record has even if no row has a value there."""

_NO_FIGURE: Final = ("failed", "skipped", "not_run")


@dataclass(frozen=True)
class Record:
    """The record of one part."""

    part: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: pd.DataFrame
    """A row for each figure. If there is no figure, `why` gives the reason ("failed: ..."), else it is NaN. In the
    speed record `seconds` is a median; `floor` and `ours` are the medians of the bare products and of this library at
    the same point."""


Records = dict[str, Record]
"""Records by the name of their part."""


def parser(name: str, text: str | None, output: Path | None = RESULTS) -> argparse.ArgumentParser:
    """An argument parser for the command `name` with a module's docstring as its description; with `--output` if the
    command writes records."""
    made = argparse.ArgumentParser(
        f"python -m benchmarks {name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if output is not None:
        made.add_argument("--output", type=Path, default=output, help=f"folder of folders by processor ({output})")
    return made


def absent(value: Any) -> bool:
    """Whether a cell of a record's table holds nothing."""
    return value is None or bool(value != value)


def _frame(part: str, rows: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

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
    """One record from the pieces of a part (`speed-1.json`, `speed-2.json`).

    Raises:
        ValueError: the pieces come from different machines or versions.
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
    """The record in one file.

    Raises:
        OSError: there is no such file.
        ValueError: the file is not a record.
    """
    content = json.loads(path.read_text())
    if "machine_info" not in content:
        raise ValueError(f"{path} is not a record: it does not say which machine was measured.")
    return _load(path.stem, [content])


def load(folder: Path) -> Records:
    """The records in the folder of one processor, by part.

    Raises:
        OSError: the folder has no records.
        ValueError: the pieces of a part come from different machines or versions.
    """
    pieces: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        stem, _, number = path.stem.rpartition("-")
        pieces.setdefault(stem if number.isdigit() else path.stem, []).append(json.loads(path.read_text()))
    if not pieces:
        raise FileNotFoundError(f"{folder} has no record (such as speed.json).")
    return {part: _load(part, contents) for part, contents in pieces.items()}


def load_all(folder: Path) -> dict[str, Records]:
    """The records in `folder` or in its subfolders, by processor.

    Raises:
        OSError, ValueError: as `load`.
    """
    folders = sorted({path.parent for path in folder.glob("*/*.json")}) or [folder]
    return {each.name: load(each) for each in folders}


def path_of(folder: Path, part: str, machine: dict[str, Any]) -> Path:
    """The path of the record of `part`. Makes its folder."""
    path = folder / str(machine["processor"]) / f"{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def save(folder: Path, part: str, machine: dict[str, Any], rows: list[dict[str, Any]], **settings: Any) -> Path:
    """Write a record; it replaces an existing one."""
    content = {"machine_info": machine, **settings, "rows": rows}
    path = path_of(folder, part, machine)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def write(folder: Path, part: str, machine: dict[str, Any], rows: list[dict[str, Any]], **settings: Any) -> Record:
    """`save`, and the record as it is read (with pandas)."""
    return read(save(folder, part, machine, rows, **settings))


def merge(
    folder: Path, part: str, machine: dict[str, Any], rows: list[dict[str, Any]], by: tuple[str, ...], **settings: Any
) -> Record:
    """Add rows to a record. A new row replaces the old one with the same `by`. If the settings or the machine differ,
    all old rows are dropped."""
    path = path_of(folder, part, machine)
    old = json.loads(path.read_text()) if path.exists() else {"rows": []}
    alike = old.get("machine_info") == machine and all(old.get(key) == value for key, value in settings.items())
    new = {tuple(row[key] for key in by) for row in rows}
    kept = [row for row in old["rows"] if alike and tuple(row[key] for key in by) not in new]
    return write(folder, part, machine, kept + rows, **settings)
