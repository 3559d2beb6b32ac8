"""A head whose vocabulary the ranks share, the same rows on each, against one process in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from infopo_kernels import linear_infopo_loss, linear_logps, linear_preference_loss
from infopo_kernels.distributed import VocabShard
from infopo_kernels.objectives import DPO, IPO, SFT, InfoPO, Objective, SimPO
from tests.distributed.launcher import on_ranks

V, H, S, T = 203, 24, 4, 13
BOUNDS = {2: (0, 80, V), 4: (0, 50, 51, 170, V)}
OBJECTIVES = (InfoPO(), InfoPO(0.3, 0.0, 1.0, None, 0.5, True), DPO(), IPO(), SimPO(), SFT())


def head(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    tensors = {
        "hidden": torch.randn(S, T, H, generator=g),
        "weight": torch.randn(V, H, generator=g) * 0.5,
        "bias": torch.randn(V, generator=g),
    }
    return {name: value.to(dtype).requires_grad_() for name, value in tensors.items()}


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, V, (S, T), generator=g)
    labels[:, :3] = -100
    return labels, torch.full((S,), -60.0, dtype=torch.float64) + torch.rand(S, generator=g)


def part(tensors: dict[str, Tensor], padding: int) -> tuple[dict[str, Tensor], VocabShard]:
    """This rank's part of the head, the last one with rows of padding."""
    rank, size = dist.get_rank(), dist.get_world_size()
    first, last = BOUNDS[size][rank : rank + 2]
    own = {name: value.detach()[first:last] for name, value in tensors.items() if name != "hidden"}
    if rank == size - 1 and padding:
        own = {
            name: torch.cat([value, torch.full_like(value[:1], 9.0).expand(padding, *value.shape[1:])])
            for name, value in own.items()
        }
    leaves = {name: value.clone().requires_grad_() for name, value in own.items()}
    return {"hidden": tensors["hidden"], **leaves}, VocabShard(dist.group.WORLD, first, V if padding else None)


def assert_parts(own: dict[str, Tensor], whole: dict[str, Tensor], limit: float) -> None:
    """The gradients of a rank's part are those of the whole head; those of padding are 0."""
    rank, size = dist.get_rank(), dist.get_world_size()
    first, last = BOUNDS[size][rank : rank + 2]
    for name, value in own.items():
        expected = whole[name].grad
        if expected is None:
            assert value.grad is None
            continue
        assert value.grad is not None
        got = value.grad
        if name != "hidden":
            assert got[last - first :].eq(0).all()
            got, expected = got[: last - first], expected[first:last]
        assert (got.double() - expected).abs().max() <= limit, name


def loss_case(objective: Objective, options: dict[str, Any], dtype: torch.dtype, backend: str, padding: int) -> None:
    labels, ref_logps = batch()
    whole = head()
    arguments: dict[str, Any] = {"objective": objective, "labels": labels, "num_pairs": 2, **options}
    if objective.reference != "none":
        arguments["ref_logps"] = ref_logps
    truth = linear_preference_loss(**whole, **arguments, backend="torch")
    (truth.loss * 3).backward()
    own, vocab = part(head(dtype), padding)
    got = linear_preference_loss(**own, **arguments, vocab=vocab, backend=backend)
    (got.loss * 3).backward()
    limit = 1e-12 if dtype == torch.float64 else 2e-5
    assert (got.loss - truth.loss).abs() <= limit * truth.loss.abs().clamp(min=1)
    assert (got.logps - truth.logps).abs().max() <= 10 * limit
    assert_parts(own, whole, limit)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_every_objective(objective: Objective, size: int) -> None:
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "auto")):
        on_ranks(size, loss_case, objective, {}, dtype, backend, 3)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "options", [{"softcap": 3.0, "shift": True}, {"logit_scale": -0.7, "temperature": 1.3}], ids=str
)
def test_every_option_of_the_logits(options: dict[str, Any], size: int) -> None:
    on_ranks(size, loss_case, InfoPO(), options, torch.float32, "auto", 0)
    on_ranks(size, loss_case, DPO(), options, torch.float64, "torch", 5)


