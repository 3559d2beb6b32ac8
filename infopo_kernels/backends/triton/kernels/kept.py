# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Logits that stay in the memory of dW from `logprob` to `backward`, and G from them.

dW [V, H] is written when all rows are summed; until then its bytes are free. For every part T of the vocabulary (PART
words) they hold, of up to R rows, Q in the input type and m in float32 (`softmax_tile.py`), and behind the last part
the logits z_iy of the labels:

    part 0: Q [R, PART], m [R]    part 1: Q, m    ...    part P - 1: Q, m    z_y [R]        P = ceil(V / PART)

A part takes S = R (PART e + 4) bytes. P S + 4 R <= V H (bytes an element of dW) makes S at most the PART rows of dW
that the part stands for, so that the parts before the word v all lie before row v of dW. Pieces of the vocabulary are
therefore taken from the last to the first: rows of dW are written when their own part and those behind it have been
turned into G, and never reach one that is still needed, whatever V is a multiple of.

Bytes of the workspace may hold the logits of further rows, in the same layout. Nothing is written over them.

With the logsumexp, for the kept rows that have a weight, at the head of the list of live rows,

    l_i  = z_iy - lse_i
    G_iv = gain c_i (1[v = label_i] - exp(z_iv - lse_i)) (1 - tanh(a_iv / softcap)^2)        as `softmax_tile.py` has it
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from infopo_kernels.backends.triton.kernels.logits import IN_ANOTHER_PART, load_labels, rows_first
from infopo_kernels.backends.triton.kernels.rows import BLOCK, LiveRows, gain_of, largest_weight, new_list
from infopo_kernels.backends.triton.kernels.softmax_tile import normalised
from infopo_kernels.backends.triton.kernels.tail import Tail, stats_of, store_tail_stats
from infopo_kernels.backends.triton.launch import FUSED, Launch, ceil_div
from infopo_kernels.backends.triton.workspace import ROW_MULTIPLE
from infopo_kernels.options import IGNORE_INDEX

Room = tuple[torch.Tensor, torch.Tensor | None]
"""The memory of a weight gradient, and bytes beside it for further rows."""


@dataclass(frozen=True)
class Store:
    """The memory of a weight gradient, or bytes beside it, seen as kept logits."""

    q: torch.Tensor
    """[P, R, PART], the input type."""
    part_max: torch.Tensor
    """[P, R] float32."""
    target: torch.Tensor
    """[R] float32: logits of the labels."""


@dataclass(frozen=True)
class Kept:
    """What the kept rows of a list are made of."""

    stores: tuple[Store, ...]
    """One, or two: the second holds the rows behind the first."""
    slot: torch.Tensor
    """[N] int32: place in the stores of each kept row of the list."""
    logp: torch.Tensor
    """[N] float32 log-probabilities by row number; defined for kept rows of the list only."""


def capacity(launch: Launch, weight_grad: torch.Tensor) -> int:
    """R: rows that the memory of `weight_grad` [V, H] holds; 0 where it does not begin on 16 bytes."""
    return 0 if weight_grad.data_ptr() % 16 else rows_in_bytes(launch, weight_grad.numel() * weight_grad.element_size())


def bytes_of_row(launch: Launch) -> int:
    """Bytes of a row's Q, maxima and target."""
    part, e = launch.tiles.logits.part, launch.head.hidden.element_size()
    return ceil_div(launch.vocabulary, part) * (part * e + 4) + 4


def rows_in_bytes(launch: Launch, size: int) -> int:
    """Rows that `size` bytes hold."""
    return size // bytes_of_row(launch) // ROW_MULTIPLE * ROW_MULTIPLE


def stores_in(launch: Launch, room: Room) -> tuple[Store, ...]:
    """Views of the memory of a weight gradient, and of what is beside it."""
    weight_grad, beside = room
    own = store_in(launch, weight_grad, capacity(launch, weight_grad))
    return (own,) if beside is None else (own, store_in(launch, beside, rows_in_bytes(launch, beside.numel())))


