"""Write the figures of the README and of docs/ from the committed records, so that nobody types a figure by hand.

A page has its tables between `<!-- NAME: begin -->` and `<!-- NAME: end -->`. All of docs/benchmarks.md is generated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from benchmarks import plots, records, report
from benchmarks.contenders import CONTENDERS
from benchmarks.parts import cpu_targets, long_context_training, packing, tuning_sweep
from benchmarks.records import Record, Records

ROOT: Final = Path(__file__).resolve().parents[1]
COMMAND: Final = "python -m benchmarks pages"
PAGE: Final = ROOT / "docs" / "benchmarks.md"

_TITLES: Final = {
    "targets": "Targets",
    "speed": "Speed",
    "memory": "Memory",
    "long-context": "Long context",
    "accuracy": "Accuracy",
    "training": "Training",
}

_METHOD: Final = f"""\
# Benchmarks

`{COMMAND}` generates this page from the records in `benchmarks/results/`; do not edit it. `make bench`
measures again, with sizes that fit 15 minutes on 2 cores. Options such as `--product-gflop` and `--memory-length`
change the sizes.

- **Inputs.** Random, with logits of standard deviation 3 and random labels. The loss is reference-free InfoPO on mean
  log-probabilities, so that rejected weights are of order one (or, with a large beta, underflowed).
- **Check.** Before a contender is timed, its loss and gradients are checked against plain PyTorch in float32. A
  contender with wrong values is not timed.
- **Time.** The repetitions of all contenders are interleaved, in an order that rotates. A figure is the median of the
  repetitions. The spread is half the interquartile range divided by the median.
- **Floor.** The bare `torch.mm` products that the case needs: 3 of size N V H for a scored token with a trainable head,
  2 with a frozen head, 1 for forward only. They have full size and the type of the inputs, and write into memory that
  is already allocated.
- **Memory.** Each figure comes from a fresh process: from the allocator on a GPU, from the resident set on a CPU.
- **Training steps.** All contenders take turns on one model in one process.

## Contenders

| | interface and setting |
| --- | --- |
"""


def _overview(found: Records) -> str:
    table, machine = report.overview(found), found["speed"].machine
    where = f"{machine.get('gpu', machine['cpu'])}, {machine['threads']} threads"
    return f"{table.title} ({where}).\n\n{report.markdown(table)}"


def _with_title(part: str, table: Callable[[Record], report.Table]) -> Callable[[Records], str]:
    def write(found: Records) -> str:
        made = table(found[part])
        return f"{made.title}\n\n{report.markdown(made)}"

    return write


_BLOCKS: Final[dict[str, tuple[str, Callable[[Records], str]]]] = {
    "figures": ("speed", _overview),
    **{
        part: (part, _with_title(part, table))
        for part, table in (
            (cpu_targets.RECORD, cpu_targets.table),
            (packing.RECORD, packing.table),
            (long_context_training.RECORD, long_context_training.table),
            (tuning_sweep.RECORD, tuning_sweep.table),
            (f"{tuning_sweep.RECORD}-long", tuning_sweep.table),
        )
    },
}
"""For each block's name: the part whose record it needs, and the function that writes it for one processor."""


def filled(text: str, found: dict[str, Records]) -> str:
    """A page's text with new content in each of its blocks: one table for each measured processor."""

    def block(match: re.Match[str]) -> str:
        name = match[1]
        if name not in _BLOCKS:
            return match[0]
        part, write = _BLOCKS[name]
        tables = "\n\n".join(write(of) for of in found.values() if part in of)
        return f"<!-- {name}: begin -->\n{tables}\n<!-- {name}: end -->"

    return re.sub(r"<!-- ([\w-]+): begin -->\n.*?<!-- \1: end -->", block, text, flags=re.S)


def _processor(name: str, found: Records) -> list[str]:
    machines: dict[str, list[str]] = {}
    for part in _TITLES:
        if part in found:
            machines.setdefault("\n".join(f"- {line}" for line in report.machine(found[part].machine)), []).append(part)
    lines = [f"# On {name}"]
    for text, parts in machines.items():
        lines += [f"{', '.join(_TITLES[part].lower() for part in parts)}:", text]
    tables = report.tables(found)
    for part, title in _TITLES.items():
        own = [table for table in tables if table.part == part]
        if not own:
            continue
        lines.append(f"## {title}")
        if part in found:
            lines.append(f"![{title}](../benchmarks/results/{name}/{part}.png)")
        for table in own:
            lines += [f"### {table.title}", report.markdown(table)]
            lines += ["\n".join(f"- {note}" for note in table.notes)] if table.notes else []
    return lines


def benchmarks_page(found: dict[str, Records]) -> str:
    """docs/benchmarks.md."""
    contenders = "\n".join(f"| {name} | {contender.setting} |" for name, contender in CONTENDERS.items())
    lines = [_METHOD + contenders]
    for name, of in found.items():
        lines += _processor(name, of)
    return "\n\n".join(lines) + "\n"


def pages(folder: Path = records.RESULTS) -> dict[Path, str]:
    """The text of every page with figures, from the records in `folder`."""
    found = records.load_all(folder)
    texts = {page: page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
    texts = {page: filled(text, found) for page, text in texts.items() if page != PAGE}
    return {**texts, PAGE: benchmarks_page(found)}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pages and redraw the plots of the committed records."""
    parser = records.parser("pages", __doc__, None)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    check, written = parser.parse_args(argv).check, pages()
    changed = [page for page, text in written.items() if not page.exists() or page.read_text() != text]
    if check:
        for page in changed:
            print(f"{page.relative_to(ROOT)} is out of date: {COMMAND}")
        return int(bool(changed))
    for page in changed:
        page.write_text(written[page])
    for name, of in records.load_all(records.RESULTS).items():
        plots.draw(of, records.RESULTS / name)
    return 0
