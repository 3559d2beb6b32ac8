"""The Triton backend on a device: the tables of cases, then what only a device can show."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from infopo_kernels import (
    DPO,
    IPO,
    SFT,
    InfoPO,
    InfoPOOptions,
    SimPO,
    linear_infopo_loss,
    linear_logps,
    linear_preference_loss,
)
from infopo_kernels.backends.base import Gradients, Head
from infopo_kernels.backends.triton import TritonBackend
from infopo_kernels.objectives import Objective, evaluate
from tests import support
from tests import triton_problems as tp
from tests.support import CASES, Case
from tests.triton_problems import PROBLEMS, Inputs, Problem

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; none is present"),
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 takes the GPU's place; unset it (make test-gpu does)"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cuda"

LARGE = [
    Problem("large", n=700, h=576, v=49152, ignored=0.4),
    Problem("large-odd", n=517, h=1031, v=32003, bias=True, softcap=20.0, ignored=0.1),
    Problem("large-strided", n=300, h=2048, v=20011, strided=True, scale=0.5),
]
"""Tens to hundreds of tiles of the tables' own sizes, with tails."""


def moved(inputs: Inputs, device: str) -> Inputs:
    """The same problem on another device, strides kept."""

    def move(x: torch.Tensor | None) -> torch.Tensor | None:
        if x is None:
            return None
        if x.is_contiguous():
            return x.to(device)
        wide = torch.full((x.shape[0], x.stride(0)), float("nan"), dtype=x.dtype, device=device)
        wide[:, : x.shape[1]] = x
        return wide[:, : x.shape[1]]

    head = inputs.head
    hidden, weight = move(head.hidden), move(head.weight)
    assert hidden is not None
    assert weight is not None
    there = replace(head, hidden=hidden, weight=weight, bias=move(head.bias))
    return Inputs(there, inputs.labels.to(device), inputs.c.to(device))


