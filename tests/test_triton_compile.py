"""Kernels compile for every target and pass the gates of `benchmarks.gpu.kernel_report`; nothing is read back."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import triton_support as ts

# isort: split
# Triton is imported by the module above.

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gpu import kernel_report, offline
from benchmarks.gpu.machine_code import issued_in
from infopo_kernels.backends.base import Gradients, Head, TailReport, Wanted
from infopo_kernels.backends.triton.kernels.logprob import logprob_chunk, slices_of
from infopo_kernels.backends.triton.launch import Launch, prepare, target_for
from infopo_kernels.backends.triton.tiles import TARGETS
from infopo_kernels.backends.triton.workspace import (
    kept_chunk,
    plan_pieces,
    plan_tile,
    size_of,
    sums_chunk,
    tile_layouts,
)

ROOT = Path(__file__).parents[1]


def test_sample_of_kernels_passes_the_gates() -> None:
    """`kernel_report.SAMPLE_RULE` says which; `make kernels` compiles them all."""
    rows = kernel_report.compile_all(kernel_report.SAMPLE_TARGETS, sample=True)
    assert {row.target for row in rows} == set(kernel_report.SAMPLE_TARGETS)
    assert {row.kernel for row in rows} >= {*kernel_report.PRODUCT_KERNELS, "kept_rows_kernel", "kept_gradient_kernel"}
    kept = [row for row in rows if row.kernel == "kept_gradient_kernel" and row.shape.h % 16 == 0]
    assert all(row.wide for row in kept), "kept logits move 16 bytes at a time"
    assigned = [row for row in rows if row.kernel == "weight_product_kernel" and row.constants["ADD"] is False]
    assert {row.target for row in assigned} == set(kernel_report.SAMPLE_TARGETS)
    failures = [str(row) for row in rows if row.failures()]
    assert not failures, "\n".join(failures)
    assert "| logprob | bfloat16 |" in kernel_report.markdown(rows)


def test_gates_can_fail() -> None:
    good = kernel_report.Row(
        registers=200, stack=0, spills=0, shared=1000, occupancy=1, tensor="HGMMA 4", wide=30, target="sm_90",
        kernel="logprob_kernel", shape=offline.Shape(1, 64, 1, torch.bfloat16, False), constants={}, warps=8, stages=3,
    )  # fmt: skip
    assert good.failures() == []
    for change, said in (
        ({"spills": 3}, "3 spills"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared": 300_000}, "300000 bytes of shared memory"),
        ({"tensor": "HMMA 64"}, "no HGMMA"),
        ({"wide": 0}, "no 16-byte access"),
    ):
        assert said in dataclasses.replace(good, **change).failures()[0]


SASS = """
.text.some_kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
.L_x_0:
        /*0020*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0030*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
        /*0040*/              @!P0 BRA `(.L_x_0) ;
        /*0050*/                   ISETP.GE.AND P1, PT, R0, R2, PT ;
        /*0060*/                   BRA.U !UP0, `(.L_x_1) ;
        /*0070*/                   MUFU.EX2 R4, R4 ;
        /*0080*/                   FSEL R4, R4, RZ, P1 ;
        /*0090*/                   FADD R5, R5, R4 ;
        /*00a0*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*00b0*/                   MUFU.EX2 R4, R4 ;
        /*00c0*/                   FADD R5, R5, R4 ;
.L_x_2:
        /*00d0*/                   STG.E desc[UR4][R2.64], R5 ;
        /*00e0*/                   EXIT ;
