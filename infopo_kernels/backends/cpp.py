"""The C++ kernels: the three primitives as calls of `torch.ops.infopo_kernels_cpp` (sources in `csrc/`).

`infopo_kernels.backends.base` has the equations, shapes and contract; `docs/cpu.md` explains the kernels. A kernel
chooses its instruction set when it runs. The environment variable INFOPO_KERNELS_CPU_ISA chooses another; `isa` returns
the one in use.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, ClassVar

import torch

from infopo_kernels.backends.base import Gradients, Head, scale_in_parts
from infopo_kernels.objectives import Evaluation, Objective, Sequences
from infopo_kernels.packing import Rows

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OPS: Any = torch.ops.infopo_kernels_cpp


@cache
def _missing_extension() -> str | None:
    """Load the extension, which registers its ops. Returns None, or the reason for the failure."""
    try:
        importlib.import_module("infopo_kernels._C")
    except ImportError as error:
        return (
            f"the extension infopo_kernels._C cannot be loaded ({error}); it is built by `pip install "
            "--no-build-isolation .` where a C++ compiler is present, against the torch that is installed then."
        )
    _register_fakes()
    return None


def _register_fakes() -> None:
    """Register the shapes and types of the results, for tracing."""

    def per_row(hidden: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            hidden.new_empty(hidden.shape[0], dtype=torch.float32),
            hidden.new_empty(hidden.shape[0], dtype=torch.float32),
        )

    torch.library.register_fake("infopo_kernels_cpp::logprob")(per_row)
    torch.library.register_fake("infopo_kernels_cpp::logprob_and_grad")(per_row)
    torch.library.register_fake("infopo_kernels_cpp::backward")(lambda *_: None)


def isa(dtype: torch.dtype = torch.float32) -> str:
    """The instruction set for inputs of `dtype`: "amx", "avx512_bf16", "avx512", "avx2" or "portable".

    Raises:
        ImportError: the extension is missing.
        ValueError: INFOPO_KERNELS_CPU_ISA names an unknown instruction set, or one that this machine does not have.
    """
    reason = _missing_extension()
    if reason is not None:
        raise ImportError(reason)
    name: str = _call(_OPS.isa, dtype)
    return name


def _call(op: Any, *arguments: object) -> Any:
    """`op(*arguments)`; its errors as ValueError or TypeError where their text begins with that (`csrc/errors.h`)."""
    try:
        return op(*arguments)
    except RuntimeError as error:
        kind, _, text = str(error).partition(": ")
        if kind not in ("ValueError", "TypeError"):
            raise
        raise (ValueError if kind == "ValueError" else TypeError)(text) from None


def _report(gradients: Gradients) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if gradients.tail is None else (gradients.tail.mass, gradients.tail.columns)


class CppBackend:
    """C++ kernels for CPUs."""

    name: ClassVar[str] = "cpp"
    tail_block: ClassVar[int] = 96
    """`kTailTile` of csrc/tile_kernels.h. A workspace that does not hold a block of 96 words has smaller ones."""
    tail_exact_above: ClassVar[float] = 0.75
    """`kExactAbove` of csrc/pooled_tail.cpp."""

    def unsupported_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"the C++ kernels run on a CPU, not on {device}; move the inputs or pass backend='triton'."
        if dtype not in _DTYPES:
            return f"the C++ kernels serve {', '.join(map(str, _DTYPES))}, not {dtype}; pass backend='torch'."
        return _missing_extension()

    def kept_rows(self, head: Head, weight_gradient: torch.Tensor) -> int:
        rows: int = _call(
            _OPS.kept_rows,
            head.hidden,
            head.weight,
            weight_gradient,
            head.softcap,
            head.scale,
            head.workspace_bytes,
            head.tail_threshold,
        )
        return rows

    def memory_for_logits(self, head: Head, weight_gradient: torch.Tensor, rows: int) -> torch.Tensor | None:
        numbers: int = _call(_OPS.numbers_for_logits, head.hidden, weight_gradient, rows)
        return torch.empty(numbers, dtype=torch.int16) if numbers else None

    def scale_(self, values: torch.Tensor, factor: torch.Tensor) -> None:
        """values *= factor, in plain PyTorch."""
        scale_in_parts(values, factor)

    def objective(
        self, objective: Objective, logp: torch.Tensor, rows: Rows, sequences: Sequences
    ) -> Evaluation | None:
        del objective, logp, rows, sequences
        return None

    def logprob(
        self, head: Head, labels: torch.Tensor, keep: Gradients | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result: tuple[torch.Tensor, torch.Tensor] = _call(
            _OPS.logprob,
            head.hidden,
            head.weight,
            head.bias,
            labels,
            *((None, None) if keep is None else (keep.weight, keep.logits)),
            head.softcap,
            head.scale,
            head.workspace_bytes,
        )
        return result

    def logprob_and_grad(
        self, head: Head, labels: torch.Tensor, row_weight: torch.Tensor, gradients: Gradients
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result: tuple[torch.Tensor, torch.Tensor] = _call(
            _OPS.logprob_and_grad,
            head.hidden,
            head.weight,
            head.bias,
            labels,
            row_weight,
            gradients.hidden,
            gradients.weight,
            gradients.bias,
            *_report(gradients),
            head.softcap,
            head.scale,
            head.workspace_bytes,
            head.tail_threshold,
        )
        return result

    def backward(
        self,
        head: Head,
        labels: torch.Tensor,
        lse: torch.Tensor,
        row_weight: torch.Tensor,
        gradients: Gradients,
        kept: torch.Tensor | None = None,
    ) -> None:
        _call(
            _OPS.backward,
            head.hidden,
            head.weight,
            head.bias,
            labels,
            lse,
            row_weight,
            gradients.hidden,
            gradients.weight,
            gradients.bias,
            *_report(gradients),
            kept,
            gradients.logits,
            head.softcap,
            head.scale,
            head.workspace_bytes,
            head.tail_threshold,
        )
