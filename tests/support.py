"""The shared table of cases, their inputs, and the comparison with float64."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import Tensor

from infopo_kernels import InfoPO, LogitOptions, linear_infopo_loss, linear_logps, linear_preference_loss, naive
from infopo_kernels.backends import cpp, dispatch
from infopo_kernels.backends.base import Head
from infopo_kernels.objectives import Objective, Sequences
from infopo_kernels.options import IGNORE_INDEX
from infopo_kernels.packing import Rows, row_segments, sequence_sums
from tests.budget import HALF_STEP, SMALLEST, assert_within, error_budget, kept_rounding, operand_rounding

CPU_BACKENDS = ["torch", "cpp-portable", "cpp-avx2", "cpp-avx512", "cpp-avx512_bf16", "cpp-amx"]
"""Backends for a CPU, with their instruction sets. Tests run all that a machine has, not only the default."""


def use_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Switch to one of CPU_BACKENDS, or skip the test if it cannot run. Returns the name of the backend."""
    if (reason := missing(name)) is not None:
        pytest.skip(reason)
    backend, _, instructions = name.partition("-")
    if instructions:
        monkeypatch.setenv("INFOPO_KERNELS_CPU_ISA", instructions)
    return backend


def missing(name: str) -> str | None:
    """The reason why one of CPU_BACKENDS cannot run here, or None."""
    backend, _, instructions = name.partition("-")
    reason = dispatch.unavailable_reason(backend, torch.device("cpu"), torch.float32)
    if reason is not None or not instructions:
        return reason
    with mock.patch.dict(os.environ, INFOPO_KERNELS_CPU_ISA=instructions):
        try:
            cpp.isa(torch.bfloat16)
        except ValueError as error:
            return str(error)
    return None


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    pairs: int = 2
    length: int = 11
    hidden: int = 24
    vocab: int = 101
    packed: bool = False
    bias: bool = False
    logit: LogitOptions = field(default_factory=LogitOptions)
    objective: Objective = field(default_factory=InfoPO)
    reference: bool = True
    weighted: bool = False  # each sequence has its own weight
    ignore_index: int = IGNORE_INDEX
    prompt: int = 3
    shift: bool = False
    trained: tuple[str, ...] = ("hidden", "weight", "bias")
    scale: float = 1.0  # of the weight
    loss_factor: float = 1.0

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("plain"),
    Case("packed", packed=True),
    Case("packed-shift", packed=True, shift=True),
    Case("padded-shift", shift=True),
    Case("bias", bias=True),
    Case("softcap", logit=LogitOptions(softcap=3.0), scale=3.0),
    Case("scale-and-temperature", logit=LogitOptions(logit_scale=0.25, temperature=0.7)),
    Case("negative-scale", logit=LogitOptions(logit_scale=-0.5)),
    Case(
        "everything",
        packed=True,
        shift=True,
        bias=True,
        logit=LogitOptions(5.0, 1.5, 0.9),
        objective=InfoPO(0.3, 0.0, 1.0, None, 0.5, True),
        ignore_index=7,
        loss_factor=1024.0,
    ),
    Case("average", objective=InfoPO(beta=2.0, average=True)),
    Case("sft", objective=InfoPO(sft_weight=1.0)),
    Case("capped", objective=InfoPO(beta=1.0, offset=0.0, max_log_weight=-2.0), scale=2.0),
    Case("underflown", objective=InfoPO(beta=10.0), reference=False),
    Case("reference-free", reference=False),
    Case("frozen-head", trained=("hidden",)),
    Case("frozen-head-softcap", trained=("hidden",), logit=LogitOptions(softcap=3.0), bias=True),
    Case("frozen-hidden", trained=("weight",)),
    Case("bias-only", bias=True, trained=("bias",)),
    Case("hidden-and-bias", bias=True, trained=("hidden", "bias")),
    Case("one-hidden-unit", hidden=1),
    Case("one-token", length=1, prompt=0, pairs=1),
    Case("two-words", vocab=2),
    Case("one-word", vocab=1, length=3, prompt=1),
    Case("odd-sizes", hidden=67, vocab=1031, length=37, pairs=3),
    Case("power-of-two", hidden=64, vocab=512, length=32),
    Case("large-logits", scale=40.0),
    Case("few-scored", length=40, prompt=38),
]


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