def on(gradients: Gradients, device: str) -> Gradients:
    return Gradients(
        *(None if x is None else x.to(device) for x in (gradients.hidden, gradients.weight, gradients.bias))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", [*PROBLEMS, *LARGE], ids=str)
def test_three_primitives(problem: Problem, dtype: torch.dtype) -> None:
    """As in the interpreter, with fresh memory filled with NaN."""
    inputs = tp.make(problem, dtype)
    truth, backend, there = tp.plain(inputs), TritonBackend(), moved(inputs, DEVICE)
    wanted = "xwb" if problem.bias else "xw"
    before = tp.buffers(inputs, wanted)
    with tp.FreshMemory():
        at_once, known = on(tp.buffers(inputs, wanted), DEVICE), on(tp.buffers(inputs, wanted), DEVICE)
        logp, lse = backend.logprob(there.head, there.labels)
        logp_too, lse_too = backend.logprob_and_grad(there.head, there.labels, there.c, at_once)
        backend.backward(there.head, there.labels, lse, there.c, known)
    tp.assert_logp(inputs, truth, logp.cpu(), lse.cpu())
    tp.assert_logp(inputs, truth, logp_too.cpu(), lse_too.cpu())
    tp.assert_gradients(inputs, truth, on(at_once, "cpu"), before, roundings=2, zero_rows=True)
    tp.assert_gradients(inputs, truth, on(known, "cpu"), before, roundings=1, zero_rows=False)


@pytest.mark.parametrize(
    "types",
    [(torch.float32, torch.float32), *((t, w) for t in DTYPES[1:] for w in (torch.float32, t))],
    ids=lambda types: f"{types[0]}-{types[1]}",
)
@pytest.mark.parametrize(
    "problem", [Problem("kept", h=256, v=301), *LARGE, Problem("kept-in-part", n=2000, h=512, v=20011)], ids=str
)
def test_kept_logits(problem: Problem, types: tuple[torch.dtype, torch.dtype]) -> None:
    """From `logprob` to `backward` in the memory of dW, which is NaN before."""
    inputs = tp.make(problem, types[0])
    truth, there = tp.plain(inputs), moved(inputs, DEVICE)
    got, before = tp.fresh_buffers(inputs, "xwb" if problem.bias else "xw", types[1])
    got = on(got, DEVICE)
    assert got.weight is not None
    most = TritonBackend().kept_rows(there.head, got.weight)
    assert most > 0
    with tp.FreshMemory():
        logp, lse = tp.keep_and_backward(TritonBackend(), there, got, most)
    tp.assert_logp(inputs, truth, logp.cpu(), lse.cpu())
    tp.assert_gradients(inputs, truth, on(got, "cpu"), before, roundings=2, zero_rows=False)


@pytest.mark.parametrize("mib", [8, 32])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_workspace(mib: int, weight_dtype: torch.dtype) -> None:
    """Chunks and pieces; the allocator's peak is the proof that the workspace holds."""
    problem = Problem("small", n=1500, h=512, v=32003, bias=True)
    inputs = tp.make(problem, torch.bfloat16, mib << 20)
    truth, backend, there = tp.plain(inputs), TritonBackend(), moved(inputs, DEVICE)
    before = tp.buffers(inputs, "xwb", weight_dtype)
    got = on(tp.buffers(inputs, "xwb", weight_dtype), DEVICE)
    _, lse = backend.logprob(there.head, there.labels)
    torch.ones(16, 16, device=DEVICE) @ torch.ones(16, 16, device=DEVICE)  # the library's own workspace is not counted
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    backend.backward(there.head, there.labels, lse, there.c, got)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - held <= (mib << 20) + 64 * problem.n
    tp.assert_gradients(inputs, truth, on(got, "cpu"), before, roundings=1, zero_rows=False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_infopo_loss_and_gradients(case: Case) -> None:
    inputs = support.make(case, torch.float32)
    got = support.fused(inputs, device=DEVICE, backend="triton")
    support.assert_result(got, support.plain(inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_from_16_bit_inputs(case: Case, dtype: torch.dtype) -> None:
    inputs = support.make(case, dtype)
    got = support.fused(inputs, device=DEVICE, backend="triton")
    support.assert_result(got, support.plain(inputs))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_logps_and_gradients(case: Case, reduction: str) -> None:
    inputs = support.make(case, torch.float32)
    got = support.fused_logps(inputs, reduction, device=DEVICE, backend="triton")
    support.assert_result(got, support.plain_logps(inputs, reduction))


def test_objective() -> None:
    g = torch.Generator().manual_seed(1)
    cu = torch.tensor([0, 5, 900, 20_000, 20_007])
    labels = torch.randint(0, 50, (20_007,), generator=g)
    labels[::3] = -100
    logp = torch.where(labels == -100, 0.0, -torch.rand(20_007, generator=g))
    chosen, ref = torch.tensor([True, False, False, True]), torch.tensor([-2.0, -290.0, -6400.0, -3.0]).double()
    for options in (InfoPOOptions(), InfoPOOptions(0.3, 0.0, -1.0, -3.0, 0.5, True)):
        arguments = labels, cu, chosen, ref
        truth = evaluate(options, logp, *support.objective_arguments(*arguments, 2.5))
        there = support.objective_arguments(*(x.to(DEVICE) for x in arguments), 2.5)
        got = TritonBackend().objective(options, logp.to(DEVICE), *there)
        assert got is not None
        for name, value, exact in zip(truth._fields, got, truth, strict=True):
            torch.testing.assert_close(value.cpu(), exact, rtol=1e-11, atol=0, msg=lambda m, n=name: f"{n}: {m}")


OBJECTIVES = [InfoPO(0.3), DPO(0.3), IPO(0.5), SimPO(2.0, 0.7), SFT()]


@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids="+".join)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_objectives(objective: Objective, trained: tuple[str, ...]) -> None:
    case = Case(
        f"objective-{objective.name}", objective=objective, packed=True, shift=True, weighted=True, trained=trained
    )
    inputs = support.make(case, torch.float32)
    got = support.fused(inputs, device=DEVICE, backend="triton")
    support.assert_result(got, support.plain(inputs))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_no_objective_waits_for_the_device(objective: Objective) -> None:
    """Not even to count chosen and rejected sequences; where their numbers differ the loss of pairs is NaN."""
    inputs = support.make(Case("waits", objective=objective, reference=False), torch.float32)
    there, leaves = inputs.moved(DEVICE), inputs.fresh(device=DEVICE)
    chosen = torch.tensor([True, False, True, True]).to(DEVICE)

    def run(is_chosen: torch.Tensor | None = None) -> torch.Tensor:
        loss = linear_preference_loss(**leaves, labels=there.labels, objective=objective, is_chosen=is_chosen).loss
        loss.backward()
        return loss

    run()  # compiles the kernels
    with no_synchronisation():
        run()
        unequal = run(chosen)
    assert unequal.isnan() == objective.pairwise


def random_head(n: int, h: int, v: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Head, torch.Tensor]:
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(n, h, generator=g, device=DEVICE, dtype=dtype)
    weight = torch.randn(v, h, generator=g, device=DEVICE, dtype=dtype) / h**0.5
    labels = torch.randint(0, v, (n,), generator=g, device=DEVICE)
    labels[::5] = -100
    return Head(hidden, weight, None, None, 1.0, tp.WORKSPACE), labels


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_graph_of_a_step(weight_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured once, replayed on new values with another number of scored rows; and nothing synchronises."""
    head, labels = random_head(600, 256, 8192)
    c = torch.rand(600, device=DEVICE)
    backend = TritonBackend()
    hidden_grad = torch.zeros_like(head.hidden)
    weight_grad = torch.zeros(head.weight.shape, dtype=weight_dtype, device=DEVICE)
    monkeypatch.setenv(
        "INFOPO_KERNELS_GPU_PRODUCTS", "triton"
    )  # what serves a capture, so that replays are equal to it
    from_kept = torch.zeros_like(weight_grad)
    most = backend.kept_rows(head, from_kept)
    assert most > 128

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        hidden_grad.zero_()
        weight_grad.zero_()
        tp.keep_and_backward(backend, Inputs(head, labels, c), Gradients(None, from_kept, None), most)
        logp, lse = backend.logprob(head, labels)
        backend.backward(head, labels, lse, c, Gradients(hidden_grad, weight_grad, None))
        again, _ = backend.logprob_and_grad(head, labels, c, Gradients(hidden_grad, weight_grad, None))
        return logp, again

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    with no_synchronisation():
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    head.hidden.copy_(torch.randn_like(head.hidden))
    labels.copy_(torch.where(labels == -100, 3, -100))
    graph.replay()
    replayed = [x.clone() for x in (*captured, hidden_grad, weight_grad, from_kept)]
    expected = [*step(), hidden_grad, weight_grad, from_kept]
    for got, want in zip(replayed, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("which", ["library", "triton"])
@pytest.mark.parametrize(
    "types",
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
    ],
    ids=str,
)
def test_library_and_triton_products(
    types: tuple[torch.dtype, torch.dtype], which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both behind the seam, on a workspace that takes several chunks and pieces, with few rows alive."""
    monkeypatch.setenv("INFOPO_KERNELS_GPU_PRODUCTS", which)
    inputs = tp.make(Problem("seam", n=1500, h=512, v=32003, bias=True, ignored=0.6), types[0], 32 << 20)
    truth, backend, there = tp.plain(inputs), TritonBackend(), moved(inputs, DEVICE)
    before = tp.buffers(inputs, "xwb", types[1])
    got = on(tp.buffers(inputs, "xwb", types[1]), DEVICE)
    _, lse = backend.logprob(there.head, there.labels)
    backend.backward(there.head, there.labels, lse, there.c, got)
    tp.assert_gradients(inputs, truth, on(got, "cpu"), before, roundings=1, zero_rows=False)


@pytest.mark.parametrize("cu", [[0, 3, 3, 20], [0, 7, 19, 64], [0, 9, 4, 20], [-5, 4, 12, 20]])
def test_wrong_bounds_make_the_loss_nan(cu: list[int]) -> None:
    """Nobody checks them on a GPU; an index out of range would end the process's context."""
    hidden = torch.randn(20, 64, device=DEVICE, requires_grad=True)
    weight = torch.randn(300, 64, device=DEVICE, requires_grad=True)
    bounds, chosen = torch.tensor(cu, device=DEVICE), torch.tensor([True, False, True], device=DEVICE)
    labels = torch.arange(20, device=DEVICE)
    for backend in ("triton", "torch"):
        out = linear_infopo_loss(hidden, weight, labels, cu_seqlens=bounds, is_chosen=chosen, backend=backend)
        out.loss.backward()
        assert out.loss.isnan()
        logps = linear_logps(hidden, weight, labels, cu_seqlens=bounds, reduction="sum", backend=backend)
        assert logps.isnan().all()
    torch.cuda.synchronize()


def test_sums_are_bitwise_equal() -> None:
    """Of packed sequences, whose token log-probabilities plain PyTorch adds up."""
    hidden, weight = torch.randn(5000, 64, device=DEVICE), torch.randn(300, 64, device=DEVICE)
    labels, bounds = torch.randint(0, 300, (5000,), device=DEVICE), torch.tensor([0, 7, 4000, 5000], device=DEVICE)
    first, *others = (
        linear_logps(hidden, weight, labels, cu_seqlens=bounds, reduction="sum", backend="triton") for _ in range(5)
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("trained", ["head", "hidden states"])
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_waits_in_a_whole_step(packed: bool, trained: str) -> None:
    """The public function, backward and all; the library's number of rows arrives by an event."""
    hidden = torch.randn(4, 40, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(3000, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=trained == "head")
    labels, layout = torch.randint(0, 3000, (4, 40), device=DEVICE), {}
    if packed:
        layout["cu_seqlens"] = torch.arange(5, device=DEVICE) * 40
        layout["is_chosen"] = torch.arange(4, device=DEVICE) < 2
    ref_logps = torch.full((4,), -300.0, dtype=torch.float64, device=DEVICE)
    rows = (hidden.flatten(0, 1), labels.flatten()) if packed else (hidden, labels)

    metric_sums = pytest.importorskip("infopo_kernels.integrations.step").metric_sums

    def step() -> None:
        out = linear_infopo_loss(rows[0], weight, rows[1], ref_logps=ref_logps, backend="triton", **layout)
        metric_sums(out, InfoPOOptions())  # what a trainer logs
        out.loss.backward()

    step()
    torch.cuda.synchronize()
    with no_synchronisation():
        step()


def test_metrics_of_several_rejected_responses_do_not_wait() -> None:
    """The numbers of rejected responses differ, so that their prompts are copied to the device."""
    step = pytest.importorskip("infopo_kernels.integrations.step")
    hidden, weight = torch.randn(20, 64, device=DEVICE), torch.randn(300, 64, device=DEVICE)
    labels, bounds = torch.randint(0, 300, (20,), device=DEVICE), torch.arange(0, 24, 4, device=DEVICE)
    chosen, weights = torch.arange(5, device=DEVICE) < 2, torch.tensor([1.0, 1, 0.5, 0.5, 1], device=DEVICE).double()
    known = {"sequence_weights": weights, "num_pairs": 2.0, "num_rejected": [2, 1]}
    out = linear_infopo_loss(
        hidden, weight, labels, cu_seqlens=bounds, is_chosen=chosen, sequence_weights=weights, num_pairs=2.0
    )

    def metrics() -> torch.Tensor:
        return step.metric_sums(out, InfoPOOptions(), {"cu_seqlens": bounds}, known)

    metrics()
    torch.cuda.synchronize()
    with no_synchronisation():
        sums = metrics()
    assert sums[:2].tolist() == [2.0, 3.0]


def test_other_streams() -> None:
    head, labels = random_head(300, 128, 4096)
    expected, _ = TritonBackend().logprob(head, labels)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            results.append(TritonBackend().logprob(head, labels)[0])
    torch.cuda.synchronize()
    for result in results:
        assert torch.equal(result, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device_while_the_first_is_current() -> None:
    head, labels = random_head(100, 64, 1000)
    expected, _ = TritonBackend().logprob(head, labels)
    there = replace(head, hidden=head.hidden.to("cuda:1"), weight=head.weight.to("cuda:1"))
    got, _ = TritonBackend().logprob(there, labels.to("cuda:1"))
    assert got.device == torch.device("cuda:1")
    torch.testing.assert_close(got.cpu(), expected.cpu(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_bitwise_equal(weight_dtype: torch.dtype) -> None:
    head, labels = random_head(2000, 512, 32003)
    c, results = torch.rand(2000, device=DEVICE), []
    for _ in range(3):
        dx, dw = torch.zeros_like(head.hidden), torch.zeros(head.weight.shape, dtype=weight_dtype, device=DEVICE)
        results.append((*TritonBackend().logprob_and_grad(head, labels, c, Gradients(dx, dw, None)), dx, dw))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


def needs(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib:.0f} GiB of free memory on the GPU, {free:.0f} are there")


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("n", "h", "v"), [(40_000, 64, 151_936), (300, 8_320, 262_144), (280_000, 8_192, 300)], ids=["NV", "VH", "NH"]
)
def test_products_of_sizes_beyond_two_to_the_31(n: int, h: int, v: int) -> None:
    """Log-probabilities and dX of the last rows, and dW of the last words, against float32 of those alone."""
    needs(24)
    head, labels = random_head(n, h, v)
    c = torch.full((n,), 1e-3, device=DEVICE)
    dx, dw = torch.zeros_like(head.hidden), torch.zeros_like(head.weight)
    logp, lse = TritonBackend().logprob(head, labels)
    TritonBackend().backward(head, labels, lse, c, Gradients(dx, dw, None))
    last = slice(n - 37, n)
    x, w, y = head.hidden[last].float(), head.weight.float(), labels[last]
    z = x @ w.T
    scored = y != -100
    expected = z.log_softmax(-1).gather(1, y.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(logp[last][scored], expected[scored], rtol=1e-4, atol=1e-4)
    g = torch.nn.functional.one_hot(y.clamp(min=0), v).float() - z.softmax(-1)
    want = (1e-3 * scored[:, None] * g) @ w
    assert (dx[last].float() - want).norm() <= 2.0**-7 * want.norm()
    tail = head.weight[-100:].float()
    total = torch.zeros(100, h, device=DEVICE)
    for rows in torch.arange(n, device=DEVICE).split(4096):
        p = (head.hidden[rows].float() @ tail.T - lse[rows, None]).exp()
        hit = (labels[rows, None] == torch.arange(v - 100, v, device=DEVICE)).float()
        total += (1e-3 * (labels[rows] != -100)[:, None] * (hit - p)).T @ head.hidden[rows].float()
    assert (dw[-100:].float() - total).norm() <= 2.0**-6 * total.norm()


def test_torch_compile() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 60, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1000, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 1000, (4, 60), device=DEVICE)

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        logps = linear_logps(x * 1.5, w, labels, reduction="sum", backend="triton")
        return linear_infopo_loss(x * 1.5, w, labels, backend="triton").loss + logps.sum() * 1e-3

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(hidden, weight), (hidden, weight))
    for first, second in zip(got, expected, strict=True):
        torch.testing.assert_close(first, second, rtol=2e-2, atol=1e-4)


@pytest.mark.heavy
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    """No access outside an allocation, no race in shared memory, on problems with tails everywhere."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", sys.executable, "-m", "pytest", "-q"]
    chosen = "bfloat16 and (test_three_primitives and (odd-strided or bias-softcap) or test_kept_logits and kept-torch)"
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, __file__, "-k", chosen], capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
