"""Options that travel together, validated where they are made. A leaf: imports torch only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

IGNORE_INDEX: Final = -100
"""Inside the library an unscored row always carries this label; `ignore_index` is translated on entry."""

BACKENDS: Final = ("auto", "cpp", "triton", "torch")
"""Names that `backend` accepts."""

WORKSPACE_MIB_CPU: Final = 32
"""Default bound, MiB, on what a call on a CPU allocates beyond its results."""

WORKSPACE_MIB_GPU: Final = 256
"""Default bound, MiB, on what a call on a GPU allocates beyond its results."""


def _require_finite(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__} {value!r}; pass a Python float.")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}.")


def _require_positive(name: str, value: float, remedy: str) -> None:
    _require_finite(name, value)
    if value <= 0:
        raise ValueError(f"`{name}` must be positive, got {value}; {remedy}")


@dataclass(frozen=True)
class LogitOptions:
    """How logits follow from the head product: ``z = logit_scale * softcap(hidden @ weight.T + bias) / temperature``.

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
            _require_positive("softcap", self.softcap, "pass None for logits without a cap.")
        _require_finite("logit_scale", self.logit_scale)
        if self.logit_scale == 0:
            raise ValueError("`logit_scale` must not be 0: every logit would be equal; pass 1.0 for no scaling.")
        _require_positive("temperature", self.temperature, "pass 1.0 for logits as they are.")

    @property
    def scale(self) -> float:
        """``logit_scale / temperature``: the one factor that kernels apply after the softcap."""
        return self.logit_scale / self.temperature


@dataclass(frozen=True)
class InfoPOOptions:
    """Hyper-parameters of the InfoPO objective (equations in `infopo_kernels.objective`).

    Args:
        beta: scale β of the log-ratios (the strength of the implicit KL constraint); positive.
        offset: constant inside the exponential; 1 is the Nguyen-Wainwright-Jordan bound, 0 its unshifted form.
        max_log_weight: where the exponential of a rejected sequence goes on as its tangent, so that the
            sequence's weight never exceeds ``beta * exp(max_log_weight)``; None never caps.
        min_log_weight: rejected sequences whose log-weight ``beta * log_ratio - offset`` lies below take no
            part in the backward pass (their weight counts as 0, at most ``beta * exp(min_log_weight)`` too little;
            the loss value is not touched); None drops only what float32 cannot hold (about -103).
        sft_weight: α of an added ``α * (-mean token log-probability of the chosen response)``; 0 leaves it out.
        average: sequence log-probabilities are means over the scored tokens instead of sums.

    Raises:
        ValueError, TypeError: a value is out of range or not a number; the message names it.
    """

    beta: float = 0.1
    offset: float = 1.0
    max_log_weight: float | None = None
    min_log_weight: float | None = None
    sft_weight: float = 0.0
    average: bool = False

    def __post_init__(self) -> None:
        _require_positive("beta", self.beta, "typical values lie between 0.01 and 1.")
        _require_finite("offset", self.offset)
        if self.max_log_weight is not None:
            _require_finite("max_log_weight", self.max_log_weight)
        if self.min_log_weight is not None:
            _require_finite("min_log_weight", self.min_log_weight)
            if self.max_log_weight is not None and self.min_log_weight >= self.max_log_weight:
                raise ValueError(
                    f"`min_log_weight` must lie below `max_log_weight`, got {self.min_log_weight} and "
                    f"{self.max_log_weight}."
                )
        _require_finite("sft_weight", self.sft_weight)
        if self.sft_weight < 0:
            raise ValueError(f"`sft_weight` must not be negative, got {self.sft_weight}; pass 0 to leave it out.")
        if not isinstance(self.average, bool):
            raise TypeError(f"`average` must be True or False, got {type(self.average).__name__} {self.average!r}.")


@dataclass(frozen=True)
class KernelOptions:
    """Which backend runs and how much memory it may take.

    Args:
        backend: "auto", "cpp" (native CPU kernels), "triton" (GPU kernels) or "torch" (plain PyTorch, any device).
        workspace_mib: bound, MiB, on what a call allocates beyond its results, whatever the number of tokens
            and the vocabulary; None takes 32 on a CPU and 256 on a GPU.

    Raises:
        ValueError, TypeError: an unknown backend, or a workspace below 1 MiB.
    """

    backend: str = "auto"
    workspace_mib: int | None = field(default=None)

    def __post_init__(self) -> None:
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