@dataclass
class Inputs:
    """Tensors of a case; `trained` ones require grad."""

    case: Case
    dtype: torch.dtype
    tensors: dict[str, Tensor | None]
    labels: Tensor
    layout: dict[str, Tensor]
    ref_logps: Tensor | None
    shares: dict[str, Any] = field(default_factory=dict)
    """`sequence_weights` and `num_pairs`, if the case gives them."""

    def fresh(self, dtype: torch.dtype | None = None, device: str = "cpu") -> dict[str, Tensor | None]:
        """Leaves with the same values, on request in another type or on another device."""
        result: dict[str, Tensor | None] = {}
        for name, value in self.tensors.items():
            leaf = None if value is None else value.detach().to(device, dtype or value.dtype).clone()
            result[name] = leaf.requires_grad_(name in self.case.trained) if leaf is not None else None
        return result

    def moved(self, device: str) -> Inputs:
        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        layout = {key: value.to(device) for key, value in self.layout.items()}
        shares = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in self.shares.items()}
        labels, ref_logps = self.labels.to(device), move(self.ref_logps)
        return Inputs(self.case, self.dtype, self.tensors, labels, layout, ref_logps, shares)


def make(case: Case, dtype: torch.dtype) -> Inputs:
    """Inputs of a case, the same in every run, already rounded to `dtype`."""
    g = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    S, T, H, V = 2 * case.pairs, case.length, case.hidden, case.vocab
    hidden = randn(g, S, T, H)
    weight = randn(g, V, H) * (case.scale / H**0.5)
    bias = randn(g, V) if case.bias else None
    labels = torch.randint(0, V, (S, T), generator=g)
    labels[labels == case.ignore_index] = 0
    labels[:, : case.prompt] = case.ignore_index
    if case.prompt + 2 < T:
        labels[0, -2:] = case.ignore_index  # padding
    layout: dict[str, Tensor] = {}
    if case.packed:
        lengths = [max(case.prompt + 2, T - 2 * s) for s in range(S)]
        keep = torch.cat([torch.arange(T) < n for n in lengths])
        hidden, labels = hidden.reshape(S * T, H)[keep], labels.reshape(S * T)[keep]
        layout["cu_seqlens"] = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        layout["is_chosen"] = torch.tensor([s % 2 == 1 for s in range(S)])
    tensors = {"hidden": hidden, "weight": weight, "bias": bias}
    rounded = {key: None if value is None else value.to(dtype) for key, value in tensors.items()}
    inputs = Inputs(case, dtype, rounded, labels, layout, None)
    if case.weighted:
        inputs.shares = {"sequence_weights": torch.rand(S, generator=g).double() + 0.5, "num_pairs": 1.5}
    if case.reference and case.objective.reference != "none":
        truth = logps_truth(inputs, "mean" if case.objective.average else "sum")
        inputs.ref_logps = truth + torch.randn(S, generator=g, dtype=torch.float64)
    return inputs


def logps_truth(inputs: Inputs, reduction: str) -> Tensor:
    """Log-probabilities with materialised logits."""
    case = inputs.case
    bounds = {"cu_seqlens": inputs.layout.get("cu_seqlens")}
    with torch.no_grad():
        return naive.linear_logps(
            **inputs.fresh(torch.float64), labels=inputs.labels, **bounds, shift=case.shift, reduction=reduction,
            ignore_index=case.ignore_index, logit=case.logit,
        )  # fmt: skip


@dataclass
class Result:
    """A loss (or log-probabilities) and gradients by name (None if there is no gradient)."""

    loss: Tensor
    gradients: dict[str, Tensor | None]
    operand: float = 0.0
    """Relative rounding of G by the products (`budget.operand_rounding`)."""
    kept: float = 0.0
    """Relative rounding of kept logits (`budget.kept_rounding`)."""

    @classmethod
    def of(cls, loss: Tensor, leaves: dict[str, Tensor | None], factor: float) -> Result:
        if loss.requires_grad:  # a gradient that is wanted and missing shows in the comparison
            (loss * factor).backward()
        return cls(loss.detach(), {k: None if v is None else v.grad for k, v in leaves.items()})


