"""How a call divides its workspace: rows and columns of a chunk, and one buffer that holds every temporary.

Counting, with B the workspace's bytes, e bytes an element and R rows a chunk (docs/gpu.md has the whole count):

- One tile of logits for forward and gradient keeps [R, V] elements, R about B / (e V). Each chunk reads and writes the
  float32 dW once, 8 V H bytes beside 2 R V H operations a product: the fewer rows, the more of the time.
- Gradients with a known logsumexp take the vocabulary in pieces: [R, H] sums of dX stay for all of them, and R no
  longer depends on V, at the price of forming the logits a second time.
- Rows whose logits dW's memory keeps (`kernels/kept.py`) pay neither price, but are all in the first chunk of such
  pieces: there are at most as many as the sums of dX leave room for.
- A pooled tail (`kernels/tail.py`) adds to a piece of T columns and P = T / 256 blocks: statistics of each block of
  rows (8 T bytes), pi, places and words (12 T), the pools (R e P), the mean rows of W (e H P) and the pools' rows of
  dW (4 H P), and for a report the probabilities (R T times 2 bytes, 4 for float32). Each chunk reads W once more for
  the means, and reads and writes dW once for the tail, so that few rows a chunk cost more than logits formed twice.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from infopo_kernels.backends.base import Wanted
from infopo_kernels.backends.triton.kernels.hidden_product import slices_of
from infopo_kernels.backends.triton.kernels.softmax_tile import NORMALISE_ROWS
from infopo_kernels.backends.triton.launch import Sizes, ceil_div, pools_of
from infopo_kernels.backends.triton.tiles import TAIL_BLOCK

ALIGNMENT = 256
"""Bytes: every temporary starts on a boundary that all vector accesses accept."""

ROW_MULTIPLE = 16
"""Rows with kept logits are a multiple of this: every part, and what is in it, then begins on 16 bytes or more."""

SPARE = 4096
"""Bytes kept back for alignment."""

MAX_SLICES = 8
"""Of the sum over the vocabulary in dX: each is one more pass over [R, H] sums in float32."""

PASS_ROWS = 870
"""Rows a chunk at which a pass over a float32 dW (8 V H bytes) takes as long as the product that feeds it (2 R V H).

On H100, with products at 728 TFLOP/s and the 3.35 TB/s of its data sheet: 4 * 728 / 3.35. B200 and MI300X lie near
(830, 730), H200 and A100 below (610, 450). A copy reached 2.98 TB/s there, which makes 977. The number only weighs
plans against each other, for every device, and may stay: an eighth more lies within what devices differ by.
"""

MIN_ROWS_WITH_WEIGHT = 512
"""Rows a chunk below which those passes (PASS_ROWS / 512 = 1.7 products) cost more than a fourth product.

With fewer rows gradients are formed in pieces of the vocabulary, from logits that are formed twice, in chunks that do
not depend on it.
"""

MIN_ROWS_WITHOUT_WEIGHT = 128
"""The same for dX alone: below one tile of rows the head's own bytes, 4 V H a chunk, outweigh the product saved."""

MEAN_ROWS = PASS_ROWS // 4
"""Rows at which a product takes as long as reading W for the mean rows of tails (2 V H bytes)."""

TAIL_SHARE = 0.1
"""Share of the columns that a plan takes to be kept (docs/pooled_tail.md: 2 to 9 % were, on a trained model)."""


