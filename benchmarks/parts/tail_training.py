"""What a pooled tail changes in training: the same runs of SmolLM2-135M-Instruct with and without it.

    python -m benchmarks tail-training                  # InfoPO and DPO, two seeds, exact and pooled: `tail-training`
    python -m benchmarks tail-training --only dpo       # a part of them

Runs of one seed see the same pairs in the same order. Runs of two seeds see other pairs, and all are scored on the same
held-out pairs: the difference between seeds is the noise with which to compare. A run that the record already has, with
the same size, is not repeated.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import records, report
from benchmarks.measure.environment import environment
from benchmarks.parts.tuning_sweep import Setting, measure, prepare, table

RECORD = "tail-training"
THRESHOLD = 2.0**-13
SETTINGS = [
    Setting(0.1, 2e-5, loss=loss, tail_threshold=threshold, seed=seed)
    for seed in (0, 1)
    for loss in ("infopo", "dpo")
    for threshold in (0.0, THRESHOLD)
]


def main(argv: Sequence[str] | None = None) -> int:
    """Do the missing runs, write the record, show the table."""
    parser = records.parser(RECORD, __doc__)
    parser.add_argument("--only", metavar="TEXT", default="", help="do only runs whose name contains TEXT")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--held-out", type=int, default=24)
    args = parser.parse_args(argv)
    console, machine = report.console(), environment()
    sizes = {"steps": args.steps, "batch": args.batch, "held_out_pairs": args.held_out}
    path = records.path_of(args.output, RECORD, machine)
    record = records.read(path) if path.exists() else None
    there = set(record.rows["run"]) if record is not None and sizes.items() <= record.settings.items() else set()
    for seed in sorted({setting.seed for setting in SETTINGS}):
        todo = [s for s in SETTINGS if s.seed == seed and s.name not in there and args.only in s.name]
        parts = prepare(args, seed) if todo else None
        for setting in todo:
            assert parts is not None
            console.print(f"[bold]{setting.name}[/bold]", highlight=False)
            row = measure(setting, *parts, lambda text: console.print(text, highlight=False))
            record = records.merge(args.output, RECORD, machine, [row], by=("run",), **sizes)
    if record is None:
        parser.error(f"--only {args.only}: no name of a run contains that; runs: {', '.join(s.name for s in SETTINGS)}")
    report.render(console, [table(record)])
    return 0
