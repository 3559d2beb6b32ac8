"""Sharded tensors of torch.distributed (DTensor) as parts of a head.

torch.distributed.tensor is imported where it is needed: that takes 0.3 s, which the import of this package saves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor; by name, so that nothing is imported."""
    return type(tensor).__name__ == "DTensor"


def part_of(argument: str, tensor: Tensor) -> tuple[ProcessGroup, int, int]:
    """The group that holds the parts of a tensor [V, ...], the first entry of this rank's part, and V.

    Raises:
        TypeError: the tensor is not cut along its first dimension over one dimension of its mesh.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    mesh, placements = tensor.device_mesh, tensor.placements
    cut = [dim for dim, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    if len(cut) != 1 or placements[cut[0]] != Shard(0) or type(placements[cut[0]]) is not Shard:
        raise TypeError(
            f"`{argument}` must be cut along its vocabulary over one dimension of its mesh, placements with one "
            f"Shard(0), got {placements}; pass `{argument}.full_tensor()`, or call the loss inside the model's "
            f"forward, where FSDP has gathered the head."
        )
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    start = min(offset[0], tensor.shape[0])
    return mesh.get_group(cut[0]), start, tensor.shape[0]


def local(argument: str, tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, differentiable; a plain tensor as it is.

    Raises:
        TypeError: hidden states that are cut.
    """
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(tensor, DTensor)
    if argument.endswith("hidden") and not all(isinstance(each, Replicate) for each in tensor.placements):
        raise TypeError(
            f"`{argument}` must be whole on every rank (Replicate), got placements {tensor.placements}; gather it with "
            f"`{argument}.redistribute(placements=[Replicate()])`."
        )
    return tensor.to_local()
