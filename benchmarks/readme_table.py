"""Write the table of measured figures into the README from the committed record, so that no figure is typed by hand.

python benchmarks/readme_table.py          rewrite the table
python benchmarks/readme_table.py --check  fail if it is out of date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README, RECORD = ROOT / "README.md", ROOT / "benchmarks/results/cpu_targets.json"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def table(record: dict[str, Any]) -> str:
    """One row a figure that has a target, one line before it that says on what it was measured."""
    m = record["machine"]
    lines = [
        f"{m['cpu']}, {m['threads']} threads, {m['isa']}, torch {m['torch']}; medians of {m['repetitions']}, "
        "side by side in one process.",
        "",
        "| case | what | figure | target |",
        "| --- | --- | ---: | ---: |",
    ]
    for case, rows in record["cases"].items():
        for row in rows:
            if row["target"] is None:
                continue
            unit = "" if row["unit"] == "ratio" else f" {row['unit']}"
            sign = "≥" if row["what"].startswith("times faster") else "≤"
            verdict = "" if row["met"] else " (missed)"
            target = f"{sign} {row['target']:g}{unit}{verdict}"
            lines.append(f"| {case} | {row['what']} | {row['figure']:.3g}{unit} | {target} |")
    return "\n".join(lines)


def updated(text: str) -> str:
    """The README's text with the table of the record in its place."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(json.loads(RECORD.read_text()))}\n{END}{after}"


def main() -> None:
    text = README.read_text()
    if "--check" in sys.argv[1:]:
        sys.exit(None if updated(text) == text else "README.md: the table is out of date; run this without --check")
    README.write_text(updated(text))


if __name__ == "__main__":
    main()
