"""The collectives of this library: all of them, by the name of their group, and nothing else calls torch.distributed.

Inside an op a collective is the plain one, which costs a fifth of the functional one's time to start (200 us against
920 us on gloo with two ranks). Outside, where torch.compile traces, it is the functional one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d


def name_of(argument: str, group: object) -> str:
    """The name of a process group, by which an op finds it again.

    Raises:
        TypeError: it is no process group.
        ValueError: this rank is not in it.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(f"`{argument}` was given, and torch.distributed is not initialized; call init_process_group.")
    if not isinstance(group, dist.ProcessGroup):
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"`{argument}` must be a group that this rank is in, got one without it.")
        raise TypeError(
            f"`{argument}` must be a torch.distributed.ProcessGroup, got {type(group).__name__}; of a device mesh "
            f"pass `mesh.get_group()`."
        )
    if dist.get_rank(group) < 0:
        raise ValueError(f"`{argument}` must be a group that this rank is in, got one without rank {dist.get_rank()}.")
    return str(group.group_name)


def group_named(name: str) -> dist.ProcessGroup:
    """The process group of that name."""
    return distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, no-any-return, arg-type]


def rank(name: str) -> int:
    """This rank's place in a group."""
    return dist.get_rank(group_named(name))


def size(name: str) -> int:
    """The number of ranks of a group."""
    return dist.get_world_size(group_named(name))


def gathered(name: str, values: Tensor) -> Tensor:
    """The `values` of every rank, [R, ...]; all ranks pass the same shape."""
    values = values.contiguous()
    out = values.new_empty(size(name), *values.shape)
    dist.all_gather(list(out.unbind()), values, group=group_named(name))
    return out


class Pending:
    """A collective on its way. The tensors that it sends and receives live as long as this object."""

    def __init__(self, works: list[Any], sent: Tensor, received: Tensor) -> None:
        self._works, self._sent, self._received = works, sent, received

    def wait(self) -> Tensor:
        """What was received."""
        for work in self._works:
            work.wait()
        return self._received


def start_gather(name: str, values: Tensor) -> Pending:
    """`gathered`, without waiting for it."""
    values = values.contiguous()
    out = values.new_empty(size(name), *values.shape)
    work = dist.all_gather(list(out.unbind()), values, group=group_named(name), async_op=True)
    return Pending([work], values, out)


def exchanged(name: str, values: Tensor) -> Tensor:
    """From `values` [R, ...], of which values[r] goes to rank r: what the ranks sent to this one, [R, ...].

    A sum of what came is a reduce-scatter that adds in the order of the ranks, in a type of the caller's choice, on any
    kind of group.
    """
    values = values.contiguous()
    out = torch.empty_like(values)
    dist.all_to_all_single(out, values, group=group_named(name))
    return out


def start_pass_on(name: str, values: Tensor, shape: tuple[int, ...]) -> Pending:
    """Send `values` to the next rank, and receive a tensor of `shape` from the one before; without waiting."""
    values, group = values.contiguous(), group_named(name)
    ranks, me = dist.get_process_group_ranks(group), dist.get_rank(group)
    if len(ranks) == 1:  # gloo has no connection to itself
        return Pending([], values, values)
    received = values.new_empty(shape)
    # Ranks of an empty part send nothing, and nobody waits for it.
    transfers = []
    if values.numel():
        transfers.append(dist.P2POp(dist.isend, values, ranks[(me + 1) % len(ranks)], group))
    if received.numel():
        transfers.append(dist.P2POp(dist.irecv, received, ranks[me - 1], group))
    return Pending(dist.batch_isend_irecv(transfers) if transfers else [], values, received)


def add_up_(name: str, values: Tensor) -> None:
    """The sum over the ranks, in place of `values`, which are contiguous."""
    dist.all_reduce(values, group=group_named(name))


def average(name: str, value: float, device: torch.device) -> float:
    """The mean of a number over the ranks; waits for them."""
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group_named(name))
    return float(total) / size(name)


def parts_within(argument: str, group: str, inner: str) -> int:
    """How many ranks of the group `inner` are in `group`: all of them, or this one alone.

    Raises:
        ValueError: some, but not all.
    """
    ranks, own = (set(dist.get_process_group_ranks(group_named(name))) for name in (group, inner))
    shared = ranks & own
    if shared != own and len(shared) != 1:
        raise ValueError(
            f"`{argument}` must hold all ranks of `sequence_group`, {sorted(own)}, or one of them, got "
            f"{sorted(shared)}; pass the group over which the wrapper averages gradients."
        )
    return len(shared)


class _SumOverParts(torch.autograd.Function):
    """A sum over ranks that each rank then uses whole: a rank's own part has the gradient of the sum."""

    @staticmethod
    def forward(ctx: object, values: Tensor, name: str) -> Tensor:
        # The ops themselves: they take the group by its name, which torch.compile can trace.
        functional = torch.ops._c10d_functional
        result: Tensor = functional.wait_tensor(functional.all_reduce(values.contiguous(), "sum", name))
        return result

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def sum_over_parts(name: str, values: Tensor) -> Tensor:
    """The sum over the ranks; its backward is the identity, because every rank forms the same loss from the sum."""
    result: Tensor = _SumOverParts.apply(values, name)  # type: ignore[no-untyped-call]
    return result
