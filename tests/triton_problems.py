"""Problems for the Triton kernels, what plain PyTorch makes of them, and error budgets; imports no Triton."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from infopo_kernels.backends.base import Backend, Gradients, Head
from infopo_kernels.options import IGNORE_INDEX

WORKSPACE = 256 << 20
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half a step of each type, relative."""

# --- inputs and truth -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A head, labels and row weights; sizes are chosen to leave a tail in every tile (16 x 32 x 16)."""

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
]
"""Hidden sizes that leave the memory of dW room for 16 rows, a block of the interpreter's tiles, and more."""


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
    """Inputs of a problem, the same in every run; unscored hidden states are NaN, because nobody may read them."""
    g = torch.Generator().manual_seed(sum(map(ord, problem.name)))
    hidden = torch.randn(problem.n, problem.h, generator=g)
    weight = torch.randn(problem.v, problem.h, generator=g) * (problem.size / problem.h**0.5)
    bias = torch.randn(problem.v, generator=g).to(dtype) if problem.bias else None
    labels = torch.randint(0, problem.v, (problem.n,), generator=g)
    labels[torch.rand(problem.n, generator=g) < problem.ignored] = IGNORE_INDEX
    hidden[labels == IGNORE_INDEX] = float("nan")
    c = torch.randn(problem.n, generator=g) * problem.c_size
    c[3::7] = 0.0
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if problem.strided:
        hidden, weight = _apart(hidden), _apart(weight)
    return Inputs(Head(hidden, weight, bias, problem.softcap, problem.scale, workspace), labels, c)


@dataclass
class Plain:
    """What plain PyTorch gives in some type, with the sizes that rounding G to 16 bits can reach."""

    logp: torch.Tensor
    lse: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    hidden_terms: torch.Tensor
    """|G| |W|: rounding each element of G by a relative u moves dX by at most u times this."""
    weight_terms: torch.Tensor
    bias_terms: torch.Tensor
    hidden_softmax: torch.Tensor
    """|c| p |W|: an error of a logit, or of lse, by some d moves p by d p, however little of G a label leaves."""
    weight_softmax: torch.Tensor
    bias_softmax: torch.Tensor


def plain(inputs: Inputs, dtype: torch.dtype = torch.float64) -> Plain:
    """Log-probabilities and gradients of sum_t c_t l_t over the scored rows, by autograd."""
    head, scored = inputs.head, inputs.scored
    x = head.hidden.to(dtype)[scored].requires_grad_()
    w = head.weight.detach().to(dtype).requires_grad_()
    a = x @ w.T
    if head.bias is not None:
        a = a + head.bias.to(dtype)
    a.retain_grad()
    z = head.scale * (a if head.softcap is None else head.softcap * torch.tanh(a / head.softcap))
    lse = z.logsumexp(-1)
    logp = z.gather(1, inputs.labels[scored][:, None])[:, 0] - lse
    (logp * inputs.c.to(dtype)[scored]).sum().backward()
    n = len(inputs.labels)
    g, w_abs = a.grad if a.grad is not None else torch.zeros_like(a), w.detach().abs()

    def rows(values: torch.Tensor) -> torch.Tensor:
        full = torch.zeros(n, *values.shape[1:], dtype=dtype)
        full[scored] = values.detach()
        return full

    def grad(of: torch.Tensor) -> torch.Tensor:
        return of.grad if of.grad is not None else torch.zeros_like(of)

    p = (z - lse[:, None]).exp().detach() * (inputs.c.to(dtype)[scored] * head.scale).abs()[:, None]
    return Plain(
        rows(logp),
        rows(lse),
        rows(grad(x)),
        grad(w),
        g.sum(0),
        rows(g.abs() @ w_abs),
        g.abs().T @ x.detach().abs(),
        g.abs().sum(0),
        rows(p @ w_abs),
        p.T @ x.detach().abs(),
        p.sum(0),
    )


def buffers(inputs: Inputs, wanted: str, weight_dtype: torch.dtype | None = None) -> Gradients:
    """Result buffers as a backend gets them: dX poisoned with NaN, dW and db holding something to add to."""
    head = inputs.head
    v, h = head.weight.shape
    fill = torch.linspace(-1e-3, 1e-3, v * h).reshape(v, h)
    return Gradients(
        torch.full(head.hidden.shape, float("nan"), dtype=head.hidden.dtype) if "x" in wanted else None,
        fill.to(weight_dtype or torch.float32) if "w" in wanted else None,
        fill[:, 0].contiguous() if "b" in wanted else None,
    )


def first_rows(labels: torch.Tensor, most: int) -> torch.Tensor:
    """Labels of the first `most` scored rows."""
    scored = labels != IGNORE_INDEX
    return torch.where(scored & (scored.cumsum(0) <= most), labels, IGNORE_INDEX)


