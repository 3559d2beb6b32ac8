"""Peak memory of single steps, each in a fresh process, and its growth with tokens, vocabulary and pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.cases import CASES, DTYPES, MAIN_SHAPE, NARROW, SHAPES, Shape, make_batch
from benchmarks.contenders import CONTENDERS
from benchmarks.measure.fresh import in_fresh_process
from benchmarks.measure.memory import watch
from benchmarks.plan import Plan, Progress
from benchmarks.truth import run


@dataclass(frozen=True)
class Setup:
    """One contender on one batch."""

    contender: str
    shape: Shape
    dtype: str
    pairs: int
    length: int
    device: str
    threads: int
    case: str = "step"

    @classmethod
    def of(cls, plan: Plan, contender: str, shape: Shape, dtype: str, pairs: int, length: int) -> Setup:
        """On the plan's device."""
        return cls(contender, shape, dtype, pairs, length, plan.device, torch.get_num_threads())

    def row(self, **more: Any) -> dict[str, Any]:
        """A row of a record."""
        names = ("contender", "case", "dtype", "pairs", "length")
        sizes = {"shape": self.shape.name, "hidden": self.shape.hidden, "vocab": self.shape.vocab}
        tokens = 2 * self.pairs * self.length
        return {**{name: getattr(self, name) for name in names}, **sizes, "tokens": tokens, **more}


def _step(setup: Setup) -> dict[str, Any]:
    device, case, dtype = torch.device(setup.device), CASES[setup.case], DTYPES[setup.dtype]
    torch.set_num_threads(setup.threads)
    contender = CONTENDERS[setup.contender]
    if reason := contender.unsupported_reason(case, device, dtype):
        return {"skipped": reason}
    # Libraries, threads and compiled code come in with a first run, which is small unless code is compiled for a shape.
    for length in (setup.length if contender.compiles else min(setup.length, 16), setup.length):
        batch = make_batch(case, setup.shape, setup.pairs, length, dtype, device)
        use = watch(partial(run, contender, batch), device)
        gradients = batch.gradients_mib
        del batch
    return {"peak_mib": max(0.0, use.peak_mib - gradients), "seconds": use.seconds}


def measure_step(setup: Setup, memory_gib: float, timeout: float = 300.0) -> dict[str, Any]:
    """{"peak_mib" beyond inputs and gradients, "seconds"}, or {"failed"} or {"skipped"} with the reason."""
    result: dict[str, Any] = in_fresh_process(_step, setup, memory_gib=memory_gib, timeout=timeout)
    result.pop("traceback", None)
    return result


def _setups(plan: Plan) -> Iterator[tuple[str, Setup]]:
    least = plan.memory_tokens[0] // 4
    for name in plan.peers:
        for dtype in plan.dtypes:
            for case in plan.memory_cases:
                peak = Setup.of(plan, name, SHAPES[MAIN_SHAPE], dtype, 2, plan.memory_length)
                yield "peak", replace(peak, case=case)
        narrow = partial(Setup.of, plan, name, dtype=plan.dtypes[0])
        for tokens in plan.memory_tokens:
            yield "tokens", narrow(shape=NARROW, pairs=2, length=tokens // 4)
        for vocab in plan.memory_vocab:
            yield "vocabulary", narrow(shape=replace(NARROW, vocab=vocab), pairs=2, length=least)
        for pairs in plan.memory_pairs:
            yield "pairs", narrow(shape=NARROW, pairs=pairs, length=least)


def memory(plan: Plan, progress: Progress) -> list[dict[str, Any]]:
    """Peak beyond inputs and gradients, and its growth with tokens, vocabulary and pairs."""
    rows, measured = [], {}
    for sweep, setup in _setups(plan):
        if setup not in measured:
            progress(f"memory: {setup.contender}, {sweep}")
            measured[setup] = measure_step(setup, plan.limit_gib("memory"))
        rows.append(setup.row(sweep=sweep, **measured[setup]))
    return rows
