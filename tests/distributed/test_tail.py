"""The pooled tail of a head that ranks share: each rank pools its own part, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from infopo_kernels import linear_infopo_loss, linear_logps, naive
from infopo_kernels.distributed import VocabShard
from tests.distributed.launcher import on_ranks

V, H, N, THETA = 160, 24, 40, 0.02


def case(backend: str) -> None:
    """Each part of 80 words is one block, so the definition with blocks of 80 is what the ranks form together."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, H, generator=g), torch.randn(V, H, generator=g) / H**0.5
    hidden[:, 0], weight[:, 0] = 1, 3 * torch.randn(V, generator=g)
    labels, c = torch.randint(0, V, (N,), generator=g), torch.randn(N, generator=g)
    want = naive.tail_gradients(hidden, weight, labels, c, [torch.arange(N)], threshold=THETA, block=80)
    assert 0 < want.kept < V // 2
    rank = dist.get_rank()
    own, x = weight[80 * rank : 80 * (rank + 1)].clone().requires_grad_(), hidden.clone().requires_grad_()
    vocab = VocabShard(dist.group.WORLD)
    logps = linear_logps(x, own, labels, backend=backend, tail_threshold=THETA, vocab=vocab)
    (logps * c).sum().backward()
    assert x.grad is not None
    assert own.grad is not None
    torch.testing.assert_close(x.grad.double(), want.hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.grad.double(), want.weight[80 * rank : 80 * (rank + 1)], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="`report_tail=True` was given with a head that ranks share"):
        linear_infopo_loss(x, own, labels, is_chosen=labels[:1] >= 0, vocab=vocab, report_tail=True)
    with pytest.raises(ValueError, match="`grad_weight_into` must go with a head that this rank holds as a whole"):
        linear_logps(x, own, labels, vocab=vocab, grad_weight_into=torch.zeros_like(own))


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_each_rank_pools_its_own_part(backend: str) -> None:
    on_ranks(2, case, backend)
