"""The pooled tail of the Triton kernels in chunks of rows and pieces of the vocabulary, interpreted, against the
definition in float64 with the same chunks. `test_tail.py` has the definition for all backends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests import triton_support as ts

# isort: split
# Triton is imported by the module above.

from infopo_kernels import naive
from infopo_kernels.backends.base import Gradients, Wanted
from infopo_kernels.backends.triton import gradients, workspace
from infopo_kernels.backends.triton.launch import prepare
from infopo_kernels.backends.triton.workspace import PiecePlan, plan_pieces, plan_tile
from infopo_kernels.options import IGNORE_INDEX, LogitOptions
from tests import test_tail
from tests.triton_support import Inputs, Problem

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns about log(0) in masked lanes

TYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
"""Of the inputs and of dW."""

PROBLEM = Problem("tail-chunks", n=45, h=24, v=301, bias=True, ignored=0.05, c_size=1.0, threshold=0.01)
"""Two blocks, the second one of a few words, and more rows than `SMALL` holds."""

SMALL = {torch.float32: 72_000, torch.bfloat16: 60_000}
"""Bytes of workspace that make every loop over chunks and pieces run more than once."""


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allows pieces of one block, so that the vocabulary of a test needs several pieces."""
    monkeypatch.setattr(workspace, "PASS_ROWS", 32)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[PiecePlan]:
    """The plans by pieces that were followed: that of dX and all else first."""
    seen: list[PiecePlan] = []
    for name in ("_by_rows", "_by_vocabulary"):
        own = getattr(gradients, name)
        monkeypatch.setattr(gradients, name, lambda *args, own=own: (seen.append(args[1]), own(*args))[1])
    return seen


def clean(inputs: Inputs, wanted: str, weight_dtype: torch.dtype) -> Gradients:
    """Buffers with 0 in dW and db."""
    result = ts.buffers(inputs, wanted, weight_dtype)
    for buffer in (result.weight, result.bias):
        if buffer is not None:
            buffer.zero_()
    return result


def made_of(inputs: Inputs, threshold_for: list[Tensor] | None = None) -> test_tail.Made:
    """The problem as `test_tail` has it: rows that no kernel may read are 0, the threshold lies in a gap."""
    head = inputs.head
    hidden = torch.where(inputs.scored[:, None], head.hidden, 0)
    assert head.scale == 1
    made = test_tail.Made(replace(head, hidden=hidden), inputs.labels, inputs.c, LogitOptions(softcap=head.softcap))
    if threshold_for is None:
        return made
    return replace(made, head=replace(made.head, tail_threshold=test_tail.threshold(made, threshold_for, 0.9)))


def with_gap(inputs: Inputs, rows: int, *more: int) -> Inputs:
    """The same with a threshold that no rounding crosses, for chunks of so many live rows."""
    live = inputs.live.nonzero().squeeze(1)
    parts = [part for size in (rows, *more) for part in live.split(size)]
    return replace(inputs, head=replace(inputs.head, tail_threshold=made_of(inputs, parts).head.tail_threshold))


def truth(inputs: Inputs, parts: list[Tensor]) -> naive.TailGradients:
    return test_tail.truth(made_of(inputs), ts.backend(), parts)


