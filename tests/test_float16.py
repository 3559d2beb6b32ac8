"""float16 gradients under a GradScaler: neither lost below float16's range nor infinite before the factor is there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from infopo_kernels import DPO, IPO, SFT, InfoPO, SimPO, linear_logps, linear_preference_loss
from infopo_kernels.backends.base import Gradients, Head
from infopo_kernels.lift import Lift
from infopo_kernels.objectives import Objective
from tests import support
from tests.support import Case

FACTOR = 2.0**16  # of a new GradScaler
TOKENS = {"pairs": 2, "length": 128, "prompt": 0, "hidden": 48, "vocab": 1500}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of lanes that Triton masks, and of overflows

BACKENDS = [*support.CPU_BACKENDS, "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        pytest.importorskip("tests.triton_support")
        return "triton"
    return support.use_backend(request.param, monkeypatch)


def sizes(backend: str) -> dict[str, int]:
    return {**TOKENS, "length": 16, "hidden": 16, "vocab": 90} if backend == "triton" else TOKENS  # interpreted


def assert_as_rounded_once(got: support.Result, truth: support.Truth) -> None:
    """Within budget, and no more entries are 0 than float64 gradients have after they were rounded to float16."""
    support.assert_result(got, truth)
    for name, gradient in truth.gradients.items():
        if gradient is not None:
            own = got.gradients[name]
            assert own is not None
            allowed = gradient.half().eq(0).float().mean() + 1e-4
            assert own.eq(0).float().mean() <= allowed, f"gradient of {name}"


@pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",)], ids="+".join)
@pytest.mark.parametrize(
    "objective", [InfoPO(average=True), DPO(0.1), IPO(0.5), SimPO(2.0, 0.7), SFT()], ids=lambda o: o.name
)
def test_what_a_scaler_lifts_is_there(objective: Objective, trained: tuple[str, ...], backend: str) -> None:
    """512 tokens. Formed for a factor of 1, 92 % of dW were 0 with `average`."""
    case = Case(
        f"float16-{objective.name}", objective=objective, trained=trained, bias=True, loss_factor=FACTOR,
        **sizes(backend),
    )  # fmt: skip
    inputs = support.make(case, torch.float16)
    assert_as_rounded_once(support.fused(inputs, backend=backend), support.plain(inputs))


@pytest.mark.parametrize("workspace_mib", [1, 32])
@pytest.mark.parametrize("case", [
    Case("float16-kept", objective=DPO(0.1), loss_factor=FACTOR, hidden=200, vocab=300, length=40),
    Case("float16-apart", objective=DPO(0.1), loss_factor=FACTOR, hidden=1500, vocab=300, length=200, pairs=1),
    Case("float16-some-kept", objective=InfoPO(0.1), loss_factor=FACTOR, hidden=160, vocab=1200, length=60),
], ids=str)  # fmt: skip
def test_every_way_of_the_schedule(case: Case, workspace_mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = support.make(case, torch.float16)
    for name in ("torch", "cpp"):
        if support.missing(name) is None:
            got = support.fused(inputs, backend=name, workspace_mib=workspace_mib)
            support.assert_result(got, support.plain(inputs))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_log_probabilities_take_the_factor_before_they_form_gradients(reduction: str, backend: str) -> None:
    inputs = support.make(Case("float16-logps", **sizes(backend)), torch.float16)
    leaves = inputs.fresh()
    logps = linear_logps(**leaves, labels=inputs.labels, reduction=reduction, backend=backend)  # type: ignore[arg-type]
    share = 1 / logps.numel() / (1 if reduction == "mean" else inputs.labels.shape[1])
    (logps.sum() * share * FACTOR).backward()
    for name, gradient in support.plain_logps(inputs, reduction).gradients.items():
        if gradient is not None:
            own = leaves[name]
            assert own is not None
            assert own.grad is not None
            assert own.grad.eq(0).float().mean() <= gradient.eq(0).float().mean() + 1e-4, name


@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids="+".join)
@pytest.mark.parametrize("objective", [InfoPO(), DPO()], ids=lambda o: o.name)
def test_a_factor_of_zero_gives_zero(objective: Objective, trained: tuple[str, ...], backend: str) -> None:
    """For a factor of 1 these gradients are beyond float16; 0 times infinity would be NaN."""
    inputs = support.make(Case("float16-overflow", hidden=16, vocab=40, trained=trained), torch.float16)
    for factor in (0.0, 1.0, 2.0**-16):
        leaves = inputs.fresh()
        out = linear_preference_loss(
            **leaves,  # type: ignore[arg-type]
            labels=inputs.labels, objective=objective, ref_logps=inputs.ref_logps, num_pairs=1e-7, backend=backend,
        )  # fmt: skip
        (out.loss * factor).backward()
        for name in trained:
            own = leaves[name]
            assert own is not None
            assert own.grad is not None
            if factor == 0:
                assert own.grad.eq(0).all()
            else:
                assert own.grad.isfinite().all() == (factor < 1), name
                assert own.grad.abs().max() > 0


def test_log_probabilities_with_a_factor_of_zero(backend: str) -> None:
    inputs = support.make(Case("float16-overflow", hidden=16, vocab=40), torch.float16)
    leaves = inputs.fresh()
    logps = linear_logps(**leaves, labels=inputs.labels, backend=backend)  # type: ignore[arg-type]
    (logps.sum() * 1e7 * 0.0).backward()
    for own in leaves.values():
        assert own is None or own.grad is None or own.grad.eq(0).all()


def test_two_kinds_of_steps_with_a_grad_scaler() -> None:
    """A whole step: the scaler finds no infinity, and the unscaled gradients are those of float64."""
    case = Case("float16-scaler", objective=InfoPO(average=True), **TOKENS)
    for trained in (("hidden", "weight"), ("hidden",)):
        inputs = support.make(Case(**{**vars(case), "trained": trained}), torch.float16)
        leaves = inputs.fresh()
        scaler = torch.amp.GradScaler("cpu", init_scale=FACTOR)
        out = linear_preference_loss(
            **leaves,  # type: ignore[arg-type]
            labels=inputs.labels, objective=case.objective, ref_logps=inputs.ref_logps,
        )  # fmt: skip
        scaler.scale(out.loss).backward()
        truth = support.plain(inputs).gradients
        for name in trained:
            own, right = leaves[name], truth[name]
            assert own is not None
            assert own.grad is not None
            assert right is not None
            error = (own.grad.double() / scaler.get_scale() - right).norm() / right.norm()
            assert error < 1e-3, f"gradient of {name}: {error:.1e}"


def head(hidden: Tensor, weight: Tensor, scale: float = 1.0) -> Head:
    return Head(hidden, weight, None, None, scale, 1 << 25)


@pytest.mark.parametrize("size", [1e-30, 1e-4, 1.0, 1e12])
@pytest.mark.parametrize("scale", [1.0, -3.0])
def test_the_lift_is_the_largest_power_of_two_within_its_bounds(size: float, scale: float) -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(30, 8, generator=g).half(), torch.randn(40, 8, generator=g).half()
    c, labels = torch.randn(30, generator=g) * size, torch.randint(40, (30,), generator=g)
    labels[4], x[4], c[5] = -100, torch.nan, torch.inf
    to = Gradients(torch.empty_like(x), torch.empty_like(w), torch.empty(40))
    rows, lift = Lift(head(x, w, scale), labels)(c, to)
    assert lift is not None
    good = [t for t in range(30) if t not in (4, 5)]
    own = abs(scale) * c[good].double().abs()
    bound = max(2 * own.max() * w.double().abs().max(), (own * x[good].double().abs().amax(1)).sum(), own.sum())
    mantissa, _ = torch.frexp(lift)
    assert mantissa == 0.5, "a power of two"
    assert (1 / lift).isfinite()
    assert torch.equal(rows[good], c[good] * lift)
    assert lift * bound <= 2.0**15 * (1 + 1e-6)
    assert size < 1e-20 or lift * bound > 2.0**14 * (1 - 1e-6)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_steps_scale_in_float32(compiler: str) -> None:
    inputs = support.make(Case("float16-compiled", objective=InfoPO(average=True), loss_factor=2.0**20), torch.float16)
    inputs.shares = {"num_pairs": 2.0**30}  # factor / lift is below float16's range

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_preference_loss(
            hidden, weight, inputs.labels, objective=inputs.case.objective, ref_logps=inputs.ref_logps, **inputs.shares
        ).loss

    leaves = inputs.fresh()
    (torch.compile(step, fullgraph=True, backend=compiler)(leaves["hidden"], leaves["weight"]) * 2.0**20).backward()
    got = support.Result(torch.tensor(0.0), {k: None if v is None else v.grad for k, v in leaves.items()})
    truth = support.plain(inputs)
    got.loss = truth.loss
    support.assert_result(got, truth)


def test_the_lift_is_found_without_reading_a_value() -> None:
    """On tensors without storage: what would wait for a GPU fails."""
    x, w = (torch.empty(n, 8, dtype=torch.float16, device="meta") for n in (30, 40))
    labels, c = torch.empty(30, dtype=torch.int64, device="meta"), torch.empty(30, device="meta")
    _, lift = Lift(head(x, w), labels)(c, Gradients(x, w, c))
    assert lift is not None
    assert lift.device.type == "meta"


def test_other_types_and_no_weights_are_left_alone() -> None:
    labels, c = torch.arange(3), torch.tensor([0.0, torch.nan, torch.inf])
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(3, 4, dtype=dtype)
        rows, lift = Lift(head(x, x), labels)(c, Gradients(x, x, None))
        assert lift is None
        assert rows is c
    x = torch.ones(3, 4).half()
    rows, lift = Lift(head(x, x), labels)(c, Gradients(x, x, None))
    assert lift == 1
    _, lift = Lift(head(x[:0], x), labels[:0])(c[:0], Gradients(x, x, None))
    assert lift == 1
