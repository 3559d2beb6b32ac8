"""`python -m benchmarks kernels`: compile every GPU kernel for every target, without a GPU, and hold it to gates.

Gates: no register spills, no stack, shared memory within the target's limit, tensor cores in every product of 16-bit
inputs (HGMMA on sm_90, UTC*MMA on sm_100, HMMA or MFMA elsewhere), 16-byte accesses in every product of aligned inputs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure.fresh import in_fresh_process
from infopo_kernels.backends.triton.tiles import TARGETS, Target

PRODUCT_KERNELS = (
    "logprob_kernel",
    "softmax_tile_kernel",
    "gradient_tile_kernel",
    "hidden_product_kernel",
    "weight_product_kernel",
)
"""Kernels with a matrix product."""

TENSOR_CORES = {"sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "mfma", "gfx950": "mfma"}
"""What a product of 16-bit inputs must be made of; HMMA where not named."""

SAMPLE_RULE = (
    "one hidden size and vocabulary (4096, 128256), 16384 rows, bfloat16 without logit options and float32 with them; "
    "targets sm_80, sm_90, sm_100 and gfx942"
)
SAMPLE_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Row:
    """One compiled kernel of the report."""

    target: str
    kernel: str
    dtype: str
    options: bool
    rows: int
    hidden: int
    vocabulary: int
    constants: dict[str, int | str | bool]
    warps: int
    stages: int
    registers: int
    stack: int
    spills: int
    shared: int
    occupancy: int
    tensor: str
    wide: int

    def failures(self) -> list[str]:
        """The gates that this kernel does not pass."""
        target, failed = TARGETS[self.target], []
        if self.spills:
            failed.append(f"{self.spills} spills")
        if self.stack:
            failed.append(f"{self.stack} bytes of stack")
        if self.shared > target.shared_memory:
            failed.append(f"{self.shared} bytes of shared memory, {target.shared_memory} are there")
        if self.kernel in PRODUCT_KERNELS and self.dtype != "float32":
            wanted = TENSOR_CORES.get(self.target, "HMMA")
            if wanted not in self.tensor:
                failed.append(f"no {wanted} in a product")
        if self.kernel in PRODUCT_KERNELS and self.hidden % 16 == 0 and self.wide == 0:
            failed.append("no 16-byte access")
        return failed

    def name(self) -> str:
        options = " with logit options" if self.options else ""
        size = f"{self.rows} x {self.hidden} x {self.vocabulary}"
        return f"{self.target} {self.kernel} {self.dtype}{options} ({size}) {self.constants}"


def compile_one(job: tuple[str, bool]) -> list[Row]:
    """Compile for a target (a sample or all); in a process of its own, because Triton's driver is replaced."""
    import torch

    from benchmarks.gpu import offline
    from benchmarks.gpu.machine_code import usage

    name, sample = job
    target = TARGETS[name]
    shapes = list(offline.shapes(target))
    if sample:
        shapes = [
            s
            for s in shapes
            if (s.n, s.h, s.v) == (16384, 4096, 128256)
            and not s.tf32
            and (s.dtype, s.options) in ((torch.bfloat16, False), (torch.float32, True))
        ]
    rows = []
    for kernel in offline.compiled(target, shapes):
        shape, metadata = kernel.shape, kernel.compiled.metadata
        rows.append(
            Row(
                name,
                kernel.name,
                str(shape.dtype).removeprefix("torch."),
                shape.options,
                shape.n,
                shape.h,
                shape.v,
                dict(kernel.constants),
                metadata.num_warps,
                metadata.num_stages,
                **asdict(usage(kernel.compiled, target)),
            )
        )
    return rows


def compile_all(targets: Iterable[str], sample: bool) -> list[Row]:
    """The rows of every target, compiled by as many processes as there are cores.

    Raises:
        RuntimeError: a kernel does not compile.
    """

    def rows_of(target: str) -> list[Row]:
        compiled = in_fresh_process(
            compile_one, (target, sample), timeout=7200.0, environment={"TRITON_INTERPRET": "0"}
        )
        if isinstance(compiled, dict):
            raise RuntimeError(f"compiling for {target} failed:\n{compiled.get('traceback', compiled['failed'])}")
        rows: list[Row] = compiled
        return rows

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [row for rows in pool.map(rows_of, targets) for row in rows]


