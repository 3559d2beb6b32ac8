"""Logits kept in the memory of dW from `logprob` to `backward`, interpreted, against float64.

dW is NaN before each run. So a row shows if it is not assigned, or if it is assigned from overwritten memory.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import triton_support as ts
from tests.triton_support import KEPT_PROBLEMS, Problem

# isort: split
# Triton is imported by the module above.

from benchmarks.gpu import offline
from infopo_kernels.backends.base import Gradients, Head, with_memory_for_logits
from infopo_kernels.backends.triton import gradients, workspace
from infopo_kernels.backends.triton.kernels import kept
from infopo_kernels.backends.triton.launch import prepare
from infopo_kernels.backends.triton.tiles import TARGETS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns about log(0) in masked lanes

TYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]
"""Of the inputs and of dW."""

PART = Problem("part", n=70, h=40, v=130, bias=True, ignored=0.2)
SMALL = 20_000
"""Bytes of workspace for a part of the rows in each chunk and, with `narrow` pieces, for a part of the vocabulary."""


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allows pieces of one tile, so that the vocabulary of a test needs several pieces."""
    monkeypatch.setattr(workspace, "PASS_ROWS", 32)


def most_of(inputs: ts.Inputs, got: Gradients) -> int:
    """Rows whose logits are kept in dW alone."""
    assert got.weight is not None
    return min(ts.backend().kept_rows(inputs.head, got.weight), kept.capacity(prepare(inputs.head), got.weight))


@pytest.mark.parametrize("types", TYPES, ids=lambda types: f"{types[0]}-{types[1]}")
@pytest.mark.parametrize("problem", KEPT_PROBLEMS, ids=str)
def test_kept_logits(problem: Problem, types: tuple[torch.dtype, torch.dtype]) -> None:
    inputs = ts.make(problem, types[0])
    truth = ts.plain(inputs)
    got, before = ts.fresh_buffers(inputs, "xwb" if problem.bias else "xw", types[1])
    most = most_of(inputs, got)
    assert most > 0
    if problem.name == "kept-in-part":
        assert most < inputs.scored.sum(), "rows that are kept and rows that are not"
    with ts.FreshMemory():
        logp, lse = ts.keep_and_backward(ts.backend(), inputs, got, most)
    ts.assert_logp(inputs, truth, logp, lse)
    ts.assert_gradients(inputs, truth, got, before, roundings=2, zero_rows=False)


@pytest.mark.parametrize("wanted", ["w", "wb", "xw"])
def test_some_buffers_are_none(wanted: str) -> None:
    inputs = ts.make(Problem("kept-some", n=23, h=40, v=70, bias=True), torch.bfloat16)
    truth = ts.plain(inputs)
    got, before = ts.fresh_buffers(inputs, wanted)
    with ts.FreshMemory():
        ts.keep_and_backward(ts.backend(), inputs, got, most_of(inputs, got))
    ts.assert_gradients(inputs, truth, got, before, roundings=2, zero_rows=False)


BESIDE = Problem("kept-beside", n=42, h=24, v=75, bias=True, softcap=3.0, scale=-0.7, size=3.0, ignored=0.1)
"""dW holds the logits of 16 or 32 rows."""


