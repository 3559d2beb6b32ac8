"""dX and dW as products of the library on exactly the live rows: values, memory, and when the host waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import triton_support as ts

# isort: split
# Triton is imported by the module above.

from infopo_kernels.backends.base import Gradients, Wanted
from infopo_kernels.backends.triton import launch, products
from infopo_kernels.backends.triton.kernels.rows import find_live_rows
from infopo_kernels.backends.triton.products import LibraryProducts, TritonProducts, products_of
from infopo_kernels.backends.triton.workspace import plan_pieces
from tests.triton_support import Problem

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALIGNED = [
    Problem("aligned", h=32),
    Problem("aligned-bias-softcap", h=48, v=75, bias=True, softcap=3.0, scale=-0.7, size=3.0),
    Problem("aligned-one-row", n=1, h=16, v=33, ignored=0.0),
    Problem("aligned-mostly-ignored", n=70, h=32, v=40, ignored=0.9),
    Problem("aligned-tiny-weights", h=32, c_size=1e-9),
]
"""Rows that begin on 16 elements: others keep Triton's products."""


@pytest.fixture(autouse=True)
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFOPO_KERNELS_GPU_PRODUCTS", "library")


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Rows, columns and depth of every product that the library forms."""
    sizes: list[tuple[int, ...]] = []
    own = products._product

    def counted(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **named: Any) -> None:
        sizes.append((*out.shape, a.shape[1]))
        own(out, a, b, **named)

    monkeypatch.setattr(products, "_product", counted)
    return sizes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", ALIGNED, ids=str)
def test_three_primitives(problem: Problem, dtype: torch.dtype, formed: list[tuple[int, ...]]) -> None:
    inputs = ts.make(problem, dtype)
    truth, backend = ts.plain(inputs), ts.backend()
    wanted = "xwb" if problem.bias else "xw"
    with ts.FreshMemory():
        before, known = ts.buffers(inputs, wanted), ts.buffers(inputs, wanted)
        at_once = ts.buffers(inputs, wanted)
        logp, lse = backend.logprob_and_grad(inputs.head, inputs.labels, inputs.c, at_once)
        backend.backward(inputs.head, inputs.labels, lse, inputs.c, known)
    ts.assert_logp(inputs, truth, logp, lse)
    ts.assert_gradients(inputs, truth, at_once, before, roundings=2, zero_rows=True)
    ts.assert_gradients(inputs, truth, known, before, roundings=1, zero_rows=False)
    scored, live = int(inputs.scored.sum()), int(inputs.live.sum())
    h, v = problem.h, problem.v
    assert formed == [(scored, h, v), (v, h, scored)] + [(live, h, v), (v, h, live)] * (live > 0)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("workspace", [36_000, 72_000])
def test_small_workspace(workspace: int, weight_dtype: torch.dtype, formed: list[tuple[int, ...]]) -> None:
    """Chunks of rows and pieces of the vocabulary; chunks without a live row form no product."""
    problem = Problem("small", n=70, h=48, v=130, bias=True, ignored=0.6)
    inputs = ts.make(problem, torch.bfloat16, workspace)
    truth, backend = ts.plain(inputs), ts.backend()
    before = ts.buffers(inputs, "xwb", weight_dtype)
    with ts.FreshMemory() as memory:
        _, lse = backend.logprob(inputs.head, inputs.labels)
        known = ts.buffers(inputs, "xwb", weight_dtype)
        memory.reset()
        backend.backward(inputs.head, inputs.labels, lse, inputs.c, known)
        assert memory.peak <= workspace + 8 * 4 * problem.n + 8 * problem.v * problem.h
    ts.assert_gradients(inputs, truth, known, before, roundings=1, zero_rows=False)
    operations = sum(2 * a * b * c for a, b, c in formed)
    # What is added to 16 bits is Triton's, which rounds once; float32 sums of dW are added to by the library.
    in_one_go = weight_dtype != torch.float32 and workspace == 72_000
    assert operations == (1 if in_one_go else 2) * 2 * int(inputs.live.sum()) * problem.h * problem.v


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=str)
def test_kept_logits(dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    inputs = ts.make(Problem("kept-in-part", n=70, h=32, v=48, bias=True, ignored=0.1), dtype)
    truth, backend = ts.plain(inputs), ts.backend()
    got, before = ts.fresh_buffers(inputs, "xwb", weight_dtype or dtype)
    assert got.weight is not None
    most = backend.kept_rows(inputs.head, got.weight)
    assert most > 0
    with ts.FreshMemory():
        logp, lse = ts.keep_and_backward(backend, inputs, got, most)
    ts.assert_logp(inputs, truth, logp, lse)
    ts.assert_gradients(inputs, truth, got, before, roundings=2, zero_rows=False)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep", [False, True], ids=["formed", "kept"])
def test_pieces_behind_the_first_are_planned_for_the_live_rows(
    keep: bool, weight_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer rows make wider pieces, in the same bytes; sums of dX of the first piece stay."""
    from infopo_kernels.backends.triton import gradients

    pieces: list[tuple[int, int]] = []
    own = gradients.launch_gradient_tile

    def counted(*args: Any, **named: Any) -> None:
        _, _, _, _, _, g, _, _, _, columns, *_ = args
        pieces.append((len(g), columns))
        own(*args, **named)

    monkeypatch.setattr(gradients, "launch_gradient_tile", counted)
    problem, workspace = Problem("fewer", n=64, h=48, v=2000, bias=True, ignored=0.0), 160_000
    inputs = ts.make(problem, torch.bfloat16, workspace)
    inputs.c[20:] = 0.0
    truth, backend = ts.plain(inputs), ts.backend()
    with ts.FreshMemory() as memory:
        if keep:
            got, before = ts.fresh_buffers(inputs, "xwb", weight_dtype)
            most = backend.kept_rows(inputs.head, got.weight)  # type: ignore[arg-type]
            assert most > 0
            ts.keep_and_backward(backend, inputs, got, most)
        else:
            got, before = ts.buffers(inputs, "xwb", weight_dtype), ts.buffers(inputs, "xwb", weight_dtype)
            _, lse = backend.logprob(inputs.head, inputs.labels)
            memory.reset()
            backend.backward(inputs.head, inputs.labels, lse, inputs.c, got)
            assert memory.peak <= workspace + 8 * 4 * problem.n + 8 * problem.v * problem.h
    ts.assert_gradients(inputs, truth, got, before, roundings=2 if keep else 1, zero_rows=False)
    (first, last_columns), *others = pieces
    planned = plan_pieces(launch.prepare(inputs.head).sizes, Wanted.of(got), rows=first)
    assert first == problem.n
    assert {rows for rows, _ in others} == {-(-int(inputs.live.sum()) // 16) * 16}
    assert max(width for _, width in others) > planned.columns
    assert last_columns + sum(width for _, width in others) == problem.v


def test_no_live_row_at_all(formed: list[tuple[int, ...]]) -> None:
    """Results stay as they were; a dW that is assigned becomes 0."""
    inputs = ts.make(Problem("nothing", n=20, h=32), torch.bfloat16)
    got, before = ts.buffers(inputs, "xw"), ts.buffers(inputs, "xw")
    zero = torch.zeros(20)
    with ts.FreshMemory():
        ts.backend().backward(inputs.head, inputs.labels, zero, zero, got)
        assigned, _ = ts.fresh_buffers(inputs, "xw")
        assert assigned.weight is not None
        kept = ts.first_rows(inputs.labels, ts.backend().kept_rows(inputs.head, assigned.weight))
        ts.backend().logprob(inputs.head, kept, assigned)
        ts.backend().backward(inputs.head, inputs.labels, zero, zero, assigned, kept)
    assert got.hidden is not None
    assert got.hidden.isnan().all()
    assert torch.equal(got.weight, before.weight)  # type: ignore[arg-type]
    assert (assigned.weight == 0).all()
    assert formed == []


def test_the_host_waits_only_after_logits_are_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of live rows is asked for when the first product is due, and once a call."""
    events: list[str] = []
    own = products._Coming.arrived
    monkeypatch.setattr(products._Coming, "arrived", lambda self: (events.append("wait"), own(self))[1])
    from infopo_kernels.backends.triton import gradients

    for name in ("launch_softmax_tile", "launch_gradient_tile"):
        kernel = getattr(gradients, name)
        monkeypatch.setattr(
            gradients, name, lambda *args, kernel=kernel, **named: (events.append("logits"), kernel(*args, **named))
        )
    inputs = ts.make(Problem("order", n=70, h=32, v=130, ignored=0.0), torch.bfloat16, 36_000)
    _, lse = ts.backend().logprob(inputs.head, inputs.labels)
    for call in (
        lambda: ts.backend().backward(inputs.head, inputs.labels, lse, inputs.c, ts.buffers(inputs, "xw")),
        lambda: ts.backend().logprob_and_grad(inputs.head, inputs.labels, inputs.c, ts.buffers(inputs, "xw")),
    ):
        events.clear()
        call()
        assert events[:2] == ["logits", "wait"]
        assert events.count("wait") == 1


def test_the_way_with_a_float32_result_exists_in_this_pytorch() -> None:
    """What a GPU runs, as far as tensors without storage tell: names and types are accepted, and `out` is filled."""
    out = torch.empty(4, 32, device="meta")
    a, b = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((4, 16), (16, 32)))
    for into in (out, out.to(torch.bfloat16)):
        products._product(into, a, b, add=True, factor=0.5)
    with pytest.raises(RuntimeError):
        products._product(out[:, :7], a, b, add=True, factor=0.5)


def test_16_bit_results_have_float32_sums() -> None:
    """PyTorch's switch is off while the library sums into 16 bits, and as it was afterwards."""
    matmul = torch.backends.cuda.matmul
    for before in (True, False):
        matmul.allow_bf16_reduced_precision_reduction = before
        with products._sums_in_float32(torch.bfloat16):
            assert not matmul.allow_bf16_reduced_precision_reduction
        assert matmul.allow_bf16_reduced_precision_reduction is before
    matmul.allow_bf16_reduced_precision_reduction = True


def test_which_products_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's where rows are not aligned or a graph is captured, and as INFOPO_KERNELS_GPU_PRODUCTS says."""

    def kind(h: int) -> type:
        inputs = ts.make(Problem("kind", h=h), torch.float16)
        live = find_live_rows(inputs.labels, inputs.c, skip_zero=True, gain=True, cleared=None)
        return type(products_of(launch.prepare(inputs.head), live))

    assert kind(32) is LibraryProducts
    assert kind(24) is TritonProducts
    monkeypatch.setenv("INFOPO_KERNELS_GPU_PRODUCTS", "triton")
    assert kind(32) is TritonProducts
    monkeypatch.setenv("INFOPO_KERNELS_GPU_PRODUCTS", "cublas")
    with pytest.raises(ValueError, match="must be 'library' or 'triton', got 'cublas'"):
        kind(32)


def test_both_kinds_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sums, in another order."""
    inputs = ts.make(Problem("agree", n=60, h=32, bias=True), torch.float32)
    results = []
    for name in ("library", "triton"):
        monkeypatch.setenv("INFOPO_KERNELS_GPU_PRODUCTS", name)
        got = ts.buffers(inputs, "xwb")
        ts.backend().logprob_and_grad(inputs.head, inputs.labels, inputs.c, got)
        results.append(Gradients(got.hidden[inputs.scored], got.weight, got.bias))  # type: ignore[index]
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(*(getattr(r, name) for r in results), rtol=1e-5, atol=1e-7)
