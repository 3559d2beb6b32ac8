"""Heads that tensor parallelism splits by vocabulary: DTensors, `parallelize_module`, transformers' `tp_plan`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from infopo_kernels import linear_infopo_loss, linear_logps
from infopo_kernels.distributed import VocabShard
from infopo_kernels.objectives import DPO, InfoPO, Objective
from tests.distributed.launcher import RankError, on_ranks
from tests.distributed.test_vocabulary import batch, head
from tests.training_fixtures import save_tiny_model, tiny_model

pytest.importorskip("transformers")

from infopo_kernels.integrations.transformers import attach_linear_logps


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def dtensors_case(replicated: bool) -> None:
    """Weight and bias as DTensors; hidden states plain, or a DTensor that is whole everywhere."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    labels, ref_logps = batch()
    alone = head()
    truth = linear_infopo_loss(**alone, labels=labels, ref_logps=ref_logps, backend="torch")
    truth.loss.backward()
    placements = {"hidden": [Replicate()], "weight": [Shard(0)], "bias": [Shard(0)]}
    own = {
        name: distribute_tensor(value.detach(), mesh, placements[name]).requires_grad_()
        if name != "hidden" or replicated
        else value.detach().clone().requires_grad_()
        for name, value in alone.items()
    }
    got = linear_infopo_loss(**own, labels=labels, ref_logps=ref_logps, backend="torch")
    got.loss.backward()
    assert (got.loss - truth.loss).abs() <= 1e-12
    for name, value in alone.items():
        assert own[name].grad is not None
        assert (whole(own[name].grad) - value.grad).abs().max() <= 1e-12, name  # type: ignore[arg-type, operator]
    logps = linear_logps(**own, labels=labels, vocab=VocabShard.of(own["weight"]), backend="torch")
    assert (logps - linear_logps(**alone, labels=labels, backend="torch")).abs().max() <= 1e-12


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("replicated", [False, True])
def test_dtensors(replicated: bool, size: int) -> None:
    on_ranks(size, dtensors_case, replicated)


def module_case(how: str, objective: Objective) -> None:
    """Two AdamW steps' gradients of an attached model, its head split before or after."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 259, (4, 9), generator=g)
    alone = attach_linear_logps(tiny_model(tie_word_embeddings=False))
    net = tiny_model(tie_word_embeddings=False)
    plan = {"lm_head": ColwiseParallel(output_layouts=Replicate() if how == "after, whole logits" else Shard(-1))}
    if how == "before":
        parallelize_module(net, mesh, plan)
        attach_linear_logps(net)
    else:
        attach_linear_logps(net)
        parallelize_module(net, mesh, plan)
    for each in (alone, net):
        out = each(ids, labels=ids, objective=objective)
        out.loss.backward()
        assert each(ids, labels=ids, linear_logps="sum").logps.shape == (4,)
    for (name, value), expected in zip(net.named_parameters(), alone.named_parameters(), strict=True):
        assert value.grad is not None
        assert expected[1].grad is not None
        error = (whole(value.grad) - expected[1].grad).abs().max()
        assert error <= 2e-5 * expected[1].grad.abs().max(), name
    if how == "after, whole logits":
        with torch.no_grad():
            assert (net(ids).logits - alone(ids).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("how", ["before", "after", "after, whole logits"])
@pytest.mark.parametrize("objective", [InfoPO(), DPO()], ids=["infopo", "dpo"])
def test_a_module_that_is_parallelized(objective: Objective, how: str) -> None:
    on_ranks(2, module_case, how, objective)


def tp_plan_case(path: str, plan: Any) -> None:
    import transformers

    ids = torch.randint(3, 259, (4, 9), generator=torch.Generator().manual_seed(0))
    alone = attach_linear_logps(transformers.AutoModelForCausalLM.from_pretrained(path))
    torchrun = {"WORLD_SIZE": "2", "RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank())}
    with mock.patch.dict(os.environ, torchrun):
        net = attach_linear_logps(transformers.AutoModelForCausalLM.from_pretrained(path, tp_plan=plan))
    assert isinstance(net.lm_head.weight, DTensor)
    for each in (alone, net):
        each(ids, labels=ids, infopo=InfoPO()).loss.backward()
    for (name, value), expected in zip(net.named_parameters(), alone.parameters(), strict=True):
        assert value.grad is not None
        assert expected.grad is not None
        assert (whole(value.grad) - expected.grad).abs().max() <= 5e-5 * expected.grad.abs().max(), name


def test_tp_plan_of_transformers() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = save_tiny_model(Path(directory) / "model", tie_word_embeddings=False, initializer_range=0.2)
        on_ranks(2, tp_plan_case, str(path), "auto")


def refused_case(what: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    labels, _ = batch()
    tensors = {name: value.detach() for name, value in head().items()}
    hidden, weight = tensors["hidden"], distribute_tensor(tensors["weight"], mesh, [Shard(0)])
    if what == "cut across":
        weight = distribute_tensor(tensors["weight"], mesh, [Shard(1)])
    elif what == "hidden states cut":
        hidden = distribute_tensor(hidden, mesh, [Shard(0)])
    else:  # each rank has rows of its own, and does not say so
        labels = labels.roll(dist.get_rank(), 0)
    linear_logps(hidden, weight, labels, backend="torch")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("cut across", "one Shard\\(0\\), got"),
        ("hidden states cut", "`hidden` must be whole on every rank"),
        ("other rows", "`labels` must be the same on all 2 ranks"),
    ],
)
def test_what_is_split_otherwise_is_refused(what: str, said: str) -> None:
    with pytest.raises(RankError, match=said) as caught:
        on_ranks(2, refused_case, what)
    assert all(isinstance(error, (TypeError, ValueError)) for error in caught.value.errors)
