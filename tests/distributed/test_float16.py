"""float16 gradients of a head that ranks share: the ranks agree on the scale at which they form them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from infopo_kernels import linear_preference_loss
from infopo_kernels.distributed import VocabShard
from infopo_kernels.objectives import DPO, InfoPO, Objective
from tests.distributed.launcher import on_ranks

H, V = 24, 203
FACTOR = 2.0**10


def case(objective: Objective, way: str, trained: tuple[str, ...]) -> None:
    """Parts of the head and rows of the ranks differ in size by much, so that each rank alone would choose another."""
    rank, size = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(0)
    bounds = [V * r // size for r in range(size + 1)]
    weight = torch.randn(V, H, generator=g) * 0.2
    weight[bounds[1] :] *= 30
    hidden = [torch.randn(4, 6, H, generator=g) * (0.02 if r else 2.0) for r in range(size)]
    labels = [torch.randint(0, V, (4, 6), generator=g) for _ in range(size)]
    if way == "same_rows":
        hidden, labels = hidden[:1], labels[:1]
    weight, hidden = weight.half(), [x.half() for x in hidden]
    whole = weight.double().requires_grad_("weight" in trained)
    every = [x.double().requires_grad_("hidden" in trained) for x in hidden]
    losses = [linear_preference_loss(x, whole, y, objective=objective, backend="torch").loss
              for x, y in zip(every, labels, strict=True)]  # fmt: skip
    (torch.stack(losses).sum() * FACTOR).backward()

    first, last = bounds[rank : rank + 2]
    mine = rank if len(hidden) > 1 else 0
    own = hidden[mine].requires_grad_("hidden" in trained)
    part = weight[first:last].clone().requires_grad_("weight" in trained)
    vocab = VocabShard(dist.group.WORLD, first, way=way)  # type: ignore[arg-type]
    out = linear_preference_loss(own, part, labels[mine], objective=objective, vocab=vocab)
    (out.loss * FACTOR).backward()
    right: dict[str, Any] = {"hidden": (own, every[mine].grad), "weight": (part, None)}
    if whole.grad is not None:
        right["weight"] = part, whole.grad[first:last]
    for name in trained:
        got, truth = right[name]
        error = (got.grad.double() - truth).norm() / truth.norm()
        assert error < 2e-3, f"gradient of {name}: {error:.1e}"


@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids="+".join)
@pytest.mark.parametrize("way", ["same_rows", "rows", "ring", "gather"])
@pytest.mark.parametrize("objective", [InfoPO(average=True), DPO(0.1)], ids=lambda o: o.name)
def test_one_scale_for_all_ranks(objective: Objective, way: str, trained: tuple[str, ...]) -> None:
    on_ranks(2, case, objective, way, trained)