def logps_case(reduction: str) -> None:
    labels, _ = batch()
    whole = head()
    truth = linear_logps(**whole, labels=labels, reduction=reduction, backend="torch")  # type: ignore[arg-type]
    truth.square().sum().backward()
    own, vocab = part(head(torch.float32), 1)
    got = linear_logps(**own, labels=labels, reduction=reduction, vocab=vocab)  # type: ignore[arg-type]
    got.square().sum().backward()
    assert (got - truth).abs().max() <= 1e-4
    assert_parts(own, whole, 1e-3)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_log_probabilities(reduction: str) -> None:
    on_ranks(2, logps_case, reduction)


def masked_part_case(way: str, backend: str, label: bool) -> None:
    """The bias removes the whole part of the last rank; a rejected response has a label there, or none has."""
    size = dist.get_world_size()
    first = BOUNDS[size][-2]
    tensors, (labels, ref_logps) = head(), batch()
    with torch.no_grad():
        tensors["bias"][first:] = -torch.inf
    labels = torch.where(labels >= first, labels % first, labels)
    if label:
        labels[-1, 5] = first + 1
    whole = {name: value.detach().clone().requires_grad_() for name, value in tensors.items()}
    truth = linear_infopo_loss(**whole, labels=labels, ref_logps=ref_logps, backend="torch")
    truth.loss.backward()
    assert truth.loss.isfinite()
    assert bool(truth.logps[-1].isneginf()) == label
    floats = {name: value.detach().float().requires_grad_() for name, value in tensors.items()}
    own, vocab = part(floats, 0)
    vocab = replace(vocab, way=way, average=way != "same_rows")  # type: ignore[arg-type]
    got = linear_infopo_loss(**own, labels=labels, ref_logps=ref_logps, vocab=vocab, backend=backend)  # type: ignore[arg-type]
    got.loss.backward()
    assert (got.loss - truth.loss).abs() <= 2e-5 * truth.loss.abs().clamp(min=1)
    assert torch.equal(got.logps.isneginf(), truth.logps.isneginf())
    assert_parts(own, whole, 2e-5)


@pytest.mark.parametrize("label", [False, True], ids=["no-label-there", "a-label-there"])
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("way", ["same_rows", "rows", "ring", "gather"])
def test_a_part_that_the_bias_removes(way: str, backend: str, label: bool) -> None:
    on_ranks(2, masked_part_case, way, backend, label)


def frozen_case(trained: str) -> None:
    labels, _ = batch()
    whole = head()
    own, vocab = part(head(torch.float32), 0)
    for tensors in (whole, own):
        for name, value in tensors.items():
            value.requires_grad_(name == trained)
    reference = {name: value.detach() * 0.9 for name, value in whole.items()}
    arguments = {f"ref_{name}": value for name, value in reference.items()}
    linear_infopo_loss(**whole, labels=labels, **arguments, backend="torch").loss.backward()
    own_reference, _ = part(reference, 0)
    arguments = {f"ref_{name}": value.detach().float() for name, value in own_reference.items()}
    linear_infopo_loss(**own, labels=labels, **arguments, vocab=vocab).loss.backward()
    assert_parts(own, whole, 1e-5)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_one_input_trained_with_a_reference_head(trained: str) -> None:
    on_ranks(2, frozen_case, trained)


def compiled_case(way: str) -> None:
    """One graph: the collectives of a shared head lie inside an op."""
    labels, ref_logps = batch()
    own, vocab = part(head(torch.float32), 0)
    vocab = replace(vocab, way=way)  # type: ignore[arg-type]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        arguments = {"bias": bias, "ref_logps": ref_logps, "vocab": vocab}
        return linear_infopo_loss(hidden, weight, labels, **arguments).loss  # type: ignore[arg-type]

    expected = loss(**own)
    wanted = torch.autograd.grad(expected, list(own.values()))
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(**own)
    assert torch.equal(got, expected)
    for one, other in zip(torch.autograd.grad(got, list(own.values())), wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("way", ["same_rows", "rows"])
def test_compiled(way: str) -> None:
    on_ranks(2, compiled_case, way)