"""


def test_instructions_of_a_step_and_behind_a_tile() -> None:
    """A loop of 3, then a masked block of 4 and one of 2; neither the first product nor what follows both is taken."""
    found = issued_in(SASS)
    assert (found.step, found.least, found.most) == (3, 2, 4)


def test_backend_never_needs_a_value_on_the_host() -> None:
    """Tensors on the meta device have no values. The whole host side runs on them, so it never waits for the device."""
    code = (
        "from benchmarks.gpu import offline\n"
        "from infopo_kernels.backends.triton.tiles import TARGETS\n"
        "import torch\n"
        "with offline.recorded(TARGETS['sm_90']) as launches:\n"
        "    offline.run(offline.Shape(5000, 512, 40000, torch.float16, True))\n"
        "print(len(launches))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=_without_interpreter()
    )
    assert int(done.stdout) > 50


@pytest.mark.parametrize("shape", ["20_000_000, 1, 2", "3, 8, 4_000_000", "1, 60_000, 3", "300_000, 4096, 262144"])
def test_grids_are_within_limits(shape: str) -> None:
    """CUDA takes 2^31 - 1 programs along x and 65535 along y."""
    code = (
        "from benchmarks.gpu import offline\n"
        "from infopo_kernels.backends.triton.tiles import TARGETS\n"
        "import torch\n"
        "with offline.recorded(TARGETS['sm_90']) as launches:\n"
        f"    offline.run(offline.Shape({shape}, torch.float16, True))\n"
        "grids = [x.grid for x in launches if x.grid]  # products of the library have none\n"
        "print(max(x[0] for x in grids), max(max((*x[1:], 1)) for x in grids))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=_without_interpreter()
    )
    along_x, along_y = map(int, done.stdout.split())
    assert along_x < 2**31
    assert along_y <= 65_535


def _without_interpreter() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}


def test_devices_find_their_row() -> None:
    assert target_for("cuda", 80).name == "sm_80"
    assert target_for("cuda", 87).name == "sm_86"
    assert target_for("cuda", 103).name == "sm_100"
    assert target_for("hip", "gfx942:sramecc+:xnack-").name == "gfx942"
    with pytest.raises(KeyError):
        target_for("cuda", 75)


@pytest.mark.parametrize(("h", "gap", "aligned"), [(64, 0, True), (64, 16, True), (60, 4, False), (64, 3, False)])
def test_rows_that_are_not_aligned_take_tiles_of_their_own(h: int, gap: int, aligned: bool) -> None:
    """The tiles of the table spill registers if every element is loaded separately."""
    row = TARGETS["sm_90"]
    with offline.recorded(row):
        hidden, weight = (torch.empty(n, h + gap, dtype=torch.float16, device="meta")[:, :h] for n in (5, 7))
        tiles = prepare(Head(hidden, weight, None, None, 1.0, ts.WORKSPACE)).tiles
    assert tiles == (row.half if aligned else row.half_unaligned)


def a_launch(target: str, n: int, h: int, v: int, dtype: torch.dtype, workspace: int, threshold: float = 0.0) -> Launch:
    """As `prepare` makes it, without a device."""
    with offline.recorded(TARGETS[target]):
        hidden, weight = torch.empty(n, h, dtype=dtype, device="meta"), torch.empty(v, h, dtype=dtype, device="meta")
        return prepare(Head(hidden, weight, None, None, 1.0, workspace, threshold))


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(sorted(TARGETS)),
    st.integers(1, 200_000),
    st.integers(1, 9000),
    st.integers(1, 300_000),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.sampled_from([8, 32, 256, 2048]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_plans_fit_any_shape(
    target: str, n: int, h: int, v: int, dtype: torch.dtype, mib: int, bias: bool, frozen: bool, tail: bool
) -> None:
    """Every plan stays within the workspace and covers the rows; grids stay below 2^31 programs."""
    launch = a_launch(target, n, h, v, dtype, mib << 20, 2.0**-13 if tail else 0.0)
    some = torch.empty(1, device="meta")
    report = TailReport(some, some) if tail else None
    gradients = Gradients(some, None if frozen else some, some if bias else None, report)
    slices, slice_tiles = slices_of(launch.sizes)
    assert 0 <= slices * slice_tiles * launch.tiles.logits.columns - v < slice_tiles * launch.tiles.logits.columns
    rows = logprob_chunk(launch.sizes)
    gathered = size_of(launch.sizes.gathered(rows)) if launch.sizes.descriptors else 0
    assert 1 <= rows <= n
    assert 8 * slices * rows + gathered <= max(8 * rows, mib << 20)
    plan = plan_tile(launch.sizes, Wanted.of(gradients))
    if plan is not None:
        own, shared = tile_layouts(launch.sizes, plan.rows, plan.slices, Wanted.of(gradients))
        assert sum(map(size_of, own)) + max(map(size_of, shared)) <= mib << 20
        assert plan.rows * v * dtype.itemsize <= mib << 20
    pieces = plan_pieces(launch.sizes, Wanted(hidden=True, weight=not frozen, bias=bias, report=tail))
    assert 1 <= pieces.rows <= n
    assert pieces.columns % (256 if tail else launch.tiles.logits.columns) == 0
    assert pieces.rows * (pieces.columns * dtype.itemsize * (2 if tail else 1) + 4 * h) <= mib << 20
    assert sum(map(size_of, pieces.layouts)) <= mib << 20


def test_the_peers_shape_takes_few_passes() -> None:
    """8192 x 4096 x 151936 in bfloat16 within 256 MiB on an H100: chunks wide enough that dW's passes stay hidden."""
    launch = a_launch("sm_90", 8192, 4096, 151936, torch.bfloat16, ts.WORKSPACE)
    plan = plan_tile(launch.sizes, Wanted(hidden=True, weight=True, bias=False))
    assert plan is not None
    assert plan.rows >= 640
    pieces = plan_pieces(launch.sizes, Wanted(hidden=True, weight=True, bias=False))
    assert pieces.rows == 8192, "a 16-bit dW of these rows is formed in one go"


