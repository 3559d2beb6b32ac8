"""How a call divides its workspace: rows and columns of a chunk, and one buffer that holds every temporary.

Counting, with B the workspace's bytes, e bytes an element and R rows a chunk (docs/gpu.md has the whole count):

- One tile of logits for forward and gradient keeps [R, V] elements, R about B / (e V). Each chunk reads and writes the
  float32 dW once, 8 V H bytes beside 2 R V H operations a product: the fewer rows, the more of the time.
- Gradients with a known logsumexp take the vocabulary in pieces: [R, H] sums of dX stay for all of them, and R no
  longer depends on V, at the price of forming the logits a second time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from infopo_kernels.backends.triton.hidden_product import slices_of
from infopo_kernels.backends.triton.launch import Launch, ceil_div
from infopo_kernels.backends.triton.softmax_tile import NORMALISE_ROWS
from infopo_kernels.backends.triton.weight_product import gathered_stride

ALIGNMENT = 256
"""Bytes: every temporary starts on a boundary that all vector accesses accept."""

SPARE = 4096
"""Bytes kept back for alignment."""

MIN_ROWS_WITH_WEIGHT = 512
"""Rows a chunk below which passes over a float32 dW (8 V H bytes a chunk) cost more than a fourth product.

On H100 (989 TFLOP/s dense bf16 and 3.35 TB/s by its data sheet) a chunk of R rows spends 8 V H / (2 R V H) * 295 =
1180 / R of a product's time on them where nothing overlaps, and 2 products' time is gained at R = 512 or so where the
half of them overlaps.
"""

MIN_ROWS_WITHOUT_WEIGHT = 128
"""The same for dX alone: below one tile of rows the head's own bytes, 4 V H a chunk, outweigh the product saved."""


@dataclass(frozen=True)
class TilePlan:
    """Chunks of rows for one tile of logits that serves forward and gradient."""

    rows: int
    slices: int
    """Of the sum over the vocabulary in dX."""


@dataclass(frozen=True)
class PiecePlan:
    """Chunks of rows and pieces of the vocabulary for gradients with a known logsumexp."""

    rows: int
    columns: int
    slices: int


def _chunk_sizes(n: int) -> Iterator[int]:
    """Rows a chunk, largest first: all, multiples of 128 (a tile), then powers of two."""
    yield n
    for blocks in range((n - 1) // 128, 0, -1):
        yield 128 * blocks
    for power in (64, 32, 16, 8, 4, 2, 1):
        if power < n:
            yield power


def _largest(n: int, most: int, fits: Callable[[int], bool]) -> int | None:
    """The largest chunk size up to `most` that fits."""
    return next((rows for rows in _chunk_sizes(min(n, most)) if fits(rows)), None)


def plan_tile(launch: Launch, *, hidden: bool, weight: bool, bias: bool) -> TilePlan | None:
    """The largest chunk of rows whose whole width of logits fits, or None where too few rows do."""
    h, budget, size = launch.hidden_size, launch.head.workspace_bytes - SPARE, launch.head.hidden.element_size()
    tiles = ceil_div(launch.vocabulary, launch.tiles.logits.columns)
    ld = tiles * launch.tiles.logits.columns

    def bytes_of(rows: int) -> int:
        total = rows * (ld * size + 8 * (ld // launch.tiles.logits.part) + 4)
        total += 4 * rows * h * slices_of(launch, rows, launch.vocabulary) if hidden else 0
        total += size * rows * gathered_stride(h) if weight else 0
        total += 4 * ceil_div(rows, NORMALISE_ROWS) * ld if bias else 0
        return total

    rows = _largest(launch.rows, max(1, budget // (ld * size)), lambda r: bytes_of(r) <= budget)
    if rows is None or rows < min(launch.rows, MIN_ROWS_WITH_WEIGHT if weight else MIN_ROWS_WITHOUT_WEIGHT):
        return None
    return TilePlan(rows, slices_of(launch, rows, launch.vocabulary) if hidden else 1)


def plan_pieces(launch: Launch, *, hidden: bool, weight: bool, bias: bool, weight_sums: bool = False) -> PiecePlan:
    """Rows and columns of a piece of G; with `weight_sums` float32 sums of dW for the columns of a piece as well.

    At most half of the workspace goes to what grows with rows alone (sums of dX, gathered X), the rest to G.

    Raises:
        ValueError: not even one row and one tile of the vocabulary fit.
    """
    h, budget, size = launch.hidden_size, launch.head.workspace_bytes - SPARE, launch.head.hidden.element_size()
    block = launch.tiles.logits
    tiles = ceil_div(launch.vocabulary, block.columns)

    def of_rows(rows: int) -> int:
        slices = slices_of(launch, rows, launch.vocabulary) if hidden else 0
        return rows * (4 * h * slices + (size * gathered_stride(h) if weight else 0))

    def of_tile(rows: int) -> int:
        bias_part = 4 * ceil_div(rows, block.rows) if bias else 0
        return block.columns * (rows * size + bias_part + (4 * h if weight_sums else 0))

    def fits(rows: int, tiles_a_piece: int) -> bool:
        return of_rows(rows) + of_tile(rows) * tiles_a_piece <= budget

    most = max(1, budget // (block.columns * size))
    all_rows = launch.rows if fits(launch.rows, min(tiles, 8)) else None
    halved = _largest(launch.rows, most, lambda r: of_rows(r) <= budget // 2 and fits(r, min(tiles, 8)))
    rows = all_rows or halved or _largest(launch.rows, most, lambda r: fits(r, 1))
    if rows is None:
        raise ValueError(
            f"`workspace_mib` must hold one row of hidden states and one tile of {block.columns} words, expected at "
            f"least {1 + ((of_rows(1) + of_tile(1) + SPARE) >> 20)} MiB, got "
            f"{launch.head.workspace_bytes / (1 << 20):.2f} MiB; raise it."
        )
    columns = min(tiles, (budget - of_rows(rows)) // of_tile(rows)) * block.columns
    return PiecePlan(rows, columns, slices_of(launch, rows, launch.vocabulary) if hidden else 1)


def carve(limit: int, device: torch.device, *wanted: tuple[tuple[int, ...], torch.dtype] | None) -> list[torch.Tensor]:
    """Uninitialised contiguous tensors of these shapes and types, cut from one allocation of at most `limit` bytes.

    What is not wanted (None) is a tensor without elements.
    """
    layouts = [((0,), torch.uint8) if layout is None else layout for layout in wanted]
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in layouts]
    begins = list(itertools.accumulate((ceil_div(size, ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
    assert begins[-1] <= limit, f"the plan takes {begins[-1]} bytes of {limit}"
    buffer = torch.empty(begins[-1], dtype=torch.uint8, device=device)
    return [
        buffer[begin : begin + size].view(dtype).view(shape)
        for (shape, dtype), begin, size in zip(layouts, begins, sizes, strict=False)
    ]
