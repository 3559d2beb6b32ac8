"""`grad_weight_into`: the backward pass adds dW to a buffer of the caller's, in float32, and the weight gets none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from infopo_kernels import (
    DPO,
    SFT,
    InfoPO,
    KernelOptions,
    LinearPreferenceLoss,
    linear_infopo_loss,
    linear_logps,
    linear_preference_loss,
)
from infopo_kernels.backends import dispatch
from infopo_kernels.backends.base import Backend
from tests import support
from tests.support import Case, Inputs, Result

H, V = 16, 53

CASES = [
    *(case for case in support.CASES if case.name in ("plain", "packed-shift", "everything", "softcap", "underflown")),
    Case("frozen hidden states", trained=("weight",), hidden=67, vocab=1031, length=37),
    Case("dpo", objective=DPO(0.3), packed=True, weighted=True),
    Case("sft", objective=SFT()),
]


def into_a_buffer(run: Callable[[Tensor], Result], inputs: Inputs, calls: int) -> Result:
    """The last of several calls with one buffer; a call's share of the buffer stands for the gradient of the weight."""
    weight = inputs.tensors["weight"]
    assert weight is not None
    buffer = torch.zeros(weight.shape)
    for _ in range(calls):
        got = run(buffer)
        assert got.gradients["weight"] is None
    return replace(got, gradients={**got.gradients, "weight": buffer / calls})


