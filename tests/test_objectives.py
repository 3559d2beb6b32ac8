"""Each objective against float64: its terms, its gradients on every backend and layout, and its number of products."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infopo_kernels import (
    DPO,
    IPO,
    SFT,
    InfoPO,
    LinearInfoPOLoss,
    LinearPreferenceLoss,
    SimPO,
    linear_infopo_loss,
    linear_logps,
    linear_preference_loss,
    naive,
)
from infopo_kernels.backends import dispatch
from infopo_kernels.backends.base import Backend, Gradients, Head
from infopo_kernels.objectives import Objective, Sequences, Terms, evaluate, from_flat
from tests import support
from tests.support import Case

PAGE = Path(__file__).parents[1] / "docs" / "objectives.md"


def code_of_the_page() -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": __name__}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S):
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), names)
    return names


ORPO = code_of_the_page()["ORPO"]

# Each loss of a pair, written by hand from chosen and rejected log-probabilities (sums or means) and references.
BY_HAND: list[tuple[Objective, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]] = [
    (InfoPO(0.5, 0.3), lambda w, r, rw, rr: -0.5 * (w - rw) + torch.exp(0.5 * (r - rr) - 0.3)),
    (
        InfoPO(0.5, sft_weight=0.7, average=True),
        lambda w, r, rw, rr: -0.5 * (w - rw) + (0.5 * (r - rr) - 1).exp() - 0.7 * w,
    ),
    (DPO(0.3), lambda w, r, rw, rr: -F.logsigmoid(0.3 * ((w - rw) - (r - rr)))),
    (DPO(2.0, average=True), lambda w, r, rw, rr: torch.log1p(torch.exp(-2.0 * ((w - rw) - (r - rr))))),
    (IPO(0.5), lambda w, r, rw, rr: ((w - rw) - (r - rr) - 1 / (2 * 0.5)) ** 2),
    (IPO(0.02, average=False), lambda w, r, rw, rr: ((w - rw) - (r - rr) - 1 / (2 * 0.02)) ** 2),
    (SimPO(2.5, 0.7), lambda w, r, rw, rr: -F.logsigmoid(2.5 * (w - r) - 0.7)),
    (SFT(), lambda w, r, rw, rr: -w),
    (SFT(average=False), lambda w, r, rw, rr: -w),
    (ORPO(0.4), lambda w, r, rw, rr: -w - 0.4 * F.logsigmoid(torch.logit(w.exp()) - torch.logit(r.exp()))),
]  # fmt: skip
OBJECTIVES = [objective for objective, _ in BY_HAND]


def inputs_of(objective: Objective, dtype: torch.dtype = torch.float64, **change: Any) -> support.Inputs:
    return support.make(Case(f"objective-{objective.name}", **{"objective": objective, **change}), dtype)


# --- equations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("objective", "pair"), BY_HAND, ids=lambda x: str(x) if isinstance(x, Objective) else "")
def test_the_naive_loss_is_the_equation(
    objective: Objective, pair: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], packed: bool
) -> None:
    """Compare with the loss by hand from materialised logits; in the packed layout chosen and rejected alternate."""
    inputs = inputs_of(objective, packed=packed, pairs=3)
    logps = support.logps_truth(inputs, "mean" if objective.average else "sum")
    chosen = inputs.layout["is_chosen"] if packed else torch.arange(6) < 3
    ref = torch.zeros_like(logps) if inputs.ref_logps is None else inputs.ref_logps
    expected = pair(logps[chosen], logps[~chosen], ref[chosen], ref[~chosen]).mean()
    torch.testing.assert_close(support.plain(inputs).loss, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_slopes_are_the_derivative_of_the_loss(objective: Objective, weighted: bool) -> None:
    """Compare with autograd through the terms. Slopes that are known beforehand are the same."""
    g = torch.Generator().manual_seed(3)
    counts = torch.tensor([3, 9, 1, 4])
    sums = -torch.rand(4, generator=g).double() * counts
    sums.requires_grad_()
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0]).double() if weighted else None
    ref = torch.zeros(4) if objective.reference == "none" else -torch.rand(4, generator=g) * counts
    sequences = Sequences(counts, torch.tensor([False, True, True, False]), ref.double(), 1.0, weights)
    sequences = sequences.paired() if objective.pairwise else sequences
    each, u = objective.terms(sums, sequences), sequences.weights if weighted else torch.ones(4)
    assert u is not None
    (by_autograd,) = torch.autograd.grad((u * each.loss).sum(), sums)
    torch.testing.assert_close(u * each.slopes, by_autograd, rtol=1e-12, atol=0)
    assert not any(x is not None and x.requires_grad for x in (each.slopes, each.weights, each.bound))
    if objective.known != "none":
        known = objective.known_slopes(sequences)
        decided = ~known.isnan()
        assert decided.all() == (objective.known == "all")
        torch.testing.assert_close(known[decided], each.slopes[decided], rtol=1e-12, atol=0)


def test_what_is_logged_by_hand() -> None:
    """Two pairs computed by hand."""
    sums, ref = torch.tensor([-10.0, -20, -30, -8]).double(), torch.tensor([-12.0, -18, -28, -12]).double()
    sequences = Sequences(torch.tensor([2, 4, 2, 4]), torch.tensor([True, True, False, False]), ref, 2.0).paired()
    dpo = DPO(0.5).terms(sums, sequences)
    assert dpo.rewards.tolist() == [1.0, -1.0, -1.0, 2.0]
    assert dpo.weights.tolist() == pytest.approx([0.5 / (1 + math.exp(m)) for m in (2, -3, 2, -3)])
    assert dpo.bound is not None
    assert float(dpo.bound.sum() / 2) == pytest.approx(math.log(2) - float(dpo.loss.sum() / 2))
    ipo = IPO(0.5, average=False).terms(sums, sequences)
    assert ipo.weights.tolist() == pytest.approx([2 * abs(m - 0.5) / 0.5 for m in (2, -3, 2, -3)])
    assert ipo.bound is None
    simpo = SimPO(2.0, 1.0).terms(sums, replace(sequences, ref_logps=torch.zeros(4).double()))
    assert simpo.rewards.tolist() == [-10.0, -10.0, -30.0, -4.0]
    assert simpo.weights.tolist() == pytest.approx([2 / (1 + math.exp(m - 1)) for m in (20, -6, 20, -6)])
    sft = SFT().terms(sums, sequences)
    assert sft.weights.tolist() == [1, 1, 0, 0]
    assert sft.rewards.tolist() == sft.logps.tolist() == [-5, -5, -15, -2]


# --- every backend and layout -----------------------------------------------------------------------------------------


@pytest.fixture(params=["torch", "cpp"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend. Objectives do not depend on the instruction set; test_backends.py runs each of them."""
    return support.use_backend(request.param, monkeypatch)


