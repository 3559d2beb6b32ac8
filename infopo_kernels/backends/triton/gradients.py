"""The two ways to gradients: from one tile of logits, or by pieces of the vocabulary with a known logsumexp."""

from __future__ import annotations

import torch

from infopo_kernels.backends.base import Gradients
from infopo_kernels.backends.triton.bias_gradient import launch_bias_gradient
from infopo_kernels.backends.triton.gradient_tile import launch_gradient_tile
from infopo_kernels.backends.triton.hidden_product import launch_hidden_product, launch_store_hidden
from infopo_kernels.backends.triton.launch import Launch, ceil_div
from infopo_kernels.backends.triton.logprob import launch_merge
from infopo_kernels.backends.triton.rows import LiveRows
from infopo_kernels.backends.triton.softmax_tile import NORMALISE_ROWS, launch_normalise, launch_softmax_tile
from infopo_kernels.backends.triton.weight_product import gathered_stride, launch_gather_rows, launch_weight_product
from infopo_kernels.backends.triton.workspace import PiecePlan, TilePlan, carve, plan_pieces, tile_layouts


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
    layouts = tile_layouts(launch, plan.rows, plan.slices, gradients)
    g, target, bias_part, stats, part, gathered = carve(
        launch.head.workspace_bytes, labels.device, layouts[:3], shared=layouts[3:]
    )
    for row0 in range(0, launch.rows, plan.rows):
        launch_softmax_tile(launch, labels, live, g, stats[0], stats[1], target, row0)
        launch_merge(launch, labels, live, stats[0], stats[1], target, logp, lse, row0)
        launch_normalise(launch, labels, live, g, stats[0], logp, lse, row_weight, bias_part, row0)
        if gradients.hidden is not None:
            launch_hidden_product(launch, live, g, part, row0, 0, v, add=False)
            launch_store_hidden(launch, live, part, gradients.hidden, row0)
        if gradients.weight is not None:
            launch_gather_rows(launch, live, gathered, row0)
            launch_weight_product(launch, live, g, gathered, gradients.weight, row0, add=True)
        if gradients.bias is not None:
            launch_bias_gradient(launch, live, bias_part, gradients.bias, row0, plan.rows, NORMALISE_ROWS)


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
    the workspace, dX and dW are formed one after the other, each rounded once, and the logits twice (4 products).
    """
    hidden, weight, bias = gradients.hidden, gradients.weight, gradients.bias
    plan = plan_pieces(launch, hidden=hidden is not None, weight=weight is not None, bias=bias is not None)
    if weight is None or weight.dtype == torch.float32 or plan.rows >= launch.rows:
        _by_rows(launch, plan, labels, lse, row_weight, live, gradients)
        return
    if hidden is not None:
        plan = plan_pieces(launch, hidden=True, weight=False, bias=False)
        _by_rows(launch, plan, labels, lse, row_weight, live, Gradients(hidden, None, None))
    plan = plan_pieces(launch, hidden=False, weight=True, bias=bias is not None, weight_sums=True)
    _by_vocabulary(launch, plan, labels, lse, row_weight, live, weight, bias)


def _by_rows(
    launch: Launch,
    plan: PiecePlan,
    labels: torch.Tensor,
    lse: torch.Tensor,
    row_weight: torch.Tensor,
    live: LiveRows,
    gradients: Gradients,
) -> None:
    """Chunks of rows outside, pieces of the vocabulary inside: dX complete per chunk, dW added to once per chunk."""
    hidden, weight, bias = gradients.hidden, gradients.weight, gradients.bias
    v, h, dtype, block = launch.vocabulary, launch.hidden_size, launch.head.hidden.dtype, launch.tiles.logits.rows
    g, part, gathered, bias_part = carve(
        launch.head.workspace_bytes,
        labels.device,
        (
            ((plan.rows, plan.columns), dtype),
            ((plan.slices, plan.rows, h), torch.float32) if hidden is not None else None,
            ((plan.rows, gathered_stride(h)), dtype) if weight is not None else None,
            ((ceil_div(plan.rows, block), plan.columns), torch.float32) if bias is not None else None,
        ),
    )
    for row0 in range(0, launch.rows, plan.rows):
        if weight is not None:
            launch_gather_rows(launch, live, gathered, row0)
        for v0 in range(0, v, plan.columns):
            columns = min(plan.columns, v - v0)
            launch_gradient_tile(launch, labels, lse, row_weight, live, g, bias_part, row0, v0, columns)
            if hidden is not None:
                launch_hidden_product(launch, live, g, part, row0, v0, columns, add=v0 > 0)
            if weight is not None:
                launch_weight_product(launch, live, g, gathered, weight[v0 : v0 + columns], row0, add=True)
            if bias is not None:
                launch_bias_gradient(launch, live, bias_part, bias[v0 : v0 + columns], row0, plan.rows, block)
        if hidden is not None:
            launch_store_hidden(launch, live, part, hidden, row0)


def _by_vocabulary(
    launch: Launch,
    plan: PiecePlan,
    labels: torch.Tensor,
    lse: torch.Tensor,
    row_weight: torch.Tensor,
    live: LiveRows,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Pieces of the vocabulary outside, chunks of rows inside: each entry of a 16-bit dW is rounded once."""
    h, dtype, block = launch.hidden_size, launch.head.hidden.dtype, launch.tiles.logits.rows
    g, gathered, sums, bias_part = carve(
        launch.head.workspace_bytes,
        labels.device,
        (
            ((plan.rows, plan.columns), dtype),
            ((plan.rows, gathered_stride(h)), dtype),
            ((plan.columns, h), torch.float32),
            ((ceil_div(plan.rows, block), plan.columns), torch.float32) if bias is not None else None,
        ),
    )
    for v0 in range(0, launch.vocabulary, plan.columns):
        columns = min(plan.columns, launch.vocabulary - v0)
        for row0 in range(0, launch.rows, plan.rows):
            launch_gather_rows(launch, live, gathered, row0)
            launch_gradient_tile(launch, labels, lse, row_weight, live, g, bias_part, row0, v0, columns)
            launch_weight_product(launch, live, g, gathered, sums[:columns], row0, add=row0 > 0)
            if bias is not None:
                launch_bias_gradient(launch, live, bias_part, bias[v0 : v0 + columns], row0, plan.rows, block)
        weight[v0 : v0 + columns].add_(sums[:columns])