def keep_and_backward(
    backend: Backend, inputs: Inputs, gradients: Gradients, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """l, lse and the gradients; the logits of the first `most` scored rows stay in dW's memory from l to there."""
    head, labels = inputs.head, inputs.labels
    kept = first_rows(labels, most)
    logp, lse = backend.logprob(head, kept, gradients.weight)
    others = backend.logprob(head, torch.where(kept == IGNORE_INDEX, labels, IGNORE_INDEX))
    logp, lse = logp + others[0], lse + others[1]
    backend.backward(head, labels, lse, inputs.c, gradients, kept)
    return logp, lse


def fresh_buffers(inputs: Inputs, wanted: str, weight_dtype: torch.dtype | None = None) -> tuple[Gradients, Gradients]:
    """Result buffers for kept logits, dW poisoned with NaN, and what they stand for: a dW that nothing is in."""
    got, before = (buffers(inputs, wanted, weight_dtype) for _ in range(2))
    assert got.weight is not None
    assert before.weight is not None
    got.weight.fill_(float("nan"))
    before.weight.zero_()
    return got, before


def assert_within(name: str, got: torch.Tensor, truth: torch.Tensor, allowed: torch.Tensor) -> None:
    error = (got.double() - truth).abs()
    worst = float((error / allowed.clamp(min=1e-300)).max()) if truth.numel() else 0.0
    assert (error <= allowed).all(), f"{name}: error {float(error.max()):.3g}, {worst:.2f} times the budget"


def assert_logp(inputs: Inputs, truth: Plain, logp: torch.Tensor, lse: torch.Tensor) -> None:
    """Float32 logits, whatever the input type: within a multiple of the error that PyTorch makes in float32."""
    single = plain(inputs, torch.float32)
    for name, got, expected, own in (("l", logp, truth.logp, single.logp), ("lse", lse, truth.lse, single.lse)):
        allowed = 4 * (own.double() - expected).abs().max() + 16 * UNIT[torch.float32] * (1 + truth.lse.abs().max())
        assert_within(name, got, expected, allowed.expand_as(expected))
    assert (logp[~inputs.scored] == 0).all()
    assert (lse[~inputs.scored] == 0).all()


def assert_gradients(
    inputs: Inputs, truth: Plain, got: Gradients, before: Gradients, roundings: int, zero_rows: bool
) -> None:
    """dX, dW, db within: the rounding of the result, `roundings` of G, and a multiple of PyTorch's float32 error."""
    single, u = plain(inputs, torch.float32), UNIT[inputs.head.hidden.dtype]
    g_error = roundings * u if u > UNIT[torch.float32] else 0.0
    written = inputs.scored if zero_rows else inputs.live

    def allowed(
        exact: torch.Tensor, terms: torch.Tensor, softmax: torch.Tensor, own: torch.Tensor, result: torch.dtype
    ) -> torch.Tensor:
        # Below float16's range a result has absolute, not relative, precision.
        tiny = 2.0**-25 if result == torch.float16 else 0.0
        own_error = (own.double() - exact).abs().max()
        # exp of a float32 logit is as wrong as the logit, which grows with its size: |z| 2^-24.
        logit_error = 8 * UNIT[torch.float32] * (2 + truth.lse.abs().max())
        return exact.abs() * UNIT[result] * 1.01 + terms * g_error + softmax * logit_error + 4 * own_error + tiny

    if got.hidden is not None:
        budget = allowed(truth.hidden, truth.hidden_terms, truth.hidden_softmax, single.hidden, got.hidden.dtype)
        assert_within("dX", got.hidden[written], truth.hidden[written], budget[written])
        assert got.hidden[~written].isnan().all(), "rows that are not scored are not touched"
    if got.weight is not None and before.weight is not None:
        total = before.weight.double() + truth.weight
        budget = allowed(
            total, truth.weight_terms, truth.weight_softmax, before.weight.float() + single.weight, got.weight.dtype
        )
        assert_within("dW", got.weight, total, budget + UNIT[torch.float32] * total.abs())
    if got.bias is not None and before.bias is not None:
        total = before.bias.double() + truth.bias
        budget = allowed(total, truth.bias_terms, truth.bias_softmax, before.bias + single.bias, torch.float32)
        assert_within("db", got.bias, total, budget)


# --- fresh memory -----------------------------------------------------------------------------------------------------


class FreshMemory(TorchDispatchMode):
    """Fill every uninitialised allocation with 0xFF bytes (NaN in every float type), and keep the peak of their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: list[tuple[StorageWeakRef, int]] = []

    def reset(self) -> None:
        """Count from here on."""
        self.peak = 0
        self._storages.clear()

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        if storage.nbytes() > 4096:
            gc.collect()  # the interpreter leaves arguments of its last launch in a reference cycle
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
