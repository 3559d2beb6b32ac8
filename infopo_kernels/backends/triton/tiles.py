"""Launch parameters: one table per target, each row with its reason. Imports neither Triton nor a GPU.

None of these figures was found on a device: they follow from the sizes of register file and shared memory, from what
Triton's compiler reports for each target (`python -m infopo_kernels kernels`), and from counting (docs/gpu.md).
Correct them by measurement with INFOPO_KERNELS_AUTOTUNE=1 and `make bench-gpu`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """One product's tile: `rows` x `columns` of the result, `depth` of the sum a step."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    """Row blocks that pass over the columns together (L2 reuse)."""
    part: int = 64
    """Columns that what follows the product takes at a time (register pressure)."""


@dataclass(frozen=True)
class Products:
    """The tiles of the three products for one class of input type."""

    logits: Tile
    """[N, V]: rows are tokens, columns the vocabulary, depth the hidden size."""
    hidden: Tile
    """dX [N, H]: rows are tokens, columns the hidden size, depth the vocabulary."""
    weight: Tile
    """dW [V, H]: rows are the vocabulary, columns the hidden size, depth the tokens."""


@dataclass(frozen=True)
class Target:
    """One GPU generation."""

    name: str
    backend: str
    """Triton's name: "cuda" or "hip"."""
    arch: int | str
    warp_size: int
    multiprocessors: int
    """Of the usual part; a device that is present is asked for its own number."""
    shared_memory: int
    """Bytes one program may take."""
    registers_per_thread: int
    """Hardware limit."""
    half: Products
    """bfloat16 and float16."""
    single: Products
    """float32."""


def _same(tile: Tile) -> Products:
    return Products(tile, tile, tile)


# float32 without TF32 runs on the plain FMA units from registers: a thread holds 64 (4 warps x 64 x 128) accumulators,
# the tile's two operands need 12 KiB a stage, and nothing is gained by a larger one. AMD's float32 MFMA fits as well.
_SINGLE = _same(Tile(rows=64, columns=128, depth=16, warps=8, stages=2))

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        # A100: mma.sync reads fragments through registers; 8 warps hold 128 x 256 float32 sums in 128 registers each.
        # 3 stages x 48 KiB = 144 KiB of 163 KiB. The epilogue (exp) of one program is not hidden, so logits use
        # 128 x 128 with 4 warps, two programs a multiprocessor: one's exp runs under the other's products.
        Target(
            "sm_80",
            "cuda",
            80,
            32,
            108,
            166_912,
            255,
            half=Products(
                logits=Tile(128, 128, 64, warps=8, stages=3),
                hidden=Tile(128, 128, 64, warps=8, stages=3),
                weight=Tile(128, 128, 64, warps=8, stages=3),
            ),
            single=_SINGLE,
        ),
        # A10, RTX 30, L4, L40, RTX 40: 99 KiB a program. 128 x 128 x 32 in 3 stages is 48 KiB: two programs fit.
        Target(
            "sm_86", "cuda", 86, 32, 84, 101_376, 255, half=_same(Tile(128, 128, 32, warps=8, stages=3)), single=_SINGLE
        ),
        Target(
            "sm_89",
            "cuda",
            89,
            32,
            142,
            101_376,
            255,
            half=_same(Tile(128, 128, 32, warps=8, stages=3)),
            single=_SINGLE,
        ),
        # H100, H200: wgmma reads both operands from shared memory; two warp groups of 64 x 256 give the widest
        # instruction (n = 256) and 85 operations a byte of L2 traffic. 4 stages x 48 KiB = 192 KiB of 227 KiB.
        Target(
            "sm_90",
            "cuda",
            90,
            32,
            132,
            232_448,
            255,
            half=Products(
                logits=Tile(128, 256, 64, warps=8, stages=3, group=16),
                hidden=Tile(128, 256, 64, warps=8, stages=3),
                weight=Tile(128, 256, 64, warps=8, stages=3),
            ),
            single=_SINGLE,
        ),
        # B200: tcgen05 accumulates in tensor memory, 128 x 256 float32 sums being half of it; same shared memory.
        Target(
            "sm_100",
            "cuda",
            100,
            32,
            148,
            232_448,
            255,
            half=_same(Tile(128, 256, 64, warps=8, stages=3, group=16)),
            single=_SINGLE,
        ),
        # RTX 50, RTX PRO 6000: sm_80's instructions with 99 KiB.
        Target(
            "sm_120",
            "cuda",
            120,
            32,
            170,
            101_376,
            255,
            half=_same(Tile(128, 128, 32, warps=8, stages=3)),
            single=_SINGLE,
        ),
        # MI300X: 64 KiB of LDS. Triton keeps one stage in registers, so 2 stages of 128 x 128 x 64 take 32 KiB.
        Target(
            "gfx942",
            "hip",
            "gfx942",
            64,
            304,
            65_536,
            512,
            half=_same(Tile(128, 128, 64, warps=4, stages=2)),
            single=_SINGLE,
        ),
        # MI355X: 160 KiB of LDS.
        Target(
            "gfx950",
            "hip",
            "gfx950",
            64,
            256,
            163_840,
            512,
            half=_same(Tile(128, 128, 64, warps=4, stages=2)),
            single=_SINGLE,
        ),
    )
}

_SMALL = Products(
    logits=Tile(16, 32, 16, warps=1, stages=1, group=2, part=16),
    hidden=Tile(16, 16, 16, warps=1, stages=1, part=8),
    weight=Tile(32, 16, 16, warps=1, stages=1, part=4),
)

# Small enough that a test of a few dozen rows crosses every edge of a tile.
INTERPRETER = Target("interpreter", "cpu", "cpu", 32, 4, 0, 0, half=_SMALL, single=_SMALL)