def store_in(launch: Launch, memory: torch.Tensor, r: int) -> Store:
    """Views of `memory` as the logits of r rows."""
    part, dtype = launch.tiles.logits.part, launch.head.hidden.dtype
    parts = ceil_div(launch.vocabulary, part)
    own = r * part * dtype.itemsize
    size = own + 4 * r
    memory = memory.view(-1).view(torch.uint8)
    q, part_max = memory[: parts * size].view(dtype), memory[own : parts * size].view(torch.float32)
    return Store(
        q.as_strided((parts, r, part), (size // dtype.itemsize, part, 1)),
        part_max.as_strided((parts, r), (size // 4, 1)),
        memory[parts * size : parts * size + 4 * r].view(torch.float32),
    )


@triton.jit(do_not_specialize=["N", "first"])
def kept_rows_kernel(
    labels_ptr,
    kept_labels_ptr,
    lse_ptr,
    c_ptr,
    target_ptr,
    beside_target_ptr,
    rows_ptr,
    slot_ptr,
    logp_ptr,
    count_ptr,
    kept_ptr,
    gain_ptr,
    N,
    first,
    V,
    IGNORE: tl.constexpr,
    GAIN: tl.constexpr,
    BESIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """rows = [t scored with c_t != 0]: first those whose logits are kept, then the others, each ascending; their
    numbers; slot[i] = rank of row i among all that are kept; l_t (NaN for a label outside the vocabulary). The first
    `first` slots lie in dW, the others BESIDE it."""
    count = 0
    slots = 0
    largest = 0.0
    for start in range(0, N, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        inside = offs_n < N
        kept = (tl.load(kept_labels_ptr + offs_n, mask=inside, other=IGNORE) != IGNORE).to(tl.int32)
        slot = slots + tl.cumsum(kept, axis=0) - kept
        label = tl.load(labels_ptr + offs_n, mask=inside, other=IGNORE)
        c = tl.load(c_ptr + offs_n, mask=inside, other=0.0)
        live = (kept != 0) & (label != IGNORE) & (c != 0.0)
        if GAIN:
            largest = largest_weight(largest, c, live)
        flag = live.to(tl.int32)
        place = count + tl.cumsum(flag, axis=0) - flag
        tl.store(rows_ptr + place, offs_n, mask=live)
        tl.store(slot_ptr + place, slot, mask=live)
        # Before any row of dW is written: the last ones lie over the target logits.
        known = ((label >= 0) & (label < V)) | (label == IN_ANOTHER_PART)
        known = live & known
        target = tl.load(target_ptr + slot, mask=known & (slot < first), other=float("nan"))
        if BESIDE:
            behind = tl.load(beside_target_ptr + slot - first, mask=known & (slot >= first), other=float("nan"))
            target = tl.where(slot < first, target, behind)
        lse = tl.load(lse_ptr + offs_n, mask=live, other=0.0)
        tl.store(logp_ptr + offs_n, target - lse, mask=live)
        count += tl.sum(flag, axis=0)
        slots += tl.sum(kept, axis=0)
    tl.store(kept_ptr, count)
    for start in range(0, N, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        inside = offs_n < N
        kept = tl.load(kept_labels_ptr + offs_n, mask=inside, other=IGNORE) != IGNORE
        label = tl.load(labels_ptr + offs_n, mask=inside, other=IGNORE)
        c = tl.load(c_ptr + offs_n, mask=inside, other=0.0)
        live = (label != IGNORE) & (c != 0.0) & (kept == 0)
        if GAIN:
            largest = largest_weight(largest, c, live)
        flag = live.to(tl.int32)
        tl.store(rows_ptr + count + tl.cumsum(flag, axis=0) - flag, offs_n, mask=live)
        count += tl.sum(flag, axis=0)
    tl.store(count_ptr, count)
    if GAIN:
        tl.store(gain_ptr, gain_of(largest))


@triton.jit(do_not_specialize=["C", "part0", "parts", "first", "stride_mt", "beside_stride_mt"])
def kept_gradient_kernel(
    q_ptr,
    max_ptr,
    beside_q_ptr,
    beside_max_ptr,
    logp_ptr,
    lse_ptr,
    c_ptr,
    labels_ptr,
    rows_ptr,
    slot_ptr,
    kept_ptr,
    gain_ptr,
    g_ptr,
    db_part_ptr,
    stats_ptr,
    p_ptr,
    C,
    part0,
    parts,
    first,
    stride_qt,
    stride_mt,
    beside_stride_qt,
    beside_stride_mt,
    ld,
    V,
    softcap,
    scale,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    TAIL: tl.constexpr,
    REPORT: tl.constexpr,
    BESIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
):
    """g[i, v - v0] = G_iv (0 for v >= V), db_part[block, v - v0] = sum of G_iv / gain over the block's rows;
    v0 = PART part0."""
    here = tl.minimum(tl.load(kept_ptr), C)
    pid_n, pid_t = rows_first(tl.program_id(0), tl.cdiv(C, BLOCK_N))
    if pid_n * BLOCK_N >= here:
        return
    part = part0 + pid_t
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, PART)
    offs_v = part * PART + offs_k
    row_ok = offs_n < here
    row = tl.load(rows_ptr + offs_n, mask=row_ok, other=0)
    slot = tl.load(slot_ptr + offs_n, mask=row_ok, other=0)
    c = tl.load(c_ptr + row, mask=row_ok, other=0.0)
    logp = tl.load(logp_ptr + row, mask=row_ok, other=0.0)
    lse = tl.load(lse_ptr + row, mask=row_ok, other=0.0)
    label = load_labels(labels_ptr, row, row_ok, V)
    # The last tile of the vocabulary may hold parts that do not exist: products want zeros up to its end.
    stored = offs_n < tl.where(part < parts, here, 0)
    own = stored & (slot < first)
    part_max = tl.load(max_ptr + part.to(tl.int64) * stride_mt + slot, mask=own, other=float("-inf"))
    offs_q = part.to(tl.int64) * stride_qt + slot.to(tl.int64)[:, None] * PART + offs_k[None, :]
    q = tl.load(q_ptr + offs_q, mask=own[:, None], other=0.0)
    if BESIDE:
        away, behind = stored & (slot >= first), slot - first
        offs_m = part.to(tl.int64) * beside_stride_mt + behind
        part_max = tl.where(away, tl.load(beside_max_ptr + offs_m, mask=away, other=float("-inf")), part_max)
        offs_q = part.to(tl.int64) * beside_stride_qt + behind.to(tl.int64)[:, None] * PART + offs_k[None, :]
        q = tl.where(away[:, None], tl.load(beside_q_ptr + offs_q, mask=away[:, None], other=0.0), q)
    g, p = normalised(q, part_max, offs_v, label, c, logp, lse, softcap, scale, HAS_SOFTCAP)
    offs_k += pid_t * PART
    if BIAS_GRAD:
        tl.store(db_part_ptr + pid_n.to(tl.int64) * ld + offs_k, tl.sum(g, axis=0))
    if HAS_GAIN:
        g = g * tl.load(gain_ptr)
    offs_g = offs_n.to(tl.int64)[:, None] * ld + offs_k[None, :]
    if TAIL:
        counts = row_ok & (c != 0.0)
        stats_ptr += pid_n.to(tl.int64) * (2 * ld)
        store_tail_stats(p, offs_v, label, counts, stats_ptr, p_ptr, offs_k, offs_g, row_ok, ld, REPORT)
    tl.store(g_ptr + offs_g, g.to(g_ptr.dtype.element_ty), mask=row_ok[:, None])


def find_kept_rows(
    launch: Launch,
    stores: tuple[Store, ...],
    labels: torch.Tensor,
    kept_labels: torch.Tensor,
    lse: torch.Tensor,
    row_weight: torch.Tensor,
) -> tuple[LiveRows, Kept]:
    """The list of live rows, those with kept logits first."""
    live, n = new_list(labels), labels.numel()
    kept = Kept(stores, torch.empty_like(live.index), torch.empty_like(lse))
    own, beside = stores[0], stores[-1]
    kept_rows_kernel[(1,)](
        labels,
        kept_labels,
        lse,
        row_weight,
        own.target,
        beside.target,
        live.index,
        kept.slot,
        kept.logp,
        live.count,
        live.kept,
        live.gain,
        n,
        len(own.target),
        launch.vocabulary,
        IGNORE=IGNORE_INDEX,
        GAIN=launch.head.hidden.dtype == torch.float16,
        BESIDE=len(stores) > 1,
        BLOCK=BLOCK // 2,  # with twice as many, or with 16 warps, it spilled on sm_80 or on gfx942
        num_warps=8,
        **FUSED,
    )
    return live, kept


def launch_kept_gradient(
    launch: Launch,
    labels: torch.Tensor,
    lse: torch.Tensor,
    row_weight: torch.Tensor,
    live: LiveRows,
    kept: Kept,
    g: torch.Tensor,
    bias_part: torch.Tensor,
    v0: int,
    columns: int,
    tail: Tail | None = None,
) -> None:
    """G [C, ld] of the kept rows, which come first in the list, for columns v0 .. v0 + columns, its column sums, and
    what `tail` chooses words from."""
    head, tile, (c, ld) = launch.head, launch.tiles.logits, g.shape
    own, beside = kept.stores[0], kept.stores[-1]
    whole = ceil_div(columns, tile.columns) * tile.columns
    kept_gradient_kernel[(ceil_div(c, tile.rows) * (whole // tile.part),)](
        own.q,
        own.part_max,
        beside.q,
        beside.part_max,
        kept.logp,
        lse,
        row_weight,
        labels,
        live.index,
        kept.slot,
        live.kept,
        live.gain,
        g,
        bias_part,
        *stats_of(tail),
        c,
        v0 // tile.part,
        own.q.shape[0],
        len(own.target),
        own.q.stride(0),
        own.part_max.stride(0),
        beside.q.stride(0),
        beside.part_max.stride(0),
        ld,
        launch.vocabulary,
        1.0 if head.softcap is None else head.softcap,
        head.scale,
        HAS_SOFTCAP=head.softcap is not None,
        HAS_GAIN=g.dtype == torch.float16,
        BIAS_GRAD=bias_part.numel() > 0,
        TAIL=tail is not None,
        REPORT=tail is not None and tail.report is not None,
        BESIDE=len(kept.stores) > 1,
        BLOCK_N=tile.rows,
        PART=tile.part,
        num_warps=8,
        **FUSED,
    )