def fused(inputs: Inputs, backend: str, device: str = "cpu", **kernel: Any) -> Result:
    """`linear_infopo_loss` of a case, or `linear_preference_loss` if the objective is not InfoPO."""
    case, there = inputs.case, inputs.moved(device)
    leaves = inputs.fresh(device=device)
    arguments = dict(
        **leaves, labels=there.labels, **there.layout, **there.shares, ref_logps=there.ref_logps, shift=case.shift,
        ignore_index=case.ignore_index, **vars(case.logit), backend=backend, **kernel,
    )  # fmt: skip
    if isinstance(case.objective, InfoPO):
        out = linear_infopo_loss(**arguments, **vars(case.objective))
    else:
        out = linear_preference_loss(**arguments, objective=case.objective)
    gradients = Result.of(out.loss, leaves, case.loss_factor).gradients
    return Result(
        out.loss.detach(), gradients, operand_rounding(backend, inputs.dtype), kept_rounding(backend, inputs.dtype)
    )


def fused_logps(inputs: Inputs, reduction: str, backend: str, device: str = "cpu", **kernel: Any) -> Result:
    """`linear_logps` of a case, weighted so that every entry has its own gradient."""
    case, there, leaves = inputs.case, inputs.moved(device), inputs.fresh(device=device)
    bounds = {"cu_seqlens": there.layout.get("cu_seqlens")}
    logps = linear_logps(
        **leaves, labels=there.labels, **bounds, shift=case.shift, reduction=reduction,
        ignore_index=case.ignore_index, **vars(case.logit), backend=backend, **kernel,
    )  # fmt: skip
    gradients = Result.of((logps * ramp(logps)).sum(), leaves, 1.0).gradients
    return Result(logps.detach(), gradients, operand_rounding(backend, inputs.dtype))


@dataclass
class Truth(Result):
    """The results of plain PyTorch for a case in float64, and the data for its error budget."""

    dtype: torch.dtype = torch.float32
    """Of the inputs."""
    factor: float = 1.0
    """The factor of the gradients."""
    value_error: Tensor | float = 0.0
    """Allowed error of the loss or the log-probabilities."""
    rows: tuple[Head, Tensor, Tensor, Tensor] | None = None
    """The problem in rows: head, labels, row weights and their own error."""

    @property
    def largest_factor(self) -> float:
        """Largest factor of a gradient after its first rounding.

        float16 gradients are rounded where the largest possible one is above 2^14 (`infopo_kernels.lift`).
        """
        assert self.rows is not None
        head, _, c, _ = self.rows
        if self.dtype != torch.float16:
            return max(abs(self.factor), float(c.abs().max()) if len(c) else 0.0)
        size = abs(head.scale) * c.abs()
        bounds = {
            "hidden": 2 * float(size.max()) * float(head.weight.abs().max()),
            "weight": float((size * head.hidden.double().abs().amax(1)).sum()),
            "bias": float(size.sum()),
        }
        return max(bounds[name] for name, gradient in self.gradients.items() if gradient is not None) / 2**14

    def budgets(self, operand: float, kept: float) -> dict[str, Tensor]:
        """Allowed errors of the gradients."""
        assert self.rows is not None
        head, labels, c, c_error = self.rows
        allowed = error_budget(head, labels, c, c_error, operand, kept)
        return {name: getattr(allowed, name) for name in ("hidden", "weight", "bias")}


def plain(inputs: Inputs) -> Truth:
    """The naive loss of a case, differentiated by autograd."""
    case = inputs.case

    def loss(leaves: dict[str, Tensor | None]) -> Tensor:
        return naive.linear_preference_loss(
            **leaves, labels=inputs.labels, **inputs.layout, **inputs.shares, ref_logps=inputs.ref_logps,
            shift=case.shift, ignore_index=case.ignore_index, objective=case.objective, logit=case.logit,
        )  # fmt: skip

    return differentiated(inputs, loss, lambda value: value * case.loss_factor, case.loss_factor)


def plain_logps(inputs: Inputs, reduction: str) -> Truth:
    """Naive log-probabilities, with the weights of `fused_logps`."""
    case = inputs.case
    bounds = {"cu_seqlens": inputs.layout.get("cu_seqlens")}

    def logps(leaves: dict[str, Tensor | None]) -> Tensor:
        return naive.linear_logps(
            **leaves, labels=inputs.labels, **bounds, shift=case.shift, reduction=reduction,
            ignore_index=case.ignore_index, logit=case.logit,
        )  # fmt: skip

    return differentiated(inputs, logps, lambda value: (value * ramp(value)).sum(), 1.0)


