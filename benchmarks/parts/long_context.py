"""One pair of ever longer sequences through the head, until each contender fails or would take too long."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import MAIN_SHAPE, NARROW, SHAPES
from benchmarks.parts.memory import Setup, measure_step
from benchmarks.plan import Plan, Progress


def long_context(plan: Plan, progress: Progress) -> list[dict[str, Any]]:
    """Seconds and peak beyond inputs and gradients of single steps, each in a fresh process."""
    rows = []
    # On a CPU a head of full width would end by its products' time, long before anybody's memory.
    shape = NARROW if plan.device == "cpu" else SHAPES[MAIN_SHAPE]
    for name in plan.peers:
        seconds: float | None = None  # for each token
        for tokens in plan.long_lengths:
            setup = Setup.of(plan, name, shape, plan.dtypes[-1], 1, tokens // 2)
            if seconds is not None and (expected := seconds * tokens) > plan.long_seconds:
                rows.append(setup.row(not_run=f"about {expected:.0f} s expected, limit {plan.long_seconds:.0f} s"))
                continue
            progress(f"long context: {name}, {tokens} tokens")
            # Its first run may compile, or run the small batch, before the one that is timed.
            result = measure_step(setup, plan.limit_gib("long-context"), timeout=60 + 8 * plan.long_seconds)
            rows.append(setup.row(**result))
            if "seconds" not in result:
                break
            seconds = result["seconds"] / tokens
    return rows
