"""Infinities, masked entries and logits of any size for the primitives of every backend for a CPU; no rows at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from infopo_kernels import DPO, SFT, InfoPO, SimPO, linear_logps
from infopo_kernels.backends import dispatch
from infopo_kernels.backends.base import Backend, Gradients, Head
from infopo_kernels.objectives import Objective
from infopo_kernels.options import ELSEWHERE, IGNORE_INDEX
from tests import support
from tests.budget import assert_within, error_budget, operand_rounding
from tests.primitives import plain

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
N, H, V = 19, 24, 500
TILE = 96
"""Vocabulary entries of a tile of the C++ kernels. Their blocks have at most 3072, tiles of plain PyTorch 4096."""


@pytest.fixture(params=support.CPU_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    return dispatch.resolve(support.use_backend(request.param, monkeypatch), torch.device("cpu"), torch.float32)


@dataclass
class Results:
    """l, lse and the gradients of one way through the primitives."""

    l: Tensor  # noqa: E741
    lse: Tensor
    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None


def make(dtype: torch.dtype, softcap: float | None = None, scale: float = 1.0) -> tuple[Head, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(N, H, generator=g).to(dtype), (torch.randn(V, H, generator=g) / H**0.5).to(dtype)
    head = Head(hidden, weight, torch.randn(V, generator=g).to(dtype), softcap, scale, 1 << 20)
    labels = torch.randint(V, (N,), generator=g)
    labels[3] = IGNORE_INDEX
    return head, labels, torch.randn(N, generator=g)


def ways(backend: Backend, head: Head, labels: Tensor, c: Tensor) -> Iterator[tuple[str, Results]]:
    """Three ways: known weights, a frozen head, a known logsumexp."""

    def buffers(frozen: bool) -> Gradients:
        dX, db = torch.zeros_like(head.hidden), torch.zeros(len(head.weight))
        return Gradients(dX, None, None) if frozen else Gradients(dX, torch.zeros(head.weight.shape), db)

    for frozen in (False, True):
        to = buffers(frozen)
        l, lse = backend.logprob_and_grad(head, labels, c, to)  # noqa: E741
        assert to.hidden is not None
        yield "frozen" if frozen else "known", Results(l, lse, to.hidden, to.weight, to.bias)
    to = buffers(False)
    l, lse = backend.logprob(head, labels)  # noqa: E741
    backend.backward(head, labels, lse, c, to)
    assert to.hidden is not None
    yield "lse", Results(l, lse, to.hidden, to.weight, to.bias)


def assert_right(backend: Backend, head: Head, labels: Tensor, c: Tensor) -> None:
    """Compare every way with float64."""
    truth = plain(head, labels, c)
    allowed = error_budget(head, labels, c, operand=operand_rounding(backend.name, head.hidden.dtype))
    for way, got in ways(backend, head, labels, c):
        for name in ("l", "lse", "hidden", "weight", "bias"):
            if (value := getattr(got, name)) is not None:
                assert_within(f"{way}: {name}", value, getattr(truth, name), getattr(allowed, name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", ["label", "first tiles", "all but one tile", "scattered"])
def test_entries_at_minus_infinity(backend: Backend, dtype: torch.dtype, masked: str) -> None:
    """Masked entries: one with a label, whole tiles before and after the others, some in each tile."""
    head, labels, c = make(dtype)
    assert head.bias is not None
    if masked == "label":
        head.bias[labels[5]] = head.bias[labels[11]] = -torch.inf
    else:
        at = {
            "first tiles": torch.arange(V) < 2 * TILE,
            "all but one tile": (torch.arange(V) < 2 * TILE) | (torch.arange(V) >= 3 * TILE),
            "scattered": torch.arange(V) % 3 == 1,
        }[masked]
        head.bias[at] = -torch.inf
        rest = (~at).nonzero().squeeze(1)
        labels = torch.where(labels == IGNORE_INDEX, labels, rest[labels % len(rest)])
    assert_right(backend, head, labels, c)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("scale", [-0.7, -3.0])
def test_negative_scale(backend: Backend, dtype: torch.dtype, softcap: float | None, scale: float) -> None:
    assert_right(backend, *make(dtype, softcap, scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("rows", [[2, 5, 11], range(N)], ids=["some", "all"])
def test_labels_in_another_part_of_the_vocabulary(
    backend: Backend, dtype: torch.dtype, softcap: float | None, rows: list[int]
) -> None:
    """l = -lse, and no entry of the gradient has the part of a label."""
    head, labels, c = make(dtype, softcap, 1.3)
    elsewhere = torch.isin(torch.arange(N), torch.tensor([*rows])) & (labels != IGNORE_INDEX)
    assert_right(backend, head, torch.where(elsewhere, ELSEWHERE, labels), c)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("where", ["hidden", "weight", "bias", "every bias"])
def test_infinity_is_nan(backend: Backend, where: str, softcap: float | None, value: float) -> None:
    """l, lse and the gradients that follow from them are NaN, never a plausible number or an infinity.

    One exception: the lse of nothing but entries at -inf is -inf.
    """
    head, labels, c = make(torch.float32, softcap)
    scored, hit = labels != IGNORE_INDEX, torch.ones(N, dtype=torch.bool)
    assert head.bias is not None
    if where == "hidden":
        head.hidden[5, 7] = value
        hit = torch.arange(N) == 5
    elif where == "weight":
        head.weight[40, 2] = value
        head.hidden[:, 2] = head.hidden[:, 2].abs()  # a_tv = value in every row
        if value < 0 and softcap is None:
            pytest.skip("an entry at -inf has probability 0")
    elif where == "bias":
        head.bias[40] = value
        if value < 0 and softcap is None:
            pytest.skip("an entry at -inf has probability 0")
    else:
        head.bias.fill_(value)
    for way, got in ways(backend, head, labels, c):
        assert torch.equal(got.l.isnan(), hit & scored), way
        empty = where == "every bias" and value < 0 and softcap is None
        assert torch.equal(got.lse.isneginf() if empty else got.lse.isnan(), hit & scored), way
        assert got.hidden[hit & scored].isnan().any(1).all(), way
        if where == "hidden":
            assert got.hidden[~hit].isfinite().all(), way


@pytest.mark.parametrize("threshold", [0.0, 0.01], ids=["exact", "pooled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_part_of_the_vocabulary_that_the_bias_removes(backend: Backend, dtype: torch.dtype, threshold: float) -> None:
    """It adds nothing to the lse of the whole vocabulary, and with that lse it has gradients of 0."""
    head, labels, c = make(dtype)
    head = replace(head, tail_threshold=threshold)
    assert head.bias is not None
    head.bias.fill_(-torch.inf)
    labels[labels != IGNORE_INDEX] = ELSEWHERE
    scored = labels != IGNORE_INDEX
    _, lse = backend.logprob(head, labels)
    assert lse[scored].isneginf().all()
    to = Gradients(torch.full_like(head.hidden, torch.nan), torch.zeros(V, H), torch.zeros(V))
    backend.backward(head, labels, torch.full_like(lse, 2.5), c, to)
    for gradient in (to.hidden, to.weight, to.bias):
        assert gradient is not None
        assert gradient[scored if gradient is to.hidden else slice(None)].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e4, 1e8, 1e15, 1e30])
def test_logits_of_any_size(backend: Backend, dtype: torch.dtype, size: float) -> None:
    """Where float32 cannot tell which logit is the largest, the budget is wide, but p <= 1 still bounds gradients."""
    head, labels, c = make(dtype)
    head.weight.mul_(size)
    assert_right(backend, head, labels, c)
    # ties: the largest logit twice
    head.weight[7] = head.weight[8]
    assert_right(backend, head, labels, c)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_probability_never_exceeds_1(backend: Backend, dtype: torch.dtype) -> None:
    """lse may come out smaller than the largest logit: another order of sums, another rounding. Here it is, by much."""
    head, labels, c = make(dtype)
    head.weight.mul_(1e3)
    _, lse = backend.logprob(head, labels)
    to = Gradients(torch.zeros_like(head.hidden), torch.zeros(V, H), torch.zeros(V))
    backend.backward(head, labels, lse - 20, c, to)
    sound = labels != IGNORE_INDEX
    assert to.bias is not None
    # Every p is at most 1: exp(20) times more without the bound.
    assert to.bias.abs().max() <= 2 * c[sound].abs().sum()


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_weight_of_zero_known_beforehand_assigns_zeros(backend: Backend, weight_dtype: torch.dtype) -> None:
    """`logprob_and_grad` assigns each scored row of dX, on every way."""
    head, labels, c = make(torch.bfloat16)
    c[4] = 0
    for weight in (None, torch.zeros(V, H, dtype=weight_dtype)):
        dX = torch.full_like(head.hidden, torch.nan)
        backend.logprob_and_grad(head, labels, c, Gradients(dX, weight, None))
        assert dX[4].eq(0).all()
        assert dX.isnan().any(1).nonzero().tolist() == [[3]], "the row that is not scored"


# --- the public functions ---------------------------------------------------------------------------------------------


@pytest.fixture(params=[*support.CPU_BACKENDS, "triton"])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        pytest.importorskip("tests.triton_support")
        return "triton"
    return support.use_backend(request.param, monkeypatch)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of lanes that Triton masks
@pytest.mark.parametrize("shift", [False, True])
def test_no_rows_and_no_tokens(shift: bool, name: str) -> None:
    hidden, weight, labels = torch.randn(4, 7, H), torch.randn(V, H), torch.zeros(4, 7, dtype=torch.int64)
    for S, T in ((0, 7), (4, 0), (0, 0)):
        x = hidden[:S, :T].requires_grad_()
        logps = linear_logps(x, weight, labels[:S, :T], shift=shift, backend=name)
        assert logps.shape == (S, T)
        logps.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
    packed = linear_logps(hidden[0, :0], weight, labels[0, :0], shift=shift, backend=name)
    assert packed.shape == (0,)
    assert linear_logps(hidden[:0], weight, labels[:0], shift=shift, reduction="mean", backend=name).shape == (0,)
    with pytest.raises(ValueError, match=r"`labels` must score at least one token.*none in sequence 0"):
        linear_logps(hidden[:, :0], weight, labels[:, :0], shift=shift, reduction="sum", backend=name)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of lanes that Triton masks
@pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",)], ids="+".join)
@pytest.mark.parametrize(
    "objective", [InfoPO(), InfoPO(sft_weight=0.5, max_log_weight=1.0), SFT(), DPO(), SimPO()], ids=str
)
@pytest.mark.parametrize("half", ["chosen", "rejected"])
def test_a_label_that_the_bias_removes(half: str, objective: Objective, trained: tuple[str, ...], name: str) -> None:
    """A chosen response that is impossible costs an infinite loss, a rejected one a finite loss; no gradient is NaN."""
    case = support.Case("removed", bias=True, objective=objective, trained=trained, reference=False)
    inputs = support.make(case, torch.float32)
    bias = inputs.tensors["bias"]
    assert bias is not None
    inputs.labels[inputs.labels == 3] = 4
    inputs.labels[0 if half == "chosen" else 2, 5] = 3
    bias[3] = -torch.inf
    truth = support.plain(inputs)
    assert truth.loss.isposinf() == (half == "chosen")
    for key in trained:
        right = truth.gradients[key]
        assert right is not None
        assert right.isfinite().all()
    support.assert_result(support.fused(inputs, backend=name), truth)
