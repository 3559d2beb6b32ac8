"""The pooled tail: each backend against the definition in float64 with its own chunks, and against exact gradients."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from infopo_kernels import DPO, SFT, InfoPO, KernelOptions, LogitOptions, linear_infopo_loss, linear_logps, naive
from infopo_kernels.backends import cpp, dispatch
from infopo_kernels.backends.base import Backend, Gradients, Head, TailReport, with_memory_for_logits
from infopo_kernels.objectives import Objective
from infopo_kernels.options import IGNORE_INDEX
from infopo_kernels.output import TailSummary
from tests import support
from tests.budget import HALF_STEP, assert_within, error_budget, kept_rounding, operand_rounding
from tests.primitives import plain
from tests.support import Case

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which interprets Triton's kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[*support.CPU_BACKENDS, "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    loaded = dispatch.load(support.use_backend(request.param, monkeypatch))
    assert not isinstance(loaded, str)
    return loaded


@dataclass(frozen=True)
class Problem:
    """Rows over a head whose words differ in frequency, as those of a trained model do."""

    name: str
    rows: int = 40
    hidden: int = 24
    vocab: int = 1301
    sharpness: float = 3.0
    """Spread of the logits over the vocabulary, the same for all rows, nats."""
    quantile: float = 0.9
    """The threshold lies in the widest gap near this quantile of the largest probabilities of words."""
    bias: bool = False
    logit: LogitOptions = field(default_factory=LogitOptions)
    unscored: int = 5
    weightless: int = 4

    def __str__(self) -> str:
        return self.name


PROBLEMS = [
    Problem("plain"),
    Problem("bias", bias=True),
    Problem("softcap", logit=LogitOptions(softcap=5.0)),
    Problem("softcap-scale-bias", logit=LogitOptions(6.0, -1.5, 0.9), bias=True),
    Problem("odd-sizes", rows=37, hidden=67, vocab=1031),
    Problem("one-block", vocab=90),
    Problem("a-block-and-a-word", vocab=97),
    Problem("two-words", vocab=2, quantile=0.5),
    Problem("nothing-kept-but-labels", quantile=1.0),
    Problem("half-kept", quantile=0.5),
    Problem("most-kept", quantile=0.1),
    Problem("all-kept", quantile=0.0),
    Problem("one-row", rows=1, unscored=0, weightless=0),
    Problem("chunks", rows=1101, vocab=400, hidden=17),
]


@dataclass
class Made:
    head: Head
    labels: Tensor
    row_weight: Tensor
    logit: LogitOptions

    @property
    def live(self) -> Tensor:
        return ((self.labels != IGNORE_INDEX) & (self.row_weight != 0)).nonzero().squeeze(1)


def make(problem: Problem, dtype: torch.dtype, backend: Backend, workspace_mib: int = 256) -> Made:
    if backend.name == "triton":  # its interpreter takes seconds for a product of 40 rows and 1301 words
        problem = replace(problem, rows=min(problem.rows, 21), vocab=min(problem.vocab, 301))
    g = torch.Generator().manual_seed(sum(map(ord, problem.name)))
    N, H, V = problem.rows, problem.hidden, problem.vocab
    hidden = torch.randn(N, H, generator=g)
    hidden[:, 0] = 1.0
    weight = torch.randn(V, H, generator=g) / H**0.5
    weight[:, 0] = problem.sharpness * torch.randn(V, generator=g)
    bias = torch.randn(V, generator=g).to(dtype) if problem.bias else None
    labels = torch.randint(0, V, (N,), generator=g)
    labels[torch.randperm(N, generator=g)[: problem.unscored]] = IGNORE_INDEX
    row_weight = torch.randn(N, generator=g)
    row_weight[torch.randperm(N, generator=g)[: problem.weightless]] = 0
    head = Head(
        hidden.to(dtype), weight.to(dtype), bias, problem.logit.softcap, problem.logit.scale, workspace_mib << 20
    )
    made = Made(head, labels, row_weight, problem.logit)
    return replace(
        made, head=replace(head, tail_threshold=threshold(made, chunks(backend, made.live, dtype), problem.quantile))
    )


def threshold(made: Made, parts: list[Tensor], quantile: float) -> float:
    """The middle of the widest gap near the quantile: no probability of float32 crosses it by rounding."""
    h = made.head
    bias = None if h.bias is None else h.bias.double()
    p = naive.logits(h.hidden.double(), h.weight.double(), bias, made.logit).softmax(1)
    most = torch.cat([p[part].amax(0) for part in parts]).sort().values
    if quantile in (0.0, 1.0):
        return float(most[0] / 2) if quantile == 0 else min(0.999, float(most[-1] * 1.01))
    at = int(quantile * (len(most) - 1))
    first = max(0, at - 8)
    near = most[first : at + 9].log()
    gap = int(near.diff().argmax())
    return float(((near[gap] + near[gap + 1]) / 2).exp())


def chunks(backend: Backend, rows: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The backend's chunks where its workspace is large: C++ takes equal ones of at most 512 rows, in whole vectors."""
    if backend.name == "triton":
        return [rows]
    if backend.name == "torch":
        return list(rows.split(1024))
    n, lanes = len(rows), LANES.get(cpp.isa(dtype), 16)
    size = -(-n // -(-n // 512))
    return list(rows.split(min(512, -(-size // lanes) * lanes)))


LANES = {"portable": 4, "avx2": 8, "amx": 32}


def truth(made: Made, backend: Backend, parts: list[Tensor] | None = None) -> naive.TailGradients:
    h = made.head
    parts = chunks(backend, made.live, h.hidden.dtype) if parts is None else parts
    return naive.tail_gradients(
        h.hidden, h.weight, made.labels, made.row_weight, parts,
        threshold=h.tail_threshold, block=backend.tail_block, exact_above=backend.tail_exact_above, bias=h.bias,
        logit=made.logit,
    )  # fmt: skip


def buffers(made: Made, trained: tuple[str, ...], weight_dtype: torch.dtype | None = None) -> Gradients:
    h = made.head
    return Gradients(
        torch.zeros_like(h.hidden) if "hidden" in trained else None,
        torch.zeros_like(h.weight, dtype=weight_dtype or h.weight.dtype) if "weight" in trained else None,
        torch.zeros(len(h.weight)) if "bias" in trained else None,
        TailReport.empty(h),
    )


def assert_gradients(
    made: Made, got: Gradients, want: naive.TailGradients, backend: Backend, kept: float = 0.0
) -> None:
    """The budget of the exact gradients holds for pooled ones too, up to the roundings of pi and of W's mean."""
    h = made.head
    chosen = torch.zeros_like(made.labels, dtype=torch.bool)
    chosen[made.live] = True
    labels = torch.where(chosen, made.labels, IGNORE_INDEX)
    operand = operand_rounding(backend.name, h.hidden.dtype)
    budget = error_budget(h, labels, made.row_weight, operand=2 * operand, kept=kept)
    u, live = 2.0**-24, made.live
    size = (made.row_weight[live].double().abs() * abs(h.scale)).sum() * 64 * u + 4 * operand * want.mass[live].sum()
    if got.hidden is not None:
        slack = (
            (64 * u + 4 * operand)
            * (made.row_weight.double() * h.scale).abs()[:, None]
            * h.weight.double().abs().amax(0)
        )
        assert_within("dX", got.hidden[live], want.hidden[live], (2 * budget.hidden + slack)[live])
    if got.weight is not None:
        slack = size * h.hidden.double().abs().amax(0)
        assert_within("dW", got.weight, want.weight, 2 * budget.weight + slack)
    if got.bias is not None:
        assert_within("db", got.bias, want.bias, 2 * budget.bias + size)
    assert got.tail is not None
    assert torch.equal(got.tail.mass.isnan(), want.mass.isnan())
    rounded = HALF_STEP[torch.bfloat16] if operand and backend.name == "triton" else 0.0  # of the probabilities
    tolerance = 1e-4 + 10 * kept + rounded
    torch.testing.assert_close(got.tail.mass[live].double(), want.mass[live], rtol=tolerance, atol=1e-6)


TRAINED = [("hidden", "weight", "bias"), ("hidden",), ("weight",), ("bias",)]
PROBLEMS_AND_TYPES = [(p, d) for p in PROBLEMS for d in DTYPES if d != torch.float16 or p.name in ("plain", "chunks")]


@pytest.mark.parametrize(("problem", "dtype"), PROBLEMS_AND_TYPES, ids=str)
def test_backward_is_the_definition(problem: Problem, dtype: torch.dtype, backend: Backend) -> None:
    made = make(problem, dtype, backend)
    _, lse = backend.logprob(made.head, made.labels)
    want = truth(made, backend)
    for trained in TRAINED:
        got = buffers(made, trained)
        backend.backward(made.head, made.labels, lse, made.row_weight, got)
        assert_gradients(made, got, want, backend)
        assert got.tail is not None
        columns = len(chunks(backend, made.live, dtype)) * len(made.head.weight)
        assert got.tail.columns.tolist() == [want.kept, columns]


@pytest.mark.parametrize(("problem", "dtype"), PROBLEMS_AND_TYPES, ids=str)
def test_known_weights_are_the_definition(problem: Problem, dtype: torch.dtype, backend: Backend) -> None:
    made = make(replace(problem, weightless=0), dtype, backend)
    want, exact = truth(made, backend), truth(replace(made, head=replace(made.head, tail_threshold=0.0)), backend)
    right = plain(made.head, made.labels, made.row_weight)
    budget = error_budget(made.head, made.labels, made.row_weight)
    for trained in TRAINED:
        got = buffers(made, trained)
        l, lse = backend.logprob_and_grad(made.head, made.labels, made.row_weight, got)  # noqa: E741
        assert_within("l", l, right.l, budget.l)
        assert_within("lse", lse, right.lse, budget.lse)
        assert got.tail is not None
        all_kept = trained == ("hidden",) and bool(got.tail.columns[0] == got.tail.columns[1])  # the contract allows it
        assert_gradients(made, got, exact if all_kept else want, backend, kept_rounding(backend.name, dtype))


@pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("weight",)], ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rows_of_weight_0_choose_no_words(dtype: torch.dtype, trained: tuple[str, ...], backend: Backend) -> None:
    """With weights known beforehand they are in the chunk: their words and their labels count nothing all the same."""
    made = make(Problem("weightless", weightless=15), dtype, backend)
    got = buffers(made, trained)
    backend.logprob_and_grad(made.head, made.labels, made.row_weight, got)
    assert_gradients(made, got, truth(made, backend), backend)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_kept_logits_are_the_definition(dtype: torch.dtype, backend: Backend) -> None:
    """Rows whose logits stay in the memory of dW make a chunk of their own, before the others, but for the Triton
    kernels, which begin their first chunk with them."""
    problem = Problem("kept-logits", rows=150, hidden=128, vocab=1301)
    made = make(replace(problem, weightless=0, unscored=0), dtype, backend)
    gradients = buffers(made, ("hidden", "weight"))
    assert gradients.weight is not None
    slots = backend.kept_rows(made.head, gradients.weight)
    if not slots:
        pytest.skip(f"{backend.name} keeps no logits")
    kept = made.labels.clone()
    kept[min(slots, 100) :] = IGNORE_INDEX
    kept[::3] = IGNORE_INDEX
    first, rest = (kept != IGNORE_INDEX).nonzero().squeeze(1), (kept == IGNORE_INDEX).nonzero().squeeze(1)
    assert len(first)
    assert len(rest)
    parts = [*chunks(backend, first, dtype), *chunks(backend, rest, dtype)]
    if backend.name == "triton":
        parts = [made.live]
    made = replace(made, head=replace(made.head, tail_threshold=threshold(made, parts, 0.9)))
    gradients.weight.fill_(torch.nan)
    head, gradients = with_memory_for_logits(backend, made.head, gradients, 100)
    made = replace(made, head=head)
    _, lse = backend.logprob(made.head, kept, gradients)
    lse = lse + backend.logprob(made.head, torch.where(kept == IGNORE_INDEX, made.labels, IGNORE_INDEX))[1]
    backend.backward(made.head, made.labels, lse, made.row_weight, gradients, kept)
    rounded = kept_rounding(backend.name, dtype)
    assert_gradients(made, gradients, truth(made, backend, parts), backend, kept=rounded)


OBJECTIVES: list[Objective] = [InfoPO(0.3), DPO(0.3), SFT()]
THETA = 0.01


def inputs_of(case: Case, dtype: torch.dtype, backend: Backend) -> support.Inputs:
    """Inputs of a case with words of very different frequency; fewer of all for the interpreter of Triton's kernels."""
    if backend.name == "triton":
        case = replace(case, pairs=2, length=9, hidden=32, vocab=300)
    inputs = support.make(case, dtype)
    hidden, weight = inputs.tensors["hidden"], inputs.tensors["weight"]
    assert hidden is not None
    assert weight is not None
    hidden[..., 0] = 1
    weight[:, 0] = 3 * torch.randn(len(weight), generator=torch.Generator().manual_seed(0))
    return inputs


@pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",), ("weight",)], ids="+".join)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_losses_are_exact_and_gradients_near(
    dtype: torch.dtype, packed: bool, objective: Objective, trained: tuple[str, ...], backend: Backend
) -> None:
    case = Case(
        "tail", pairs=3, length=40, hidden=160, vocab=1501, packed=packed, bias=True, shift=packed,
        objective=objective, trained=trained, logit=LogitOptions(softcap=8.0),
    )  # fmt: skip
    inputs = inputs_of(case, dtype, backend)
    exact, near = (support.fused(inputs, backend=backend.name, tail_threshold=theta) for theta in (0.0, THETA))
    torch.testing.assert_close(exact.loss, near.loss, rtol=2e-6, atol=1e-6)
    for name in trained:
        a, b = exact.gradients[name], near.gradients[name]
        assert a is not None
        assert b is not None
        error = float((a.double() - b.double()).norm() / a.double().norm())
        assert error < 0.2, f"{name}: relative error {error:.3g}"
        assert error > 0 or name == "hidden", f"{name}: nothing was pooled"  # a call may form dX alone and exactly


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
def test_two_runs_are_bitwise_equal(objective: Objective, backend: Backend) -> None:
    case = Case("tail-again", pairs=3, length=50, hidden=160, vocab=3001, objective=objective)
    inputs = inputs_of(case, torch.bfloat16, backend)
    one, two = (support.fused(inputs, backend=backend.name, tail_threshold=THETA) for _ in range(2))
    for name in ("hidden", "weight"):
        assert torch.equal(one.gradients[name], two.gradients[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",), ("weight",)], ids="+".join)
def test_smallest_workspace(dtype: torch.dtype, trained: tuple[str, ...], backend: Backend) -> None:
    """1 MiB: many chunks and blocks, so the words that are kept differ, and the error stays small."""
    if backend.name == "triton":
        pytest.skip("tests/test_triton_tail.py has its chunks, of fewer rows")
    case = Case("tail-small", pairs=3, length=150, hidden=384, vocab=4099, trained=trained, prompt=20)
    inputs = inputs_of(case, dtype, backend)
    exact, near = (
        support.fused(inputs, backend=backend.name, workspace_mib=1, tail_threshold=theta) for theta in (0.0, THETA)
    )
    torch.testing.assert_close(exact.loss, near.loss, rtol=2e-6, atol=1e-6)
    for name in trained:
        a, b = exact.gradients[name], near.gradients[name]
        assert a is not None
        assert b is not None
        error = float((a.double() - b.double()).norm() / a.double().norm())
        assert error < 0.2, f"{name}: relative error {error:.3g}"
        assert error > 0 or name == "hidden", f"{name}: nothing was pooled"  # a call may form dX alone and exactly


@pytest.mark.parametrize("vocab", [7, 49, 254])
def test_a_wide_head_fits_the_smallest_workspace(vocab: int, backend: Backend) -> None:
    """A head that a MiB holds without a threshold, it holds with one, kept logits or not."""
    if backend.name == "triton":
        pytest.skip("its smallest workspace depends on the device")
    for rows, dtype in ((1, torch.float32), (68, torch.bfloat16)):
        made = make(Problem("wide", rows=rows, hidden=1024, vocab=vocab, unscored=0, weightless=0), dtype, backend)
        head = replace(made.head, workspace_bytes=1 << 20, tail_threshold=0.01)
        gradients = buffers(replace(made, head=head), ("hidden", "weight", "bias"))
        assert gradients.weight is not None
        kept, most = None, min(backend.kept_rows(head, gradients.weight), rows)
        if most:
            kept = torch.where(torch.arange(rows) < most, made.labels, IGNORE_INDEX)
            head, gradients = with_memory_for_logits(backend, head, gradients, most)
            backend.logprob(head, kept, gradients)
        _, lse = backend.logprob(head, made.labels)
        backend.backward(head, made.labels, lse, made.row_weight, gradients, kept)
        assert gradients.hidden is not None
        assert gradients.hidden.isfinite().all()


def test_a_bad_row_spoils_no_other(backend: Backend) -> None:
    problem = PROBLEMS[0]
    made = make(problem, torch.float32, backend)
    _, lse = backend.logprob(made.head, made.labels)
    clean, poisoned = buffers(made, ("hidden",)), buffers(made, ("hidden",))
    backend.backward(made.head, made.labels, lse, made.row_weight, clean)
    bad = int(made.live[3])
    made.head.hidden[bad, 5] = torch.nan
    _, lse = backend.logprob(made.head, made.labels)
    backend.backward(made.head, made.labels, lse, made.row_weight, poisoned)
    assert poisoned.hidden is not None
    assert poisoned.hidden[bad].isnan().all()
    assert poisoned.hidden.isnan().any(1).sum() == 1


def test_logps_take_the_threshold(backend: Backend) -> None:
    case = Case("tail-logps", pairs=2, length=30, hidden=40, vocab=700, trained=("hidden", "weight"))
    inputs = inputs_of(case, torch.float32, backend)
    results = []
    for theta in (0.0, THETA):
        leaves = inputs.fresh()
        logps = linear_logps(**leaves, labels=inputs.labels, backend=backend.name, tail_threshold=theta)
        logps.square().sum().backward()
        assert leaves["weight"] is not None
        results.append((logps.detach(), leaves["weight"].grad))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][1], results[1][1])  # type: ignore[arg-type]
    assert results[0][1] is not None
    assert float((results[0][1] - results[1][1]).norm() / results[0][1].norm()) < 0.2  # type: ignore[operator]


def test_report(backend: Backend) -> None:
    inputs = inputs_of(Case("tail-report", pairs=2, length=30, hidden=40, vocab=700), torch.float32, backend)
    leaves = inputs.fresh()

    def run(**options: float) -> TailSummary:
        out = linear_infopo_loss(
            **leaves,
            labels=inputs.labels,
            ref_logps=inputs.ref_logps,
            backend=backend.name,
            report_tail=True,
            **options,
        )
        assert out.tail is not None
        return out.tail

    assert [float(x) for x in run()] == [0, 0, 1], "exact"
    few, many = run(tail_threshold=1e-4), run(tail_threshold=1e-2)
    assert 0 < float(few.mass_mean) < float(few.mass_max) < float(many.mass_max) < 1
    assert 0 < float(many.kept_share) < float(few.kept_share) < 1
    out = linear_infopo_loss(**leaves, labels=inputs.labels, ref_logps=inputs.ref_logps, backend=backend.name)
    assert out.tail is None


@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids="+".join)
def test_report_where_sums_of_dx_do_not_fit(trained: tuple[str, ...], backend: Backend) -> None:
    """dX is formed in parts then, before dW: each of these passes pools."""
    made = make(Problem("turns", rows=700, hidden=512, vocab=701), torch.bfloat16, backend, workspace_mib=1)
    got, (_, lse) = buffers(made, trained), backend.logprob(made.head, made.labels)
    backend.backward(made.head, made.labels, lse, made.row_weight, got)
    assert got.tail is not None
    assert torch.equal((~got.tail.mass.isnan()).nonzero().squeeze(1), made.live)
    kept, columns = got.tail.columns.tolist()
    assert 0 < kept < columns
    assert columns % len(made.head.weight) == 0
    assert 0 < float(got.tail.summary()[0]) < 1


def test_report_of_no_rows(backend: Backend) -> None:
    """Nothing could be pooled: 0, 0 and 1, as the contract has it."""
    made = make(PROBLEMS[0], torch.float32, backend)
    for labels, weights in (
        (made.labels.new_full(made.labels.shape, IGNORE_INDEX), made.row_weight),
        (made.labels, torch.zeros_like(made.row_weight)),
    ):
        for known in (True, False):
            got = buffers(made, ("hidden", "weight"))
            if known:
                backend.logprob_and_grad(made.head, labels, weights, got)
            else:
                backend.backward(made.head, labels, backend.logprob(made.head, labels)[1], weights, got)
            assert got.tail is not None
            assert got.tail.summary().tolist() == [0, 0, 1]


def test_a_backend_without_pools_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = dispatch.load("torch")
    monkeypatch.setattr(type(loaded), "tail_block", 0)
    inputs = support.make(Case("refused"), torch.float32)
    with pytest.raises(ValueError, match=r"`tail_threshold=0.01` needs a backend.*'torch' does not; pass tail_thresho"):
        support.fused(inputs, backend="torch", tail_threshold=THETA)


def test_attached_model() -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    from infopo_kernels.integrations.transformers import attach_linear_logps

    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    model.lm_head.weight.data *= 20
    kernel = KernelOptions("torch", tail_threshold=THETA, report_tail=True)
    attach_linear_logps(model, kernel=kernel)
    ids = torch.randint(0, 300, (4, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    out = model(**batch, infopo=InfoPO(), ref_logps=torch.full((4,), -60.0))
    out.loss.backward()
    assert 0 < float(out.infopo.tail.mass_mean) < 1
    pooled = model.lm_head.weight.grad.clone()
    assert model(**batch, linear_logps="sum").logps.shape == (4,)
    model.zero_grad()
    attach_linear_logps(model, kernel=KernelOptions("torch"))
    out = model(**batch, infopo=InfoPO(), ref_logps=torch.full((4,), -60.0))
    out.loss.backward()
    assert out.infopo.tail is None
    assert 0 < float((pooled - model.lm_head.weight.grad).norm() / pooled.norm()) < 0.2