@pytest.mark.parametrize("backend", support.CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_steps_add_up(case: Case, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, for every factor that the case has. A dW that had been 16-bit would miss the budget."""
    inputs = support.make(case, dtype)
    name = support.use_backend(backend, monkeypatch)
    got = into_a_buffer(lambda buffer: support.fused(inputs, name, grad_weight_into=buffer), inputs, 2)
    support.assert_result(got, support.plain(inputs))


@pytest.mark.parametrize("backend", support.CPU_BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_log_probabilities(reduction: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = support.make(next(case for case in CASES if case.name == "packed-shift"), torch.bfloat16)
    name = support.use_backend(backend, monkeypatch)
    got = into_a_buffer(lambda buffer: support.fused_logps(inputs, reduction, name, grad_weight_into=buffer), inputs, 2)
    support.assert_result(got, support.plain_logps(inputs, reduction))


@pytest.mark.parametrize("factor", [2.0**-8, 2.0**14])
def test_a_grad_scaler_s_factor(factor: float) -> None:
    """float16 needs no scale of its own: nothing is rounded to 16 bits before the factor is in it."""
    case = Case("scaled", objective=InfoPO(average=True), loss_factor=factor)
    inputs = support.make(case, torch.float16)
    got = into_a_buffer(lambda buffer: support.fused(inputs, "torch", grad_weight_into=buffer), inputs, 1)
    support.assert_result(got, support.plain(inputs))


def batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (4, 7), generator=g)
    labels[:, :2] = -100
    hidden = torch.randn(4, 7, H, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=g) / 4).to(dtype).requires_grad_()
    return {"hidden": hidden, "weight": weight, "labels": labels}


def infopo(**arguments: Any) -> Tensor:
    return linear_infopo_loss(**arguments).loss


def dpo(**arguments: Any) -> Tensor:
    return linear_preference_loss(**arguments, objective=DPO()).loss


def module(**arguments: Any) -> Tensor:
    return LinearPreferenceLoss(SFT(), kernel=KernelOptions("torch"))(**arguments).loss


def logps(**arguments: Any) -> Tensor:
    return linear_logps(**arguments, reduction="mean").sum()


STEPS = pytest.mark.parametrize("step", [infopo, dpo, module, logps], ids=lambda step: step.__name__)


@STEPS
def test_every_backward_pass_adds(step: Callable[..., Tensor]) -> None:
    x, start = batch(), torch.randn(V, H, generator=torch.Generator().manual_seed(1))
    buffer, (dX, dW) = start.clone(), torch.autograd.grad(step(**x), (x["hidden"], x["weight"]))
    loss = step(**x, grad_weight_into=buffer)
    assert torch.equal(buffer, start)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(buffer, start + dW)
    (3 * loss).backward()
    torch.testing.assert_close(buffer, start + 4 * dW)
    torch.testing.assert_close(x["hidden"].grad, 4 * dX)
    assert x["weight"].grad is None


@STEPS
def test_losses_that_are_open_at_a_time_share_a_buffer(step: Callable[..., Tensor]) -> None:
    """The first backward pass changes the buffer that the second loss was given."""
    x, buffer = batch(), torch.zeros(V, H)
    (dW,) = torch.autograd.grad(step(**x), x["weight"])
    losses = [step(**x, grad_weight_into=buffer) for _ in range(2)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(buffer, 2 * dW)


@STEPS
def test_the_buffer_may_be_the_weight_s_own_gradient(step: Callable[..., Tensor]) -> None:
    x = batch()
    step(**x).backward()
    assert x["weight"].grad is not None
    dW = x["weight"].grad.clone()
    step(**x, grad_weight_into=x["weight"].grad).backward()
    torch.testing.assert_close(x["weight"].grad, 2 * dW)


@STEPS
def test_hooks_of_the_weight_run_with_none(step: Callable[..., Tensor]) -> None:
    """Wrappers count on them to know that the weight's gradient is done."""
    x, seen = batch(), list[str]()
    weight = x["weight"]
    weight.register_hook(lambda gradient: seen.append(f"gradient {gradient}"))
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(f"accumulated {parameter.grad}"))
    step(**x, grad_weight_into=torch.zeros(V, H)).backward()
    assert seen == ["gradient None", "accumulated None"]


@STEPS
def test_a_tied_embedding_keeps_its_gradient(step: Callable[..., Tensor]) -> None:
    """What the embedding sends back goes to `weight.grad`, what the head sends back to the buffer."""
    x, buffer = batch(), torch.zeros(V, H)
    weight, labels = x["weight"], x["labels"]

    def embedded() -> Tensor:
        return torch.nn.functional.embedding(labels.clamp(min=0), weight)

    (whole,) = torch.autograd.grad(step(hidden=embedded(), weight=weight, labels=labels), weight)
    step(hidden=embedded(), weight=weight, labels=labels, grad_weight_into=buffer).backward()
    assert weight.grad is not None
    assert weight.grad.any()
    torch.testing.assert_close(weight.grad + buffer, whole)


@STEPS
def test_second_derivatives_are_refused_before_anything_is_added(step: Callable[..., Tensor]) -> None:
    x, buffer = batch(), torch.zeros(V, H)
    name = {infopo: "linear_infopo_loss", logps: "linear_logps"}.get(step, "linear_preference_loss")
    with pytest.raises(RuntimeError, match=f"{name}: second derivatives"):
        torch.autograd.grad(step(**x, grad_weight_into=buffer), x["hidden"], create_graph=True)
    assert not buffer.any()


@STEPS
def test_without_gradients_the_buffer_stays(step: Callable[..., Tensor]) -> None:
    x, buffer = batch(), torch.zeros(V, H)
    with torch.no_grad():
        value = step(**x, grad_weight_into=buffer)
    assert torch.equal(value, step(**x).detach())
    assert not buffer.any()


@STEPS
def test_autocast_casts_the_weight_and_not_the_buffer(step: Callable[..., Tensor]) -> None:
    x, buffer = batch(), torch.zeros(V, H)
    rounded = {**x, "hidden": x["hidden"].detach().bfloat16(), "weight": x["weight"].detach().bfloat16()}
    rounded["weight"].requires_grad_()
    truth = torch.zeros(V, H)
    step(**rounded, grad_weight_into=truth).backward()
    with torch.autocast("cpu", torch.bfloat16):
        step(**x, grad_weight_into=buffer).backward()
    assert torch.equal(buffer, truth)
    assert truth.any()


@STEPS
def test_one_graph(step: Callable[..., Tensor]) -> None:
    x, buffer = batch(), torch.zeros(V, H)
    (dW,) = torch.autograd.grad(step(**x), x["weight"])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for calls in (1, 2):
        compiled(**x, grad_weight_into=buffer).backward()
        torch.testing.assert_close(buffer, calls * dW)


@pytest.mark.parametrize("name", ["torch", "cpp"])
@pytest.mark.parametrize("objective", [InfoPO(), DPO(), SFT()], ids=str)
def test_no_gradient_exists_between_the_passes(name: str, objective: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass calls `logprob` and nothing else, the backward pass `backward` alone, on the caller's memory."""
    if reason := dispatch.unavailable_reason(name, torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    backend, calls = dispatch.resolve(name, torch.device("cpu"), torch.float32), list[tuple[str, Any]]()
    kind: type[Backend] = type(backend)
    for primitive in ("logprob", "logprob_and_grad", "backward"):
        own = getattr(kind, primitive)

        def recorded(self: Any, *arguments: Any, _own: Any = own, _name: str = primitive) -> Any:
            calls.append((_name, arguments[4].weight.data_ptr() if _name == "backward" else len(arguments)))
            return _own(self, *arguments)

        monkeypatch.setattr(kind, primitive, recorded)
    x, buffer = batch(torch.bfloat16), torch.zeros(V, H)
    loss = linear_preference_loss(**x, objective=objective, backend=name, grad_weight_into=buffer).loss
    assert calls == [("logprob", 2)]
    loss.backward()
    assert calls[1:] == [("backward", buffer.data_ptr())]


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("a list", {"grad_weight_into": [0.0]}, TypeError, r"`grad_weight_into` must be a torch\.Tensor, got list"),
    ("wrong shape", {"grad_weight_into": torch.zeros(H, V)}, ValueError,
     r"`grad_weight_into` must have the shape of `weight`, \[53, 16\], got \[16, 53\]"),
    ("wrong type", {"grad_weight_into": torch.zeros(V, H).bfloat16()}, TypeError,
     r"`grad_weight_into` must be torch\.float32.*got torch\.bfloat16; leave it out"),
    ("wrong device", {"grad_weight_into": torch.zeros(V, H, device="meta")}, ValueError,
     r"`grad_weight_into` must be on the device of `hidden`, cpu, got meta"),
    ("not contiguous", {"grad_weight_into": torch.zeros(H, V).T}, ValueError,
     r"`grad_weight_into` must be contiguous.*strides \[1, 53\]"),
    ("a leaf", {"grad_weight_into": torch.zeros(V, H, requires_grad=True)}, ValueError,
     r"`grad_weight_into` must not require a gradient.*detach"),
    ("a frozen head", {"grad_weight_into": torch.zeros(V, H), "weight": torch.zeros(V, H)}, ValueError,
     r"`grad_weight_into` was given and `weight` needs no gradient.*requires_grad_"),
]  # fmt: skip


@STEPS
@pytest.mark.parametrize(("change", "error", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_buffers_are_named(
    change: dict[str, Any], error: type[Exception], message: str, step: Callable[..., Tensor]
) -> None:
    with pytest.raises(error, match=message):
        step(**{**batch(), **change})


def test_float64_inputs_want_a_float64_buffer() -> None:
    x, buffer = batch(torch.float64), torch.zeros(V, H, dtype=torch.float64)
    (dW,) = torch.autograd.grad(infopo(**x), x["weight"])
    infopo(**x, grad_weight_into=buffer).backward()
    torch.testing.assert_close(buffer, dW)
    with pytest.raises(TypeError, match=r"`grad_weight_into` must be torch\.float64"):
        infopo(**x, grad_weight_into=buffer.float())


def test_a_report_of_the_tail_would_come_too_late() -> None:
    with pytest.raises(ValueError, match=r"`report_tail=True` was given with `grad_weight_into`"):
        infopo(**batch(), grad_weight_into=torch.zeros(V, H), report_tail=True)
