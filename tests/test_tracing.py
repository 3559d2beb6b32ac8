"""torch.compile and torch.export with sizes that change, and transforms of torch.func: right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from infopo_kernels import DPO, InfoPO, linear_infopo_loss, linear_logps, linear_preference_loss, naive

H, V = 16, 50

Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def infopo(hidden: Tensor, weight: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
    return linear_infopo_loss(hidden, weight, labels, ref_logps=ref, beta=0.3, max_log_weight=2.0).loss


def dpo(hidden: Tensor, weight: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
    return linear_preference_loss(hidden, weight, labels, objective=DPO(), ref_logps=ref, shift=True).loss


def means(hidden: Tensor, weight: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
    return (linear_logps(hidden, weight, labels, reduction="mean", shift=True) - ref).sum()


def sums(hidden: Tensor, weight: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
    return (linear_logps(hidden, weight, labels, reduction="sum", softcap=20.0) - ref).sum()


STEPS = [infopo, dpo, means, sums]


def make(S: int, T: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(S)
    hidden = torch.randn(S, T, H, generator=g).requires_grad_()
    weight = (torch.randn(V, H, generator=g) / 4).requires_grad_()
    labels = torch.randint(0, V, (S, T), generator=g)
    labels[:, :2] = -100
    with torch.no_grad():
        return hidden, weight, labels, naive.linear_logps(hidden, weight, labels, reduction="sum").double()


def expected(step: Step, inputs: tuple[Tensor, ...]) -> Tensor:
    """The value from materialised logits in float64."""
    hidden, weight, labels, ref = inputs
    if step is infopo or step is dpo:
        objective = InfoPO(0.3, max_log_weight=2.0) if step is infopo else DPO()
        return naive.linear_preference_loss(
            hidden, weight, labels, objective=objective, ref_logps=ref, shift=step is dpo, dtype=torch.float64
        )
    if step is means:
        return (
            naive.linear_logps(hidden, weight, labels, reduction="mean", shift=True, dtype=torch.float64) - ref
        ).sum()
    logit = naive.LogitOptions(softcap=20.0)
    return (naive.linear_logps(hidden, weight, labels, reduction="sum", logit=logit, dtype=torch.float64) - ref).sum()


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_one_graph_serves_every_size(step: Step) -> None:
    torch.compiler.reset()
    compiled = torch.compile(step, dynamic=True, fullgraph=True, backend="aot_eager")
    compiled(*make(4, 7))
    for S, T in ((4, 7), (6, 9), (2, 11)):
        inputs = make(S, T)
        with torch.compiler.set_stance("fail_on_recompile"):
            got = compiled(*inputs)
        right = expected(step, inputs)
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-4)
        found = torch.autograd.grad(got, inputs[:2])
        torch.testing.assert_close(found, torch.autograd.grad(right, inputs[:2]), rtol=1e-3, atol=1e-5)


class Scored(torch.nn.Module):
    def __init__(self, step: Step, weight: Tensor) -> None:
        super().__init__()
        self.step, self.weight = step, torch.nn.Parameter(weight.detach())

    def forward(self, hidden: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        return self.step(hidden, self.weight, labels, ref)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_an_exported_program_serves_every_size(step: Step) -> None:
    any_size = torch.export.Dim.DYNAMIC
    hidden, weight, labels, ref = make(4, 7)
    program = torch.export.export(
        Scored(step, weight),
        (hidden.detach(), labels, ref),
        dynamic_shapes=({0: any_size, 1: any_size}, {0: any_size, 1: any_size}, {0: any_size}),
    )
    for S, T in ((4, 7), (6, 13), (2, 5)):
        hidden, _, labels, ref = make(S, T)
        got = program.module()(hidden.detach(), labels, ref)
        right = expected(step, (hidden, weight, labels, ref))
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-4)


def test_an_exported_program_of_packed_rows_serves_every_number_of_sequences() -> None:
    class Packed(torch.nn.Module):
        def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, bounds: Tensor) -> Tensor:
            return linear_logps(hidden, weight, labels, cu_seqlens=bounds, reduction="mean", shift=True)

    any_size = torch.export.Dim.DYNAMIC

    def rows(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden, weight, labels, _ = make(1, sum(lengths))
        labels = labels.clamp(min=0)
        return hidden[0].detach(), weight.detach(), labels[0], torch.tensor([0, *lengths]).cumsum(0)

    shapes = ({0: any_size}, None, {0: any_size}, {0: any_size})
    program = torch.export.export(Packed(), rows([3, 4, 5]), dynamic_shapes=shapes)
    for lengths in ([3, 4, 5], [6, 2], [2, 2, 9, 4]):
        hidden, weight, labels, bounds = rows(lengths)
        right = naive.linear_logps(
            hidden, weight, labels, cu_seqlens=bounds, reduction="mean", shift=True, dtype=torch.float64
        )
        got = program.module()(hidden, weight, labels, bounds)
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "hessian", "jvp", "jacfwd", "dual numbers"])
def test_transforms_of_torch_func_are_refused(step: Step, transform: str) -> None:
    """A tangent was dropped without a word: the derivative was 0."""
    hidden, weight, labels, ref = (x.detach() for x in make(4, 7))

    def loss(x: Tensor) -> Tensor:
        return step(x, weight, labels, ref)

    def dual_numbers() -> Any:
        with forward_ad.dual_level():
            return loss(forward_ad.make_dual(hidden, torch.ones_like(hidden)))

    def run() -> Any:
        if transform == "dual numbers":
            return dual_numbers()
        if transform == "jvp":
            return torch.func.jvp(loss, (hidden,), (torch.ones_like(hidden),))
        if transform == "vjp":
            return torch.func.vjp(loss, hidden)
        return getattr(torch.func, transform)(loss)(hidden)

    with pytest.raises(RuntimeError, match=r"not available through .*torch\.autograd\.grad"):
        run()


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_transforms_of_something_else_may_use_values(step: Step) -> None:
    inputs = tuple(x.detach() for x in make(4, 7))
    value = expected(step, inputs)
    got = torch.func.grad(lambda a: (a * step(*inputs)).sum())(torch.ones(3))
    torch.testing.assert_close(got.double(), value.double().expand(3), rtol=1e-5, atol=1e-4)
    with forward_ad.dual_level():
        factor = forward_ad.make_dual(torch.ones(()), torch.full((), 2.0))
        tangent = forward_ad.unpack_dual(factor * step(*inputs)).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent.double(), 2 * value.double(), rtol=1e-5, atol=1e-4)