Layout = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of a temporary."""


def size_of(layout: Layout | None) -> int:
    """Bytes of a temporary, up to the next boundary; 0 for one that is not wanted."""
    return 0 if layout is None else ceil_div(math.prod(layout[0]) * layout[1].itemsize, ALIGNMENT) * ALIGNMENT


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
    layouts: tuple[Layout | None, ...]
    """Sums of dX, gathered rows, G, column sums, sums of dW; then those of `tail_layouts`."""

    @property
    def bytes(self) -> int:
        return sum(map(size_of, self.layouts))


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


def tail_layouts(sizes: Sizes, rows: int, row_blocks: int, columns: int, wanted: Wanted) -> list[Layout | None]:
    """The tensors of `kernels.tail.Tail` for a piece of G with so many blocks of rows; none without a threshold."""
    if not sizes.tail:
        return []
    h, pools, ld = sizes.hidden_size, pools_of(columns), columns + sizes.pool_columns(columns)
    return [
        ((row_blocks, 2, ld), torch.float32),
        ((rows, ld), torch.float32 if sizes.dtype == torch.float32 else torch.bfloat16) if wanted.report else None,
        ((columns,), torch.float32),
        ((columns,), torch.int32),
        ((columns,), torch.int32),
        ((pools,), torch.int32),
        ((1,), torch.int32),
        ((pools, h), sizes.dtype) if wanted.hidden else None,
        ((pools, h), torch.float32) if wanted.weight else None,
    ]


def tile_layouts(
    sizes: Sizes, rows: int, slices: int, wanted: Wanted
) -> tuple[list[Layout | None], list[Layout | None]]:
    """What one chunk of rows takes: G, column sums, gathered rows, those of `tail_layouts`; and three that are never
    needed at a time.

    The gathered rows are the last of either: descriptors need them before the product of logits, dW after it.
    """
    tile, gathered, row_blocks = sizes.tiles.logits, None, ceil_div(rows, NORMALISE_ROWS)
    columns = ceil_div(sizes.vocabulary, tile.columns) * tile.columns
    ld = columns + sizes.pool_columns(columns)
    if wanted.weight or sizes.descriptors:
        gathered = sizes.gathered(rows)
    own: list[Layout | None] = [
        ((rows, ld), sizes.dtype),
        ((row_blocks, ld), torch.float32) if wanted.bias else None,
        gathered if sizes.descriptors else None,
        *tail_layouts(sizes, rows, row_blocks, columns, wanted),
    ]
    shared: list[Layout | None] = [
        ((2, columns // tile.part, rows), torch.float32),
        ((slices, rows, sizes.hidden_size), torch.float32) if wanted.hidden else None,
        None if sizes.descriptors else gathered,
    ]
    return own, shared


@lru_cache(maxsize=256)
def plan_tile(sizes: Sizes, wanted: Wanted) -> TilePlan | None:
    """Chunks of rows whose whole width of logits fits, or None where too few rows do.

    Of all chunks and slices that fit, those with the least modelled time (`_chunk_time`).
    """
    budget = sizes.workspace_bytes - SPARE
    steps = ceil_div(sizes.vocabulary, sizes.tiles.hidden.depth)
    divided = wanted.hidden and not sizes.library
    most_slices = max(1, min(MAX_SLICES, steps // 16)) if divided else 1
    row_bytes = sizes.vocabulary * sizes.dtype.itemsize
    n, best = sizes.rows, None
    for rows in _chunk_sizes(min(n, max(1, budget // row_bytes))):
        for slices in range(1, most_slices + 1):
            own, shared = tile_layouts(sizes, rows, slices, wanted)
            if sum(map(size_of, own)) + max(map(size_of, shared)) > budget:
                break
            time = n // rows * _chunk_time(sizes, rows, slices, wanted)
            time += _chunk_time(sizes, n % rows, slices, wanted) if n % rows else 0.0
            if best is None or time < best[0]:
                best = time, TilePlan(rows, slices)
    least = MIN_ROWS_WITH_WEIGHT if wanted.weight else MIN_ROWS_WITHOUT_WEIGHT
    if sizes.tail:
        least = PASS_ROWS * wanted.weight + MEAN_ROWS * wanted.hidden
    return best[1] if best is not None and best[1].rows >= min(n, least) else None


def _chunk_time(sizes: Sizes, rows: int, slices: int, wanted: Wanted) -> float:
    """Modelled time of a chunk, in units of one product of one row.

    Logits cost their whole blocks of rows, dX its blocks over the share of the device that its programs fill, dW its
    rows or its pass over memory, whichever is longer. With a pooled tail the products have few columns, and a pass over
    W and one over dW come on top.
    """
    tiles, share = sizes.tiles, TAIL_SHARE if sizes.tail else 1.0
    time = float(ceil_div(rows, tiles.logits.rows) * tiles.logits.rows)
    if wanted.hidden:
        blocks = ceil_div(rows, tiles.hidden.rows)
        programs = blocks * ceil_div(sizes.hidden_size, tiles.hidden.columns) * slices
        time += share * blocks * tiles.hidden.rows / sizes.filled(programs) * (1 + 0.01 * slices)
        time += MEAN_ROWS * sizes.tail
    if wanted.weight:
        time += share * rows + PASS_ROWS if sizes.tail else max(rows, PASS_ROWS)
    return time


@dataclass(frozen=True)
class _Pieces:
    """What gradients by pieces of the vocabulary take of the workspace."""

    sizes: Sizes
    wanted: Wanted
    weight_sums: bool = False

    @property
    def budget(self) -> int:
        return self.sizes.workspace_bytes - SPARE

    @property
    def unit(self) -> int:
        """Words of the narrowest piece: a tile of logits, or a whole block that pools its tail."""
        columns = self.sizes.tiles.logits.columns
        return max(columns, TAIL_BLOCK) if self.sizes.tail else columns

    @property
    def units(self) -> int:
        """Of the vocabulary."""
        return ceil_div(self.sizes.vocabulary, self.unit)

    @property
    def wide(self) -> int:
        """Units a piece behind which a pass over the sums of dX (8 R H bytes) hides, as one over dW does behind a chunk
        of as many rows."""
        return min(self.units, ceil_div(PASS_ROWS, self.unit))

    def slices(self, rows: int) -> int:
        return slices_of(self.sizes, rows, self.sizes.vocabulary) if self.wanted.hidden else 1

    def of_rows(self, rows: int) -> tuple[Layout | None, Layout | None]:
        """What grows with rows alone: sums of dX, gathered X."""
        sizes, gathers = self.sizes, self.wanted.weight or self.sizes.descriptors
        sums = ((self.slices(rows), rows, sizes.hidden_size), torch.float32)
        return sums if self.wanted.hidden else None, sizes.gathered(rows) if gathers else None

    def layouts(self, rows: int, units: int) -> tuple[Layout | None, ...]:
        """Those of a plan (`PiecePlan.layouts`). Rows whose logits are kept begin a block of rows of their own."""
        sizes, columns, blocks = self.sizes, units * self.unit, ceil_div(rows, self.sizes.tiles.logits.rows) + 1
        ld, sums = columns + sizes.pool_columns(columns), ((columns, sizes.hidden_size), torch.float32)
        return (
            *self.of_rows(rows),
            ((rows, ld), sizes.dtype),
            ((blocks, ld), torch.float32) if self.wanted.bias else None,
            sums if self.weight_sums else None,
            *tail_layouts(sizes, rows, blocks, columns, self.wanted),
        )

    def size(self, rows: int, units: int) -> int:
        return sum(map(size_of, self.layouts(rows, units)))

    def fits(self, rows: int, units: int) -> bool:
        return self.size(rows, units) <= self.budget

    def best(self, rows: int) -> int:
        """Units a piece for chunks of `rows`: of those that fit, down to half of the most, the least modelled time.

        The most make the fewest passes, but the last wave of their programs may leave much of the device idle.
        """
        most = bisect_right(range(1, self.units + 1), self.budget, key=lambda units: self.size(rows, units))
        least = max(min(most, self.wide), ceil_div(most, 2))

        def time(units: int) -> float:
            whole, rest = divmod(self.units, units)
            return whole * self._time(rows, units) + (self._time(rows, rest) if rest else 0.0)

        return min(range(most, least - 1, -1), key=time)

    def _time(self, rows: int, units: int) -> float:
        """Modelled time of a piece, in units of one product of one column, less what does not depend on the piece.

        Logits and dW cost their columns over the share of the device that their programs fill. A piece reads and
        writes the sums of dX (PASS_ROWS columns' time), and X for logits and for dW (a quarter each); half is hidden.
        """
        logits, dw, wanted = self.sizes.tiles.logits, self.sizes.tiles.weight, self.wanted
        columns, share = units * self.unit, TAIL_SHARE if self.sizes.tail else 1.0
        times = [1 / self.sizes.filled(ceil_div(rows, logits.rows) * ceil_div(columns, logits.columns))]
        if wanted.weight:
            programs = ceil_div(math.ceil(share * columns), dw.rows) * ceil_div(self.sizes.hidden_size, dw.columns)
            times.append(share / self.sizes.filled(programs))
        passes = wanted.hidden + len(times) / 4
        return columns * sum(times) + passes * PASS_ROWS / 2


@lru_cache(maxsize=256)
def plan_pieces(sizes: Sizes, wanted: Wanted, *, weight_sums: bool = False, rows: int | None = None) -> PiecePlan:
    """Rows and columns of a piece of G; with `weight_sums` float32 sums of dW for the columns of a piece as well.

    At most half of the workspace goes to what grows with rows alone (sums of dX, gathered X), or as much as a given
    number of `rows` takes; the rest to G, as far as wider pieces are faster.

    Raises:
        ValueError: not even one row and one tile of the vocabulary fit.
    """
    pieces = _Pieces(sizes, wanted, weight_sums)
    fits, wide = pieces.fits, pieces.wide
    if rows is None:
        most = max(1, pieces.budget // (pieces.unit * sizes.dtype.itemsize))
        all_rows = sizes.rows if fits(sizes.rows, wide) else None
        half = pieces.budget // 2
        halved = _largest(sizes.rows, most, lambda r: sum(map(size_of, pieces.of_rows(r))) <= half and fits(r, wide))
        rows = all_rows or halved or _largest(sizes.rows, most, lambda r: fits(r, 1))
    if rows is None:
        raise ValueError(
            f"`workspace_mib` must hold one row of hidden states and one piece of {pieces.unit} words, expected at "
            f"least {1 + ((pieces.size(1, 1) + SPARE) >> 20)} MiB, got "
            f"{sizes.workspace_bytes / (1 << 20):.2f} MiB; raise it."
        )
    units = pieces.best(rows)
    return PiecePlan(rows, units * pieces.unit, pieces.slices(rows), pieces.layouts(rows, units))


def plan_for_fewer(sizes: Sizes, wanted: Wanted, plan: PiecePlan, live: int) -> PiecePlan:
    """The plan for pieces that follow the first, once the host knows that `live` rows are all there are.

    It lies in the bytes of `plan`, and its sums of dX in the first of them, as those of `plan` do. The rows are whole
    eighths of the plan's, so that few plans are ever made.
    """
    eighth = ceil_div(ceil_div(plan.rows, 8), ROW_MULTIPLE) * ROW_MULTIPLE
    rows = max(1, ceil_div(live, eighth)) * eighth
    if rows >= plan.rows:
        return plan
    return plan_pieces(replace(sizes, rows=rows, workspace_bytes=plan.bytes + SPARE), wanted, rows=rows)


@lru_cache(maxsize=256)
def kept_chunk(sizes: Sizes, most: int) -> int:
    """Rows of the chunk that takes all rows with kept logits (`most` of them can be kept); 0 where none fit.

    All rows of the call, or as many of the `most` as the workspace has room for. Asked before the call that keeps
    logits and again after it, so it depends on nothing but the head: every gradient counts as wanted.
    """
    pieces = _Pieces(sizes, Wanted(hidden=True, weight=True, bias=sizes.bias, report=True))
    if pieces.fits(sizes.rows, pieces.wide):
        return sizes.rows
    return _largest(sizes.rows, most, lambda r: pieces.fits(r, pieces.wide)) or 0


@lru_cache(maxsize=256)
def rows_beside(sizes: Sizes, held: int, row_bytes: int) -> int:
    """Rows, of `row_bytes` each, whose logits the workspace holds where dW's memory holds those of `held` rows.

    As many as are missing, or as leave room for pieces of sqrt(PASS_ROWS V) columns: with C columns a piece, the passes
    over the sums of dX take as long as the product of V PASS_ROWS / C columns, which one column more makes less by
    V PASS_ROWS / C^2; the logits of rows, of as many bytes, spare the product of one column. 0 where that is less than
    a block of rows, or where not all rows are in one chunk.
    """
    pieces, block = _Pieces(sizes, Wanted(hidden=True, weight=True, bias=sizes.bias, report=True)), sizes.tiles.logits
    units = min(pieces.units, ceil_div(math.isqrt(PASS_ROWS * sizes.vocabulary), pieces.unit))
    spare = pieces.budget - pieces.size(sizes.rows, units)
    missing = ceil_div(sizes.rows - held, ROW_MULTIPLE) * ROW_MULTIPLE
    rows = min(missing, spare // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE)
    return rows if rows >= min(missing, block.rows) and rows > 0 else 0


def sums_chunk(sizes: Sizes) -> int:
    """Rows, in whole blocks, whose sums of exponentials, one for each part of the vocabulary, fit the workspace, beside
    the rows themselves where they are gathered."""
    row_bytes = 4 * ceil_div(sizes.vocabulary, sizes.tiles.logits.part)
    row_bytes += sizes.dtype.itemsize * sizes.gathered_stride if sizes.descriptors else 0
    block = sizes.tiles.logits.rows
    return sizes.workspace_bytes // row_bytes // block * block


def new_buffer(
    limit: int, device: torch.device, wanted: Sequence[Layout | None], shared: Sequence[Layout | None] = ()
) -> torch.Tensor:
    """Uninitialised bytes for `cut`, at most `limit`: a call's only temporary beside vectors."""
    total = sum(map(size_of, wanted)) + max(map(size_of, shared), default=0)
    assert total <= limit, f"the plan takes {total} bytes of {limit}"
    return torch.empty(total, dtype=torch.uint8, device=device)


def cut(
    buffer: torch.Tensor, wanted: Sequence[Layout | None], shared: Sequence[Layout | None] = ()
) -> list[torch.Tensor]:
    """Uninitialised contiguous tensors of these shapes and types in the bytes of `buffer`, one behind the other.

    Those of `shared` lie over one another, for temporaries that are never needed at a time. What is not wanted (None)
    is a tensor without elements.
    """
    begins = list(itertools.accumulate(map(size_of, wanted), initial=0))
    tensors = []
    for layout, begin in zip((*wanted, *shared), (*begins, *[begins[-1]] * (len(shared) - 1)), strict=False):
        shape, dtype = layout if layout is not None else ((0,), torch.uint8)
        tensors.append(buffer[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape))
    return tensors
