"""Features of the C++ kernels alone: instruction sets, threads, schedules chosen by size, a bound on memory."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from infopo_kernels.backends.base import Gradients, Head, with_memory_for_logits
from infopo_kernels.backends.cpp import CppBackend, isa
from infopo_kernels.options import IGNORE_INDEX
from tests import primitives, support
from tests.budget import HALF_STEP, Budget, accumulated, assert_within, error_budget, kept_rounding, operand_rounding
from tests.primitives import Plain

BACKEND = CppBackend()
REASON = BACKEND.unsupported_reason(torch.device("cpu"), torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = ["avx512_bf16", "amx"]
"""Instruction sets that multiply pairs of bfloat16; they take no other type."""
KERNELS = [
    *itertools.product(["portable", "avx2", "avx512"], DTYPES),
    *((name, torch.bfloat16) for name in PAIRS),
]
MIB = 1 << 20
BEFORE = 1 / 16
"""Initial content of buffers that a kernel adds to. It is small, so that rounding of the sum hides little."""


def force_isa(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    support.use_backend(f"cpp-{name}", monkeypatch)
    assert isa(torch.bfloat16) == name


class Problem:
    """Inputs, and their l, lse, dX, dW, db by plain PyTorch in float64."""

    def __init__(
        self,
        N: int,
        H: int,
        V: int,
        dtype: torch.dtype,
        softcap: float | None = None,
        scale: float = 1.0,
        bias: bool = True,
        workspace: int = 32 * MIB,
        size: float = 1.0,
        offset: float = 0.0,
    ) -> None:
        """`size` is a factor of the logits; `offset` is added to all of them."""
        generator = torch.Generator().manual_seed(N * 1009 + H * 31 + V)
        normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.labels = torch.randint(V, (N,), generator=generator)
        self.labels[torch.rand(N, generator=generator) < 0.3] = IGNORE_INDEX
        self.labels[-1] = V - 1
        self.c = normal(N)
        self.c[torch.rand(N, generator=generator) < 0.2] = 0
        self.c[-1] = 0.5
        self.head = Head(
            normal(N, H).to(dtype),
            (normal(V, H) * 2 * size / H**0.5).to(dtype),
            (normal(V) + offset).to(dtype) if bias else None,
            softcap,
            scale,
            workspace,
        )
        self.truth, self.before = self.plain(), {"weight": 0.0, "bias": 0.0}

    def plain(self) -> Plain:
        self.allowed: dict[tuple[float, float], Budget] = {}
        return primitives.plain(self.head, self.labels, self.c)

    def run(
        self, known: bool, wanted: tuple[str, ...], weight_dtype: torch.dtype, keep: int | None = None
    ) -> dict[str, Tensor]:
        """Run one primitive. Buffers that it assigns are poisoned; buffers that it adds to hold BEFORE.

        With `keep` the logits of that many scored rows stay in the memory of dW: every second row from the end.
        """
        head = self.head
        gradients = Gradients(
            torch.full_like(head.hidden, torch.nan) if "hidden" in wanted else None,
            torch.full_like(head.weight, BEFORE, dtype=weight_dtype) if "weight" in wanted else None,
            torch.full((len(head.weight),), BEFORE) if "bias" in wanted else None,
        )
        scored = self.labels != IGNORE_INDEX
        if known:
            l, lse = BACKEND.logprob_and_grad(head, self.labels, self.c, gradients)  # noqa: E741
            touched = scored
        else:
            l, lse = BACKEND.logprob(head, self.labels)  # noqa: E741
            touched = scored & (self.c != 0)
            kept = None
            if keep is not None:
                assert gradients.weight is not None
                gradients.weight.fill_(torch.nan)
                rows = scored.nonzero().flip(0)[:, 0]
                rows = torch.cat([rows[::2], rows[1::2]])[:keep]
                kept = torch.full_like(self.labels, IGNORE_INDEX).index_copy(0, rows, self.labels[rows])
                head, gradients = with_memory_for_logits(BACKEND, head, gradients, keep)
                again = BACKEND.logprob(head, kept, gradients)
                torch.testing.assert_close(again[0][rows], l[rows])
                torch.testing.assert_close(again[1][rows], lse[rows])
            BACKEND.backward(head, self.labels, lse, self.c, gradients, kept)
        result = {"l": l, "lse": lse}
        self.kept = kept_rounding("cpp", head.hidden.dtype) if keep else 0.0
        self.before = {"weight": BEFORE if keep is None else 0.0, "bias": BEFORE}
        if gradients.hidden is not None:
            assert gradients.hidden[~touched].isnan().all(), "rows that take no part must not be written"
            result["hidden"] = gradients.hidden.nan_to_num(0) if touched.any() else gradients.hidden
            assert gradients.hidden[touched].isfinite().all()
        if gradients.weight is not None:
            result["weight"] = gradients.weight
        if gradients.bias is not None:
            result["bias"] = gradients.bias
        return result

    def assert_right(self, got: dict[str, Tensor]) -> None:
        """Each result is within the budget of the instruction set in use."""
        operand = operand_rounding("cpp", self.head.hidden.dtype)
        key = operand, self.kept
        if key not in self.allowed:
            self.allowed[key] = error_budget(self.head, self.labels, self.c, operand=operand, kept=self.kept)
        allowed = self.allowed[key]
        added = accumulated(len(self.labels), HALF_STEP[torch.float32])  # a chunk of rows after the other
        for name, value in got.items():
            truth, limit = getattr(self.truth, name), getattr(allowed, name)
            if name in self.before:
                truth, limit = truth + self.before[name], limit + added * self.before[name]
            assert_within(name, value, truth, limit)


WANTED = [("hidden", "weight", "bias"), ("hidden",), ("weight",), ("bias",), ("hidden", "bias")]
SIZES = {
    "one-unit": {"N": 5, "H": 1, "V": 7},
    "edges": {"N": 70, "H": 83, "V": 397},
    "softcap-scale": {"N": 37, "H": 64, "V": 500, "softcap": 3.0, "scale": 0.5},
    "softcap-negative-scale": {"N": 37, "H": 31, "V": 300, "softcap": 2.0, "scale": -0.8},
    "many-chunks": {"N": 700, "H": 48, "V": 1500, "workspace": MIB},
    "many-blocks": {"N": 40, "H": 48, "V": 9000, "workspace": MIB},
    "page-stride": {"N": 40, "H": 1024, "V": 300},
}


@pytest.mark.parametrize("known", [True, False], ids=["weights-known", "lse-known"])
@pytest.mark.parametrize(("name", "dtype"), KERNELS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_every_instruction_set_and_schedule(
    size: str, name: str, dtype: torch.dtype, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_isa(name, monkeypatch)
    problem = Problem(dtype=dtype, **SIZES[size])  # type: ignore[arg-type]
    for wanted, weight_dtype in itertools.product(WANTED, {dtype, torch.float32}):
        problem.assert_right(problem.run(known, wanted, weight_dtype))


KEPT_SIZES = {
    "one-chunk": {"N": 90, "H": 96, "V": 397},
    "softcap-scale": {"N": 120, "H": 130, "V": 301, "softcap": 3.0, "scale": 0.5},
    "small-workspace": {"N": 700, "H": 256, "V": 1500, "workspace": MIB},
    "several-chunks": {"N": 760, "H": 520, "V": 200},
    "differences-beyond-float16": {"N": 90, "H": 96, "V": 397, "size": 1e9},
    "differences-beyond-float32": {"N": 90, "H": 96, "V": 397, "size": 1e15},
    "softcap-beyond-float16": {"N": 90, "H": 96, "V": 397, "size": 1e5, "softcap": 1e5, "scale": -0.7},
    "far-from-zero": {"N": 90, "H": 96, "V": 397, "offset": -3e4},
}


@pytest.mark.parametrize("keep", [0, 50, None])
@pytest.mark.parametrize(("name", "dtype"), KERNELS, ids=str)
@pytest.mark.parametrize("size", KEPT_SIZES)
def test_logits_kept_in_the_memory_of_the_weight_gradient(
    size: str, name: str, dtype: torch.dtype, keep: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows are kept, some, or as many as fit. Some have weight 0, which does not affect the others."""
    if dtype == torch.float16 and KEPT_SIZES[size].get("size", 1) > 1:
        pytest.skip("float16 does not hold such weights")
    force_isa(name, monkeypatch)
    problem = Problem(dtype=dtype, **KEPT_SIZES[size])  # type: ignore[arg-type]
    for wanted, weight_dtype in itertools.product((WANTED[0], ("weight",)), {dtype, torch.float32}):
        fit = BACKEND.kept_rows(problem.head, torch.empty_like(problem.head.weight, dtype=weight_dtype))
        if keep is not None and keep > fit:
            continue
        problem.assert_right(problem.run(False, wanted, weight_dtype, fit if keep is None else keep))