def differentiated(
    inputs: Inputs,
    compute: Callable[[dict[str, Tensor | None]], Tensor],
    scalar: Callable[[Tensor], Tensor],
    factor: float,
) -> Truth:
    """`compute` in float64, its gradients, and the weight and the allowed error of each token's log-probability."""

    def run(shift: Tensor | float) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        leaves, seen = inputs.fresh(torch.float64), []

        def token_logps(z: Tensor, labels: Tensor) -> Tensor:
            seen.append(own(z, labels) + shift)
            seen[-1].retain_grad()
            return seen[-1]

        with mock.patch.object(naive, "token_logps", token_logps):
            value = compute(leaves)
        scalar(value).backward()
        c = seen[0].grad
        return value.detach(), torch.zeros_like(seen[0]) if c is None else c, leaves

    own, case = naive.token_logps, inputs.case
    value, c, leaves = run(0.0)
    hidden = cast(Tensor, inputs.tensors["hidden"])
    rows = naive._rows(hidden, inputs.labels, inputs.layout.get("cu_seqlens"), case.shift, case.ignore_index)
    weight, bias = cast(Tensor, inputs.tensors["weight"]), inputs.tensors["bias"]
    head = Head(rows.hidden, weight, bias, case.logit.softcap, case.logit.scale, 0)
    dl = error_budget(head, rows.labels, c).l
    # Errors in one direction change the sums most; opposite errors of chosen and rejected change the margins most.
    moved = [run(direction * dl) for direction in (torch.ones_like(c), -torch.ones_like(c), c.sign(), -c.sign())]
    c_error = torch.stack([(other[1] - c).abs() for other in moved]).amax(0)
    c_error += 2 * HALF_STEP[head.accumulator_dtype] * c.abs() + SMALLEST[torch.float32] * abs(factor)
    # A loss falls with some log-probabilities and grows with others; a log-probability only grows.
    spread = torch.stack([(other[0] - value).abs() for other in moved]).amax(0)
    value_error = spread if value.ndim else ((c.abs() + c_error) * dl).sum() / abs(factor)
    gradients = {k: None if v is None else v.grad for k, v in leaves.items()}
    return Truth(value, gradients, 0.0, 0.0, inputs.dtype, factor, value_error, (head, rows.labels, c, c_error))


def ramp(like: Tensor) -> Tensor:
    """The same numbers, exactly, in float32 and in float64."""
    values = torch.linspace(-1, 2, like.numel(), dtype=torch.float32, device=like.device)
    return values.to(like.dtype).reshape(like.shape)


FLUSHED = 2.0**-126 * 1e6
"""Entries of G below float32's smallest normal number may be flushed to 0: as many as a sum has terms (up to 10^4 in
the tests), times an operand (up to 100)."""


def assert_value(got: Result, truth: Truth) -> None:
    """The loss, or the log-probabilities, are within budget."""
    assert_within("loss", got.loss, truth.loss, truth.value_error)


def assert_result(got: Result, truth: Truth) -> None:
    """The value and every gradient are within budget, and only wanted gradients exist."""
    assert_value(got, truth)
    allowed, largest = truth.budgets(got.operand, got.kept), truth.largest_factor
    for name, gradient in truth.gradients.items():
        other = got.gradients[name]
        if gradient is None:
            assert other is None, f"gradient of {name} was not asked for"
            continue
        assert other is not None, f"gradient of {name} is missing"
        # Each is rounded once when stored; dX of a frozen head (formed for weights of 1) is then scaled row by row;
        # then all are scaled by the factor, and float16 ones by their lift even if the factor is 1.
        roundings = 1 + (name == "hidden") + (truth.factor != 1 or truth.dtype == torch.float16)
        limit = allowed[name].reshape(gradient.shape) + FLUSHED
        assert_within(f"gradient of {name}", other, gradient, limit, roundings, largest)


def objective_arguments(
    labels: Tensor,
    cu_seqlens: Tensor,
    is_chosen: Tensor,
    ref_logps: Tensor,
    num_pairs: float,
    weights: Tensor | None = None,
) -> tuple[Rows, Sequences]:
    """The inputs of an objective besides log-probabilities; hidden states have width 0."""
    segments = row_segments(cu_seqlens, len(labels))
    # These are out of order if the bounds are, because nothing has checked the bounds.
    counts = sequence_sums(labels != IGNORE_INDEX, segments.clamp(max=len(is_chosen) - 1), len(is_chosen))
    rows = Rows(torch.empty(len(labels), 0), labels, cu_seqlens, segments)
    return rows, Sequences(counts, is_chosen, ref_logps, num_pairs, weights)
