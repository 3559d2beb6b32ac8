"""The ways to gradients: from one tile of logits, or by pieces of the vocabulary with a known logsumexp, where the
logits of some rows may have been kept in the memory of dW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from infopo_kernels.backends.base import Gradients, Wanted
from infopo_kernels.backends.triton.kernels.bias_gradient import launch_bias_gradient
from infopo_kernels.backends.triton.kernels.gradient_tile import launch_gradient_tile
from infopo_kernels.backends.triton.kernels.hidden_product import launch_store_hidden
from infopo_kernels.backends.triton.kernels.kept import (
    Kept,
    Room,
    bytes_of_row,
    capacity,
    find_kept_rows,
    launch_kept_gradient,
    stores_in,
)
from infopo_kernels.backends.triton.kernels.logprob import launch_merge
from infopo_kernels.backends.triton.kernels.rows import LiveRows, launch_gather_rows, room_for_rows, rows_in
from infopo_kernels.backends.triton.kernels.softmax_tile import NORMALISE_ROWS, launch_normalise, launch_softmax_tile
from infopo_kernels.backends.triton.kernels.tail import Tail, launch_pool_tail
from infopo_kernels.backends.triton.launch import Launch, ceil_div
from infopo_kernels.backends.triton.products import products_of
from infopo_kernels.backends.triton.workspace import (
    ROW_MULTIPLE,
    PiecePlan,
    TilePlan,
    cut,
    kept_chunk,
    new_buffer,
    plan_for_fewer,
    plan_pieces,
    rows_beside,
    sums_chunk,
    tile_layouts,
)


def gradients_from_tiles(
    launch: Launch,
    plan: TilePlan,
    labels: torch.Tensor,
    row_weight: torch.Tensor,
    live: LiveRows,
    logp: torch.Tensor,
    lse: torch.Tensor,
    gradients: Gradients,
) -> None:
    """l, lse and the gradients chunk by chunk of rows, each from logits that are formed once.

    Products: 1 (logits), + 1 (dX), + 1 (dW).
    """
    v = launch.vocabulary
    own, shared = tile_layouts(launch.sizes, plan.rows, plan.slices, Wanted.of(gradients))
    buffer = new_buffer(launch.head.workspace_bytes, labels.device, own, shared)
    g, bias_part, early, *of_tail, stats, part, late = cut(buffer, own, shared)
    tail = _tail(launch, g, gradients, of_tail)
    gathered = early if launch.sizes.descriptors else late
    q = g.view(plan.rows, -1, launch.tiles.logits.part).transpose(0, 1)
    products = products_of(launch, live, tail)
    for row0 in range(0, launch.rows, plan.rows):
        if products.done(row0):
            break
        if launch.sizes.descriptors:
            launch_gather_rows(launch, live, gathered, row0)
        launch_softmax_tile(launch, live, q, stats[0], stats[1], row0, gathered)
        launch_merge(launch, labels, live, stats[0], stats[1], logp, lse, row0)
        launch_normalise(launch, labels, live, g, stats[0], logp, lse, row_weight, bias_part, row0, tail)
        if tail is not None:
            launch_pool_tail(launch, live, tail, row_weight, g, row0, 0, v, NORMALISE_ROWS, first=True)
        if gradients.hidden is not None:
            products.hidden(g, part, row0, 0, v, add=False)
            launch_store_hidden(launch, live, part, gradients.hidden, row0)
        if gradients.weight is not None:
            if not launch.sizes.descriptors:
                launch_gather_rows(launch, live, gathered, row0)
            products.weight(g, gathered, gradients.weight, row0, add=True)
        if gradients.bias is not None:
            launch_bias_gradient(launch, live, bias_part, gradients.bias, row0, plan.rows, NORMALISE_ROWS, tail)


def _tail(launch: Launch, g: torch.Tensor, gradients: Gradients, memory: Sequence[torch.Tensor]) -> Tail | None:
    """The tail of pieces of G [C, ld] in the memory of `tail_layouts`; None without a threshold."""
    if not memory:
        return None
    stats, p, share, *others = memory
    return Tail(launch.head.tail_threshold, len(share), gradients.tail, stats, p, share, *others)


def kept_rows(launch: Launch, weight_grad: torch.Tensor) -> int:
    """Rows whose logits the memory of `weight_grad` and the workspace hold, and whose sums of dX a chunk holds.

    0 where that is less than a block of rows, which is not worth a launch of its own, or where a 16-bit dW would be
    rounded twice: the kept rows make its first chunk, so that all rows of the call have to be in it. 0 where kept
    exponentials do not hold the probabilities that a pooled tail wants.
    """
    if not launch.keeps_logits:
        return 0
    held = capacity(launch, weight_grad)
    beside = _rows_beside(launch, held)
    rest = replace(launch.sizes, workspace_bytes=launch.sizes.workspace_bytes - beside * bytes_of_row(launch))
    chunk = kept_chunk(rest, held + beside)
    most = min(held + beside, chunk)
    pays = most >= min(launch.rows, launch.tiles.logits.rows) and sums_chunk(rest) > 0
    once = weight_grad.dtype == torch.float32 or chunk >= launch.rows
    return most if pays and once else 0


def memory_for_logits(launch: Launch, weight_grad: torch.Tensor, rows: int) -> torch.Tensor | None:
    """Uninitialised bytes of the workspace for those of the rows that the memory of `weight_grad` has no room for."""
    held = capacity(launch, weight_grad)
    beside = min(_rows_beside(launch, held), ceil_div(max(0, rows - held), ROW_MULTIPLE) * ROW_MULTIPLE)
    size = beside * bytes_of_row(launch)
    return torch.empty(size, dtype=torch.uint8, device=weight_grad.device) if size else None


def _rows_beside(launch: Launch, held: int) -> int:
    """Rows whose logits the workspace holds where a weight gradient's memory holds those of `held` rows."""
    return rows_beside(launch.sizes, held, bytes_of_row(launch)) if held else 0


