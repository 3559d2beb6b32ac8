"""Random calls of the public functions, and their check against float64: layouts, shift, objectives, reductions, pooled
tails, nothing to train, a head that a group of one rank shares."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch

from infopo_kernels import DPO, IPO, SFT, InfoPO, LogitOptions, SimPO, naive
from infopo_kernels.distributed import VocabShard
from infopo_kernels.distributed.parallel import Way
from infopo_kernels.objectives import Objective
from infopo_kernels.options import IGNORE_INDEX
from tests import support
from tests.budget import HALF_STEP, SMALLEST
from tests.distributed.one_rank import one_rank

LAYOUTS = ["padded", "padded, any order", "packed", "packed [1, N]"]


@dataclass(frozen=True)
class Call:
    """The description of a call; it and the seed determine the tensors."""

    seed: int
    backend: str
    dtype: torch.dtype
    layout: str
    lengths: tuple[int, ...]
    """Rows of each sequence."""
    H: int
    V: int
    reduction: str | None
    """Of `linear_logps`; None for a loss."""
    objective: Objective
    trained: tuple[str, ...]
    bias: bool
    shift: bool
    softcap: float | None
    scale: float
    ignore_index: int
    ignored: float
    reference: bool
    weights: bool
    num_pairs: float | None
    factor: float
    hidden_size: float
    weight_size: float
    way: str | None
    """How the ranks of a group that share the head compute together; None: the head is whole."""
    padding: int
    """Rows of NaN behind a shared head's vocabulary."""
    kernel: dict[str, Any] = field(default_factory=dict)


def draw(seed: int, backends: list[str]) -> Call:
    """The call of a seed."""
    r = random.Random(seed)
    backend = r.choice(backends)
    small = backend == "triton"  # interpreted
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    dtype = r.choice([torch.bfloat16] if backend in ("cpp-avx512_bf16", "cpp-amx") else dtypes)
    objective = r.choice(
        [
            InfoPO(10 ** r.uniform(-2, 0), r.choice([0.0, 1.0]), average=r.random() < 0.5),
            InfoPO(10 ** r.uniform(-2, 0), max_log_weight=r.uniform(-3, 2), sft_weight=r.choice([0.0, 0.3])),
            DPO(10 ** r.uniform(-2, 0)),
            IPO(10 ** r.uniform(-1, 0)),
            SimPO(r.uniform(1, 3), r.uniform(0, 1.5)),
            SFT(),
        ]
    )
    layout = r.choice(LAYOUTS)
    shift = r.random() < 0.5
    S, least = 2 * r.choice([1, 1, r.randint(1, 3)]), 2 if shift else 1
    longest = r.choice([least, least + 5, 12 if small else 40])
    if layout.startswith("padded"):
        lengths = (r.randint(least, longest),) * S
    else:
        odd = not objective.pairwise and r.random() < 0.3
        lengths = tuple(r.randint(least, longest) for _ in range(S + odd))
    trained = tuple(name for name in ("hidden", "weight", "bias") if r.random() < 0.7)
    bias = r.random() < 0.5
    weights = r.random() < 0.3
    return Call(
        seed=seed,
        backend=backend,
        dtype=dtype,
        layout=layout,
        lengths=lengths,
        H=r.choice([1, r.randint(1, 40), r.randint(1, 30 if small else 130), 16 if small else 256]),
        V=r.choice([1, 2, r.randint(1, 100), r.randint(1, 100 if small else 1200)]),
        reduction=r.choice([None, None, None, "none", "sum", "mean"]),
        objective=objective,
        trained=trained if bias else tuple(name for name in trained if name != "bias"),
        bias=bias,
        shift=shift,
        softcap=r.choice([None, None, 10 ** r.uniform(-0.5, 2)]),
        scale=r.choice([1.0, r.uniform(0.1, 2), -r.uniform(0.1, 2)]),
        ignore_index=r.choice([IGNORE_INDEX, IGNORE_INDEX, -1]),
        ignored=r.choice([0.0, 0.3, 0.9]),
        reference=r.random() < 0.7,
        weights=weights,
        num_pairs=10 ** r.uniform(-1, 3) if weights or r.random() < 0.3 else None,
        factor=r.choice([1.0, 1.0, 2.0 ** r.randint(-8, 16), 10 ** r.uniform(-3, 3)]),
        hidden_size=10 ** r.uniform(-1, 0.5),
        weight_size=10 ** r.uniform(-1, 1.5 if r.random() < 0.3 else 0.3),
        way=r.choice(get_args(Way)) if r.random() < 0.15 else None,
        padding=r.choice([0, r.randint(1, 70)]),
        kernel={
            **r.choice([{}, {"workspace_mib": 1}, {"workspace_mib": 4}]),
            **({} if small or r.random() < 0.75 else {"tail_threshold": 10 ** r.uniform(-6, -0.1)}),
        },
    )


