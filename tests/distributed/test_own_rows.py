"""A head that ranks share, with rows of its own on each, against one process in float64: every way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from infopo_kernels import linear_infopo_loss, linear_logps, linear_preference_loss
from infopo_kernels.backends import dispatch
from infopo_kernels.backends.base import Head
from infopo_kernels.distributed import VocabShard, collectives
from infopo_kernels.distributed.own_rows import TravellingRows
from infopo_kernels.distributed.parts import Parts
from infopo_kernels.distributed.ring import Ring
from infopo_kernels.distributed.same_rows import SameRows
from infopo_kernels.objectives import DPO, IPO, SFT, InfoPO, Objective, SimPO
from tests.distributed.launcher import on_ranks
from tests.distributed.test_vocabulary import H, V, assert_parts, head, part

WAYS = ("rows", "ring", "gather")
OBJECTIVES = (InfoPO(), InfoPO(0.3, 0.0, 1.0, None, 0.5, True), DPO(), IPO(), SimPO(), SFT())
LENGTHS = (9, 17, 5, 12)
"""Tokens of a sequence on each rank: ranks differ in the number of rows."""


def batches(size: int) -> list[dict[str, Any]]:
    """The batch of each rank."""
    g = torch.Generator().manual_seed(2)
    result = []
    for T in LENGTHS[:size]:
        labels = torch.randint(0, V, (4, T), generator=g)
        labels[:, :2] = -100
        ref_logps = torch.full((4,), -6.0 * T, dtype=torch.float64) + torch.rand(4, generator=g)
        result.append({"hidden": torch.randn(4, T, H, generator=g), "labels": labels, "ref_logps": ref_logps})
    return result


def whole(size: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Every rank's batch and the head, float64 leaves."""
    every, tensors = batches(size), {k: v for k, v in head().items() if k != "hidden"}
    for each in every:
        each["hidden"] = each["hidden"].double().requires_grad_()
    return every, tensors


def own_part(way: str, dtype: torch.dtype, padding: int, average: bool = False) -> tuple[dict[str, Any], VocabShard]:
    """This rank's batch and its part of the head."""
    batch = batches(dist.get_world_size())[dist.get_rank()]
    tensors, vocab = part({**head(dtype), "hidden": batch["hidden"].to(dtype).requires_grad_()}, padding)
    return {**batch, **tensors}, replace(vocab, way=way, average=average)  # type: ignore[arg-type]


def assert_own(own: dict[str, Any], every: list[dict[str, Any]], tensors: dict[str, Tensor], limit: float) -> None:
    """dX is that of the rank's own rows; dW and db that of the rows of all ranks."""
    names = [name for name in ("hidden", "weight", "bias") if name in own]
    truth = {**tensors, "hidden": every[dist.get_rank()]["hidden"]}
    assert_parts({name: own[name] for name in names}, truth, limit)


def loss_case(objective: Objective, way: str, dtype: torch.dtype, workspace: int | None, options: Any) -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    every, tensors = whole(size)
    without = {} if objective.reference != "none" else {"ref_logps": None}
    losses = []
    for each in every:
        arguments = {**each, **without, **options}
        losses.append(linear_preference_loss(**arguments, **tensors, objective=objective, num_pairs=3, backend="torch"))
    (sum(out.loss for out in losses) * 3).backward()  # type: ignore[union-attr]
    own, vocab = own_part(way, dtype, 2)
    got = linear_preference_loss(
        **{**own, **without, **options}, objective=objective, num_pairs=3, vocab=vocab, workspace_mib=workspace,
        backend="torch" if dtype == torch.float64 else "auto",
    )  # fmt: skip
    (got.loss * 3).backward()
    limit = 1e-12 if dtype == torch.float64 else 5e-5
    assert (got.loss - losses[rank].loss).abs() <= limit * losses[rank].loss.abs().clamp(min=1)
    assert (got.logps - losses[rank].logps).abs().max() <= 10 * limit
    assert_own(own, every, tensors, limit)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_every_objective(objective: Objective, size: int, way: str) -> None:
    on_ranks(size, loss_case, objective, way, torch.float64, None, {})
    on_ranks(size, loss_case, objective, way, torch.float32, None, {})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options", [{"softcap": 3.0, "shift": True}, {"logit_scale": -0.7, "temperature": 1.3}], ids=str
)
def test_every_option_of_the_logits(options: dict[str, Any], way: str) -> None:
    on_ranks(4, loss_case, InfoPO(), way, torch.float32, None, options)
    on_ranks(2, loss_case, DPO(), way, torch.float64, None, options)


