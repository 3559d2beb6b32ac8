"""Every combination of backend, layout, type and option against float64."""

import pytest
import torch

from infopo_kernels import linear_infopo_loss, linear_logps, naive
from tests import support
from tests.support import CASES, Case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=support.CPU_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend with each instruction set that this machine has; the name of the backend."""
    return support.use_backend(request.param, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_infopo_loss_and_gradients(case: Case, dtype: torch.dtype, backend: str) -> None:
    inputs = support.make(case, dtype)
    got = support.fused(inputs, backend=backend)
    support.assert_result(got, support.plain(inputs))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_logps_and_gradients(case: Case, dtype: torch.dtype, reduction: str, backend: str) -> None:
    inputs = support.make(case, dtype)
    got = support.fused_logps(inputs, reduction, backend=backend)
    support.assert_result(got, support.plain_logps(inputs, reduction))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",), ("weight",)], ids="+".join)
def test_smallest_workspace(dtype: torch.dtype, trained: tuple[str, ...], backend: str) -> None:
    """1 MiB makes every loop of tiles run more than once."""
    case = Case("small-workspace", pairs=3, length=150, hidden=384, vocab=4099, trained=trained, prompt=20)
    inputs = support.make(case, dtype)
    got = support.fused(inputs, backend=backend, workspace_mib=1)
    support.assert_result(got, support.plain(inputs))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",), ()], ids=lambda t: "+".join(t) or "nothing")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_come_out_as_nan(
    value: float, trained: tuple[str, ...], dtype: torch.dtype, backend: str
) -> None:
    inputs = support.make(Case("poisoned", trained=trained), dtype)
    hidden = inputs.tensors["hidden"]
    assert hidden is not None
    hidden[1, 5, 3] = value
    logps = support.fused_logps(
        support.Inputs(Case("poisoned"), dtype, inputs.tensors, inputs.labels, {}, None), "none", backend=backend
    ).loss
    assert logps[1, 5].isnan(), f"a row with {value} has log-probability {logps[1, 5]}"
    assert logps.isnan().sum() == 1, "the other rows are not touched"
    case_inputs = support.Inputs(inputs.case, dtype, inputs.tensors, inputs.labels, {}, inputs.ref_logps)
    leaves = case_inputs.fresh()
    out = linear_infopo_loss(**leaves, labels=inputs.labels, ref_logps=inputs.ref_logps, backend=backend)
    assert out.loss.isnan()


def test_unscored_rows_are_never_read(backend: str) -> None:
    """NaN in the hidden states of prompt and padding changes nothing."""
    inputs = support.make(Case("unread", trained=("hidden", "weight")), torch.float32)
    clean = support.fused(inputs, backend=backend)
    hidden = inputs.tensors["hidden"]
    assert hidden is not None
    hidden[inputs.labels == -100] = float("nan")
    poisoned = support.fused(inputs, backend=backend)
    assert torch.equal(clean.loss, poisoned.loss)
    for name in ("hidden", "weight"):
        assert torch.equal(clean.gradients[name], poisoned.gradients[name])  # type: ignore[arg-type]
    assert poisoned.gradients["hidden"][inputs.labels == -100].eq(0).all()  # type: ignore[index]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_contiguous_inputs(dtype: torch.dtype, backend: str) -> None:
    inputs = support.make(Case("strided"), dtype)
    expected = support.fused(inputs, backend=backend)
    for name, value in list(inputs.tensors.items()):
        if value is not None:
            wide = torch.full((*value.shape, 2), float("nan"), dtype=dtype)
            wide[..., 0] = value
            inputs.tensors[name] = wide[..., 0]
    strided = {k: None if v is None else v.requires_grad_() for k, v in inputs.tensors.items()}
    inputs.fresh = lambda *_, **__: strided  # type: ignore[method-assign]
    got = support.fused(inputs, backend=backend)
    assert torch.equal(got.loss, expected.loss)
    for name in ("hidden", "weight"):
        assert torch.equal(got.gradients[name], expected.gradients[name])  # type: ignore[arg-type]


def test_rows_with_gaps_between_them(backend: str) -> None:
    """hidden[..., :H] of a wider tensor: the last stride is 1. No copy is needed, and the result is the same."""
    inputs = support.make(Case("gaps"), torch.float32)
    hidden, weight = inputs.tensors["hidden"], inputs.tensors["weight"]
    assert hidden is not None
    assert weight is not None
    expected = support.fused(inputs, backend=backend)
    wide_hidden = torch.full((*hidden.shape[:-1], 40), float("nan"))
    wide_weight = torch.full((len(weight), 31), float("nan"))
    wide_hidden[..., :24], wide_weight[:, 3:27] = hidden, weight
    leaves = {"hidden": wide_hidden[..., :24].requires_grad_(), "weight": wide_weight[:, 3:27].requires_grad_()}
    inputs.fresh = lambda *_, **__: {**leaves, "bias": None}  # type: ignore[method-assign]
    got = support.fused(inputs, backend=backend)
    assert torch.equal(got.loss, expected.loss)
    for name in leaves:
        assert torch.equal(got.gradients[name], expected.gradients[name])  # type: ignore[arg-type]


def test_two_runs_are_bitwise_equal(backend: str) -> None:
    inputs = support.make(Case("again", pairs=4, length=60, hidden=160, vocab=3001), torch.bfloat16)
    one, two = (support.fused(inputs, backend=backend) for _ in range(2))
    assert torch.equal(one.loss, two.loss)
    for name in ("hidden", "weight"):
        assert torch.equal(one.gradients[name], two.gradients[name])  # type: ignore[arg-type]


def test_underflown_rejected_weight_leaves_no_gradient(backend: str) -> None:
    """The float32 weight is exactly 0, and so is the rejected half's gradient; the chosen half keeps its own."""
    inputs = support.make(next(c for c in CASES if c.name == "underflown"), torch.float32)
    gradient = support.fused(inputs, backend=backend).gradients["hidden"]
    assert gradient is not None
    assert gradient[2:].eq(0).all()
    assert gradient[:2].ne(0).any()


def test_long_bf16_sequence_within_a_thousandth_of_a_nat(backend: str) -> None:
    """4096 tokens of bfloat16: the sum of log-probabilities against float64 of the same inputs."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 4096, 64, generator=g).bfloat16()
    weight = (torch.randn(2003, 64, generator=g) * 0.4).bfloat16()
    labels = torch.randint(0, 2003, (1, 4096), generator=g)
    got = linear_logps(hidden, weight, labels, reduction="sum", backend=backend)
    truth = naive.linear_logps(hidden, weight, labels, reduction="sum", dtype=torch.float64)
    assert got.dtype == torch.float64
    assert abs(float(got - truth)) <= 1e-3
