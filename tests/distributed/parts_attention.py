"""Attention over sequences whose parts lie on several ranks, in plain PyTorch: for tests on a CPU.

torch's ring attention has kernels for GPUs only. This one gathers keys and values of all ranks, and masks by the global
positions. It stands for ring attention and for any other that sees whole sequences.

    register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="parts")
    with parts_of(layout, group): model(...)

`context_parallel` stands for Accelerate's `maybe_context_parallel` on a CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AttentionInterface


@dataclass(frozen=True)
class Layout:
    """Where the tokens of this rank and of all ranks stand; [T] and [R T], in the order of the ranks."""

    position: Tensor
    document: Tensor
    """The sequence that a token of a packed row belongs to; 0 in a padded batch."""
    all_positions: Tensor
    all_documents: Tensor


def slices(length: int, parts: int, part: int, *, zig_zag: bool) -> Tensor:
    """The columns of a rank: one slice, or two from both ends as ring attention cuts."""
    columns = torch.arange(length)
    if not zig_zag:
        return columns.chunk(parts)[part]
    pieces = columns.chunk(2 * parts)
    return torch.cat([pieces[part], pieces[2 * parts - 1 - part]])


class _Gather(torch.autograd.Function):
    """Keys or values [B, heads, T, D] of all ranks along T; each rank's gradient is the sum of what all ranks say."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(dist.get_world_size(ctx.group), 2)[dist.get_rank(ctx.group)], None


_sdpa = torch.nn.functional.scaled_dot_product_attention
_active: list[tuple[Layout, Any]] = []


@contextlib.contextmanager
def parts_of(layout: Layout, group: Any) -> Iterator[None]:
    """While active, sequences lie as `layout` says on the ranks of `group`."""
    _active.append((layout, group))
    try:
        yield
    finally:
        _active.pop()


def _seen(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    layout, group = _active[-1]
    key, value = _Gather.apply(key, group), _Gather.apply(value, group)
    before = layout.position[:, None] >= layout.all_positions
    same = layout.document[:, None] == layout.all_documents
    return _sdpa(query, key, value, attn_mask=before & same, scale=kwargs.get("scale"), enable_gqa=True)


def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """As transformers calls it; the mask is made here."""
    out = _seen(query, key, value, scale=kwargs.get("scaling"))
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make "parts" an attention implementation of transformers."""
    AttentionInterface.register("parts", attention)


@contextlib.contextmanager
def context_parallel(
    accelerator: Any, buffers: Any = None, buffer_seq_dims: Any = None, no_restore_buffers: Any = None
) -> Iterator[None]:
    """In place of `Accelerator.maybe_context_parallel`: cuts the same buffers in place, as ring attention cuts them."""
    if buffers is None:
        yield
        return
    group = accelerator.torch_device_mesh["cp"].get_group()
    parts, length = dist.get_world_size(group), buffers[0].shape[buffer_seq_dims[0]]
    assert length % (2 * parts) == 0, "what torch asserts"
    columns = [slices(length, parts, part, zig_zag=True) for part in range(parts)]
    mine, everywhere = columns[dist.get_rank(group)], torch.cat(columns)
    for buffer, dim in zip(buffers, buffer_seq_dims, strict=True):
        part = buffer.index_select(dim, mine)
        buffer.resize_(part.shape)
        buffer.copy_(part)
    layout = Layout(mine, torch.zeros_like(mine), everywhere, torch.zeros_like(everywhere))
    with parts_of(layout, group):
        torch.nn.functional.scaled_dot_product_attention = _seen  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.nn.functional.scaled_dot_product_attention = _sdpa
