"""Tokens and time of forward and backward that packs and shared prompts save, on SmolLM2-135M-Instruct.

    python -m benchmarks packing --pairs 4 --repeats 5

The data are the demo's word problems, in float32, with the same pairs in every layout. Repetitions are interleaved, and
times are medians.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import records, report
from benchmarks.measure.environment import environment
from benchmarks.measure.timing import interleave, spread
from infopo_kernels import InfoPOOptions
from infopo_kernels.commands.demo.word_problems import word_problems
from infopo_kernels.commands.smollm2 import smollm2_directory
from infopo_kernels.integrations.collators import PackedPreferenceCollator, PreferenceCollator
from infopo_kernels.integrations.preferences import preference_features
from infopo_kernels.integrations.transformers import attach_linear_logps

RECORD = "packing"


def _step(model: Any, batch: dict[str, Any]) -> float:
    loss = model(**batch, infopo=InfoPOOptions(beta=0.01)).loss
    loss.backward()
    return float(loss.detach())


def table(record: records.Record) -> report.Table:
    """A row for each layout."""
    rows = record.rows.assign(median=record.rows["seconds"].map(median), spread=record.rows["seconds"].map(spread))
    first, m = rows.iloc[0], record.machine
    cells = [
        [r.layout, f"{r.tokens:,}", f"{r.median:.2f}", f"± {r.spread:.1%}", f"{r.median / first['median'] - 1:+.0%}"]
        for r in rows.itertuples()
    ]
    title = (
        f"{record.settings['pairs']} pairs, forward and backward of SmolLM2-135M-Instruct, float32, sdpa; {m['cpu']}, "
        f"{m['threads']} threads, medians of {len(first['seconds'])}."
    )
    return report.Table(
        RECORD, title, ["layout", "tokens", "seconds", "spread", f"time against {first['layout']}"], cells
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and show."""
    parser = records.parser(RECORD, __doc__)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    source = str(smollm2_directory())
    model = attach_linear_logps(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)).train()
    pairs = [pair.row() for pair in word_problems(args.pairs, seed=0)]
    features = preference_features(AutoTokenizer.from_pretrained(source), pairs)
    layouts: dict[str, Any] = {
        "padded": PreferenceCollator()(features),
        "packed": PackedPreferenceCollator()(features),
        "packed, shared prompts": PackedPreferenceCollator(share_prompt=True)(features),
    }
    losses = {name: _step(model, batch) for name, batch in layouts.items()}  # warms up, too
    calls = {name: partial(_step, model, batch) for name, batch in layouts.items()}
    each = interleave(calls, args.repeats, float("inf"), torch.device("cpu"))
    rows = [
        {"layout": name, "tokens": batch["input_ids"].numel(), "seconds": each[name], "loss": losses[name]}
        for name, batch in layouts.items()
    ]
    record = records.write(args.output, RECORD, environment(), rows, pairs=args.pairs)
    report.render(report.console(), [table(record)])
    return 0
