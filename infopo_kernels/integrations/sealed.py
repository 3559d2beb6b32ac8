"""Values that a model's wrappers do not cast.

Mixed precision of FSDP2, FSDP1 and DeepSpeed casts every floating tensor that enters or leaves a wrapped forward,
wherever it finds one: in tuples, dictionaries, dataclasses. A sum of log-probabilities of -1452.1 nats becomes -1456
in bfloat16, and the weight of a rejected response 0.06 where 0.43 is right. They do not look into a
`Sealed` value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Sealed:
    """A value that no wrapper of a model casts.

    Example::

        out = model(**batch, infopo=InfoPOOptions(), ref_logps=Sealed(ref_logps))  # float64 under FSDP2 in bfloat16

    Args:
        value: a tensor, or a tuple of tensors.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def unsealed(name: str, value: Tensor | Sealed | None, device: torch.device) -> Tensor | None:
    """The tensor inside, on `device`.

    Raises:
        TypeError: it holds 16-bit numbers. Differences of sums of hundreds of nats are formed with it.
    """
    tensor = value.value if isinstance(value, Sealed) else value
    if tensor is None:
        return None
    if tensor.dtype in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"`{name}` came as {tensor.dtype}, expected float64 (or float32): after 1000 nats the next number that "
            f"bfloat16 holds is 1004. If it was float64 where you passed it, a wrapper with mixed precision (FSDP2's "
            f"MixedPrecisionPolicy, DeepSpeed) has cast it on its way into the model; pass `{name}=Sealed({name})` "
            f"(infopo_kernels.integrations.sealed), or use compute_infopo_loss, PreferenceTrainer or InfoPOTrainer."
        )
    moved: Tensor = tensor.to(device)
    return moved


def least_cast(seen: Any, original: Any) -> Any:
    """`seen`, unless a wrapper has cast it; then `original`.

    DDP and DeepSpeed put their backward hooks on `seen`, which may be another tensor than `original`. FSDP2 puts its
    hook on the original, before it casts. So each is the right tensor to go backward from.
    """
    if isinstance(original, Tensor):
        return seen if isinstance(seen, Tensor) and seen.dtype == original.dtype else original
    if isinstance(original, tuple):
        values = [least_cast(s, o) for s, o in zip(seen, original, strict=True)]
        return type(original)(*values) if hasattr(original, "_fields") else tuple(values)
    return original