def logprob_keeping(
    launch: Launch, labels: torch.Tensor, live: LiveRows, room: Room, logp: torch.Tensor, lse: torch.Tensor
) -> None:
    """l and lse of the live rows, whose logits stay in `room`. One product."""
    stores = stores_in(launch, room)
    places = sum(len(store.target) for store in stores)
    most = min(places, kept_chunk(launch.sizes, places))
    parts, c, first = len(stores[0].q), min(most, sums_chunk(launch.sizes)), 0
    sums = torch.empty(parts * c, dtype=torch.float32, device=labels.device)
    memory = room_for_rows(launch, c)
    for store in stores:
        rows = min(len(store.target), most - first)
        for begin in range(0, rows, c):
            chunk, row0 = slice(begin, min(begin + c, rows)), first + begin
            part_sum = sums[: parts * (chunk.stop - begin)].view(parts, -1)
            q, part_max, target = store.q[:, chunk], store.part_max[:, chunk], store.target[chunk]
            gathered = rows_in(launch, live, memory, row0, chunk.stop - begin)
            launch_softmax_tile(launch, live, q, part_max, part_sum, row0, gathered)
            launch_merge(launch, labels, live, part_max, part_sum, logp, lse, row0, target)
        first += rows


def gradients_from_kept(
    launch: Launch,
    labels: torch.Tensor,
    kept_labels: torch.Tensor,
    lse: torch.Tensor,
    row_weight: torch.Tensor,
    gradients: Gradients,
) -> None:
    """The gradients with a known logsumexp, where dW's memory holds the logits of some rows; dW is assigned.

    Products: 1 (dX), + 1 (dW), and for rows that are not kept + 1 (logits).
    """
    assert gradients.weight is not None
    stores = stores_in(launch, (gradients.weight, gradients.logits))
    rows = kept_chunk(launch.sizes, sum(len(store.target) for store in stores))
    plan = plan_pieces(launch.sizes, Wanted.of(gradients), rows=rows)
    live, kept = find_kept_rows(launch, stores, labels, kept_labels, lse, row_weight)
    _by_rows(launch, plan, labels, lse, row_weight, live, gradients, kept)


def gradients_from_lse(
    launch: Launch,
    labels: torch.Tensor,
    lse: torch.Tensor,
    row_weight: torch.Tensor,
    live: LiveRows,
    gradients: Gradients,
) -> None:
    """The gradients with a known logsumexp.

    Products: 1 (logits), + 1 (dX), + 1 (dW). Where dW is 16-bit and the float32 sums of dX for all rows do not fit
    the workspace, dX and dW are formed one after the other, each rounded once, and the logits twice (4 products); what
    is reported of a pooled tail is that of dX.
    """
    plan, weight = plan_pieces(launch.sizes, Wanted.of(gradients)), gradients.weight
    if weight is None or weight.dtype == torch.float32 or plan.rows >= launch.rows:
        _by_rows(launch, plan, labels, lse, row_weight, live, gradients)
        return
    if gradients.hidden is not None:
        own = replace(gradients, weight=None, bias=None)
        _by_rows(launch, plan_pieces(launch.sizes, Wanted.of(own)), labels, lse, row_weight, live, own)
        gradients = replace(gradients, hidden=None, tail=None)
    plan = plan_pieces(launch.sizes, Wanted.of(gradients), weight_sums=True)
    _by_vocabulary(launch, plan, labels, lse, row_weight, live, gradients)