@pytest.mark.parametrize("types", TYPES, ids=lambda types: f"{types[0]}-{types[1]}")
def test_the_workspace_holds_rows_beside(types: tuple[torch.dtype, torch.dtype]) -> None:
    """Every row is kept. Nothing of the head is read after `logprob` but for dX, so that no logit is formed again."""
    inputs = ts.make(BESIDE, types[0])
    truth, backend = ts.plain(inputs), ts.backend()
    got, before = ts.fresh_buffers(inputs, "wb", types[1])
    assert got.weight is not None
    assert 16 <= most_of(inputs, got) < inputs.scored.sum()
    assert backend.kept_rows(inputs.head, got.weight) >= len(inputs.labels)
    with ts.checked_addresses(), ts.FreshMemory():
        head, got = with_memory_for_logits(backend, inputs.head, got, len(inputs.labels))
        logp, lse = backend.logprob(head, inputs.labels, got)
        gone = replace(head, weight=torch.full_like(head.weight, float("nan")))
        backend.backward(gone, inputs.labels, lse, inputs.c, got, inputs.labels)
    ts.assert_logp(inputs, truth, logp, lse)
    ts.assert_gradients(inputs, truth, got, before, roundings=2, zero_rows=False)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_workspace_holds_some_rows_beside(dtype: torch.dtype) -> None:
    """Rows in dW, beside it, and rows that are not kept, over several pieces of the vocabulary."""
    inputs = ts.make(replace(BESIDE, n=70), dtype, 30_000)
    truth, backend, (got, before) = ts.plain(inputs), ts.backend(), ts.fresh_buffers(inputs, "xwb", dtype)
    assert got.weight is not None
    most = backend.kept_rows(inputs.head, got.weight)
    assert 16 <= most_of(inputs, got) < most < inputs.scored.sum()
    with ts.FreshMemory() as memory:
        logp, lse = ts.keep_and_backward(backend, inputs, got, most)
        assert memory.peak <= 30_000 + 12 * 4 * 70  # l, lse, lists of rows, slots, ...
    ts.assert_logp(inputs, truth, logp, lse)
    ts.assert_gradients(inputs, truth, got, before, roundings=2, zero_rows=False)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_small_workspace(dtype: torch.dtype) -> None:
    """Kept rows are in the first chunk; other rows are in the first and in later chunks."""
    inputs = ts.make(PART, dtype, SMALL)
    truth, backend = ts.plain(inputs), ts.backend()
    got, before = ts.fresh_buffers(inputs, "xwb")
    most = most_of(inputs, got)
    assert 16 <= most < inputs.scored.sum()
    vectors = 12 * 4 * PART.n  # l, lse, lists of rows, slots, ...
    labels = ts.first_rows(inputs.labels, most)
    with ts.FreshMemory() as memory:
        backend.logprob(inputs.head, labels, got)
        assert 9 * 4 * most <= memory.peak <= SMALL + vectors
        memory.reset()
        _, lse = backend.logprob(inputs.head, inputs.labels)
        memory.reset()
        backend.backward(inputs.head, inputs.labels, lse, inputs.c, got, labels)
        assert SMALL // 2 < memory.peak <= SMALL + vectors
    ts.assert_gradients(inputs, truth, got, before, roundings=2, zero_rows=False)


def test_sums_of_exponentials_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "sums_chunk", lambda sizes: 16)
    inputs = ts.make(PART, torch.float16)
    truth, (got, before) = ts.plain(inputs), ts.fresh_buffers(inputs, "xwb")
    with ts.FreshMemory():
        logp, lse = ts.keep_and_backward(ts.backend(), inputs, got, 41)
    ts.assert_logp(inputs, truth, logp, lse)
    ts.assert_gradients(inputs, truth, got, before, roundings=2, zero_rows=False)


