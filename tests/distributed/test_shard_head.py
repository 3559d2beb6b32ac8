"""`shard_head`: three steps of AdamW under FSDP2 with a head that stays where it lives, against one process."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from infopo_kernels.objectives import DPO, InfoPO, Objective
from tests.distributed.launcher import RankError, on_ranks
from tests.training_fixtures import tiny_model

pytest.importorskip("transformers")

from infopo_kernels.integrations.shard_head import shard_head
from infopo_kernels.integrations.transformers import attach_linear_logps

STEPS = 3


def model(**config: Any) -> Any:
    return attach_linear_logps(tiny_model(tie_word_embeddings=False, initializer_range=0.2, **config)).train()


def batch(step: int, rank: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(3, 259, (4, 8 + 3 * rank), generator=g)
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def train(net: Any, ranks: list[int], objective: Objective, divisor: int) -> list[float]:
    """Losses of each step, with clipped gradients."""
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=1e-2), []
    for step in range(STEPS):
        total = 0.0
        for rank in ranks:
            out = net(**batch(step, rank), objective=objective, num_pairs=2)
            (out.loss / divisor).backward()
            total += float(out.loss.detach())
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def sharded(way: str, policy: MixedPrecisionPolicy | None = None) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    net = model()
    ignored = shard_head(net, mesh, way=way)  # type: ignore[arg-type]
    options = {"mesh": mesh, **({} if policy is None else {"mp_policy": policy})}
    for layer in net.model.layers:
        fully_shard(layer, **options)
    return fully_shard(net, ignored_params=ignored, **options)


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def steps_case(way: str, objective: Objective) -> None:
    """In float64: AdamW makes a whole step of a gradient that differs in its last bits only."""
    size, rank = dist.get_world_size(), dist.get_rank()
    torch.set_default_dtype(torch.float64)
    try:
        alone, net = model(), sharded(way)
    finally:
        torch.set_default_dtype(torch.float32)
    train(alone, list(range(size)), objective, size)
    own = train(net, [rank], objective, 1)
    assert all(torch.tensor(own).isfinite())
    assert isinstance(net.lm_head.weight, DTensor)
    for (name, value), expected in zip(net.named_parameters(), alone.parameters(), strict=True):
        assert (whole(value) - expected).abs().max() <= 1e-9, name


@pytest.mark.parametrize("way", ["auto", "rows", "ring", "gather"])
@pytest.mark.parametrize("objective", [InfoPO(beta=0.5, average=True), DPO(beta=0.5)], ids=["infopo", "dpo"])
@pytest.mark.parametrize("size", [2, 4])
def test_three_steps_are_those_of_one_process(size: int, objective: Objective, way: str) -> None:
    on_ranks(size, steps_case, way, objective)


def checkpoint_case(directory: str) -> None:
    """A distributed checkpoint and a full one bring the same weights back; logits are those of the whole head."""
    net = sharded("rows")
    train(net, [dist.get_rank()], InfoPO(beta=0.5), 1)
    full = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
    ids = batch(7, dist.get_rank())["input_ids"]
    with torch.no_grad():
        logits = net(ids).logits
    state = get_model_state_dict(net)
    dcp.save({"model": state}, checkpoint_id=directory)
    other = sharded("ring")
    state = get_model_state_dict(other)
    dcp.load({"model": state}, checkpoint_id=directory)
    set_model_state_dict(other, state)
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(one), whole(two))
    if dist.get_rank() == 0:
        alone = model()
        alone.load_state_dict(full)
        with torch.no_grad():
            assert (alone(ids).logits - logits).abs().max() <= 1e-4


def test_checkpoints() -> None:
    with tempfile.TemporaryDirectory() as directory:
        on_ranks(2, checkpoint_case, directory)


def half_case() -> None:
    """FSDP's mixed precision leaves the head in float32, and its products follow the hidden states."""
    net = sharded("rows", MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    out = net(**batch(0, dist.get_rank()), infopo=InfoPO(beta=0.5, average=True), num_pairs=2)
    out.loss.backward()
    exact = model()(**batch(0, dist.get_rank()), infopo=InfoPO(beta=0.5, average=True), num_pairs=2)
    assert net.lm_head.weight.dtype == torch.float32
    assert net.lm_head.weight.grad.dtype == torch.float32
    assert (out.logps - exact.logps).abs().max() <= 0.05 * exact.logps.abs().max()


def test_mixed_precision() -> None:
    on_ranks(2, half_case)


def refused_case(what: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    if what == "tied":
        shard_head(attach_linear_logps(tiny_model(tie_word_embeddings=True)), mesh)
    elif what == "not attached":
        shard_head(tiny_model(tie_word_embeddings=False), mesh)
    elif what == "unknown way":
        shard_head(model(), mesh, way="same_rows")  # type: ignore[arg-type]
    else:
        net = model()
        shard_head(net, mesh)
        shard_head(net, mesh)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("tied", "tied to its embedding"),
        ("not attached", "attach_linear_logps"),
        ("unknown way", "'auto', 'rows', 'ring', 'gather', got 'same_rows'"),
        ("twice", "is a Parameter already|is a DTensor already"),
    ],
)
def test_what_cannot_be_sharded_is_refused(what: str, said: str) -> None:
    with pytest.raises(RankError, match=said):
        on_ranks(2, refused_case, what)
