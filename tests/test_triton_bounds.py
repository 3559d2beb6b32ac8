"""No Triton kernel reads or writes outside its tensors, at any size: every access is checked, and the check is proved.

Every tensor argument gets an address space of its own in the interpreter (`triton_support.AddressSpaces`), so a pointer
that leaves its tensor is caught wherever it lands.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests import triton_support as ts

# isort: split
# Triton is imported by the module above, and by what follows.

from infopo_kernels.backends.base import Head
from infopo_kernels.backends.triton.kernels import (
    gradient_tile,
    hidden_product,
    kept,
    logprob,
    rows,
    softmax_tile,
    tail,
    weight_product,
)
from infopo_kernels.backends.triton.launch import prepare
from tests.triton_support import Problem, interpreter

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ODD = Problem("odd-bounds", n=35, h=21, v=75, bias=True, softcap=5.0, strided=True)


def run_everything(problem: Problem, dtype: torch.dtype, workspace: int) -> None:
    inputs = ts.make(problem, dtype, workspace)
    backend, wanted = ts.backend(), "xwb" if problem.bias else "xw"
    _, lse = backend.logprob(inputs.head, inputs.labels)
    for weight_dtype in (torch.float32, dtype):
        backend.logprob_and_grad(inputs.head, inputs.labels, inputs.c, ts.buffers(inputs, wanted, weight_dtype))
        backend.backward(inputs.head, inputs.labels, lse, inputs.c, ts.buffers(inputs, wanted, weight_dtype))
        fresh, _ = ts.fresh_buffers(inputs, wanted, weight_dtype)
        assert fresh.weight is not None
        most = backend.kept_rows(inputs.head, fresh.weight)
        in_dw = min(most, kept.capacity(prepare(inputs.head), fresh.weight))
        for number in {in_dw, most} - {0}:
            ts.keep_and_backward(backend, inputs, fresh, number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "problem", [ODD, Problem("one", n=1, h=1, v=1), Problem("thin", n=18, h=3, v=97)], ids=lambda p: p.name
)
def test_every_access_is_inside(problem: Problem, dtype: torch.dtype) -> None:
    with ts.checked_addresses() as spaces, ts.FreshMemory():
        run_everything(problem, dtype, ts.WORKSPACE)
    assert spaces.loads > 20
    assert spaces.stores > 10


def test_every_access_is_inside_with_chunks() -> None:
    with ts.checked_addresses(), ts.FreshMemory():
        run_everything(ODD, torch.bfloat16, 20_000)


TAIL = Problem("tail", n=18, h=17, v=259, bias=True, strided=True, threshold=0.01)


@pytest.mark.parametrize(("dtype", "workspace"), [(torch.float16, ts.WORKSPACE), (torch.float32, 40_000)], ids=str)
def test_every_access_of_a_pooled_tail_is_inside(dtype: torch.dtype, workspace: int) -> None:
    with ts.checked_addresses(), ts.FreshMemory():
        run_everything(TAIL, dtype, workspace)


@pytest.mark.parametrize("keep", [False, True], ids=["formed", "kept"])
def test_every_access_is_inside_of_pieces_planned_for_the_live_rows(
    keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """18 of 61 rows are live: neither number fills a block."""
    from infopo_kernels.backends.triton import gradients

    monkeypatch.setenv("INFOPO_KERNELS_GPU_PRODUCTS", "library")
    plans, own = [], gradients.plan_for_fewer
    monkeypatch.setattr(gradients, "plan_for_fewer", lambda *args: plans.append(own(*args)) or plans[-1])
    inputs = ts.make(Problem("fewer", n=61, h=48, v=1001, bias=True, ignored=0.0), torch.float16, 160_000)
    inputs.c[21:] = 0.0
    assert inputs.live.sum() == 18
    with ts.checked_addresses() as spaces, ts.FreshMemory():
        if keep:
            got, _ = ts.fresh_buffers(inputs, "xwb")
            assert got.weight is not None
            most = ts.backend().kept_rows(inputs.head, got.weight)
            ts.keep_and_backward(ts.backend(), inputs, got, most)
        else:
            _, lse = ts.backend().logprob(inputs.head, inputs.labels)
            ts.backend().backward(inputs.head, inputs.labels, lse, inputs.c, ts.buffers(inputs, "xwb"))
    assert [plan.rows for plan in plans] == [32]
    assert spaces.loads > 20


@pytest.mark.usefixtures("described")
def test_every_access_is_inside_by_descriptors() -> None:
    """Aligned rows, as descriptors want them, and nothing else aligned."""
    with ts.checked_addresses() as spaces, ts.FreshMemory():
        run_everything(Problem("described", n=35, h=48, v=75, bias=True, softcap=5.0), torch.float16, ts.WORKSPACE)
    assert spaces.loads > 20


# --- the check itself: a kernel with one mask dropped must be caught -------------------------------------------------

MUTATIONS: list[tuple[Any, str, str, str]] = [
    (rows, "live_rows_kernel", "inside = offs_n < N", "inside = offs_n >= 0"),
    (logprob, "logprob_kernel", "row_ok = offs_n < here", "row_ok = offs_n >= 0"),
    (logprob, "merge_kernel", "(offs_s < parts)[:, None] & row_ok", "(offs_s >= 0)[:, None] & row_ok"),
    (softmax_tile, "normalise_kernel", "row_ok = offs_n < here", "row_ok = offs_n >= 0"),
    (softmax_tile, "softmax_block", "row_ok = offs_n < here", "row_ok = offs_n >= 0"),
    (softmax_tile, "store_softmax_part", "tl.where(part < num_parts, C, 0)", "C"),
    (kept, "kept_rows_kernel", "inside = offs_n < N", "inside = offs_n >= 0"),
    (kept, "kept_rows_kernel", "known & (slot < first)", "inside"),
    (kept, "kept_rows_kernel", "known & (slot >= first)", "inside"),
    (kept, "kept_gradient_kernel", "own = stored & (slot < first)", "own = stored"),
    (kept, "kept_gradient_kernel", "tl.where(part < parts, here, 0)", "here"),
    (kept, "kept_gradient_kernel", "row_ok = offs_n < here", "row_ok = offs_n >= 0"),
    (gradient_tile, "gradient_block", "row_ok = offs_n < here", "row_ok = offs_n >= 0"),
    (hidden_product, "hidden_product_kernel", "(offs_v < end - v)[:, None] & ", ""),
    (hidden_product, "store_hidden_kernel", "(offs_h < H)", "(offs_h >= 0)"),
    (rows, "gather_rows_kernel", "(offs_h < H)", "(offs_h >= 0)"),
    (weight_product, "weight_product_kernel", "row_ok = offs_n < here - n", "row_ok = offs_n >= 0"),
    (weight_product, "weight_product_kernel", "offs_v, offs_v < columns, first_h", "offs_v, offs_v >= 0, first_h"),
]


@contextmanager
def mutated(module: Any, name: str, old: str, new: str) -> Iterator[None]:
    """The kernel `name` with `old` replaced in its source, for the interpreter."""
    kernel = getattr(module, name)
    source = inspect.getsource(kernel.fn)
    assert old in source, f"{name} no longer contains {old!r}: the mutation tests nothing"
    rewriter = kernel.rewriter
    prepare = rewriter._prepare_source

    def changed(lines: list[str]) -> str:
        return str(prepare(lines)).replace(old, new)

    rewriter._prepare_source = changed
    cache = interpreter.InterpretedFunction.rewritten_fn
    cache.pop(kernel.fn, None)
    try:
        yield
    finally:
        rewriter._prepare_source = prepare
        cache.pop(kernel.fn, None)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m[1]}: {m[2]}")
def test_a_dropped_mask_is_caught(mutation: tuple[Any, str, str, str]) -> None:
    # 38 rows, 33 of them with a weight: neither number fills its last block of 16, so a mask is all that stops it.
    # Logits of 16 rows are kept at h = 21, those of all rows at h = 61.
    h = 61 if mutation[1:3] == ("kept_gradient_kernel", "row_ok = offs_n < here") else 21
    problem = Problem("mutant", n=38, h=h, v=75, ignored=0.0)
    with mutated(*mutation), pytest.raises(Exception, match="OutOfBounds"), ts.checked_addresses():
        run_everything(problem, torch.float32, ts.WORKSPACE)


def test_a_dropped_vocabulary_mask_is_caught_by_value() -> None:
    """A tail that counts exp(0) instead of exp(-inf) stays inside its tensors; the numbers tell."""
    from infopo_kernels.backends.triton.kernels import logits

    inputs = ts.make(Problem("tail", v=75), torch.float32)
    truth = ts.plain(inputs)
    with mutated(logits, "inside", 'float("-inf")', "0.0"):
        logp, lse = ts.backend().logprob(inputs.head, inputs.labels)
    with pytest.raises(AssertionError, match="times the budget"):
        ts.assert_logp(inputs, truth, logp, lse)


TAIL_MUTATIONS: list[tuple[Any, str, str, str]] = [
    (tail, "choose_words_kernel", "(offs_n < blocks)[:, None]", "(offs_n >= 0)[:, None]"),
    (tail, "choose_words_kernel", "ok = offs_v < columns", "ok = offs_v >= 0"),
    (tail, "place_words_kernel", "ok = offs_v < columns", "ok = offs_v >= 0"),
    (tail, "compact_columns_kernel", "ok = offs_v < columns", "ok = offs_v >= 0"),
    (tail, "mean_words_kernel", "mask=offs_v < columns", "mask=offs_v >= 0"),
    (tail, "spread_tail_kernel", "h_ok = offs_h < H", "h_ok = offs_h >= 0"),
    (hidden_product, "hidden_product_kernel", "(offs_v < here - b)[:, None] & ", ""),
    (weight_product, "weight_product_kernel", "kept = offs_v < columns", "kept = offs_v >= 0"),
    (weight_product, "weight_product_kernel", "pool < pools", "pool >= 0"),
]


@pytest.mark.parametrize("mutation", TAIL_MUTATIONS, ids=lambda m: f"{m[1]}: {m[2]}")
def test_a_dropped_mask_of_a_pooled_tail_is_caught(mutation: tuple[Any, str, str, str]) -> None:
    problem = Problem("mutant-tail", n=20, h=21, v=75, ignored=0.0, threshold=0.01)
    caught = pytest.raises(Exception, match="OutOfBounds")
    with mutated(*mutation), caught, ts.checked_addresses(), ts.FreshMemory():
        run_everything(problem, torch.float32, ts.WORKSPACE)


# --- offsets beyond 2^31 ----------------------------------------------------------------------------------------------


def huge(rows_: int, columns: int, stride: int, dtype: torch.dtype, values: torch.Tensor | None = None) -> torch.Tensor:
    """[rows, columns] whose rows lie `stride` elements apart: address space, of which only what is touched is there."""
    storage = torch.empty((rows_ - 1) * stride + columns, dtype=dtype)
    view = storage.as_strided((rows_, columns), (stride, 1))
    if values is not None:
        view.copy_(values)
    return view


def test_inputs_beyond_two_to_the_31() -> None:
    """N H and V H beyond 2^31 elements: hidden states and head with rows 2^27 elements apart."""
    inputs = ts.make(Problem("far", n=20, h=16, v=40, ignored=0.0), torch.float16)
    truth, head, stride = ts.plain(inputs), inputs.head, 1 << 27
    assert 19 * stride > 2**31
    object.__setattr__(head, "hidden", huge(20, 16, stride, torch.float16, head.hidden))
    object.__setattr__(head, "weight", huge(40, 16, stride, torch.float16, head.weight))
    before, at_once, known = (ts.buffers(inputs, "w") for _ in range(3))
    with ts.checked_addresses():
        logp, lse = ts.backend().logprob_and_grad(head, inputs.labels, inputs.c, at_once)
        ts.backend().backward(head, inputs.labels, lse, inputs.c, known)
    object.__setattr__(head, "hidden", head.hidden.contiguous())
    object.__setattr__(head, "weight", head.weight.contiguous())
    ts.assert_logp(inputs, truth, logp, lse)
    ts.assert_gradients(inputs, truth, at_once, before, roundings=2, zero_rows=True)
    ts.assert_gradients(inputs, truth, known, before, roundings=1, zero_rows=False)


@contextmanager
def last_program_only() -> Iterator[None]:
    """Run one program of a grid, that with the largest indices, instead of millions."""
    builder = interpreter.interpreter_builder
    call = interpreter.GridExecutor.__call__

    def last(self: Any, *args: Any, **kwargs: Any) -> Any:
        grid = (*self.grid, 1, 1)[:3]
        set_index, set_dim = builder.set_grid_idx, builder.set_grid_dim
        builder.set_grid_idx = lambda x, y, z: set_index(*(length - 1 for length in grid))
        builder.set_grid_dim = lambda *shape: set_dim(*grid)
        self.grid = (1, 1, 1)
        try:
            return call(self, *args, **kwargs)
        finally:
            builder.set_grid_idx, builder.set_grid_dim = set_index, set_dim

    interpreter.GridExecutor.__call__ = last
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__ = call


def _launch(n: int, h: int, v: int) -> Any:
    return prepare(Head(torch.empty(n, h).half(), torch.empty(1, h).half().expand(v, h), None, None, 1.0, 1 << 20))


def _live(n: int, *index: int) -> rows.LiveRows:
    live = rows.new_list(torch.zeros(n, dtype=torch.int64))
    live.index.copy_(torch.tensor([*index, *[0] * n][:n]))
    live.count.fill_(n)
    live.kept.fill_(0)
    live.gain.fill_(1.0)
    return live


def test_dw_beyond_two_to_the_31() -> None:
    """The last tile of a dW [V, H] of 2^32 elements and more."""
    v, h, n = 4_200_001, 1025, 3
    launch, live = _launch(n, h, 16), _live(n, 0, 1, 2)
    g = torch.ones(n, math.ceil(v / 32) * 32, dtype=torch.float16)
    x = torch.ones(n, launch.sizes.gathered_stride, dtype=torch.float16)
    dw = huge(v, h, h, torch.float16)
    dw[-1, -1] = 0.5
    with ts.checked_addresses(), last_program_only():
        weight_product.launch_weight_product(launch, live, g, x, dw, 0, add=True)
    assert dw[-1, -1] == 3.5


def test_dx_beyond_two_to_the_31() -> None:
    """The last row of a dX [N, H] of 2^32 elements and more."""
    n, h = 4_200_001, 1025
    launch, live = _launch(1, h, 16), _live(1, n - 1)
    part, dx = torch.full((2, 1, h), 1.5), huge(n, h, h, torch.float16)
    with ts.checked_addresses(), last_program_only():
        hidden_product.launch_store_hidden(launch, live, part, dx, 0)
    assert dx[-1, -1] == 3.0


def check_g(launch_it: Callable[[Any, rows.LiveRows, torch.Tensor], None]) -> None:
    """G [C, V] with C V beyond 2^31 (a workspace of many GiB)."""
    c, v = 70_001, 33_000
    launch, live = _launch(c, 16, v), _live(c)
    g = huge(c, math.ceil(v / 32) * 32, math.ceil(v / 32) * 32, torch.float16)
    g[-1, -40:] = 1.0
    assert g.numel() > 2**31
    with ts.checked_addresses(), last_program_only():
        launch_it(launch, live, g)


def test_g_beyond_two_to_the_31_as_an_operand() -> None:
    part = torch.full((1, 70_001, 16), float("nan"))

    def hidden(launch: Any, live: rows.LiveRows, g: torch.Tensor) -> None:
        head = launch.head
        object.__setattr__(head, "weight", torch.ones(33_000, 16).half())
        hidden_product.launch_hidden_product(launch, live, g[:, :33_024], part, 0, 32_960, 40, add=False)

    check_g(hidden)
    assert not part[0, -1].isnan().any()


def test_compact_g_beyond_two_to_the_31() -> None:
    """The last row of G: its second word is kept, the first and the third are pooled."""
    c, columns, ld = 70_001, 3, 33_000
    live, g = _live(c), huge(c, ld, ld, torch.float16)
    g[-1, :3] = torch.tensor([1.0, 2.0, 3.0])
    place, number = torch.tensor([-1, 0, -1], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with ts.checked_addresses(), last_program_only():
        tail.compact_columns_kernel[(c,)](
            g, None, place, number, None, None, live.index, live.count, 0, columns, 32_000, ld,
            FIRST=True, REPORT=False, BLOCK=tail.TAIL_BLOCK, STEP=tail.COMPACT_WORDS, DEPTH=16,
        )  # fmt: skip
    assert g[-1, :16].tolist() == [2.0] + [0.0] * 15
    assert g[-1, 32_000:32_016].tolist() == [4.0] + [0.0] * 15


def test_spread_tail_beyond_two_to_the_31() -> None:
    """The last rows of a dW [V, H] of 2^32 elements and more."""
    v, h = 4_200_001, 1025
    dw, share, sums = huge(v, h, h, torch.float16), torch.full((v,), -1.0), torch.zeros(math.ceil(v / 256), h)
    dw[-1, -1], share[-1], sums[-1, -1] = 0.5, 0.25, 2.0
    none = torch.empty(0)
    buffers = tail.Tail(0.01, v, None, none, none, share, none, none, none, none, none, sums)
    with ts.checked_addresses(), last_program_only():
        tail.launch_spread_tail(buffers, dw, add=True)
    assert dw[-1, -1] == 1.0


def test_kept_logits_beyond_two_to_the_31() -> None:
    """A dW of more than 2^31 elements holds them: parts 2^27 elements apart, kept and turned into G."""
    inputs = ts.make(Problem("far-kept", n=20, h=16, v=320, ignored=0.0), torch.float16)
    truth, labels, stride, n = ts.plain(inputs), inputs.labels, 1 << 27, 20
    assert 19 * stride > 2**31
    launch = prepare(inputs.head)
    q = torch.empty(19 * stride + 16 * n, dtype=torch.float16).as_strided((20, n, 16), (stride, 16, 1))
    part_max = torch.empty(19 * stride + n).as_strided((20, n), (stride, 1))
    store = kept.Store(q, part_max, torch.empty(n))
    logp, lse, g = torch.empty(n), torch.empty(n), torch.full((n, 320), float("nan"), dtype=torch.float16)
    with ts.checked_addresses():
        live = rows.find_live_rows(labels, None, skip_zero=False, gain=False, cleared=(logp, lse))
        part_sum = torch.empty(20, n)
        softmax_tile.launch_softmax_tile(launch, live, q, part_max, part_sum, 0)
        logprob.launch_merge(launch, labels, live, part_max, part_sum, logp, lse, 0, store.target)
        _, expected = ts.backend().logprob(inputs.head, labels)
        live, found = kept.find_kept_rows(launch, (store,), labels, labels, expected, inputs.c)
        kept.launch_kept_gradient(launch, labels, expected, inputs.c, live, found, g, torch.empty(0), 0, 320)
    there = int(live.kept)
    z = inputs.head.hidden.double() @ inputs.head.weight.double().T
    exact = torch.nn.functional.one_hot(labels, 320) - (z - truth.lse[:, None]).exp()
    exact = (exact * inputs.c[:, None])[inputs.live]
    error = (g[:there].double() / live.gain - exact).abs()
    assert (error <= 2.0**-9 * exact.abs() + 1e-7).all()


def test_g_beyond_two_to_the_31_as_a_result() -> None:
    c = 70_001

    def gradient(launch: Any, live: rows.LiveRows, g: torch.Tensor) -> None:
        object.__setattr__(launch.head, "weight", torch.zeros(33_000, 16).half())
        object.__setattr__(launch.head, "hidden", torch.zeros(c, 16).half())
        g[-1] = float("nan")
        labels, vector = torch.zeros(c, dtype=torch.int64), torch.ones(c)
        none = torch.empty(0)
        gradient_tile.launch_gradient_tile(launch, labels, vector, vector, live, g, none, 0, 0, 33_000)
        assert not g[-1, -32:].isnan().any()

    check_g(gradient)