def check(call: Call, backend: str) -> None:
    """Run the call. Raises AssertionError if a value or a gradient exceeds its budget."""
    inputs = _inputs(call)
    _check_rows(call, inputs)
    got, known = _run(call, inputs, backend), inputs
    if not call.trained:  # the truth's budget follows from gradients
        assert not got.loss.requires_grad
        known = replace(inputs, case=replace(inputs.case, trained=("hidden",)))
    truth = support.plain(known) if call.reduction is None else support.plain_logps(known, call.reduction)
    fits = all(g is None or float(g.abs().max() if g.numel() else 0) < 3e4 for g in truth.gradients.values())
    if not call.trained or not (fits or call.dtype != torch.float16):
        # float16 overflows where float64 rounded to it does; entries near its end may go either way
        support.assert_value(got, truth)
    elif "tail_threshold" in call.kernel:
        support.assert_value(got, truth)
        _check_pooled(got, truth)
    else:
        support.assert_result(got, truth)


def _run(call: Call, inputs: support.Inputs, backend: str) -> support.Result:
    """The fused value and its gradients; those of a shared head without its padding, which must be 0."""
    with contextlib.ExitStack() as stack:
        options = dict(call.kernel)
        if call.way is not None:
            group = stack.enter_context(one_rank())
            options["vocab"] = VocabShard(group, vocabulary=call.V, way=call.way)  # type: ignore[arg-type]
            inputs = replace(inputs, tensors=_padded(inputs.tensors, call.padding))
        if call.reduction is None:
            got = support.fused(inputs, backend, **options)
        else:
            got = support.fused_logps(inputs, call.reduction, backend, **options)
    for name in ("weight", "bias"):
        gradient = got.gradients[name]
        if gradient is not None:
            assert gradient[call.V :].eq(0).all(), f"gradient of {name}: padding counts"
            got.gradients[name] = gradient[: call.V]
    return got


def _padded(tensors: dict[str, torch.Tensor | None], rows: int) -> dict[str, torch.Tensor | None]:
    def pad(name: str, x: torch.Tensor) -> torch.Tensor:
        return x if name == "hidden" else torch.cat([x, x.new_full((rows, *x.shape[1:]), torch.nan)])

    return {name: None if x is None else pad(name, x) for name, x in tensors.items()}


def _check_pooled(got: support.Result, truth: support.Truth) -> None:
    """What a pooled tail leaves as it is: the sums of the gradients over the vocabulary. (`cases` bounds the rest.)"""
    allowed, largest = truth.budgets(2 * got.operand, got.kept), truth.largest_factor
    for name, gradient in truth.gradients.items():
        other = got.gradients[name]
        assert (other is None) == (gradient is None), f"gradient of {name}"
        if other is None or gradient is None:
            continue
        assert other.isfinite().all(), f"gradient of {name}"
        if name == "hidden":
            continue
        # Each entry is rounded, into its type and as a part of its pool.
        size = other.double().abs() + gradient.abs() + allowed[name]
        limit = allowed[name] + 3 * HALF_STEP[other.dtype] * size + 3 * SMALLEST[other.dtype] * max(1.0, largest)
        error, limit = (other.double() - gradient).sum(0).abs(), (limit + support.FLUSHED).sum(0)
        worst = float((error / limit).max())
        assert (error <= limit).all(), f"gradient of {name}: its sum over the vocabulary is off, {worst:.2f} times"