LAYOUTS = [
    {},
    {"packed": True, "shift": True, "weighted": True},
    {"bias": True, "weighted": True, "trained": ("hidden",)},
    {"packed": True, "bias": True, "trained": ("weight", "bias")},
    {"trained": ("hidden",)},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: "-".join(map(str, x)) or "padded")
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_loss_and_gradients(objective: Objective, layout: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    inputs = inputs_of(objective, dtype, **layout)
    got = support.fused(inputs, backend=backend)
    support.assert_result(got, support.plain(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids="+".join)
@pytest.mark.parametrize("objective", [DPO(0.3), SFT()], ids=str)
def test_smallest_workspace(objective: Objective, trained: tuple[str, ...], dtype: torch.dtype, backend: str) -> None:
    """Every loop of tiles runs more than once; a 16-bit weight gradient has no float32 copy."""
    inputs = inputs_of(objective, dtype, trained=trained, pairs=3, length=150, hidden=384, vocab=4099, prompt=20)
    got = support.fused(inputs, backend=backend, workspace_mib=1)
    support.assert_result(got, support.plain(inputs))


def test_compiles_without_a_graph_break() -> None:
    inputs = inputs_of(DPO(), torch.float32, packed=True, shift=True, weighted=True)
    ref = inputs.ref_logps

    def step(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        each = [
            linear_preference_loss(
                hidden, weight, inputs.labels, objective=objective, **inputs.layout, **inputs.shares, shift=True,
                ref_logps=None if objective.reference == "none" else ref,
            )
            for objective in OBJECTIVES
        ]  # fmt: skip
        return sum(out.loss for out in each), *(out.rewards for out in each)  # type: ignore[return-value]

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = inputs.fresh()
        hidden, weight = leaves["hidden"], leaves["weight"]
        assert hidden is not None
        assert weight is not None
        loss, *rewards = run(hidden, weight)
        results.append([loss.detach(), *rewards, *torch.autograd.grad(loss * 3, [hidden, weight])])
    torch.testing.assert_close(results[1], results[0])


def test_modules_hold_their_objective() -> None:
    inputs = inputs_of(DPO(), torch.float32)
    leaves = inputs.fresh()
    module = LinearPreferenceLoss(DPO(0.3))
    assert "DPO(beta=0.3" in repr(module)
    del leaves["bias"]
    expected = linear_preference_loss(**leaves, labels=inputs.labels, objective=DPO(0.3), ref_logps=inputs.ref_logps)
    assert torch.equal(module(**leaves, labels=inputs.labels, ref_logps=inputs.ref_logps).loss, expected.loss)
    assert LinearInfoPOLoss(InfoPO(beta=0.4)).options == InfoPO(beta=0.4)


# --- pairs and weights ------------------------------------------------------------------------------------------------


def test_several_rejected_responses_to_a_prompt(backend: str) -> None:
    """One, three and two rejected responses to prompts of weights 1, 2 and 0.5, against a loop over prompts."""
    rejected_of, prompt_weights = [[3], [4, 5, 6], [7, 8]], [1.0, 2.0, 0.5]
    options = InfoPO(beta=0.2, sft_weight=0.3, max_log_weight=2.0)
    g = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(9, 6, 8, generator=g), torch.randn(31, 8, generator=g) / 2
    labels = torch.randint(0, 31, (9, 6), generator=g)
    labels[:, :2] = -100
    ref = -14 - 4 * torch.rand(9, generator=g).double()
    u = torch.zeros(9).double()
    for p, (rejected, w) in enumerate(zip(rejected_of, prompt_weights, strict=True)):
        u[p], u[rejected] = w, w / len(rejected)

    x, y = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logps = naive.linear_logps(x, y, labels, reduction="sum")
    delta = options.beta * (logps - ref)
    loss, bound = torch.zeros(()).double(), torch.zeros(()).double()
    for p, (rejected, w) in enumerate(zip(rejected_of, prompt_weights, strict=True)):
        term = -delta[p] + sum(torch.exp(delta[k] - 1) for k in rejected) / len(rejected)
        loss = loss + w * (term - options.sft_weight * logps[p] / 4) / 3
        bound = bound - w * term / 3
    truth = torch.autograd.grad(loss, [x, y])

    hidden.requires_grad_()
    weight.requires_grad_()
    out = linear_infopo_loss(
        hidden, weight, labels, is_chosen=torch.arange(9) < 3, ref_logps=ref, sequence_weights=u, num_pairs=3,
        backend=backend, **vars(options),
    )  # fmt: skip
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.mi_lower_bound, bound, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.weights[:3], 0.2 * u[:3])
    for got, exact in zip(torch.autograd.grad(out.loss, [hidden, weight]), truth, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-6)


def test_a_pair_weighs_the_mean_of_its_two_weights() -> None:
    inputs = inputs_of(DPO(0.5), torch.float64, packed=True)
    leaves = inputs.fresh()
    u = torch.tensor([1.0, 2.0, 0.0, 4.0])  # chosen are 1 and 3, rejected 0 and 2
    out = linear_preference_loss(
        **leaves, labels=inputs.labels, **inputs.layout, ref_logps=inputs.ref_logps, objective=DPO(0.5),
        sequence_weights=u, num_pairs=7,
    )  # fmt: skip
    margins = out.rewards[[1, 3]] - out.rewards[[0, 2]]
    torch.testing.assert_close(out.loss, -(torch.tensor([1.5, 2.0]) * F.logsigmoid(margins)).sum() / 7)


def test_a_sequence_of_weight_zero_leaves_no_gradient() -> None:
    for objective in (InfoPO(), DPO(), SFT()):
        inputs = inputs_of(objective, torch.float32)
        leaves = inputs.fresh()
        linear_preference_loss(
            **leaves, labels=inputs.labels, ref_logps=inputs.ref_logps, objective=objective, num_pairs=2,
            sequence_weights=torch.tensor([0.0, 1, 0, 1]),
        ).loss.backward()  # fmt: skip
        hidden = leaves["hidden"]
        assert hidden is not None
        assert hidden.grad is not None
        assert hidden.grad[[0, 2]].eq(0).all()
        assert hidden.grad[1].ne(0).any()


def test_without_a_partner_the_loss_is_nan_and_nothing_waits() -> None:
    """Unequal numbers on a GPU, which raise an error on a CPU: the host reads no value back."""
    labels, ref = torch.zeros(8, dtype=torch.int64), torch.zeros(4).double()
    for chosen in ([True, True, True, False], [False] * 4, [True] * 4):
        rows, sequences = support.objective_arguments(
            labels, torch.tensor([0, 2, 4, 6, 8]), torch.tensor(chosen), ref, 1.0
        )
        for objective in (DPO(), IPO(), SimPO(), ORPO()):
            assert evaluate(objective, -torch.rand(8), rows, sequences.paired()).loss.isnan(), (objective, chosen)
    # Tensors without storage raise an error when a value is read.
    rows, sequences = support.objective_arguments(labels, torch.tensor([0, 2, 4, 6, 8]), torch.arange(4) < 2, ref, 1.0)
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in vars(sequences).items()}
    there = replace(rows, labels=labels.to("meta"), segments=torch.zeros(8, dtype=torch.int64, device="meta"))
    for objective in OBJECTIVES:
        of = Sequences(**meta).paired() if objective.pairwise else Sequences(**meta)
        assert evaluate(objective, torch.zeros(8, device="meta"), there, of).loss.shape == ()


# --- what it costs ----------------------------------------------------------------------------------------------------


class Counting:
    """A backend that runs another one, and counts the products of scored rows that `backends.base` promises."""

    def __init__(self, runner: Backend) -> None:
        self._runner, self.products = runner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def logprob(self, head: Head, labels: Tensor, keep: Gradients | None = None) -> tuple[Tensor, Tensor]:
        self.products += int((labels != -100).sum())
        return self._runner.logprob(head, labels, keep)

    def logprob_and_grad(
        self, head: Head, labels: Tensor, row_weight: Tensor, gradients: Gradients
    ) -> tuple[Tensor, Tensor]:
        self.products += int((labels != -100).sum()) * (1 + self._buffers(gradients))
        return self._runner.logprob_and_grad(head, labels, row_weight, gradients)

    def backward(
        self, head: Head, labels: Tensor, lse: Tensor, row_weight: Tensor, gradients: Gradients,
        kept: Tensor | None = None,
    ) -> None:  # fmt: skip
        live = (labels != -100) & (row_weight != 0)
        again = live if kept is None else live & (kept == -100)
        self.products += int(again.sum()) + int(live.sum()) * self._buffers(gradients)
        self._runner.backward(head, labels, lse, row_weight, gradients, kept)

    @staticmethod
    def _buffers(gradients: Gradients) -> int:
        return (gradients.hidden is not None) + (gradients.weight is not None)


PRODUCTS = [  # products for each chosen and each rejected row: first with no row kept, then with every row kept
    (DPO(), ("hidden", "weight"), (4, 4), (3, 3)),
    (IPO(), ("hidden", "weight"), (4, 4), (3, 3)),
    (SimPO(), ("hidden", "weight"), (4, 4), (3, 3)),
    (DPO(), ("hidden",), (2, 2), (2, 2)),
    (SFT(), ("hidden", "weight"), (3, 1), (3, 1)),
    (SFT(), ("hidden",), (2, 1), (2, 1)),
    (InfoPO(), ("hidden", "weight"), (3, 4), (3, 3)),
    (InfoPO(), ("hidden",), (2, 2), (2, 2)),
    (InfoPO(beta=200.0), ("hidden", "weight"), (3, 1), (3, 1)),  # every rejected weight underflows
]


@pytest.mark.parametrize("name", ["torch", "cpp"])
@pytest.mark.parametrize(("objective", "trained", "none_kept", "all_kept"), PRODUCTS, ids=str)
def test_products(
    objective: Objective, trained: tuple[str, ...], none_kept: tuple[int, int], all_kept: tuple[int, int],
    name: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The table of `schedule.py`. The C++ kernels keep logits where that pays; plain PyTorch keeps none."""
    if reason := dispatch.unavailable_reason(name, torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    counting = Counting(dispatch.resolve(name, torch.device("cpu"), torch.float32))
    monkeypatch.setattr(dispatch, "resolve", lambda *_: counting)
    inputs = inputs_of(objective, torch.float32, trained=trained, length=40, hidden=256, vocab=512, reference=False)
    rows = [int((half != -100).sum()) for half in inputs.labels.chunk(2)]
    support.fused(inputs, backend=name)
    expected = all_kept if name == "cpp" else none_kept
    assert counting.products == sum(n * products for n, products in zip(rows, expected, strict=True))


def test_dpo_costs_no_more_than_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(dispatch.resolve("torch", torch.device("cpu"), torch.float32))
    monkeypatch.setattr(dispatch, "resolve", lambda *_: counting)
    inputs = inputs_of(DPO(), torch.float32, trained=("hidden", "weight"))
    leaves = inputs.fresh()
    assert inputs.ref_logps is not None
    logps = linear_logps(**leaves, labels=inputs.labels, reduction="sum")
    chosen, rejected = (0.1 * (logps - inputs.ref_logps)).chunk(2)
    loss = -F.logsigmoid(chosen - rejected).mean()
    loss.backward()
    by_hand, counting.products = counting.products, 0
    fused = support.fused(inputs, backend="torch")
    assert 0 < counting.products <= by_hand
    torch.testing.assert_close(fused.loss.double(), loss.detach(), rtol=1e-6, atol=1e-7)


# --- an objective of one's own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [*OBJECTIVES, InfoPO(0.2, 0.0, 1.5, -3.0, 0.1, True)], ids=str)
def test_options_survive_the_op(objective: Objective) -> None:
    assert from_flat(objective.name, objective.to_flat()) == objective


def test_two_objectives_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`name` must be unique, got 'dpo', which DPO has"):

        @dataclass(frozen=True)
        class Other(SFT):
            name: ClassVar[str] = "dpo"


def test_an_objective_without_known_slopes_says_so() -> None:
    @dataclass(frozen=True)
    class Forgetful(SFT):
        name: ClassVar[str] = "forgetful"

        def terms(self, sums: Tensor, sequences: Sequences) -> Terms:
            return super().terms(sums, sequences)

        known_slopes = Objective.known_slopes

    inputs = inputs_of(Forgetful(), torch.float32)
    with pytest.raises(NotImplementedError, match="Forgetful says known='all'"):
        support.fused(inputs, backend="torch")