def assert_gradients(inputs: Inputs, got: Gradients, want: naive.TailGradients) -> None:
    test_tail.assert_gradients(made_of(inputs), got, want, ts.backend())


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("types", TYPES, ids=lambda types: f"{types[0]}-{types[1]}")
def test_chunks_and_pieces(types: tuple[torch.dtype, torch.dtype], plans: list[PiecePlan]) -> None:
    inputs = ts.make(PROBLEM, types[0], SMALL[types[0]])
    sizes, everything = prepare(inputs.head).sizes, Wanted(hidden=True, weight=True, bias=True, report=True)
    if types[1] == torch.float32:
        expected = [plan_pieces(sizes, everything)] * 2
    else:
        expected = [
            plan_pieces(sizes, replace(everything, weight=False, bias=False)),
            plan_pieces(sizes, replace(everything, hidden=False, report=False), weight_sums=True),
        ]
    live = inputs.live.nonzero().squeeze(1)
    assert all(plan.rows < len(live) and plan.columns < PROBLEM.v for plan in expected)
    inputs = with_gap(inputs, *(plan.rows for plan in expected))
    of_hidden, of_weight = (truth(inputs, list(live.split(plan.rows))) for plan in expected)
    assert PROBLEM.v * 0.02 * len(live) / expected[0].rows < of_hidden.kept < PROBLEM.v * len(live)
    got = clean(inputs, "xwb", types[1])
    with ts.FreshMemory() as memory:
        _, lse = ts.backend().logprob(inputs.head, inputs.labels)
        memory.reset()
        ts.backend().backward(inputs.head, inputs.labels, lse, inputs.c, got)
        assert memory.peak <= SMALL[types[0]] + 8 * 4 * PROBLEM.n
    assert plans == list(dict.fromkeys(expected))
    want = of_hidden._replace(weight=of_weight.weight, bias=of_weight.bias)
    assert_gradients(inputs, got, want)
    assert got.tail is not None
    assert got.tail.columns.tolist() == [of_hidden.kept, PROBLEM.v * -(-len(live) // expected[0].rows)]


@pytest.mark.usefixtures("described")
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_by_descriptors(weight_dtype: torch.dtype) -> None:
    inputs = with_gap(ts.make(replace(PROBLEM, n=21, h=32), torch.bfloat16), 21)
    live = inputs.live.nonzero().squeeze(1)
    known, at_once = clean(inputs, "xwb", weight_dtype), clean(inputs, "xwb", weight_dtype)
    with ts.FreshMemory():
        _, lse = ts.backend().logprob(inputs.head, inputs.labels)
        ts.backend().backward(inputs.head, inputs.labels, lse, inputs.c, known)
        ts.backend().logprob_and_grad(inputs.head, inputs.labels, inputs.c, at_once)
    assert prepare(inputs.head).sizes.descriptors
    assert_gradients(inputs, known, truth(inputs, [live]))
    assert_gradients(inputs, at_once, truth(inputs, [live]))


@pytest.mark.parametrize("wanted", ["xwb", "x"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_chunks_of_whole_logits(dtype: torch.dtype, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights known beforehand, rows of weight 0 among them, which decide nothing and get a gradient of 0."""
    monkeypatch.setattr(workspace, "PASS_ROWS", 8)
    monkeypatch.setattr(workspace, "MEAN_ROWS", 2)
    inputs = ts.make(replace(PROBLEM, bias="b" in wanted), dtype, 64_000)
    launch, scored = prepare(inputs.head), inputs.scored.nonzero().squeeze(1)
    plan = plan_tile(launch.sizes, Wanted("x" in wanted, "w" in wanted, "b" in wanted, report=True))
    assert plan is not None
    assert plan.rows < len(scored)
    parts = [part[inputs.c[part] != 0] for part in scored.split(plan.rows)]
    inputs = replace(inputs, head=replace(inputs.head, tail_threshold=made_of(inputs, parts).head.tail_threshold))
    got = clean(inputs, wanted, torch.float32)
    with ts.FreshMemory() as memory:
        ts.backend().logprob_and_grad(inputs.head, inputs.labels, inputs.c, got)
        assert memory.peak <= 64_000 + 8 * 4 * PROBLEM.n
    assert_gradients(inputs, got, truth(inputs, parts))
    dead = inputs.scored & ~inputs.live
    assert dead.any()
    assert got.hidden is not None
    assert got.tail is not None
    assert (got.hidden[dead] == 0).all()
    assert got.tail.mass[dead].isnan().all()


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("types", TYPES, ids=lambda types: f"{types[0]}-{types[1]}")
def test_kept_logits(types: tuple[torch.dtype, torch.dtype], plans: list[PiecePlan]) -> None:
    """Kept rows and others in one chunk, of several pieces; dW, whose memory they lie in, is assigned."""
    small = 80_000 if types[0] == types[1] else 60_000
    inputs = ts.make(replace(PROBLEM, name="tail-kept", n=40, h=40, bias=False), types[0], small)
    got = clean(inputs, "xw", types[1])
    assert got.weight is not None
    got.weight.fill_(torch.nan)
    most = min(ts.backend().kept_rows(inputs.head, got.weight), 20)
    assert 16 <= most < int(inputs.live.sum())
    live = inputs.live.nonzero().squeeze(1)
    first = (ts.first_rows(inputs.labels, most) != IGNORE_INDEX) & inputs.live
    order = torch.cat([first.nonzero().squeeze(1), (inputs.live & ~first).nonzero().squeeze(1)])
    with ts.FreshMemory():
        ts.keep_and_backward(ts.backend(), inputs, got, most)
    assert len(plans) == 1
    assert plans[0].columns < PROBLEM.v
    parts = list(order.split(plans[0].rows))
    gap = made_of(inputs, parts).head.tail_threshold
    inputs, again = replace(inputs, head=replace(inputs.head, tail_threshold=gap)), clean(inputs, "xw", types[1])
    assert again.weight is not None
    again.weight.fill_(torch.nan)
    with ts.FreshMemory():
        ts.keep_and_backward(ts.backend(), inputs, again, most)
    assert_gradients(inputs, again, truth(inputs, parts))
    assert len(live) == len(order)


def test_a_softcap_keeps_no_logits() -> None:
    """Kept exponentials hold its slope, so that probabilities cannot be had from them."""
    problem = replace(PROBLEM, n=40, h=40, softcap=5.0)
    for threshold, kept in ((0.01, False), (0.0, True)):
        inputs = ts.make(replace(problem, threshold=threshold), torch.float32)
        weight = torch.zeros(inputs.head.weight.shape)
        assert (ts.backend().kept_rows(inputs.head, weight) > 0) == kept


@pytest.mark.parametrize("kept", [False, True], ids=["backward", "kept"])
def test_no_live_row_at_all(kept: bool) -> None:
    """Results stay as they were; a dW that is assigned becomes 0. Nothing is reported."""
    inputs = ts.make(replace(PROBLEM, n=20, h=40, bias=False), torch.bfloat16)
    got, before, zero = ts.buffers(inputs, "xw"), ts.buffers(inputs, "xw"), torch.zeros(20)
    assert got.weight is not None
    dead = replace(inputs, c=zero)
    with ts.FreshMemory():
        if kept:
            ts.keep_and_backward(ts.backend(), dead, got, ts.backend().kept_rows(inputs.head, got.weight))
        else:
            ts.backend().backward(inputs.head, inputs.labels, zero, zero, got)
    assert got.hidden is not None
    assert got.tail is not None
    assert got.hidden.isnan().all()
    assert torch.equal(got.weight, torch.zeros_like(got.weight) if kept else before.weight)  # type: ignore[arg-type]
    assert got.tail.columns.tolist() == [0, 0]
    assert got.tail.mass.isnan().all()