KEPT_IN_16_BIT = 2 * 151936 * 4096 // (151936 // 64 * (64 * 2 + 4) + 4) // 16 * 16
"""Rows of the peer's shape whose logits a 16-bit dW holds."""


KEPT_BESIDE = 2176
"""And those that 1024 MiB hold beside it, with sums of dX, gathered rows, and pieces of G of sqrt(870 V) columns."""


def test_a_weight_gradient_keeps_the_rows_that_its_memory_and_the_workspace_hold() -> None:
    from infopo_kernels.backends.triton.gradients import kept_rows

    def most(n: int, h: int, v: int, dtype: torch.dtype, mib: int = 256) -> int:
        launch = a_launch("sm_90", n, h, v, torch.bfloat16, mib << 20)
        return kept_rows(launch, torch.empty(v, h, dtype=dtype, device="meta"))

    half, single = torch.bfloat16, torch.float32
    assert most(8192, 4096, 151936, half) == KEPT_IN_16_BIT
    assert most(8192, 4096, 151936, single) == 4 * 151936 * 4096 // (151936 // 64 * (64 * 2 + 4) + 4) // 16 * 16
    assert most(1 << 20, 8192, 151936, half) == 0, "a 16-bit dW would be rounded twice"
    assert 4000 < most(1 << 20, 8192, 151936, single) < 8192, "the workspace has no room for more sums of dX"
    assert most(1 << 20, 8192, 151936, single, mib=1024) > 15_000
    assert most(1 << 20, 64, 151936, single) == 0, "less than a block of rows"


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(sorted(TARGETS)),
    st.integers(1, 200_000),
    st.integers(1, 9000),
    st.integers(1, 300_000),
    st.sampled_from(
        [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)]
    ),
    st.sampled_from([1, 8, 256, 2048]),
)
def test_kept_rows_fit_any_shape(
    target: str, n: int, h: int, v: int, types: tuple[torch.dtype, torch.dtype], mib: int
) -> None:
    """All kept rows are in the first chunk, for all wanted gradients; a 16-bit dW has only one chunk."""
    from infopo_kernels.backends.triton.gradients import kept_rows, memory_for_logits
    from infopo_kernels.backends.triton.kernels.kept import stores_in

    launch, limit = a_launch(target, n, h, v, types[0], mib << 20), mib << 20
    dw = torch.empty(v, h, dtype=types[1], device="meta")
    most = kept_rows(launch, dw)
    if most == 0:
        return
    assert most >= min(n, launch.tiles.logits.rows)
    beside = memory_for_logits(launch, dw, min(most, n))
    if beside is not None:
        limit -= beside.nbytes
        launch = a_launch(target, n, h, v, types[0], limit)
    places = sum(len(store.target) for store in stores_in(launch, (dw, beside)))
    assert places >= min(most, n)
    rows = kept_chunk(launch.sizes, places)
    assert min(most, n) <= rows <= n
    assert types[1] == torch.float32 or rows == n
    block, size = launch.tiles.logits, types[0].itemsize
    assert 4 * -(-v // block.part) * min(most, sums_chunk(launch.sizes)) <= limit
    for hidden in (True, False):
        pieces = plan_pieces(launch.sizes, Wanted(hidden=hidden, weight=True, bias=False), rows=rows)
        assert pieces.columns >= block.columns
        sums = 4 * h * pieces.slices if hidden else 0
        assert rows * (pieces.columns * size + sums + h * size) <= limit


def test_the_model_counts_the_products_that_are_promised() -> None:
    """Operations, counted from the arguments of the launches, are 2 N V H for a product."""
    code = (
        "import json, benchmarks.gpu.roofline as r\n"
        "h100 = r.DEVICES[1]; shape = (8192, 4096, 151936); out = {}\n"
        "for work in r.WORK:\n"
        "    p = r.predict(h100, r.calls(work, h100, *shape))\n"
        "    out[work.name] = p.cost.operations / (2 * 8192 * 4096 * 151936)\n"
        "print(json.dumps(out))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env=_without_interpreter(),
    )
    assert json.loads(done.stdout) == pytest.approx(
        {
            "default setting, every weight live": 4 - KEPT_IN_16_BIT / 8192,
            "default setting, rejected weights underflowed": 2.5 - KEPT_IN_16_BIT / 8192,
            "frozen head": 2,
            "no gradient (reference, evaluation)": 1,
            "workspace_mib=1024, every weight live": 4 - (KEPT_IN_16_BIT + KEPT_BESIDE) / 8192,
            "workspace_mib=1640: every row's logits are kept": 3,
        }
    )


LAUNCHES = """
import json
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import offline
from infopo_kernels import schedule
from infopo_kernels.backends.base import Head, Wanted
from infopo_kernels.backends.triton import TritonBackend
from infopo_kernels.backends.triton.tiles import TARGETS
from infopo_kernels.objectives import InfoPO, Sequences
from infopo_kernels.options import WORKSPACE_MIB_GPU
from infopo_kernels.packing import Rows


def empty(*size, dtype=torch.bfloat16):
    return torch.empty(size, dtype=dtype, device="meta")


class Filled(TorchDispatchMode):
    small = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        free = name.startswith(("empty", "new_empty", "addmm")) or func.is_view
        self.small.update([] if free else [name])
        return func(*args, **(kwargs or {}))


n, h, v, s, out = 256, 576, 49152, 4, {}
head = Head(empty(n, h), empty(v, h), None, None, 1.0, WORKSPACE_MIB_GPU << 20)
rows = Rows(head.hidden, empty(n, dtype=torch.int64), empty(s + 1, dtype=torch.int32), None)
vectors = [empty(s, dtype=dtype) for dtype in (torch.int64, torch.bool, torch.float64)]
for target in ("sm_80", "sm_90"):
    Filled.small.clear()
    with offline.recorded(TARGETS[target]) as launches, Filled():
        wanted = Wanted(hidden=True, weight=True, bias=False)
        schedule.preference(TritonBackend(), head, rows, Sequences(*vectors, 2.0, None), InfoPO(), wanted)
    out[target] = [[launched.name for launched in launches], Filled.small]
print(json.dumps(out))
"""


def test_a_step_of_a_small_head_is_a_dozen_launches() -> None:
    """256 rows of SmolLM2's head, all of whose logits dW keeps: as docs/gpu.md says, beside 2 fills of PyTorch."""
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES], check=True, capture_output=True, text=True, env=_without_interpreter()
    )
    found = json.loads(done.stdout)
    for target, expected in (("sm_80", 12), ("sm_90", 13)):  # descriptors want the rows of logits gathered
        kernels, small = found[target]
        assert len(kernels) == expected, kernels
        assert sum(small.values()) == 2, small


def test_the_docs_show_what_the_model_says() -> None:
    """And what it says is within 4 % of the record of an H100."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "roofline"],
        check=True, capture_output=True, text=True, env=_without_interpreter(),
    )  # fmt: skip
    shown = (Path(__file__).parents[1] / "docs" / "gpu.md").read_text()
    missing = [line for line in done.stdout.splitlines() if line.startswith("|") and line not in shown]
    assert not missing, "run `python -m benchmarks roofline` and put its tables into docs/gpu.md"
    differences = [float(line.split("|")[-2].strip(" %")) for line in done.stdout.splitlines() if line.endswith("% |")]
    assert len(differences) == 6
    assert max(map(abs, differences)) < 4
