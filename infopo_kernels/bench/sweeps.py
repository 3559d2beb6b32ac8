"""Memory and long context: rows of isolated steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from infopo_kernels.bench.isolated import Setup, measure_step
from infopo_kernels.bench.plan import MAIN_SHAPE, NARROW, Plan
from infopo_kernels.bench.shapes import SHAPES, Shape

Progress = Callable[[str], None]


def _setup(plan: Plan, contender: str, shape: Shape, dtype: str, pairs: int, length: int, case: str = "step") -> Setup:
    return Setup(contender, shape, case, dtype, pairs, length, plan.device, torch.get_num_threads(), plan.memory_gib)


def _row(setup: Setup, **more: Any) -> dict[str, Any]:
    return {
        "contender": setup.contender,
        "shape": setup.shape.name,
        "hidden": setup.shape.hidden,
        "vocab": setup.shape.vocab,
        "case": setup.case,
        "dtype": setup.dtype,
        "pairs": setup.pairs,
        "length": setup.length,
        "tokens": 2 * setup.pairs * setup.length,
        **more,
    }


def _memory_setups(plan: Plan) -> Iterator[tuple[str, Setup]]:
    shape = SHAPES[MAIN_SHAPE]
    for name in plan.peers:
        for dtype in plan.dtypes:
            for case in plan.memory_cases:
                yield "peak", _setup(plan, name, shape, dtype, 2, plan.memory_length, case)
        dtype = plan.dtypes[0]
        for tokens in plan.memory_tokens:
            yield "tokens", _setup(plan, name, NARROW, dtype, 2, tokens // 4)
        for vocab in plan.memory_vocab:
            wide = replace(NARROW, vocab=vocab)
            yield "vocabulary", _setup(plan, name, wide, dtype, 2, plan.memory_tokens[0] // 4)
        for pairs in plan.memory_pairs:
            yield "pairs", _setup(plan, name, NARROW, dtype, pairs, plan.memory_tokens[0] // 4)


def memory(plan: Plan, progress: Progress) -> list[dict[str, Any]]:
    """Peak beyond inputs and gradients, and its growth with tokens, vocabulary and pairs."""
    rows, measured = [], {}
    for sweep, setup in _memory_setups(plan):
        if setup not in measured:
            progress(f"memory: {setup.contender}, {sweep}")
            measured[setup] = measure_step(setup)
        rows.append(_row(setup, sweep=sweep, **measured[setup]))
    return rows


def long_context(plan: Plan, progress: Progress) -> list[dict[str, Any]]:
    """One pair of ever longer sequences until each contender fails, or would take too long."""
    rows = []
    # On a CPU a head of full width would end by its products' time, long before anybody's memory.
    shape = NARROW if plan.device == "cpu" else SHAPES[MAIN_SHAPE]
    plan = replace(plan, memory_gib=plan.limit_gib("long-context"))
    for name in plan.peers:
        seconds: float | None = None  # for each token
        for tokens in plan.long_lengths:
            setup = _setup(plan, name, shape, plan.dtypes[-1], 1, tokens // 2)
            if seconds is not None and (expected := seconds * tokens) > plan.long_seconds:
                rows.append(_row(setup, not_run=f"about {expected:.0f} s expected, limit {plan.long_seconds:.0f} s"))
                continue
            progress(f"long context: {name}, {tokens} tokens")
            # Its first run may compile, or run the small batch, before the one that is timed.
            result = measure_step(setup, timeout=60 + 8 * plan.long_seconds)
            rows.append(_row(setup, **result))
            if "seconds" not in result:
                break
            seconds = result["seconds"] / tokens
    return rows
