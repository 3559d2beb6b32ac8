"""A head that a group of one rank shares: every way gives what the whole head gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
import torch
import torch.distributed as dist

from infopo_kernels import linear_infopo_loss, linear_logps
from infopo_kernels.distributed import VocabShard
from infopo_kernels.distributed.parallel import Way
from tests.distributed.one_rank import one_rank


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    with one_rank() as group:
        yield group


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("way", get_args(Way))
@pytest.mark.parametrize("loss", ["logps", "infopo"])
def test_every_way(loss: str, way: Way, dtype: torch.dtype, alone: dist.ProcessGroup) -> None:
    """Padding may hold anything; the scale of float16 gradients does not depend on it."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(4, 7, 16).to(dtype), torch.randint(50, (4, 7))
    weight = (2e-4 * torch.randn(53, 16)).to(dtype)  # float16 gradients of the hidden states underflow without a scale
    weight[50:] = torch.nan

    def run(rows: int, vocab: VocabShard | None) -> list[torch.Tensor]:
        leaves = [hidden.clone().requires_grad_(), weight[:rows].clone().requires_grad_()]
        if loss == "logps":
            value = linear_logps(*leaves, labels, reduction="mean", backend="torch", vocab=vocab).sum()
        else:
            value = linear_infopo_loss(*leaves, labels, backend="torch", vocab=vocab).loss
        (value * 1024).backward()
        return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    whole, shared = run(50, None), run(53, VocabShard(alone, vocabulary=50, way=way))
    assert shared[2][50:].eq(0).all(), "rows beyond the vocabulary are padding"
    for one, other in zip([*shared[:2], shared[2][:50]], whole, strict=True):
        torch.testing.assert_close(one, other)
