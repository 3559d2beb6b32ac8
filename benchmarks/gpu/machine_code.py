"""What a compiled kernel takes and issues, read from its machine code: SASS by Triton's cuobjdump, AMDGCN as text."""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from infopo_kernels.backends.triton.tiles import Target

_NVIDIA_WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
"""Warps a multiprocessor holds (CUDA programming guide, technical specifications per compute capability)."""

_NVIDIA_SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
"""KiB of shared memory a multiprocessor has; a program takes 1 KiB beyond its own."""


@dataclass(frozen=True)
class Usage:
    """One kernel's machine code in numbers."""

    registers: int
    """A thread (AMD: vector registers a lane, accumulation registers included)."""
    stack: int
    """Bytes a thread."""
    spills: int
    """Instructions that move registers to and from local memory (AMD: registers spilled)."""
    shared: int
    """Bytes a program."""
    occupancy: int
    """Programs a multiprocessor can hold at a time."""
    tensor: str
    """Tensor-core instructions: their name and number."""
    wide: int
    """16-byte accesses to global memory (copies to shared memory included), and loads of whole tiles by descriptors."""


def usage(kernel: Any, target: Target) -> Usage:
    """Read a CompiledKernel."""
    return _nvidia(kernel, target) if target.backend == "cuda" else _amd(kernel, target)


@dataclass(frozen=True)
class Issued:
    """Instructions that a warp issues for one tile of a product that exponentials follow."""

    step: int
    """For one step of the loop over the depth."""
    least: int
    """Behind the product, where nothing has to be masked or compared."""
    most: int
    """Behind the product, with masks and comparisons."""


def issued(kernel: Any) -> Issued:
    """Count them in a CompiledKernel for NVIDIA."""
    with _cubin(kernel) as cubin:
        return issued_in(_sass(cubin))


def issued_in(sass: str) -> Issued:
    """Count them in what nvdisasm lists: the shortest way round through a block with tensor-core
    instructions, and the smallest and the largest block with exponentials that can follow it."""
    blocks, after = _blocks(sass)
    count = {name: len(found) for name, found in blocks.items()}
    products = [name for name, found in blocks.items() if any(re.match(_MMA, each) for each in found)]
    ways = {name: _lengths(name, after, count) for name in products}
    product = min((name for name in products if name in ways[name]), key=lambda name: ways[name][name])
    exponentials = {name: sum(each.startswith("MUFU.EX2") for each in blocks[name]) for name in ways[product]}
    tiles = [count[name] for name, found in exponentials.items() if 2 * found > max(exponentials.values())]
    return Issued(ways[product][product], min(tiles), max(tiles))


_MMA = r"(UTC\w*MMA|HGMMA|HMMA|QGMMA|OMMA)\b"


@contextmanager
def _cubin(kernel: Any) -> Iterator[str]:
    """The path of the kernel's machine code as a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        yield str(path)


def _sass(cubin: str) -> str:
    return _run(triton.knobs.nvidia.nvdisasm, "-c", cubin)


def _blocks(sass: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Basic blocks with their instructions, and the blocks that follow each."""
    blocks: dict[str, list[str]] = {"": []}
    after: dict[str, list[str]] = {"": []}
    name, falls = "", True

    def begin(following: str) -> None:
        nonlocal name
        if falls:
            after[name].append(following)
        name = following
        blocks[name], after[name] = [], []

    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            begin(label[1])
            falls = True
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", line):
            blocks[name].append(found[2])
            if found[2].split(".")[0] in ("BRA", "EXIT", "RET"):
                target = re.search(r"`\((\.L_x_\d+)\)", found[3])
                after[name] += [target[1]] if target else []
                falls = found[1] is not None or re.search(r"\bU?P\d", found[3]) is not None
                begin(f"{name}+")
                falls = True
    return blocks, after


def _lengths(start: str, after: dict[str, list[str]], count: dict[str, int]) -> dict[str, int]:
    """Instructions of the shortest way from behind `start` to the end of each block that can be reached."""
    lengths: dict[str, int] = {}
    waiting = [(count[name], name) for name in after[start]]
    while waiting:
        length, name = heapq.heappop(waiting)
        if name not in lengths:
            lengths[name] = length
            for following in after[name]:
                heapq.heappush(waiting, (length + count[following], following))
    return lengths


def _run(tool: Any, *arguments: str) -> str:
    return subprocess.run([tool.path, *arguments], check=True, capture_output=True, text=True).stdout


def _nvidia(kernel: Any, target: Target) -> Usage:
    with _cubin(kernel) as cubin:
        resources = _run(triton.knobs.nvidia.cuobjdump, "-res-usage", cubin)
        sass = _sass(cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    assert found is not None, resources
    registers, stack = int(found[1]), int(found[2])
    names = re.findall(rf"\b{_MMA}", sass)
    tensor = ", ".join(f"{name} {names.count(name)}" for name in sorted(set(names)))
    return Usage(
        registers,
        stack,
        len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        kernel.metadata.shared,
        _nvidia_occupancy(int(target.arch), registers, kernel.metadata.num_warps, kernel.metadata.shared),
        tensor,
        len(re.findall(r"\b(?:LDG|STG|LDGSTS)\b[.\w]*\.128\b|\bUTMALDG\b", sass)),
    )


def _nvidia_occupancy(arch: int, registers: int, warps: int, shared: int) -> int:
    by_warps = _NVIDIA_WARPS[arch] // warps
    # A warp's registers are given out in units of 256 of the 65536.
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = (_NVIDIA_SHARED[arch] << 10) // (shared + 1024)
    return min(by_warps, by_registers, by_shared, 32)


def _amd(kernel: Any, target: Target) -> Usage:
    text = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    registers = field("vgpr_count")
    names = re.findall(r"\bv_(?:s?mfma)\w*", text)
    shared = kernel.metadata.shared
    # 4 SIMDs of 512 registers a lane, given out in eights, and 8 waves each.
    waves = min(8, 512 // max(8, -(-registers // 8) * 8))
    by_registers = 4 * waves // kernel.metadata.num_warps
    return Usage(
        registers,
        field("private_segment_fixed_size"),
        field("vgpr_spill_count"),
        shared,
        max(0, min(by_registers, target.shared_memory // max(shared, 1))),
        f"mfma {len(names)}" if names else "",
        len(re.findall(r"\b(?:global|buffer)_(?:load|store)_(?:lds_)?dwordx4\b", text)),
    )