def markdown(rows: Sequence[Row], sample: bool = False) -> str:
    """docs/kernels.md."""
    import torch
    import triton

    shapes = (
        f"a sample, {SAMPLE_RULE} (`make kernels` without `--sample` compiles everything)"
        if sample
        else "hidden sizes 576, 2048, 4096, 5120, 8192 x vocabularies 32000, 49152, 128256, 151936, 262144 x bfloat16, "
        "float16, float32 x without and with bias and softcap x 64 and 16384 rows, one shape aligned to nothing "
        "(577 x 32003) and one of ones"
    )
    lines = [
        "# The GPU kernels in machine code",
        "",
        f"Generated by `make kernels{' ARGS=--sample' * sample}`; do not edit. Every kernel that the Triton backend "
        "launches, compiled for each target without a GPU by running the backend itself on tensors without storage: "
        f"what is listed is what a real call launches. Triton {triton.__version__}, PyTorch "
        f"{torch.__version__.split('+')[0]}.",
        "",
        f"{len(rows)} kernels for {len({r.target for r in rows})} targets, from {shapes}. Two launches share a kernel "
        "where Triton's own key is the same (constants, types, divisibility of sizes and addresses by 16), so most "
        "shapes compile nothing new.",
        "",
        f"Gates passed by {sum(not r.failures() for r in rows)} of {len(rows)}: no spills, no stack, shared memory "
        "within the limit, tensor cores in every product of 16-bit inputs (HGMMA on sm_90, tcgen05's UTC*MMA on "
        "sm_100, HMMA or MFMA elsewhere), 16-byte accesses wherever the hidden size is a multiple of 16. Registers "
        "and stack are a thread's, spills instructions (AMD: registers), shared memory a program's in bytes, occupancy "
        "programs a multiprocessor; `wide` counts 16-byte accesses to global memory. The worst case over all variants "
        "of a kernel is shown: the most registers, spills and shared memory, the fewest programs and wide accesses.",
    ]
    failed = [(row, row.failures()) for row in rows if row.failures()]
    if failed:
        lines += ["", "Gates not passed:", ""]
        lines += [f"- {row.name()}: {'; '.join(failures)}" for row, failures in failed]
    for target in dict.fromkeys(row.target for row in rows):
        lines += ["", f"## {target}", "", _limits(TARGETS[target]), ""]
        lines.append(
            "| kernel | type | variants | warps | stages | registers | spills | shared | occupancy | wide | MMA |"
        )
        lines.append("| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: | --- |")
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            if row.target == target:
                product = row.kernel in PRODUCT_KERNELS
                kind = row.dtype if product else "all"
                groups.setdefault((row.kernel, kind), []).append(row)
        for (kernel, kind), group in sorted(groups.items()):
            aligned = [r.wide for r in group if r.hidden % 16 == 0] or [0]
            tensor = sorted({r.tensor for r in group})
            lines.append(
                f"| {kernel.removesuffix('_kernel')} | {kind} | {len(group)} | {group[0].warps} | {group[0].stages} | "
                f"{max(r.registers for r in group)} | {max(r.spills for r in group)} | "
                f"{max(r.shared for r in group)} | {min(r.occupancy for r in group)} | {min(aligned)} | "
                f"{' / '.join(t for t in tensor if t)} |"
            )
    return "\n".join(lines) + "\n"


def _limits(target: Target) -> str:
    kib = target.shared_memory / 1024
    return f"{kib:.0f} KiB of shared memory and {target.registers_per_thread} registers a thread at most."


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print the report, hold the gates: 0 if every kernel passes, else 1."""
    parser = argparse.ArgumentParser("python -m benchmarks kernels", description=__doc__)
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), help="targets (default: all)")
    parser.add_argument("--sample", action="store_true", help=f"a sample for CI: {SAMPLE_RULE}")
    parser.add_argument("--output", type=Path, help="write the report here, for example docs/kernels.md")
    arguments = parser.parse_args(argv)
    targets = arguments.target or (SAMPLE_TARGETS if arguments.sample else tuple(TARGETS))
    rows = compile_all(targets, arguments.sample)
    report = markdown(rows, arguments.sample)
    if arguments.output is not None:
        arguments.output.write_text(report)
    print(report)
    failed = [row for row in rows if row.failures()]
    for row in failed:
        print(f"{row.name()}: {'; '.join(row.failures())}", file=sys.stderr)
    return 1 if failed else 0
