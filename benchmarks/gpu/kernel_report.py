"""`python -m benchmarks kernels`: compile every GPU kernel for every target, without a GPU, and hold it to gates.

Gates: no register spills, no stack, shared memory within the target's limit, tensor cores in every product of 16-bit
inputs (HGMMA on sm_90, UTC*MMA on sm_100, HMMA or MFMA elsewhere), 16-byte accesses in every product of aligned inputs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import torch
import triton

from benchmarks import records, report
from benchmarks.gpu import offline
from benchmarks.gpu.machine_code import Usage, issued, usage
from benchmarks.measure.fresh import in_fresh_process
from infopo_kernels.backends.triton.tiles import TARGETS

PRODUCT_KERNELS: Final = (
    "logprob_kernel",
    "softmax_tile_kernel",
    "gradient_tile_kernel",
    "hidden_product_kernel",
    "weight_product_kernel",
)
"""Kernels with a matrix product."""

TENSOR_CORES: Final = {"sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "mfma", "gfx950": "mfma"}
"""What a product of 16-bit inputs must be made of; HMMA where not named."""

SAMPLE_RULE: Final = (
    "one hidden size and vocabulary (4096, 128256), 16384 rows, bfloat16 without logit options and float32 with "
    "them; both types with them, aligned to nothing; targets sm_80, sm_90, sm_100 and gfx942"
)
SAMPLE_TARGETS: Final = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Row(Usage):
    """One compiled kernel of the report: its machine code in numbers, and what it was compiled for."""

    target: str
    kernel: str
    shape: offline.Shape
    constants: dict[str, Any]
    warps: int
    stages: int

    @property
    def kind(self) -> str:
        """A product's input type; other kernels work on float32 whatever it is."""
        return str(self.shape.dtype).removeprefix("torch.") if self.kernel in PRODUCT_KERNELS else "all"

    def failures(self) -> list[str]:
        """The gates that this kernel does not pass."""
        target, failed = TARGETS[self.target], []
        if self.spills:
            failed.append(f"{self.spills} spills")
        if self.stack:
            failed.append(f"{self.stack} bytes of stack")
        if self.shared > target.shared_memory:
            failed.append(f"{self.shared} bytes of shared memory, {target.shared_memory} are there")
        if self.kernel in PRODUCT_KERNELS and self.shape.dtype != torch.float32:
            wanted = TENSOR_CORES.get(self.target, "HMMA")
            if wanted not in self.tensor:
                failed.append(f"no {wanted} in a product")
        if self.kernel in PRODUCT_KERNELS and self.shape.h % 16 == 0 and self.wide == 0:
            failed.append("no 16-byte access")
        return failed

    def __str__(self) -> str:
        shape, options = self.shape, " with logit options" if self.shape.options else ""
        size = f"{shape.dtype}{options} ({shape.n} x {shape.h} x {shape.v})"
        return f"{self.target} {self.kernel} {size} {self.constants}: {'; '.join(self.failures())}"


def _in_sample(shape: offline.Shape) -> bool:
    if shape.tf32:
        return False
    if (shape.n, shape.h, shape.v) == (16384, 4096, 128256):
        return (shape.dtype, shape.options) in ((torch.bfloat16, False), (torch.float32, True))
    return shape.h == 577 and shape.dtype != torch.float16 and shape.options


def compile_one(job: tuple[str, bool]) -> list[Row]:
    """Compile for a target (a sample or all); in a process of its own, because Triton's driver is replaced."""
    name, sample = job
    target = TARGETS[name]
    shapes = [shape for shape in offline.shapes(target) if not sample or _in_sample(shape)]
    return [
        Row(
            **vars(usage(kernel.compiled, target)),
            target=name,
            kernel=kernel.name,
            shape=kernel.shape,
            constants=dict(kernel.constants),
            warps=kernel.compiled.metadata.num_warps,
            stages=kernel.compiled.metadata.num_stages,
        )
        for kernel in offline.compiled(target, shapes)
    ]