def many_chunks_case(way: str, dtype: torch.dtype) -> None:
    """A workspace of 1 MiB and rows of 1024 numbers: a chunk has 16 rows of each rank."""
    size, rank = dist.get_world_size(), dist.get_rank()
    g = torch.Generator().manual_seed(3)
    weight = (torch.randn(40, 1024, generator=g) / 32).to(dtype)
    hidden = [torch.randn(2, 30 + 17 * r, 1024, generator=g).to(dtype) for r in range(size)]
    labels = [torch.randint(0, 40, x.shape[:2], generator=g) for x in hidden]
    truth_weight = weight.double().requires_grad_()
    truth_hidden = [x.double().requires_grad_() for x in hidden]
    total = sum(
        linear_infopo_loss(x, truth_weight, y, beta=0.5, backend="torch").loss
        for x, y in zip(truth_hidden, labels, strict=True)
    )
    total.backward()  # type: ignore[union-attr]
    first, last = 40 * rank // size, 40 * (rank + 1) // size
    own, x = weight[first:last].clone().requires_grad_(), hidden[rank].clone().requires_grad_()
    vocab = VocabShard(dist.group.WORLD, way=way)  # type: ignore[arg-type]
    linear_infopo_loss(x, own, labels[rank], beta=0.5, vocab=vocab, workspace_mib=1).loss.backward()
    assert x.grad is not None
    assert own.grad is not None
    for got, expected in ((x.grad, truth_hidden[rank].grad), (own.grad, truth_weight.grad[first:last])):  # type: ignore[index]
        assert expected is not None
        step = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-18
        assert (got.double() - expected).abs().max() <= step * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_many_chunks(way: str, dtype: torch.dtype) -> None:
    on_ranks(2, many_chunks_case, way, dtype)


