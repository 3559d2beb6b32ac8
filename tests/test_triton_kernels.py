"""Every Triton kernel, interpreted, against float64: the three primitives for all problems, types and buffers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import triton_support as ts
from tests.triton_support import PROBLEMS, Problem

# isort: split
# Triton is imported by the module above.

from infopo_kernels.backends.triton.launch import prepare
from infopo_kernels.options import ELSEWHERE
from tests.budget import assert_within, error_budget

# isort: split
# Triton is imported by the module above.


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns about log(0) in masked lanes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = 36_000
"""Bytes of workspace that make every loop over chunks and pieces run more than once."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_three_primitives(problem: Problem, dtype: torch.dtype) -> None:
    """Fresh memory is NaN, so it shows if a kernel does not write an entry, or reads it too early."""
    inputs = ts.make(problem, dtype)
    truth, backend = ts.plain(inputs), ts.backend()
    wanted = "xwb" if problem.bias else "xw"
    with ts.FreshMemory():
        logp, lse = backend.logprob(inputs.head, inputs.labels)
        before, known = ts.buffers(inputs, wanted), ts.buffers(inputs, wanted)
        at_once = ts.buffers(inputs, wanted)
        logp_too, lse_too = backend.logprob_and_grad(inputs.head, inputs.labels, inputs.c, at_once)
        backend.backward(inputs.head, inputs.labels, lse, inputs.c, known)
    ts.assert_logp(inputs, truth, logp, lse)
    ts.assert_logp(inputs, truth, logp_too, lse_too)
    ts.assert_gradients(inputs, truth, at_once, before, roundings=2, zero_rows=True)
    ts.assert_gradients(inputs, truth, known, before, roundings=1, zero_rows=False)


DESCRIBED = [
    Problem("described", h=48),
    Problem("described-whole-tiles", n=32, h=32, v=64, ignored=0.0),
    Problem("described-bias-softcap", h=64, bias=True, softcap=3.0, scale=-0.7, size=3.0),
    Problem("described-mostly-ignored", n=70, h=32, v=40, ignored=0.9),
]
"""Rows that descriptors can load."""


@pytest.mark.usefixtures("described")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("problem", DESCRIBED, ids=str)
def test_three_primitives_by_descriptors(problem: Problem, dtype: torch.dtype) -> None:
    test_three_primitives(problem, dtype)
    assert prepare(ts.make(problem, dtype).head).sizes.descriptors


@pytest.mark.usefixtures("described")
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_workspace_by_descriptors(weight_dtype: torch.dtype) -> None:
    """Chunks of gathered rows, and of rows whose logits are kept."""
    problem = Problem("small-described", n=70, h=48, v=130, bias=True, ignored=0.2)
    inputs = ts.make(problem, torch.bfloat16, SMALL)
    truth, backend = ts.plain(inputs), ts.backend()
    before, vectors = ts.buffers(inputs, "xwb", weight_dtype), 8 * 4 * problem.n
    with ts.FreshMemory() as memory:
        logp, lse = backend.logprob(inputs.head, inputs.labels)
        assert memory.peak <= SMALL + vectors
        known = ts.buffers(inputs, "xwb", weight_dtype)
        memory.reset()
        backend.backward(inputs.head, inputs.labels, lse, inputs.c, known)
        assert memory.peak <= SMALL + vectors
    ts.assert_logp(inputs, truth, logp, lse)
    ts.assert_gradients(inputs, truth, known, before, roundings=1, zero_rows=False)


