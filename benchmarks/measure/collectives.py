"""What travels between ranks: every collective that is dispatched is counted, by what this rank receives.

    with Counted() as counted:
        step()
    counted.received_bytes, max(transfer.elements for transfer in counted.transfers)

The bytes are those of the usual algorithms: a ring for sums, direct sends else. Collectives of autograd's backward pass
are counted where it runs in the same thread (on a CPU).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from infopo_kernels import ops


@dataclass(frozen=True)
class Transfer:
    """One collective."""

    name: str
    elements: int
    """Numbers that this rank holds for it: what it sends, or what it gets, whichever is more."""
    received_bytes: float


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in _tensors(each)]
    return []


def _size(arguments: tuple[Any, ...]) -> int:
    """Ranks of the group among an op's arguments."""
    for value in arguments:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value).size()
    return dist.get_world_size()


_RECEIVED: dict[str, Callable[[int, int, int], float]] = {
    # of bytes of outputs, bytes of inputs, and ranks
    "c10d::allgather_": lambda out, own, ranks: out * (ranks - 1) / ranks,
    "c10d::_allgather_base_": lambda out, own, ranks: out * (ranks - 1) / ranks,
    "c10d::allreduce_": lambda out, own, ranks: 2 * out * (ranks - 1) / ranks,
    "c10d::alltoall_base_": lambda out, own, ranks: out * (ranks - 1) / ranks,
    "c10d::reduce_scatter_": lambda out, own, ranks: out * (ranks - 1),
    "c10d::_reduce_scatter_base_": lambda out, own, ranks: out * (ranks - 1),
    "c10d::broadcast_": lambda out, own, ranks: out,
    "c10d::recv_": lambda out, own, ranks: out,
    "c10d::send": lambda out, own, ranks: 0,
    "_c10d_functional::all_gather_into_tensor": lambda out, own, ranks: own * (ranks - 1),
    "_c10d_functional::all_reduce": lambda out, own, ranks: 2 * own * (ranks - 1) / ranks,
    "_c10d_functional::reduce_scatter_tensor": lambda out, own, ranks: own * (ranks - 1) / ranks,
}

_NO_TRANSFER = ("wait_tensor", "_wrap_tensor_autograd", "barrier")

_OURS = {
    op._opoverload: op._init_fn
    for op in (getattr(value, "raw", value) for value in vars(ops).values())
    if hasattr(op, "_opoverload") and hasattr(op, "_init_fn")
}


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is active, inside this library's ops too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.transfers: list[Transfer] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OURS:  # an op is one call to a mode; its own collectives come after this
            with self:
                return _OURS[func](*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        if name.startswith(("c10d::", "_c10d_functional::")) and not name.endswith(_NO_TRANSFER):
            tensors = [_tensors(value) for value in args]
            held = [each for each in tensors if each]
            out, own = (_bytes(held[0]), _bytes(held[-1])) if held else (0, 0)
            elements = max((sum(t.numel() for t in each) for each in held), default=0)
            self.transfers.append(Transfer(name, elements, _RECEIVED[name](out, own, _size(args))))
        return func(*args, **(kwargs or {}))

    @property
    def received_bytes(self) -> float:
        """Bytes that this rank has received."""
        return sum(transfer.received_bytes for transfer in self.transfers)
