"""Problems for the Triton kernels, and the results of plain PyTorch for them. This file does not import Triton."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from infopo_kernels.backends.base import Backend, Gradients, Head, TailReport, with_memory_for_logits
from infopo_kernels.options import ELSEWHERE, IGNORE_INDEX
from tests import primitives
from tests.budget import HALF_STEP, accumulated, assert_within, error_budget, operand_rounding
from tests.primitives import Plain

WORKSPACE = 256 << 20

# --- inputs and truth -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A head, labels and row weights. The sizes leave a tail in every tile (16 x 32 x 16)."""

    name: str
    n: int = 37
    h: int = 24
    v: int = 101
    bias: bool = False
    softcap: float | None = None
    scale: float = 1.0
    size: float = 1.0
    """Of the logits."""
    ignored: float = 0.3
    strided: bool = False
    """Rows apart in memory, with NaN between them."""
    c_size: float = 1e-2
    elsewhere: float = 0.0
    """Labels that lie in another part of the vocabulary."""
    threshold: float = 0.0
    """Of a pooled tail; words differ in frequency then, as those of a trained model do."""

    def __str__(self) -> str:
        return self.name


PROBLEMS = [
    Problem("plain"),
    Problem("whole-tiles", n=32, h=32, v=64, ignored=0.0),
    Problem("bias-softcap", bias=True, softcap=3.0, scale=-0.7, size=3.0),
    Problem("odd-strided", n=21, h=17, v=67, bias=True, strided=True),
    Problem("one-row", n=1, h=40, v=33, ignored=0.0),
    Problem("one-hidden-unit", n=19, h=1, v=40),
    Problem("two-words", n=19, h=8, v=2),
    Problem("one-word", n=5, h=8, v=1),
    Problem("mostly-ignored", n=70, v=40, ignored=0.9),
    Problem("large-logits", size=60.0),
    Problem("tiny-weights", c_size=1e-7),
    Problem("labels-elsewhere", elsewhere=0.5),
    Problem("all-labels-elsewhere", bias=True, softcap=3.0, scale=-0.7, size=3.0, elsewhere=1.0),
]


KEPT_PROBLEMS = [
    Problem("kept", v=301),
    Problem("kept-whole-tiles", n=32, h=32, v=128, ignored=0.0),
    Problem("kept-bias-softcap", h=33, v=75, bias=True, softcap=3.0, scale=-0.7, size=3.0),
    Problem("kept-strided", n=21, h=23, v=67, bias=True, strided=True),
    Problem("kept-one-row", n=1, h=40, v=33, ignored=0.0),
    Problem("kept-in-part", n=70, h=20, v=48, bias=True, ignored=0.1),
    Problem("kept-large-logits", h=32, size=60.0),
    Problem("kept-tiny-weights", h=32, c_size=1e-7),
    Problem("kept-labels-elsewhere", h=33, v=75, bias=True, softcap=3.0, scale=-0.7, size=3.0, elsewhere=0.5),
]
"""Hidden sizes for which the memory of dW has room for 16 rows (a block of the interpreter's tiles) and for more."""


@dataclass
class Inputs:
    """Tensors of a problem."""

    head: Head
    labels: torch.Tensor
    c: torch.Tensor

    @property
    def scored(self) -> torch.Tensor:
        return self.labels != IGNORE_INDEX

    @property
    def live(self) -> torch.Tensor:
        return self.scored & (self.c != 0)


def _apart(x: torch.Tensor) -> torch.Tensor:
    """The same values with NaN between the rows; last stride 1."""
    wide = torch.full((x.shape[0], x.shape[1] + 5), float("nan"), dtype=x.dtype)
    wide[:, 2:-3] = x
    return wide[:, 2:-3]


def make(problem: Problem, dtype: torch.dtype, workspace: int = WORKSPACE) -> Inputs:
    """Inputs of a problem, the same in every run. Unscored hidden states are NaN, because no kernel may read them."""
    g = torch.Generator().manual_seed(sum(map(ord, problem.name)))
    hidden = torch.randn(problem.n, problem.h, generator=g)
    weight = torch.randn(problem.v, problem.h, generator=g) * (problem.size / problem.h**0.5)
    bias = torch.randn(problem.v, generator=g).to(dtype) if problem.bias else None
    labels = torch.randint(0, problem.v, (problem.n,), generator=g)
    if problem.threshold:
        hidden[:, 0], weight[:, 0] = 1.0, 3 * torch.randn(problem.v, generator=g)
    labels[torch.rand(problem.n, generator=g) < problem.ignored] = IGNORE_INDEX
    if problem.elsewhere:
        labels[(torch.rand(problem.n, generator=g) < problem.elsewhere) & (labels != IGNORE_INDEX)] = ELSEWHERE
    hidden[labels == IGNORE_INDEX] = float("nan")
    c = torch.randn(problem.n, generator=g) * problem.c_size
    c[3::7] = 0.0
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if problem.strided:
        hidden, weight = _apart(hidden), _apart(weight)
    head = Head(hidden, weight, bias, problem.softcap, problem.scale, workspace, problem.threshold)
    return Inputs(head, labels, c)


