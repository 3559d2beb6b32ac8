"""The memory limit: the resident set of a fresh process shows what a call takes beyond inputs and gradients."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
import torch

from benchmarks.cases import CASES, Batch, Shape, make_batch
from benchmarks.measure.fresh import in_fresh_process
from benchmarks.measure.memory import watch
from infopo_kernels import linear_preference_loss
from infopo_kernels.backends import dispatch
from infopo_kernels.objectives import DPO, InfoPO, Objective


@dataclass(frozen=True)
class Call:
    """A forward and backward of a backend."""

    objective: Objective
    backend: str
    dtype: str
    trained: bool
    tokens: int = 1536
    hidden: int = 128
    vocab: int = 32768


def beyond(call: Call) -> float:
    """MiB at the peak beyond inputs and gradients, in this process."""
    torch.set_num_threads(2)
    cpu, case = torch.device("cpu"), CASES["step" if call.trained else "frozen"]

    def run(batch: Batch) -> None:
        inputs = (batch.hidden, batch.weight, batch.labels)
        linear_preference_loss(*inputs, objective=call.objective, backend=call.backend).loss.backward()

    def batch_of(length: int, shape: Shape) -> Batch:
        return make_batch(case, shape, 2, length, getattr(torch, call.dtype), cpu)

    run(batch_of(8, Shape("small", 64, 512)))  # loads code, thread pools and the allocator's arenas first
    batch = batch_of(call.tokens // 4, Shape("measured", call.hidden, call.vocab))
    return watch(lambda: run(batch), cpu).peak_mib - batch.gradients_mib


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("trained", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("objective", "backend"),
    [(InfoPO(), "cpp"), (InfoPO(average=True), "cpp"), (DPO(), "cpp"), (InfoPO(), "torch")],
    ids=["InfoPO, underflowed", "InfoPO", "DPO", "InfoPO, PyTorch"],
)
def test_workspace_does_not_grow(objective: Objective, backend: str, dtype: str, trained: bool) -> None:
    """A call stays within the default of 32 MiB (plus 4 MiB for vectors and the allocator); logits alone are 192 MiB.

    Plain PyTorch keeps its tiles within this limit, but its products pack additional memory.
    """
    if reason := dispatch.unavailable_reason(backend, torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    call = Call(objective, backend, dtype, trained)
    peak = in_fresh_process(beyond, call)
    if isinstance(peak, dict) and "clear_refs" in peak["failed"]:
        pytest.skip("this kernel does not let a process reset its high-water mark")
    assert isinstance(peak, float), peak
    logits = call.tokens * call.vocab * 4 / 2**20
    limit = 32 + (4 if backend == "cpp" else 16)
    assert peak <= limit < logits, f"{peak:.0f} MiB beyond inputs and gradients"