@pytest.mark.parametrize(("name", "dtype"), [k for k in KERNELS if k[0] in PAIRS], ids=str)
def test_the_workspace_keeps_the_rows_that_the_weight_gradient_does_not(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16-bit logits: H rows in the memory of a bfloat16 dW, the others beside it; also where some are not live."""
    force_isa(name, monkeypatch)
    for size in ({"N": 300, "H": 96, "V": 397}, {"N": 300, "H": 96, "V": 1000, "softcap": 3.0, "scale": -0.5}):
        problem = Problem(dtype=dtype, workspace=4 * MIB, **size)  # type: ignore[arg-type]
        dW = torch.empty_like(problem.head.weight)
        assert BACKEND.kept_rows(problem.head, dW) > 300
        head, gradients = with_memory_for_logits(BACKEND, problem.head, Gradients(None, dW, None), 300)
        assert gradients.logits is not None
        groups = -(-len(dW) // 96)
        references = 2 * groups  # a float32 number is two of 16 bits
        assert gradients.logits.numel() == references * 300 + len(dW) * (300 - 96)
        assert head.workspace_bytes == problem.head.workspace_bytes - gradients.logits.nbytes
        for keep in (90, 97, 250, 300):
            problem.assert_right(problem.run(False, ("hidden", "weight", "bias"), dtype, keep))


def test_a_small_workspace_keeps_only_what_leaves_room_for_the_products() -> None:
    """References of 16-bit logits lie in the workspace, half of which stays free."""
    if isa(torch.bfloat16) not in PAIRS:
        pytest.skip("products take float32 here, and logits are kept as float32")
    problem = Problem(100, 96, 397, torch.bfloat16, workspace=MIB)
    head, dW = problem.head, torch.empty_like(problem.head.weight)
    rows = BACKEND.kept_rows(head, dW)
    assert rows > 96
    memory = BACKEND.memory_for_logits(head, dW, rows)
    assert memory is not None
    assert memory.nbytes <= head.workspace_bytes // 2
    tiny = replace(head, workspace_bytes=3 * len(head.hidden) * 96 * 4)
    assert BACKEND.kept_rows(tiny, dW) == 0, "sums of dX need it all"


def test_kept_logits_leave_no_trace_where_nothing_is_added() -> None:
    problem = Problem(90, 96, 397, torch.float32)
    head, dW = problem.head, torch.full((397, 96), torch.nan)
    kept = torch.where(torch.arange(90) < 60, problem.labels, IGNORE_INDEX)
    _, lse = BACKEND.logprob(head, kept, Gradients(None, dW, None))
    assert dW.isfinite().any(), "the logits are in its memory"
    BACKEND.backward(head, kept, lse, torch.zeros(90), Gradients(None, dW, None), kept)
    assert torch.equal(dW, torch.zeros_like(dW))


def test_no_row_at_all_leaves_a_weight_gradient_of_zeros() -> None:
    """With `kept` dW is assigned, even if `kept` is empty and its pointer is null."""
    head = Head(torch.zeros(0, 96), torch.ones(5, 96), None, None, 1.0, MIB)
    none, dW = torch.zeros(0, dtype=torch.int64), torch.full((5, 96), torch.nan)
    _, lse = BACKEND.logprob(head, none, Gradients(None, dW, None))
    BACKEND.backward(head, none, lse, torch.zeros(0), Gradients(None, dW, None), none)
    assert torch.equal(dW, torch.zeros_like(dW))


def test_no_more_rows_are_kept_than_fit() -> None:
    problem = Problem(900, 64, 20, torch.float32)
    dW, lse = torch.zeros(20, 64), torch.zeros(900)
    fit = BACKEND.kept_rows(problem.head, dW)
    assert fit == 64
    with pytest.raises(ValueError, match=f"at most {fit} rows"):
        BACKEND.logprob(problem.head, problem.labels, Gradients(None, dW, None))
    with pytest.raises(ValueError, match=f"at most {fit} rows"):
        BACKEND.backward(problem.head, problem.labels, lse, problem.c, Gradients(None, dW, None), problem.labels)
    assert BACKEND.kept_rows(problem.head, torch.zeros(20, 63)) == 0, "too few to pay"
    odd = torch.zeros(20, 301, dtype=torch.bfloat16)
    assert BACKEND.kept_rows(problem.head, odd) == 0, "floats would lie across rows"


def test_strided_inputs() -> None:
    problem = Problem(50, 40, 300, torch.bfloat16)
    head = problem.head
    wide_x, wide_w = torch.full((50, 57), torch.nan).bfloat16(), torch.full((300, 45), torch.nan).bfloat16()
    wide_x[:, 3:43], wide_w[:, 2:42] = head.hidden, head.weight
    problem.head = Head(wide_x[:, 3:43], wide_w[:, 2:42], head.bias, None, 1.0, head.workspace_bytes)
    problem.assert_right(problem.run(True, ("weight",), torch.float32))
    l, lse = BACKEND.logprob(problem.head, problem.labels)  # noqa: E741
    problem.assert_right({"l": l, "lse": lse})


def test_running_reference_follows_a_late_maximum() -> None:
    """The largest logit of each row is in the last block, far above all others: the earlier sums must shrink to 0."""
    problem = Problem(20, 32, 6000, torch.float32, bias=False, workspace=MIB)
    problem.head.weight[-1] = 40 * problem.head.hidden.sum(0) / problem.head.hidden.norm()
    problem.head.weight[2500:2600] *= 8
    problem.truth = problem.plain()
    problem.assert_right(problem.run(True, ("hidden",), torch.float32))


def test_bias_of_minus_infinity_masks_an_entry() -> None:
    problem = Problem(20, 16, 100, torch.float32)
    assert problem.head.bias is not None
    problem.head.bias[3:40] = -torch.inf
    problem.labels[problem.labels != IGNORE_INDEX] = 50
    problem.truth = problem.plain()
    for known in (True, False):
        problem.assert_right(problem.run(known, ("hidden", "weight", "bias"), torch.float32))
    problem.assert_right(problem.run(True, ("hidden",), torch.float32))


@pytest.mark.parametrize("label", [100, 10**12, -1, -(10**12)])
def test_label_outside_the_vocabulary_is_nan_and_reads_nothing(label: int) -> None:
    problem = Problem(20, 16, 100, torch.float32)
    problem.labels[4] = label
    gradients = Gradients(torch.zeros(20, 16), torch.zeros(100, 16), torch.zeros(100))
    for l in (  # noqa: E741
        BACKEND.logprob(problem.head, problem.labels)[0],
        BACKEND.logprob_and_grad(problem.head, problem.labels, problem.c, gradients)[0],
        BACKEND.logprob_and_grad(problem.head, problem.labels, problem.c, Gradients(gradients.hidden, None, None))[0],
    ):
        assert l[4].isnan()
        assert l.isfinite().sum() == len(l) - 1


def test_weight_of_nan_is_not_zero() -> None:
    problem = Problem(20, 16, 100, torch.float32)
    problem.labels[2], problem.c[2] = 7, torch.nan
    got = torch.zeros(20, 16)
    lse = BACKEND.logprob(problem.head, problem.labels)[1]
    BACKEND.backward(problem.head, problem.labels, lse, problem.c, Gradients(got, None, None))
    assert got[2].isnan().all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("known", [True, False])
def test_any_number_of_threads_and_bitwise_equal_runs(threads: int, known: bool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype, wanted in itertools.product((torch.float32, torch.bfloat16), (WANTED[0], WANTED[1])):
            problem = Problem(150, 80, 777, dtype, workspace=2 * MIB)
            first = problem.run(known, wanted, dtype)
            problem.assert_right(first)
            for _ in range(3):
                again = problem.run(known, wanted, dtype)
                for name in first:
                    assert torch.equal(first[name], again[name]), name
    finally:
        torch.set_num_threads(before)


PEAK = """
import sys, torch
from pathlib import Path
from infopo_kernels.backends.base import Gradients, Head
from infopo_kernels.backends.cpp import CppBackend

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

mib, known, wanted, dtype = int(sys.argv[1]), sys.argv[2] == "known", sys.argv[3], getattr(torch, sys.argv[4])
backend = CppBackend()
assert backend.unsupported_reason(torch.device("cpu"), dtype) is None

def call(N, V):
    x, w, y = torch.randn(N, 96).to(dtype), torch.randn(V, 96).to(dtype), torch.randint(V, (N,))
    head, c, lse = Head(x, w, None, None, 1.0, mib << 20), torch.rand(N), torch.full((N,), 9.0)
    to = Gradients(torch.ones_like(x) if "x" in wanted else None, torch.ones_like(w) if "w" in wanted else None, None)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    backend.logprob_and_grad(head, y, c, to) if known else backend.backward(head, y, lse, c, to)
    return resident("VmHWM") - before

call(8, 64)
print(call(3000, 40000))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize("mib", [4, 32])
@pytest.mark.parametrize(
    ("known", "wanted", "dtype"),
    [("known", "xw", "float32"), ("known", "x", "float32"), ("lse", "xw", "float32"), ("lse", "xw", "bfloat16")],
)
def test_memory_stays_within_the_workspace(mib: int, known: str, wanted: str, dtype: str) -> None:
    """Whole logits would take 458 MiB here. Half a MiB is left for vectors of length N and the allocator."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(mib), known, wanted, dtype],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert int(done.stdout) <= (mib << 20) + (1 << 19)


def test_workspace_too_small_for_one_row_says_so() -> None:
    problem = Problem(4, 16, 50, torch.float32, workspace=1024)
    with pytest.raises(ValueError, match="workspace_mib"):
        BACKEND.logprob(problem.head, problem.labels)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_serve_bfloat16_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force_isa(name, monkeypatch)
    assert isa(torch.float32) == isa(torch.float16) == "avx512"


@pytest.mark.parametrize("name", PAIRS)
def test_products_of_torch_on_the_same_thread_are_as_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both may use the tile registers, whose shape is the state of a thread."""
    force_isa(name, monkeypatch)
    problem, g = Problem(70, 96, 397, torch.bfloat16), torch.Generator().manual_seed(1)
    a, b = torch.randn(96, 160, generator=g).bfloat16(), torch.randn(160, 70, generator=g).bfloat16()
    before = a @ b
    problem.assert_right(problem.run(True, WANTED[0], torch.bfloat16))
    assert torch.equal(a @ b, before)
    problem.assert_right(problem.run(True, WANTED[0], torch.bfloat16))


def test_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFOPO_KERNELS_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match="INFOPO_KERNELS_CPU_ISA=sse9"):
        isa()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(50, 15)}, ValueError, "`weight` must be"),
        ({"weight": torch.zeros(50, 16).bfloat16()}, TypeError, "`weight` must have the type"),
        ({"hidden": torch.zeros(16, 4).T}, ValueError, "`hidden` must have stride 1"),
        ({"bias": torch.zeros(49)}, ValueError, "`bias` must be"),
        ({"labels": torch.zeros(4, dtype=torch.int32)}, TypeError, "`labels` must be"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError, "`labels` must be"),
    ],
)
def test_ops_keep_reads_in_bounds(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    arguments: dict[str, Tensor | None] = {
        "hidden": torch.zeros(4, 16),
        "weight": torch.zeros(50, 16),
        "bias": None,
        "labels": torch.zeros(4, dtype=torch.int64),
    }
    arguments |= change
    hidden, weight, bias, labels = arguments.values()
    assert hidden is not None
    assert weight is not None
    assert labels is not None
    with pytest.raises(error, match=f"^{message}"):
        BACKEND.logprob(Head(hidden, weight, bias, None, 1.0, MIB), labels)


def test_opcheck() -> None:
    problem = Problem(6, 8, 20, torch.float32)
    head, ops = problem.head, torch.ops.infopo_kernels_cpp
    common = (head.hidden, head.weight, head.bias, problem.labels)
    lse = ops.logprob(*common, None, None, None, 1.0, MIB)[1]
    buffers = (torch.zeros(6, 8), torch.zeros(20, 8), torch.zeros(20))
    torch.library.opcheck(ops.logprob.default, (*common, None, None, None, 1.0, MIB))
    for tail in ((None, None, 0.0), (torch.zeros(6), torch.zeros(2).double(), 0.01)):
        *report, threshold = tail
        torch.library.opcheck(
            ops.logprob_and_grad.default, (*common, problem.c, *buffers, *report, 3.0, 0.5, MIB, threshold)
        )
        torch.library.opcheck(
            ops.backward.default, (*common, lse, problem.c, *buffers, *report, None, None, None, 1.0, MIB, threshold)
        )


def column_dropped(head: Head, c: Tensor) -> tuple[Head, Tensor]:
    assert head.bias is not None
    return replace(head, bias=head.bias.clone().index_fill_(0, torch.tensor([5]), -torch.inf)), c


def scale_off_by_a_hundredth(head: Head, c: Tensor) -> tuple[Head, Tensor]:
    return replace(head, scale=head.scale * 1.01), c


def one_row_weighs_too_much(head: Head, c: Tensor) -> tuple[Head, Tensor]:
    return head, c * torch.where(torch.arange(len(c)) == len(c) - 1, 1.02, 1.0)


def all_rows_weigh_too_much(head: Head, c: Tensor) -> tuple[Head, Tensor]:
    return head, c * 1.01


def softcap_left_out(head: Head, c: Tensor) -> tuple[Head, Tensor]:
    return replace(head, softcap=None), c


FAULTS = [
    column_dropped,
    scale_off_by_a_hundredth,
    one_row_weighs_too_much,
    all_rows_weigh_too_much,
    softcap_left_out,
]


@pytest.mark.parametrize("known", [True, False], ids=["weights-known", "lse-known"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize(("name", "dtype"), KERNELS, ids=str)
def test_the_budget_has_no_room_for_faults(
    name: str, dtype: torch.dtype, fault: Callable[..., Any], known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients alone show each of these faults, in the type of the inputs; l would show more."""
    support.use_backend(f"cpp-{name}", monkeypatch)
    problem = Problem(70, 83, 397, dtype, softcap=4.0 if fault is softcap_left_out else None)
    right = problem.head, problem.c
    problem.head, problem.c = fault(*right)
    got = problem.run(known, ("hidden", "weight"), dtype)
    problem.head, problem.c = right
    with pytest.raises(AssertionError, match="times the budget"):
        problem.assert_right({name: got[name] for name in ("hidden", "weight")})