def plain(inputs: Inputs) -> Plain:
    """The results of plain PyTorch in float64."""
    return primitives.plain(inputs.head, inputs.labels, inputs.c)


def buffers(inputs: Inputs, wanted: str, weight_dtype: torch.dtype | None = None) -> Gradients:
    """Result buffers as a backend gets them: dX is NaN, dW and db hold numbers to add to."""
    head = inputs.head
    v, h = head.weight.shape
    fill = torch.linspace(-1e-3, 1e-3, v * h).reshape(v, h)
    return Gradients(
        torch.full(head.hidden.shape, float("nan"), dtype=head.hidden.dtype) if "x" in wanted else None,
        fill.to(weight_dtype or torch.float32) if "w" in wanted else None,
        fill[:, 0].contiguous() if "b" in wanted else None,
        TailReport.empty(head) if head.tail_threshold else None,
    )


def first_rows(labels: torch.Tensor, most: int) -> torch.Tensor:
    """Labels of the first `most` scored rows."""
    scored = labels != IGNORE_INDEX
    return torch.where(scored & (scored.cumsum(0) <= most), labels, IGNORE_INDEX)


def keep_and_backward(
    backend: Backend, inputs: Inputs, gradients: Gradients, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """l, lse and the gradients. The logits of the first `most` scored rows stay in dW's memory until the gradients, and
    those for which it has no room beside it."""
    labels = inputs.labels
    kept = first_rows(labels, most)
    head, gradients = with_memory_for_logits(backend, inputs.head, gradients, min(most, len(labels)))
    logp, lse = backend.logprob(head, kept, gradients)
    others = backend.logprob(head, torch.where(kept == IGNORE_INDEX, labels, IGNORE_INDEX))
    logp, lse = logp + others[0], lse + others[1]
    backend.backward(head, labels, lse, inputs.c, gradients, kept)
    return logp, lse


def fresh_buffers(inputs: Inputs, wanted: str, weight_dtype: torch.dtype | None = None) -> tuple[Gradients, Gradients]:
    """Result buffers for kept logits, with NaN in dW; and the expected initial content, with 0 in dW."""
    got, before = (buffers(inputs, wanted, weight_dtype) for _ in range(2))
    assert got.weight is not None
    assert before.weight is not None
    got.weight.fill_(float("nan"))
    before.weight.zero_()
    return got, before


def assert_logp(inputs: Inputs, truth: Plain, logp: torch.Tensor, lse: torch.Tensor) -> None:
    """Float32 logits, whatever the input type."""
    allowed = error_budget(inputs.head, inputs.labels, inputs.c)
    assert_within("l", logp, truth.l, allowed.l)
    assert_within("lse", lse, truth.lse, allowed.lse)
    assert (logp[~inputs.scored] == 0).all()
    assert (lse[~inputs.scored] == 0).all()


def assert_gradients(
    inputs: Inputs, truth: Plain, got: Gradients, before: Gradients, roundings: int, zero_rows: bool
) -> None:
    """dX, dW and db. `roundings`: of G as an operand of products, if they take it in 16 bits."""
    operand = operand_rounding("triton", inputs.head.hidden.dtype, roundings)
    allowed = error_budget(inputs.head, inputs.labels, inputs.c, operand=operand)
    written = inputs.scored if zero_rows else inputs.live
    added = accumulated(len(inputs.labels), HALF_STEP[torch.float32])  # a chunk of rows after the other
    if got.hidden is not None:
        assert_within("dX", got.hidden[written], truth.hidden[written], allowed.hidden[written])
        assert got.hidden[~written].isnan().all(), "rows that are not scored are not touched"
    for letter, name, error in (("W", "weight", allowed.weight), ("b", "bias", allowed.bias)):
        result, first = getattr(got, name), getattr(before, name)
        if result is not None and first is not None:
            assert_within(f"d{letter}", result, first.double() + getattr(truth, name), error + added * first.abs())


# --- fresh memory -----------------------------------------------------------------------------------------------------


class FreshMemory(TorchDispatchMode):
    """Fill every uninitialised allocation with 0xFF bytes (NaN in every float type), and keep the peak of their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: list[tuple[StorageWeakRef, int]] = []

    def reset(self) -> None:
        """Start to count."""
        self.peak = 0
        self._storages.clear()

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        if storage.nbytes() > 4096:
            gc.collect()  # the interpreter keeps the arguments of its last launch in a reference cycle
        self._storages = [(ref, size) for ref, size in self._storages if not ref.expired()]
        self._storages.append((StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self._storages))

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if name.startswith("aten.empty"):
            self._allocated(result.untyped_storage())
            result.untyped_storage().fill_(0xFF)
        if name.startswith("aten._local_scalar_dense"):
            raise AssertionError("a value was read back to the host")
        return result
