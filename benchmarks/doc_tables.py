"""Write tables of measured figures into the README and docs/cpu.md from the committed records, so that no figure is
typed by hand.

python benchmarks/doc_tables.py          rewrite the tables
python benchmarks/doc_tables.py --check  fail if one is out of date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from infopo_kernels.bench import report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def peers() -> str:
    """Every contender of `make bench` in one row."""
    records = report.load(RESULTS)
    table, machine = report.overview(records["speed"], records["memory"]), records["speed"]["machine_info"]
    return f"{table.title} ({machine['cpu']}, {machine['threads']} threads).\n\n{report.markdown_rows(table)}"


def cpu_targets() -> str:
    """One row a figure that has a target, one line before it that says on what it was measured."""
    record: dict[str, Any] = json.loads((RESULTS / "cpu_targets.json").read_text())
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


TABLES = {ROOT / "README.md": peers, ROOT / "docs/cpu.md": cpu_targets}


def main() -> None:
    for page, table in TABLES.items():
        text = page.read_text()
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
        updated = f"{before}{BEGIN}\n{table()}\n{END}{after}"
        if "--check" not in sys.argv[1:]:
            page.write_text(updated)
        elif updated != text:
            sys.exit(f"{page.name}: its table is out of date; run this without --check")


if __name__ == "__main__":
    main()