def compile_all(targets: Iterable[str], sample: bool) -> list[Row]:
    """The rows of every target, compiled by as many processes as there are cores.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    return _in_processes(compile_one, [(target, sample) for target in targets])


def _in_processes(compiler: Callable[[tuple[str, bool]], list[Any]], jobs: Sequence[tuple[str, bool]]) -> list[Any]:
    """What `compiler` returns for each job, a target and a choice, one after the other."""

    def found_by(job: tuple[str, bool]) -> list[Any]:
        found = in_fresh_process(compiler, job, timeout=7200.0, environment={"TRITON_INTERPRET": "0"})
        if isinstance(found, dict):
            raise RuntimeError(f"compiling for {job[0]} failed:\n{found.get('traceback', found['failed'])}")
        return list(found)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [each for found in pool.map(found_by, jobs) for each in found]


LOGITS: Final = ("logprob_kernel", "softmax_tile_kernel", "gradient_tile_kernel")
WAYS: Final = (
    ("sm_80", False),
    ("sm_90", False),
    ("sm_90", True),
    ("sm_100", False),
    ("sm_100", True),
    ("sm_120", False),
)
"""Targets whose instructions are counted, and whether descriptors load their operands."""


def count_one(job: tuple[str, bool]) -> list[list[str]]:
    """Lines of the table of instructions; in a process of its own, as above."""
    name, descriptors = job
    target = replace(TARGETS[name], descriptors=descriptors)
    lines = []
    for kernel in offline.compiled(target, [offline.Shape(16384, 4096, 128256, torch.bfloat16, False)]):
        if kernel.name in LOGITS and not dict(kernel.constants).get("TAIL"):
            found, used = issued(kernel.compiled), usage(kernel.compiled, target)
            figures = [found.step, found.least, found.most, used.registers, used.spills]
            loaded = "descriptors" if descriptors else "addresses"
            lines.append([name, kernel.name.removesuffix("_kernel"), loaded, *map(str, figures)])
    return lines


def instructions() -> report.Table:
    """Instructions of the kernels of logits: what a warp issues."""
    heads = ["target", "kernel", "loads by", "a step", "behind, least", "behind, most", "registers", "spills"]
    return report.Table("kernels", "instructions", heads, _in_processes(count_one, WAYS))


def _table(target: str, rows: Sequence[Row]) -> report.Table:
    """Every kernel of a target, at the worst of its variants."""
    cells = []
    for (kernel, kind), found in groupby(sorted(rows, key=_group), _group):
        group = list(found)
        aligned = [row.wide for row in group if row.shape.h % 16 == 0] or [0]
        tensor = sorted({row.tensor for row in group if row.tensor})
        worst = [max(getattr(row, name) for row in group) for name in ("registers", "spills", "shared")]
        figures = [len(group), group[0].warps, group[0].stages, *worst, min(row.occupancy for row in group)]
        cells.append([kernel.removesuffix("_kernel"), kind, *map(str, figures), str(min(aligned)), " / ".join(tensor)])
    heads = ["kernel", "type", "variants", "warps", "stages", "registers", "spills", "shared", "occupancy", "wide"]
    return report.Table("kernels", target, [*heads, "MMA"], cells)


def _group(row: Row) -> tuple[str, str]:
    return row.kernel, row.kind


def markdown(rows: Sequence[Row], sample: bool = False, counted: report.Table | None = None) -> str:
    """docs/kernels.md; `counted` is the table of instructions."""
    shapes = (
        f"a sample, {SAMPLE_RULE} (`make kernels` without `--sample` compiles everything)"
        if sample
        else "hidden sizes 576, 2048, 4096, 5120, 8192 x vocabularies 32000, 49152, 128256, 151936, 262144 x bfloat16, "
        "float16, float32 x without and with bias and softcap x 64 and 16384 rows, one shape aligned to nothing "
        "(577 x 32003) and one of ones"
    )
    failed = [row for row in rows if row.failures()]
    parts = [
        "# The GPU kernels in machine code",
        f"Generated by `make kernels{' ARGS=--sample' * sample}`; do not edit. Every kernel that the Triton backend "
        "launches, compiled for each target without a GPU by running the backend itself on tensors without storage: "
        f"what is listed is what a real call launches. Triton {triton.__version__}, PyTorch "
        f"{torch.__version__.split('+')[0]}.",
        f"{len(rows)} kernels for {len({r.target for r in rows})} targets, from {shapes}. Two launches share a kernel "
        "where Triton's own key is the same (constants, types, divisibility of sizes and addresses by 16), so most "
        "shapes compile nothing new.",
        f"Gates passed by {len(rows) - len(failed)} of {len(rows)}: no spills, no stack, shared memory "
        "within the limit, tensor cores in every product of 16-bit inputs (HGMMA on sm_90, tcgen05's UTC*MMA on "
        "sm_100, HMMA or MFMA elsewhere), 16-byte accesses wherever the hidden size is a multiple of 16. Registers "
        "and stack are a thread's, spills instructions (AMD: registers), shared memory a program's in bytes, occupancy "
        "programs a multiprocessor; `wide` counts 16-byte accesses to global memory. The worst case over all variants "
        "of a kernel is shown: the most registers, spills and shared memory, the fewest programs and wide accesses.",
    ]
    if failed:
        parts += ["Gates not passed:", "\n".join(f"- {row}" for row in failed)]
    for name in dict.fromkeys(row.target for row in rows):
        kib, registers = TARGETS[name].shared_memory / 1024, TARGETS[name].registers_per_thread
        parts += [
            f"## {name}",
            f"{kib:.0f} KiB of shared memory and {registers} registers a thread at most.",
            report.markdown(_table(name, [row for row in rows if row.target == name])),
        ]
    if counted is not None:
        parts += [
            "## Instructions of the kernels of logits",
            "SASS of bfloat16 (16384 x 4096 x 128256, no logit options), by addresses and by descriptors: what a warp "
            "issues for one step of the loop over the hidden size, and for a tile behind the product, where no label "
            "and no end of the vocabulary lies in the tile (least) and where one does (most). With descriptors every "
            "tile masks and compares.",
            report.markdown(counted),
        ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print the report, hold the gates: 0 if every kernel passes, else 1."""
    parser = records.parser("kernels", __doc__, None)
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), help="targets (default: all)")
    parser.add_argument("--sample", action="store_true", help=f"a sample for CI: {SAMPLE_RULE}")
    parser.add_argument("--output", type=Path, help="write the report here, for example docs/kernels.md")
    arguments = parser.parse_args(argv)
    targets = arguments.target or (SAMPLE_TARGETS if arguments.sample else tuple(TARGETS))
    rows = compile_all(targets, arguments.sample)
    counted = None if arguments.sample or arguments.target else instructions()
    page = markdown(rows, arguments.sample, counted)
    if arguments.output is not None:
        arguments.output.write_text(page)
    print(page)
    failed = [row for row in rows if row.failures()]
    print(*failed, sep="\n", end="\n" if failed else "", file=sys.stderr)
    return 1 if failed else 0