@pytest.mark.usefixtures("described")
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_logits_by_descriptors(weight_dtype: torch.dtype) -> None:
    inputs = ts.make(Problem("kept-described", h=32, v=75, bias=True), torch.bfloat16)
    truth, (got, before) = ts.plain(inputs), ts.fresh_buffers(inputs, "xwb", weight_dtype)
    assert got.weight is not None
    most = ts.backend().kept_rows(inputs.head, got.weight)
    assert most > 0
    with ts.FreshMemory():
        logp, lse = ts.keep_and_backward(ts.backend(), inputs, got, most)
    ts.assert_logp(inputs, truth, logp, lse)
    ts.assert_gradients(inputs, truth, got, before, roundings=2, zero_rows=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", ["x", "w", "b", "wb", "xb"])
def test_some_buffers_are_none(wanted: str, dtype: torch.dtype) -> None:
    inputs = ts.make(Problem("partial", n=23, h=20, v=70, bias=True), dtype)
    truth, backend, before = ts.plain(inputs), ts.backend(), ts.buffers(inputs, wanted)
    with ts.FreshMemory():
        at_once, known = ts.buffers(inputs, wanted), ts.buffers(inputs, wanted)
        _, lse = backend.logprob_and_grad(inputs.head, inputs.labels, inputs.c, at_once)
        backend.backward(inputs.head, inputs.labels, lse, inputs.c, known)
    ts.assert_gradients(inputs, truth, at_once, before, roundings=2, zero_rows=True)
    ts.assert_gradients(inputs, truth, known, before, roundings=1, zero_rows=False)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("workspace", [SMALL, 2 * SMALL])
def test_small_workspace(workspace: int, weight_dtype: torch.dtype) -> None:
    """Chunks of rows and pieces of the vocabulary; a 16-bit dW is still rounded once."""
    problem = Problem("small", n=70, h=40, v=130, bias=True, ignored=0.2)
    inputs = ts.make(problem, torch.bfloat16, workspace)
    truth, backend = ts.plain(inputs), ts.backend()
    before = ts.buffers(inputs, "xwb", weight_dtype)
    vectors = 8 * 4 * problem.n  # l, lse, list of rows, ...
    with ts.FreshMemory() as memory:
        _, lse = backend.logprob(inputs.head, inputs.labels)
        at_once, known = ts.buffers(inputs, "xwb", weight_dtype), ts.buffers(inputs, "xwb", weight_dtype)
        memory.reset()
        backend.logprob_and_grad(inputs.head, inputs.labels, inputs.c, at_once)
        assert SMALL // 4 < memory.peak <= workspace + vectors
        memory.reset()
        backend.backward(inputs.head, inputs.labels, lse, inputs.c, known)
        assert SMALL // 4 < memory.peak <= workspace + vectors
    ts.assert_gradients(inputs, truth, at_once, before, roundings=2, zero_rows=True)
    ts.assert_gradients(inputs, truth, known, before, roundings=1, zero_rows=False)


@pytest.mark.parametrize("wanted", ["x", "xw"])
def test_chunks_of_one_tile_way(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of rows, each with one tile of logits; the few rows of a test would otherwise be one chunk."""
    from infopo_kernels.backends.triton import workspace

    monkeypatch.setattr(workspace, "MIN_ROWS_WITH_WEIGHT", 8)
    monkeypatch.setattr(workspace, "MIN_ROWS_WITHOUT_WEIGHT", 8)
    inputs = ts.make(Problem("chunks", n=70, h=24, v=130), torch.float16, 30_000)
    truth, before, got = ts.plain(inputs), ts.buffers(inputs, wanted), ts.buffers(inputs, wanted)
    with ts.FreshMemory():
        logp, lse = ts.backend().logprob_and_grad(inputs.head, inputs.labels, inputs.c, got)
    ts.assert_logp(inputs, truth, logp, lse)
    ts.assert_gradients(inputs, truth, got, before, roundings=2, zero_rows=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_bad_values_make_their_own_row_nan(value: float, softcap: float | None) -> None:
    inputs = ts.make(Problem("bad", softcap=softcap, ignored=0.0), torch.bfloat16)
    inputs.head.hidden[5, 3] = value
    backend, got = ts.backend(), ts.buffers(inputs, "x")
    for logp in (
        backend.logprob(inputs.head, inputs.labels)[0],
        backend.logprob_and_grad(inputs.head, inputs.labels, inputs.c, got)[0],
    ):
        assert logp.isnan().nonzero().tolist() == [[5]]
    assert got.hidden is not None
    assert got.hidden[5].isnan().all()
    assert not got.hidden[:5].isnan().any()


@pytest.mark.parametrize("label", [101, 10**12, -1, -101])
def test_label_outside_the_vocabulary_is_nan(label: int) -> None:
    inputs = ts.make(Problem("label", ignored=0.0), torch.float32)
    inputs.labels[7] = label
    backend = ts.backend()
    at_once, known = ts.buffers(inputs, "x"), ts.buffers(inputs, "x")
    with ts.checked_addresses():
        logp, lse = backend.logprob(inputs.head, inputs.labels)
        logp_too, _ = backend.logprob_and_grad(inputs.head, inputs.labels, inputs.c, at_once)
        backend.backward(inputs.head, inputs.labels, lse, inputs.c, known)
    for result in (logp, logp_too):
        assert result.isnan().nonzero().tolist() == [[7]]
    for gradients in (at_once, known):
        assert gradients.hidden is not None
        assert gradients.hidden[7].isnan().all()


def test_bias_of_minus_infinity_takes_a_word_out() -> None:
    """Whole tiles of -inf too: exp(-inf + inf) is not 1."""
    inputs = ts.make(Problem("masked", bias=True, ignored=0.0), torch.float32)
    assert inputs.head.bias is not None
    inputs.head.bias[:70] = float("-inf")
    labels = inputs.labels % 31 + 70
    a = inputs.head.hidden.double() @ inputs.head.weight[70:].double().T + inputs.head.bias[70:].double()
    truth = a.log_softmax(-1).gather(1, labels[:, None] - 70)[:, 0]
    allowed = error_budget(inputs.head, labels, inputs.c).l
    for logp, _ in (
        ts.backend().logprob(inputs.head, labels),
        ts.backend().logprob_and_grad(inputs.head, labels, inputs.c, ts.buffers(inputs, "xw")),
    ):
        assert_within("l", logp, truth, allowed)


def test_a_part_of_the_vocabulary_that_the_bias_removes() -> None:
    """Its lse is -inf, not NaN, and with the lse of the whole vocabulary its gradients are 0."""
    inputs = ts.make(Problem("removed", h=40, bias=True, ignored=0.0), torch.float32)
    head, labels, backend = inputs.head, torch.full_like(inputs.labels, ELSEWHERE), ts.backend()
    assert head.bias is not None
    head.bias.fill_(float("-inf"))
    got, before = ts.buffers(inputs, "xwb"), ts.buffers(inputs, "wb")
    _, lse = backend.logprob(head, labels)
    assert lse.isneginf().all()
    backend.backward(head, labels, torch.full_like(lse, 2.5), inputs.c, got)
    assert got.hidden is not None
    assert got.hidden[inputs.c != 0].eq(0).all()
    assert torch.equal(got.weight, before.weight)  # type: ignore[arg-type]
    assert torch.equal(got.bias, before.bias)  # type: ignore[arg-type]
    assert backend.logprob_and_grad(head, labels, inputs.c, got)[1].isneginf().all()


def test_a_label_at_minus_infinity_has_finite_gradients() -> None:
    """l is -inf, and G that of a probability of 0; known weights and kept logits both form G from l."""
    inputs = ts.make(Problem("masked-label", h=40, bias=True, ignored=0.0), torch.float32)
    assert inputs.head.bias is not None
    inputs.head.bias[inputs.labels[4]] = float("-inf")
    truth, backend, before = ts.plain(inputs), ts.backend(), ts.buffers(inputs, "xwb")
    at_once = ts.buffers(inputs, "xwb")
    logp, lse = backend.logprob_and_grad(inputs.head, inputs.labels, inputs.c, at_once)
    assert logp[4] == float("-inf")
    ts.assert_logp(inputs, truth, logp, lse)
    ts.assert_gradients(inputs, truth, at_once, before, roundings=2, zero_rows=True)
    kept, empty = ts.fresh_buffers(inputs, "xwb")
    assert kept.weight is not None
    ts.keep_and_backward(backend, inputs, kept, backend.kept_rows(inputs.head, kept.weight))
    ts.assert_gradients(inputs, truth, kept, empty, roundings=2, zero_rows=False)


def test_nothing_to_do() -> None:
    """No rows, no scored rows, no row with a weight: results stay as they were."""
    inputs = ts.make(Problem("nothing", n=20), torch.float32)
    head, backend = inputs.head, ts.backend()
    none = replace(head, hidden=head.hidden[:0])
    empty = torch.empty(0, dtype=torch.int64)
    assert backend.logprob(none, empty)[0].shape == (0,)
    got, before = ts.buffers(inputs, "xw"), ts.buffers(inputs, "xw")
    ignored = torch.full_like(inputs.labels, -100)
    with ts.FreshMemory():
        logp, lse = backend.logprob_and_grad(head, ignored, inputs.c, got)
        backend.backward(head, inputs.labels, torch.zeros(20), torch.zeros(20), got)
    assert (logp == 0).all()
    assert (lse == 0).all()
    assert got.hidden is not None
    assert got.hidden.isnan().all()
    assert torch.equal(got.weight, before.weight)  # type: ignore[arg-type]


def test_nan_weight_is_not_zero() -> None:
    inputs = ts.make(Problem("nan-weight", ignored=0.0), torch.float16)
    inputs.c[4] = float("nan")
    _, lse = ts.backend().logprob(inputs.head, inputs.labels)
    got = ts.buffers(inputs, "x")
    ts.backend().backward(inputs.head, inputs.labels, lse, inputs.c, got)
    assert got.hidden is not None
    assert got.hidden[4].isnan().all()
    assert not got.hidden[:3].isnan().any()


def test_two_runs_are_bitwise_equal() -> None:
    inputs = ts.make(Problem("twice", n=60, bias=True), torch.bfloat16, 60_000)
    results = []
    for _ in range(2):
        got = ts.buffers(inputs, "xwb")
        logp, _ = ts.backend().logprob_and_grad(inputs.head, inputs.labels, inputs.c, got)
        results.append((logp, got.hidden[inputs.scored], got.weight, got.bias))  # type: ignore[index]
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)  # type: ignore[arg-type]


def test_float16_keeps_gradients_below_its_range() -> None:
    """c p = 1e-9 rounds to 0 in float16; this must not change dW."""
    inputs = ts.make(Problem("gain", c_size=1e-9, ignored=0.0), torch.float16)
    truth, before, got = ts.plain(inputs), ts.buffers(inputs, "w"), ts.buffers(inputs, "w")
    assert before.weight is not None
    assert got.weight is not None
    before.weight.zero_()
    got.weight.zero_()
    ts.backend().logprob_and_grad(inputs.head, inputs.labels, inputs.c, got)
    ts.assert_gradients(inputs, truth, got, before, roundings=2, zero_rows=True)
    assert truth.weight.abs().max() < 1e-7
