"""Launch parameters: one table per target, each row with its reason. Imports neither Triton nor a GPU.

Of sm_90 and aligned 16-bit rows, the stages, part and group of the logits' tile, descriptors, and whose products form
dX and dW were compared with others on an H100 (record first-contact-variants). The rest follows from the sizes of
register file and shared memory, from what Triton's compiler reports for each target (`make kernels`), and from counting
(docs/gpu.md). Correct it by measurement with INFOPO_KERNELS_AUTOTUNE=1 and `make first-contact`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

TAIL_BLOCK = 256
"""Words of a block that pools its tail: one column more for 256 of G. The widest tile of logits, so that pieces of the
vocabulary are whole blocks, and one program sums a block."""


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
    half_unaligned: Products | None = None
    """bfloat16 and float16 whose rows do not all begin on 16 elements, if they take tiles of their own."""
    single_unaligned: Products | None = None
    """float32 likewise."""
    library_half: bool = False
    """Whether dX and dW of 16-bit inputs are the library's products (`products.py`), for aligned rows."""
    library_single: bool = False
    """float32 likewise."""
    descriptors: bool = False
    """Whether aligned 16-bit rows reach the product of logits by tensor descriptors (TMA), gathered before."""

    def products(self, *, single: bool, aligned: bool, release: tuple[int, ...]) -> Products:
        """The tiles of a type, with Triton's `release`."""
        own, unaligned = (self.single, self.single_unaligned) if single else (self.half, self.half_unaligned)
        tiles = own if aligned or unaligned is None else unaligned
        if not (single and aligned and self.name == "sm_100" and release == (3, 7)):
            return tiles
        # Whole parts spilled 2 to 13 registers there.
        narrower = (replace(tile, part=tile.part // 2) for tile in (tiles.logits, tiles.hidden, tiles.weight))
        return Products(*narrower)

    def gradient_part(
        self, tile: Tile, *, single: bool, softcap: bool, tail: bool, described: bool, release: tuple[int, ...]
    ) -> int:
        """Columns of G that follow a product of logits at a time, of a tile of logits, with Triton's `release`.

        As many as spilled no register with 3.6, 3.7 and 3.9. 64 did on sm_90 with 3.6 and 3.7. float32 takes 16 with
        tanh and 8 with the statistics of a tail, 16 bits take 16 with both. 3.7 takes 16 on sm_90 with descriptors and
        no tail, where it holds 32 with one, and on sm_100 with one, where it holds 32 without.
        """
        if single:
            most = 8 if tail else 16 if softcap else 32
        else:
            fewer = not self.descriptors if tail else described
            fewer = release == (3, 7) and fewer and tile.columns == 256
            most = 16 if fewer or (tail and softcap) else 32
        return min(tile.part, most)


def _same(tile: Tile) -> Products:
    return Products(tile, tile, tile)


# float32 without TF32 runs on the plain FMA units, which take operands from registers: 8 warps share 64 x 128 sums,
# 32 a thread, because a depth of 16 unrolls into as many operand registers again, and 64 sums a thread spilled.
_SINGLE = _same(Tile(rows=64, columns=128, depth=16, warps=8, stages=2))

# 99 KiB a program (sm_86, 89, 120): 128 x 128 sums in 8 warps are 64 registers a thread, a depth of 32 in 3 stages is
# 48 KiB at most, and what follows a product finds registers enough.
_99_KIB = _same(Tile(128, 128, 32, warps=8, stages=3))

# Rows that do not begin on 16 elements are loaded one element at a time, each with an address of its own in registers,
# which then hold fewer sums and less depth; what follows logits takes registers too, 32 columns of it at a time.
_UNALIGNED = replace(
    _same(Tile(128, 128, 32, warps=8, stages=3)), logits=Tile(128, 128, 16, warps=8, stages=3, part=32)
)

# The same of float32: an online softmax of 64 x 64 beside a depth of 16 spilled, and Triton before 3.8 has no product
# of less depth.
_SINGLE_UNALIGNED = replace(_SINGLE, logits=Tile(32, 64, 16, warps=8, stages=2, part=16))

# sm_100 and sm_120: the assembler fits dX of float32 into 128 registers (64 with TF32), so that two programs share a
# multiprocessor, and spills a few on the way; parts of 32 columns leave room.
_SINGLE_100 = replace(_SINGLE, hidden=replace(_SINGLE.hidden, part=32))
_SINGLE_UNALIGNED_100 = replace(_SINGLE_UNALIGNED, hidden=_SINGLE_100.hidden)

# sm_120: so they do for dW of rows that do not begin on 16 elements.
_UNALIGNED_120 = replace(_UNALIGNED, weight=replace(_UNALIGNED.weight, part=32))
_SINGLE_UNALIGNED_120 = replace(_SINGLE_UNALIGNED_100, weight=replace(_SINGLE.weight, part=32))

# gfx950: with two stages the head goes to LDS by itself, but four bytes a lane at a time; with one it passes through
# registers, sixteen at a time.
_SINGLE_950 = replace(_SINGLE, logits=replace(_SINGLE.logits, stages=1))

# 128 x 256 sums in two warp groups: wgmma's widest instruction (n = 256), 85 operations a byte of L2 traffic against 64
# of 128 x 128, which at 700 TFLOP/s is 8 TB/s against 11. 3 stages of 48 KiB: on an H100 a fourth changed nothing, and
# two took 1.3 times as long. One program a multiprocessor, so that what follows a product is not hidden: 5 to 8 % of it
# at H = 4096.
_WIDE = Tile(128, 256, 64, warps=8, stages=3)

# Logits: 16 row blocks share each tile of the head, so that it leaves memory once for 2048 rows; their hidden states
# (16 MiB at H = 4096 in bfloat16) stay in L2 beside it. On an H100 14.1 ms, and 14.9 with 8.
_WIDE_LOGITS = replace(_WIDE, group=16)

# Whose products form dX and dW. H100, 16 bits: the library's, measured (56.9 ms a step, 60.7 with Triton's). The rest
# is a model. Blackwell: less than half of cuBLAS' rate for a Triton product that is neither persistent nor specialised,
# it is assumed. A100: 0.96 (float16, 2944 cubed: 170.1 and 176.1 TFLOP/s, issue 6523 of triton-lang/triton), so that
# products on plain memory stay. float32 on plain FMA units: cuBLAS', it is assumed. AMD: Triton's until somebody has
# seen `addmm` with a float32 result there.
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        # A100: mma.sync takes fragments from registers, so 128 x 256 sums (128 a thread) would leave none for them;
        # 128 x 128 in 8 warps, and a depth of 64 in 3 stages, 64 of 163 KiB.
        Target(
            "sm_80",
            "cuda",
            80,
            32,
            108,
            166_912,
            255,
            _same(Tile(128, 128, 64, warps=8, stages=3)),
            _SINGLE,
            _UNALIGNED,
            _SINGLE_UNALIGNED,
            library_single=True,
        ),
        # A10, RTX 30.
        Target(
            "sm_86",
            "cuda",
            86,
            32,
            84,
            101_376,
            255,
            _99_KIB,
            _SINGLE,
            _UNALIGNED,
            _SINGLE_UNALIGNED,
            library_single=True,
        ),
        # L4, L40, RTX 40.
        Target(
            "sm_89",
            "cuda",
            89,
            32,
            142,
            101_376,
            255,
            _99_KIB,
            _SINGLE,
            _UNALIGNED,
            _SINGLE_UNALIGNED,
            library_single=True,
        ),
        # H100, H200.
        Target(
            "sm_90",
            "cuda",
            90,
            32,
            132,
            232_448,
            255,
            Products(_WIDE_LOGITS, _WIDE, _WIDE),
            _SINGLE,
            _UNALIGNED,
            _SINGLE_UNALIGNED,
            library_half=True,
            library_single=True,
            descriptors=True,
        ),
        # B200: tcgen05 keeps the sums in tensor memory, of which 128 x 256 float32 are half; else as H100.
        Target(
            "sm_100",
            "cuda",
            100,
            32,
            148,
            232_448,
            255,
            Products(_WIDE_LOGITS, _WIDE, _WIDE),
            _SINGLE_100,
            _UNALIGNED,
            _SINGLE_UNALIGNED_100,
            library_half=True,
            library_single=True,
        ),
        # RTX 50, RTX PRO 6000: mma.sync again.
        Target(
            "sm_120",
            "cuda",
            120,
            32,
            170,
            101_376,
            255,
            _99_KIB,
            _SINGLE_100,
            _UNALIGNED_120,
            _SINGLE_UNALIGNED_120,
            library_single=True,
        ),
        # MI300X: 64 KiB of LDS, of which 128 x 128 x 64 takes half, so that two programs share a compute unit. 4 waves
        # hold 64 sums a lane each.
        Target("gfx942", "hip", "gfx942", 64, 304, 65_536, 512, _same(Tile(128, 128, 64, warps=4, stages=2)), _SINGLE),
        # MI355X: the same in 160 KiB.
        Target(
            "gfx950", "hip", "gfx950", 64, 256, 163_840, 512, _same(Tile(128, 128, 64, warps=4, stages=2)), _SINGLE_950
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