def _check_rows(call: Call, inputs: support.Inputs) -> None:
    """The truth's rows, which come from the library's own layouts, are those of a plain loop."""
    hidden = inputs.tensors["hidden"]
    assert hidden is not None
    rows = naive._rows(hidden, inputs.labels, inputs.layout.get("cu_seqlens"), call.shift, call.ignore_index)
    given, labels, segments = inputs.labels.reshape(-1).tolist(), [], []
    for s, length in enumerate(call.lengths):
        own = given[len(labels) : len(labels) + length]
        if call.shift:
            own = [*own[1:], call.ignore_index]
        labels += [IGNORE_INDEX if y == call.ignore_index else y for y in own]
        segments += [s] * length
    assert rows.labels.tolist() == labels, "labels of the rows"
    assert rows.segments is not None
    assert rows.segments.tolist() == segments, "sequences of the rows"


def _inputs(call: Call) -> support.Inputs:
    g = torch.Generator().manual_seed(call.seed)
    N, S = sum(call.lengths), len(call.lengths)
    hidden = support.randn(g, N, call.H) * call.hidden_size
    weight = support.randn(g, call.V, call.H) * (call.weight_size / call.H**0.5)
    tensors = {"hidden": hidden, "weight": weight, "bias": support.randn(g, call.V) if call.bias else None}
    bounds = torch.tensor([0, *call.lengths]).cumsum(0)
    labels = torch.randint(call.V, (N,), generator=g)
    ignored = torch.rand(N, generator=g) < call.ignored
    ignored[bounds[:-1] + call.shift] = False  # each sequence scores a token
    labels[ignored] = call.ignore_index
    is_chosen = torch.arange(S) % 2 == 0
    if not call.objective.pairwise:
        is_chosen = torch.rand(S, generator=g) < 0.5
    is_chosen = is_chosen[torch.randperm(S, generator=g)]
    layout: dict[str, torch.Tensor] = {}
    if call.layout.startswith("padded"):
        tensors["hidden"] = hidden.view(S, -1, call.H)
        labels = labels.view(S, -1)
        if call.layout != "padded" and call.reduction is None:
            layout = {"is_chosen": is_chosen}
    else:
        layout = {"cu_seqlens": bounds.to(torch.int32 if call.seed % 2 else torch.int64), "is_chosen": is_chosen}
        if call.layout != "packed" and call.reduction != "none":  # of the shape of `labels`
            tensors["hidden"], labels = hidden[None], labels[None]
    rounded = {name: None if x is None else x.to(call.dtype) for name, x in tensors.items()}
    case = support.Case(
        f"fuzz-{call.seed}",
        bias=call.bias,
        logit=LogitOptions(call.softcap, call.scale),
        objective=call.objective,
        ignore_index=call.ignore_index,
        shift=call.shift,
        trained=call.trained,
        loss_factor=call.factor,
    )
    inputs = support.Inputs(case, call.dtype, rounded, labels, layout, None)
    if call.reduction is None and (call.weights or call.num_pairs is not None):
        inputs.shares = {"num_pairs": call.num_pairs}
        if call.weights:
            inputs.shares["sequence_weights"] = torch.rand(S, generator=g).double() + 0.5
    if call.reference and call.objective.reference != "none" and call.reduction is None:
        truth = support.logps_truth(inputs, "mean" if call.objective.average else "sum")
        inputs.ref_logps = truth + torch.randn(S, generator=g, dtype=torch.float64)
    return inputs
