"""Options of logits and kernels. Each class checks its values when it is made. Imports nothing of this package."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Final

IGNORE_INDEX: Final = -100
"""Label of an unscored row inside the library; the public functions translate `ignore_index` to it."""

ELSEWHERE: Final = -(1 << 62)
"""Label, inside the library, of a scored row whose label lies in another rank's part of the vocabulary. A number that
no caller passes by mistake."""

BACKENDS: Final = ("auto", "cpp", "triton", "torch")
"""Names that `backend` accepts."""

WORKSPACE_MIB_CPU: Final = 32
"""Default bound, in MiB, on the memory that a call on a CPU allocates beyond its results."""

WORKSPACE_MIB_GPU: Final = 256
"""Default bound, in MiB, on the memory that a call on a GPU allocates beyond its results."""


def require_finite(name: str, value: float) -> None:
    """Raise unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__} {value!r}; pass a Python float.")
    if not -math.inf < value < math.inf:  # torch.compile does not trace math.isfinite of a symbolic number
        raise ValueError(f"`{name}` must be finite, got {value}.")


def require_positive(name: str, value: float, remedy: str) -> None:
    """Raise unless `value` is a positive finite number."""
    require_finite(name, value)
    if value <= 0:
        raise ValueError(f"`{name}` must be positive, got {value}; {remedy}")


def require_bool(name: str, value: object) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {type(value).__name__} {value!r}.")


def arguments(options: Any) -> dict[str, Any]:
    """A dataclass as keyword arguments. `asdict` would copy values, which torch.compile of torch 2.10 cannot trace."""
    return {each.name: getattr(options, each.name) for each in fields(options)}


@dataclass(frozen=True)
class LogitOptions:
    """From the head product to logits: ``z = logit_scale * softcap(hidden @ weight.T + bias) / temperature``.

    Args:
        softcap: ``c`` of ``c * tanh(a / c)`` (Gemma 2's `final_logit_softcapping`), or None for the identity.
        logit_scale: multiplies the logits (Cohere's `logit_scale`; 1 / Granite's `logits_scaling`).
        temperature: divides the logits.

    Raises:
        ValueError, TypeError: a value is not a positive finite number (`logit_scale` may be negative).
    """

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.softcap is not None:
            require_positive("softcap", self.softcap, "pass None for logits without a cap.")
        require_finite("logit_scale", self.logit_scale)
        if self.logit_scale == 0:
            raise ValueError("`logit_scale` must not be 0: every logit would be equal; pass 1.0 for no scaling.")
        require_positive("temperature", self.temperature, "pass 1.0 for logits as they are.")

    @property
    def scale(self) -> float:
        """``logit_scale / temperature``: the factor that kernels apply after the softcap."""
        return self.logit_scale / self.temperature


@dataclass(frozen=True)
class KernelOptions:
    """Which backend runs, how much memory it may take, and how exact the gradients are.

    Args:
        backend: "auto", "cpp" (C++ kernels, CPU), "triton" (GPU kernels) or "torch" (plain PyTorch, any device).
        workspace_mib: bound, in MiB, on the memory that a call allocates beyond its results, for any number of tokens
            and any vocabulary; None takes 32 on a CPU and 256 on a GPU.
        tail_threshold: probability θ, 0 <= θ < 1. Words that no row of a chunk predicts with at least this probability
            share one column of the gradient (`infopo_kernels.backends.base` defines it). 0 is exact. Losses and
            log-probabilities are exact for every θ. docs/pooled_tail.md says when it pays and what it costs.
        report_tail: fill `PreferenceOutput.tail`: how much probability was pooled and how many columns were kept.

    Raises:
        ValueError, TypeError: an unknown backend, a workspace below 1 MiB, or a threshold outside [0, 1).
    """

    backend: str = "auto"
    workspace_mib: int | None = field(default=None)
    tail_threshold: float = 0.0
    report_tail: bool = False

    def __post_init__(self) -> None:
        require_finite("tail_threshold", self.tail_threshold)
        if not 0 <= self.tail_threshold < 1:
            raise ValueError(
                f"`tail_threshold` must be a probability, 0 <= tail_threshold < 1, got {self.tail_threshold}; pass 0 "
                f"for exact gradients, or a value near 2**-13."
            )
        require_bool("report_tail", self.report_tail)
        if self.backend not in BACKENDS:
            raise ValueError(f"`backend` must be one of {', '.join(map(repr, BACKENDS))}, got {self.backend!r}.")
        if self.workspace_mib is None:
            return
        if isinstance(self.workspace_mib, bool) or not isinstance(self.workspace_mib, int):
            raise TypeError(
                f"`workspace_mib` must be a whole number of MiB or None, got "
                f"{type(self.workspace_mib).__name__} {self.workspace_mib!r}."
            )
        if self.workspace_mib < 1:
            raise ValueError(f"`workspace_mib` must be at least 1, got {self.workspace_mib}.")

    def workspace_bytes(self, device_type: str) -> int:
        """The bound in bytes on a device of `device_type` ("cpu", "cuda", ...)."""
        default = WORKSPACE_MIB_CPU if device_type == "cpu" else WORKSPACE_MIB_GPU
        return (default if self.workspace_mib is None else self.workspace_mib) << 20