def _by_rows(
    launch: Launch,
    plan: PiecePlan,
    labels: torch.Tensor,
    lse: torch.Tensor,
    row_weight: torch.Tensor,
    live: LiveRows,
    gradients: Gradients,
    kept: Kept | None = None,
) -> None:
    """Chunks of rows outside, pieces of the vocabulary inside: dX complete per chunk, dW added to once per chunk.

    All rows with kept logits are in the first chunk, which assigns dW: a piece's rows of it are written when the logits
    that lie there have become G, and the last piece comes first (`kernels/kept.py`).

    From its second piece on, the first chunk is planned for the rows that are live, where the host has learnt their
    number for the products: fewer rows make wider pieces, and fewer passes over the sums of dX.
    """
    hidden, weight, bias = gradients.hidden, gradients.weight, gradients.bias
    v, block = launch.vocabulary, launch.tiles.logits.rows
    buffer = new_buffer(launch.head.workspace_bytes, labels.device, plan.layouts)
    part, gathered, g, bias_part, _, *of_tail = cut(buffer, plan.layouts)
    tail = _tail(launch, g, gradients, of_tail)
    products = products_of(launch, live, tail)
    for row0 in range(0, launch.rows, plan.rows):
        if products.done(row0):
            break
        if gathered.numel():
            launch_gather_rows(launch, live, gathered, row0)
        from_kept, end = kept if row0 == 0 else None, v
        while end > 0:
            v0, columns = last_piece(end, plan.columns)
            if from_kept is not None:
                launch_kept_gradient(launch, labels, lse, row_weight, live, from_kept, g, bias_part, v0, columns, tail)
            launch_gradient_tile(launch, labels, lse, row_weight, live, g, bias_part, row0, v0, columns, gathered, tail)
            if tail is not None:
                first = v0 + columns == v
                launch_pool_tail(launch, live, tail, row_weight, g, row0, v0, columns, block, first=first)
            if hidden is not None:
                products.hidden(g, part, row0, v0, columns, add=v0 + columns < v)
            if weight is not None:
                into, add = weight[v0 : v0 + columns], from_kept is None
                products.weight(g, gathered, into, row0, add=add)
            if bias is not None:
                launch_bias_gradient(launch, live, bias_part, bias[v0 : v0 + columns], row0, len(g), block, tail)
            if row0 == 0 and end == v and (count := products.known_rows()) is not None:
                fewer = plan_for_fewer(launch.sizes, Wanted.of(gradients), plan, count)
                if fewer is not plan:
                    plan = fewer
                    part, gathered, g, bias_part, *_ = cut(buffer, plan.layouts)  # the sums of dX stay where they are
                    if gathered.numel():
                        launch_gather_rows(launch, live, gathered, row0)
            end -= columns
        if hidden is not None:
            launch_store_hidden(launch, live, part, hidden, row0)


def last_piece(end: int, columns: int) -> tuple[int, int]:
    """The first word and the number of words of the last of the pieces, of `columns` words each, of words 0 .. end."""
    v0 = (ceil_div(end, columns) - 1) * columns
    return v0, end - v0


def _by_vocabulary(
    launch: Launch,
    plan: PiecePlan,
    labels: torch.Tensor,
    lse: torch.Tensor,
    row_weight: torch.Tensor,
    live: LiveRows,
    gradients: Gradients,
) -> None:
    """Pieces of the vocabulary outside, chunks of rows inside: each entry of a 16-bit dW is rounded once."""
    weight, bias, block = gradients.weight, gradients.bias, launch.tiles.logits.rows
    assert weight is not None
    buffer = new_buffer(launch.head.workspace_bytes, labels.device, plan.layouts)
    _, gathered, g, bias_part, sums, *of_tail = cut(buffer, plan.layouts)
    tail = _tail(launch, g, gradients, of_tail)
    products = products_of(launch, live, tail)
    for v0 in range(0, launch.vocabulary, plan.columns):
        columns = min(plan.columns, launch.vocabulary - v0)
        for row0 in range(0, launch.rows, plan.rows):
            if products.done(row0):
                break
            launch_gather_rows(launch, live, gathered, row0)
            launch_gradient_tile(launch, labels, lse, row_weight, live, g, bias_part, row0, v0, columns, gathered, tail)
            if tail is not None:
                launch_pool_tail(launch, live, tail, row_weight, g, row0, v0, columns, block, first=v0 == 0)
            products.weight(g, gathered, sums[:columns], row0, add=row0 > 0)
            if bias is not None:
                launch_bias_gradient(launch, live, bias_part, bias[v0 : v0 + columns], row0, plan.rows, block, tail)
        weight[v0 : v0 + columns].add_(sums[:columns])
