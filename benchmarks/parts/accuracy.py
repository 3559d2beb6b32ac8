"""Errors against float64 of the same inputs."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cases import CASES, DTYPES, MAIN_SHAPE, SHAPES, make_batch
from benchmarks.contenders import CONTENDERS
from benchmarks.measure.timing import message
from benchmarks.plan import Plan, Progress
from benchmarks.truth import relative_error, run, truth


def accuracy(plan: Plan, progress: Progress) -> list[dict[str, Any]]:
    """Largest error of a token and of a sequence log-probability (nats), relative error of dX and dW, by length."""
    rows: list[dict[str, Any]] = []
    device, case, shape = torch.device(plan.device), CASES["step"], SHAPES[MAIN_SHAPE]
    for dtype in plan.dtypes:
        for length in plan.accuracy_lengths:
            progress(f"accuracy: {dtype}, {length} tokens, float64")
            torch.compiler.reset()
            batch = make_batch(case, shape, 1, length, DTYPES[dtype], device, seed=length)
            right = truth(batch, torch.float64)
            sums = batch.sequence_sums(right.token_logps)
            for name in plan.peers:
                contender = CONTENDERS[name]
                row: dict[str, Any] = {"contender": name, "shape": shape.name, "dtype": dtype, "length": length}
                rows.append(row)
                if reason := contender.unsupported_reason(case, device, DTYPES[dtype]):
                    row["skipped"] = reason
                    continue
                progress(f"accuracy: {dtype}, {length} tokens, {name}")
                try:
                    with torch.no_grad():
                        row["sequence"] = float((contender.sequence_logps(batch).double() - sums).abs().max())
                        try:
                            tokens = contender.token_logps(batch).double()
                        except NotImplementedError:
                            tokens = None
                    if tokens is not None:
                        row["token"] = float((tokens - right.token_logps).abs().max())
                    run(contender, batch)
                    for key in ("hidden", "weight"):
                        row[key] = relative_error(getattr(batch, key).grad, right.gradients[key])
                except Exception as error:  # a peer may fail in any way, and that is a row
                    row["failed"] = message(error)
                batch.clear()
    return rows
