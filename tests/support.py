"""The shared table of cases, the inputs that they describe, and the error budgets against float64."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from infopo_kernels import InfoPO, LogitOptions, linear_infopo_loss, linear_logps, linear_preference_loss, naive
from infopo_kernels.objectives import Objective, Sequences
from infopo_kernels.options import IGNORE_INDEX
from infopo_kernels.packing import Rows, row_segments, sequence_sums


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
    weighted: bool = False  # each sequence with a weight of its own
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
    """`sequence_weights` and `num_pairs`, where they are given."""

    def fresh(self, dtype: torch.dtype | None = None, device: str = "cpu") -> dict[str, Tensor | None]:
        """Leaves with the same values, in another type or on another device if asked."""
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


def logps_truth(inputs: Inputs, reduction: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Log-probabilities with materialised logits."""
    case = inputs.case
    bounds = {"cu_seqlens": inputs.layout["cu_seqlens"]} if inputs.layout else {}
    with torch.no_grad():
        return naive.linear_logps(
            **inputs.fresh(dtype), labels=inputs.labels, **bounds, shift=case.shift, reduction=reduction,
            ignore_index=case.ignore_index, logit=case.logit,
        )  # fmt: skip


@dataclass
class Result:
    """A loss and gradients by name (None where none came)."""

    loss: Tensor
    gradients: dict[str, Tensor | None]
    summands: float = 0.0

    @classmethod
    def of(cls, loss: Tensor, leaves: dict[str, Tensor | None], factor: float) -> Result:
        (loss * factor).backward()
        return cls(loss.detach(), {k: None if v is None else v.grad for k, v in leaves.items()})


def fused(inputs: Inputs, device: str = "cpu", **kernel: Any) -> Result:
    """`linear_infopo_loss` of a case, or `linear_preference_loss` where its objective is another."""
    case, there = inputs.case, inputs.moved(device)
    leaves = inputs.fresh(device=device)
    arguments = dict(
        **leaves, labels=there.labels, **there.layout, **there.shares, ref_logps=there.ref_logps, shift=case.shift,
        ignore_index=case.ignore_index, **vars(case.logit), **kernel,
    )  # fmt: skip
    if isinstance(case.objective, InfoPO):
        out = linear_infopo_loss(**arguments, **vars(case.objective))
    else:
        out = linear_preference_loss(**arguments, objective=case.objective)
    return Result.of(out.loss, leaves, case.loss_factor)


def plain(inputs: Inputs, dtype: torch.dtype) -> Result:
    """The naive loss of a case in `dtype`, differentiated by autograd."""
    case, leaves = inputs.case, inputs.fresh(dtype)
    loss = naive.linear_preference_loss(
        **leaves, labels=inputs.labels, **inputs.layout, **inputs.shares, ref_logps=inputs.ref_logps,
        shift=case.shift, ignore_index=case.ignore_index, objective=case.objective, logit=case.logit,
    )  # fmt: skip
    result = Result.of(loss, leaves, case.loss_factor)
    reduction = "mean" if case.objective.average else "sum"
    result.summands = getattr(case.objective, "beta", 1.0) * float(logps_truth(inputs, reduction, dtype).abs().max())
    return result


def fused_logps(inputs: Inputs, reduction: str, device: str = "cpu", **kernel: Any) -> Result:
    """`linear_logps` of a case, weighted so that every entry has a gradient of its own."""
    case, there, leaves = inputs.case, inputs.moved(device), inputs.fresh(device=device)
    bounds = {"cu_seqlens": there.layout["cu_seqlens"]} if there.layout else {}
    logps = linear_logps(
        **leaves, labels=there.labels, **bounds, shift=case.shift, reduction=reduction,
        ignore_index=case.ignore_index, **vars(case.logit), **kernel,
    )  # fmt: skip
    return Result(logps.detach(), Result.of((logps * ramp(logps)).sum(), leaves, 1.0).gradients)


def plain_logps(inputs: Inputs, reduction: str, dtype: torch.dtype) -> Result:
    """Naive log-probabilities with the same weights."""
    case, leaves = inputs.case, inputs.fresh(dtype)
    bounds = {"cu_seqlens": inputs.layout["cu_seqlens"]} if inputs.layout else {}
    logps = naive.linear_logps(
        **leaves, labels=inputs.labels, **bounds, shift=case.shift, reduction=reduction,
        ignore_index=case.ignore_index, logit=case.logit,
    )  # fmt: skip
    return Result(logps.detach(), Result.of((logps * ramp(logps)).sum(), leaves, 1.0).gradients)


def ramp(like: Tensor) -> Tensor:
    return torch.linspace(-1, 2, like.numel(), dtype=like.dtype, device=like.device).reshape(like.shape)


ROUNDING = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Relative error of two roundings to the type: once to store a gradient, once to scale it."""


def assert_close(
    name: str, got: Tensor, truth: Tensor, float32: Tensor, factor: float = 4.0, size: float = 0.0
) -> None:
    """`got` lies within its own rounding plus a small multiple of the error that float32 PyTorch makes.

    `size` is that of the summands where they cancel (float32 PyTorch may be right by luck there).
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)} instead of {tuple(truth.shape)}"
    got, truth = got.detach().cpu(), truth.detach().cpu()
    own = (float32.detach().cpu().double() - truth).abs().max() if truth.numel() else torch.tensor(0.0)
    size = max(size, float(truth.abs().max()) if truth.numel() else 0.0) or 1.0  # all 0: what is summed is about 1
    tiny = 2.0**-24 if got.dtype == torch.float16 else 0.0  # float16 is subnormal below
    allowed = truth.abs() * ROUNDING[got.dtype] + factor * own + 4 * 2.0**-24 * size + tiny
    error = (got.double() - truth).abs()
    worst = (error / allowed.clamp(min=torch.finfo(torch.float64).tiny)).max() if truth.numel() else 0.0
    assert (error <= allowed).all(), f"{name}: error {float(error.max()):.3g}, {float(worst):.2f} times the budget"


def assert_result(got: Result, truth: Result, float32: Result) -> None:
    """Loss and every gradient within budget, and gradients only where they were asked for."""
    assert_close("loss", got.loss, truth.loss, float32.loss, size=truth.summands)
    for name, gradient in truth.gradients.items():
        other = got.gradients[name]
        if gradient is None:
            assert other is None, f"gradient of {name} was not asked for"
            continue
        assert other is not None, f"gradient of {name} is missing"
        single = float32.gradients[name]
        assert single is not None
        assert_close(f"gradient of {name}", other, gradient, single)


def objective_arguments(
    labels: Tensor,
    cu_seqlens: Tensor,
    is_chosen: Tensor,
    ref_logps: Tensor,
    num_pairs: float,
    weights: Tensor | None = None,
) -> tuple[Rows, Sequences]:
    """What an objective is evaluated on beside log-probabilities; hidden states are of no width."""
    segments = row_segments(cu_seqlens, len(labels))
    # Out of order where the bounds are: nobody has checked them.
    counts = sequence_sums(labels != IGNORE_INDEX, segments.clamp(max=len(is_chosen) - 1), len(is_chosen))
    rows = Rows(torch.empty(len(labels), 0), labels, cu_seqlens, segments)
    return rows, Sequences(counts, is_chosen, ref_logps, num_pairs, weights)