@pytest.mark.usefixtures("narrow")
def test_pieces_in_the_other_order_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong order writes rows of dW over logits that are still needed: this proves that the tests above can fail."""

    def first_piece(end: int, columns: int) -> tuple[int, int]:
        return PART.v - end, min(end, columns)

    monkeypatch.setattr(gradients, "last_piece", first_piece)
    inputs = ts.make(PART, torch.float16, SMALL)
    truth, (got, before) = ts.plain(inputs), ts.fresh_buffers(inputs, "w")
    ts.keep_and_backward(ts.backend(), inputs, got, most_of(inputs, got))
    with pytest.raises(AssertionError, match="dW: "):
        ts.assert_gradients(inputs, truth, got, before, roundings=2, zero_rows=False)


@pytest.mark.parametrize("v", [1, 15, 16, 17, 75, 128, 301, 511, 512, 513, 32003, 151936])
@pytest.mark.parametrize("h", [24, 577, 4096])
def test_parts_lie_in_front_of_the_rows_that_they_become(h: int, v: int) -> None:
    """Of dW, of what is read of it and of each other, in bytes."""
    for dtype, weight_dtype in TYPES:
        hidden, weight = (torch.empty(n, h, dtype=dtype, device="meta") for n in (5, v))
        dw = torch.empty(v, h, dtype=weight_dtype, device="meta")
        with offline.recorded(TARGETS["sm_90"]):
            launch = prepare(Head(hidden, weight, None, None, 1.0, ts.WORKSPACE))
        rows = kept.capacity(launch, dw)
        if rows == 0:
            continue
        (store,) = kept.stores_in(launch, (dw, None))
        part = launch.tiles.logits.part
        e, parts = dtype.itemsize, -(-v // part)
        step = store.q.stride(0) * e
        assert step == store.part_max.stride(0) * 4 == rows * (part * e + 4)
        assert all(place % 16 == 0 for place in (step, store.part_max.storage_offset() * 4, store.q.stride(1) * e))
        assert store.part_max.storage_offset() * 4 == rows * part * e
        assert step <= part * h * weight_dtype.itemsize, "part T ends before row part (T + 1) of dW"
        assert store.target.storage_offset() * 4 == parts * step
        assert parts * step + 4 * rows <= v * h * weight_dtype.itemsize
        if v > 4000 and h > 100:
            assert rows > 0.85 * h * weight_dtype.itemsize / e


@pytest.mark.parametrize("types", TYPES, ids=lambda types: f"{types[0]}-{types[1]}")
def test_no_row_has_a_weight(types: tuple[torch.dtype, torch.dtype]) -> None:
    """dW holds logits and has to become 0. Kept rows of weight 0 need no other work."""
    inputs = ts.make(Problem("kept-zero", h=40, bias=True), types[0])
    got, before = ts.fresh_buffers(inputs, "xwb", types[1])
    inputs.c.zero_()
    with ts.FreshMemory():
        ts.keep_and_backward(ts.backend(), inputs, got, most_of(inputs, got))
    assert got.weight is not None
    assert got.hidden is not None
    assert (got.weight == 0).all()
    assert got.hidden.isnan().all()
    assert torch.equal(got.bias, before.bias)  # type: ignore[arg-type]


def test_kept_rows_without_a_weight_are_not_computed() -> None:
    inputs = ts.make(Problem("kept-cost", h=40, ignored=0.0), torch.float32)
    loads = []
    for c in (torch.ones(37), torch.zeros(37)):
        got, _ = ts.fresh_buffers(inputs, "xw")
        labels = ts.first_rows(inputs.labels, most_of(inputs, got))
        _, lse = ts.backend().logprob(inputs.head, labels, got)
        with ts.checked_addresses() as spaces:
            ts.backend().backward(inputs.head, inputs.labels, lse, c, got, labels)
        loads.append(spaces.loads)
    assert loads[1] < 0.2 * loads[0]


def test_kept_rows_need_no_second_product() -> None:
    """dW is formed from the kept logits: the head is NaN by then, and is not read again."""
    inputs = ts.make(Problem("kept-product", h=64), torch.float16)
    truth, (got, before) = ts.plain(inputs), ts.fresh_buffers(inputs, "w")
    labels = ts.first_rows(inputs.labels, most_of(inputs, got))
    assert torch.equal(labels, inputs.labels)
    _, lse = ts.backend().logprob(inputs.head, labels, got)
    gone = replace(inputs.head, weight=torch.full_like(inputs.head.weight, float("nan")))
    ts.backend().backward(gone, labels, lse, inputs.c, got, labels)
    ts.assert_gradients(inputs, truth, got, before, roundings=2, zero_rows=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_bad_values_make_their_own_row_nan(value: float, softcap: float | None) -> None:
    inputs = ts.make(Problem("kept-bad", h=40, softcap=softcap, ignored=0.0), torch.bfloat16)
    inputs.head.hidden[5, 3] = value
    inputs.c.fill_(0.5)
    got, _ = ts.fresh_buffers(inputs, "xw")
    logp, _ = ts.keep_and_backward(ts.backend(), inputs, got, most_of(inputs, got))
    assert logp.isnan().nonzero().tolist() == [[5]]
    assert got.hidden is not None
    assert got.weight is not None
    assert got.hidden.isnan().all(1).nonzero().tolist() == [[5]]
    assert not got.hidden[torch.arange(37) != 5].isnan().any()
    assert got.weight.isnan().any()


@pytest.mark.parametrize("label", [101, 10**12, -1, -101])
def test_label_outside_the_vocabulary_is_nan(label: int) -> None:
    inputs = ts.make(Problem("kept-label", h=40, ignored=0.0), torch.float32)
    inputs.labels[7] = label
    inputs.c.fill_(0.5)
    got, _ = ts.fresh_buffers(inputs, "xw")
    with ts.checked_addresses(), ts.FreshMemory():
        logp, _ = ts.keep_and_backward(ts.backend(), inputs, got, most_of(inputs, got))
    assert logp.isnan().nonzero().tolist() == [[7]]
    assert got.hidden is not None
    assert got.hidden.isnan().all(1).nonzero().tolist() == [[7]]


def test_bias_of_minus_infinity_takes_a_word_out() -> None:
    """Whole parts of the vocabulary as well, whose maximum is minus infinity."""
    inputs = ts.make(Problem("kept-masked", h=40, bias=True, ignored=0.0), torch.float32)
    head, labels = inputs.head, inputs.labels % 31 + 70
    assert head.bias is not None
    masked = replace(inputs, labels=labels, head=replace(head, weight=head.weight[70:], bias=head.bias[70:]))
    truth, (got, before) = ts.plain(replace(masked, labels=labels - 70)), ts.fresh_buffers(inputs, "xw")
    head.bias[:70] = float("-inf")
    ts.keep_and_backward(ts.backend(), replace(inputs, labels=labels), got, most_of(inputs, got))
    assert got.weight is not None
    assert before.weight is not None
    assert (got.weight[:70] == 0).all()
    rest = replace(got, weight=got.weight[70:]), replace(before, weight=before.weight[70:])
    ts.assert_gradients(replace(masked, labels=labels - 70), truth, *rest, roundings=2, zero_rows=False)


def test_nan_weight_is_not_zero() -> None:
    inputs = ts.make(Problem("kept-nan-weight", h=40, ignored=0.0), torch.float16)
    inputs.c.fill_(0.5)
    inputs.c[4] = float("nan")
    got, _ = ts.fresh_buffers(inputs, "xw")
    ts.keep_and_backward(ts.backend(), inputs, got, most_of(inputs, got))
    assert got.hidden is not None
    assert got.hidden.isnan().all(1).nonzero().tolist() == [[4]]


def test_float16_keeps_gradients_below_its_range() -> None:
    inputs = ts.make(Problem("kept-gain", h=40, c_size=1e-9, ignored=0.0), torch.float16)
    truth, (got, before) = ts.plain(inputs), ts.fresh_buffers(inputs, "w")
    ts.keep_and_backward(ts.backend(), inputs, got, most_of(inputs, got))
    ts.assert_gradients(inputs, truth, got, before, roundings=2, zero_rows=False)
    assert truth.weight.abs().max() < 1e-7


@pytest.mark.parametrize("kept", [True, False])
def test_a_probability_never_exceeds_1(kept: bool) -> None:
    """A logsumexp may be smaller than the largest logit: at 1e14 float32 is exact to 2^23. Here it is smaller by 20."""
    inputs = ts.make(Problem("kept-above-1", n=20, h=40, bias=True, size=1e3, ignored=0.0), torch.float32)
    backend, (got, _) = ts.backend(), ts.fresh_buffers(inputs, "xwb")
    assert got.weight is not None
    assert got.bias is not None
    got.bias.zero_()
    assert not kept or most_of(inputs, got) >= len(inputs.labels)
    _, lse = backend.logprob(inputs.head, inputs.labels, got if kept else None)
    if not kept:
        got.weight.zero_()
    backend.backward(inputs.head, inputs.labels, lse - 20, inputs.c, got, inputs.labels if kept else None)
    assert got.bias.abs().max() <= 2 * inputs.c.abs().sum()


@pytest.mark.usefixtures("narrow")
def test_two_runs_are_bitwise_equal() -> None:
    inputs, results = ts.make(PART, torch.bfloat16, SMALL), []
    for _ in range(2):
        got, _ = ts.fresh_buffers(inputs, "xwb")
        logp, _ = ts.keep_and_backward(ts.backend(), inputs, got, most_of(inputs, got))
        results.append((logp, got.hidden[inputs.live], got.weight, got.bias))  # type: ignore[index]
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)  # type: ignore[arg-type]


@pytest.mark.usefixtures("narrow")
def test_where_nothing_is_kept() -> None:
    """A 16-bit dW whose rows are not all in one chunk, memory that is not aligned, too few rows, no rows."""
    inputs = ts.make(PART, torch.bfloat16, SMALL)
    v, h = inputs.head.weight.shape
    backend, fits = ts.backend(), torch.empty(v, h)
    assert backend.kept_rows(inputs.head, fits) >= 16
    assert backend.kept_rows(inputs.head, fits.bfloat16()) == 0
    assert backend.kept_rows(replace(inputs.head, workspace_bytes=ts.WORKSPACE), fits.bfloat16()) >= 16
    assert backend.kept_rows(inputs.head, torch.empty(v * h + 1)[1:].view(v, h)) == 0
    assert backend.kept_rows(replace(inputs.head, hidden=inputs.head.hidden[:0]), fits) == 0
    small = ts.make(Problem("kept-small", h=8), torch.bfloat16)
    assert backend.kept_rows(small.head, torch.empty(small.head.weight.shape)) == 0