def logps_case(reduction: str, way: str) -> None:
    every, tensors = whole(dist.get_world_size())
    truth = [
        linear_logps(each["hidden"], labels=each["labels"], **tensors, reduction=reduction, backend="torch")  # type: ignore[arg-type]
        for each in every
    ]
    sum(each.square().sum() for each in truth).backward()  # type: ignore[union-attr]
    own, vocab = own_part(way, torch.float32, 1)
    own.pop("ref_logps")
    got = linear_logps(**own, reduction=reduction, vocab=vocab)  # type: ignore[arg-type]
    got.square().sum().backward()
    assert (got - truth[dist.get_rank()]).abs().max() <= 1e-4
    assert_own(own, every, tensors, 2e-3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_log_probabilities(reduction: str, way: str) -> None:
    on_ranks(2, logps_case, reduction, way)


def frozen_case(trained: str, way: str) -> None:
    every, tensors = whole(dist.get_world_size())
    own, vocab = own_part(way, torch.float32, 0)
    for each in (tensors, own, *every):
        for name in ("hidden", "weight", "bias"):
            if name in each:
                each[name].requires_grad_(name == trained)
    for each in every:
        reference = {"ref_hidden": each["hidden"].detach() * 0.9, "ref_weight": tensors["weight"].detach()}
        out = linear_infopo_loss(**{**each, "ref_logps": None}, **tensors, **reference, backend="torch")
        out.loss.backward()
    reference = {"ref_hidden": own["hidden"].detach() * 0.9, "ref_weight": own["weight"].detach()}
    linear_infopo_loss(**{**own, "ref_logps": None}, **reference, vocab=vocab).loss.backward()
    assert_own(own, every, tensors, 1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_one_input_trained_with_a_reference_head(trained: str, way: str) -> None:
    on_ranks(2, frozen_case, trained, way)


def average_case(way: str) -> None:
    """As a wrapper does that averages: dW over the number of ranks, dX as it is."""
    own, vocab = own_part(way, torch.float32, 0)
    linear_infopo_loss(**own, vocab=vocab).loss.backward()
    other, vocab = own_part(way, torch.float32, 0, average=True)
    linear_infopo_loss(**other, vocab=vocab).loss.backward()
    for name, factor in (("hidden", 1), ("weight", 1 / 4), ("bias", 1 / 4)):
        assert (other[name].grad - own[name].grad * factor).abs().max() <= 1e-7


@pytest.mark.parametrize("way", WAYS)
def test_average(way: str) -> None:
    on_ranks(4, average_case, way)


def empty_part_case(way: str) -> None:
    """5 entries on 4 ranks: 2, 2, 1, 0, as a sharded tensor has them."""
    rank = dist.get_rank()
    g = torch.Generator().manual_seed(4)
    weight, hidden = torch.randn(5, 8, generator=g), torch.randn(4, 2, 6, 8, generator=g)
    labels = torch.randint(0, 5, (4, 2, 6), generator=g)
    truth = [weight.double().requires_grad_(), hidden.double().requires_grad_()]
    rows = range(4) if way != "same_rows" else [0]
    sum(linear_infopo_loss(truth[1][r], truth[0], labels[r], backend="torch").loss for r in rows).backward()  # type: ignore[union-attr]
    first, last = min(2 * rank, 5), min(2 * rank + 2, 5)
    own, mine = weight[first:last].clone().requires_grad_(), 0 if way == "same_rows" else rank
    x = hidden[mine].clone().requires_grad_()
    vocab = VocabShard(dist.group.WORLD, first, 5, way=way)  # type: ignore[arg-type]
    linear_infopo_loss(x, own, labels[mine], vocab=vocab).loss.backward()
    assert x.grad is not None
    assert own.grad is not None
    assert (x.grad - truth[1].grad[mine]).abs().max() <= 1e-6  # type: ignore[index]
    assert own.grad.shape == (last - first, 8)
    assert (own.grad - truth[0].grad[first:last]).abs().sum() <= 1e-5  # type: ignore[index]


@pytest.mark.parametrize("way", ["same_rows", *WAYS])
def test_a_rank_without_a_part(way: str) -> None:
    on_ranks(4, empty_part_case, way)


def outside_case(way: str) -> None:
    """Labels that lie in no part, which nothing checks on a GPU."""
    parts = Parts(collectives.name_of("group", dist.group.WORLD), (0, 9, V))
    own = dispatch.resolve("torch", torch.device("cpu"), torch.float32)
    shared = {
        "same_rows": lambda: SameRows(own, parts, 0),
        "rows": lambda: TravellingRows(own, parts),
        "ring": lambda: Ring(own, parts),
    }[way]()
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, H, generator=g), torch.randn(V, H, generator=g)
    mine = weight[parts.bounds[parts.rank] : parts.bounds[parts.rank + 1]]
    labels = torch.tensor([3, V, -1, 100, -100, 10**12])
    logp, lse = shared.logprob(Head(hidden, mine, None, None, 1.0, 1 << 20), labels)
    assert logp.isnan().tolist() == [False, True, True, False, False, True]
    truth = (hidden @ weight.T).log_softmax(1)
    assert abs(float(logp[0] - truth[0, 3])) + abs(float(logp[3] - truth[3, 100])) <= 1e-4
    assert lse.isfinite().all()


@pytest.mark.parametrize("way", ["same_rows", "rows", "ring"])
def test_labels_in_no_part_are_nan(way: str) -> None:
    on_ranks(2, outside_case, way)
