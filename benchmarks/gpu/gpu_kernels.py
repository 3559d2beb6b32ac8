"""On a GPU: the Triton backend's primitives against the bare products and against the model of `roofline.py`.

Prints what was measured on, then for every line of the model's table the measured time, its ratio to the bare products'
time measured beside it, what the model said, and the peak of memory beyond inputs and results; then the time of every
kernel. `python -m benchmarks --device cuda` measures against other libraries.

    python -m benchmarks gpu-kernels [--rows 8192 --hidden 4096 --vocabulary 151936] [--output FOLDER]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import records, report
from benchmarks.gpu import roofline
from benchmarks.measure.environment import environment
from benchmarks.measure.memory import available_gib, watch
from benchmarks.measure.timing import interleave, spread
from infopo_kernels.backends.base import Gradients, Head
from infopo_kernels.backends.triton import TritonBackend
from infopo_kernels.options import IGNORE_INDEX

RECORD = "gpu-kernels"
REPETITIONS = 20


def bare_rows(head: Head) -> int:
    """How many rows the bare products take at a time: all, where their logits take no more than a quarter of what is
    free."""
    x = head.hidden
    room = int(available_gib(x.device) * 2**30) // 4
    return max(1, min(len(x), room // (len(head.weight) * x.element_size())))


def bare_products(head: Head, count: int, rows: int) -> Callable[[], object]:
    """The products that no implementation can do without, for so many rows at a time (`bare_rows`)."""
    x, w = head.hidden, head.weight
    g = torch.zeros(rows, len(w), dtype=x.dtype, device=x.device)

    def run() -> None:
        for part in torch.split(x, rows):
            here = g[: len(part)]
            torch.mm(part, w.T, out=here)
            if count > 1:
                here @ w
            if count > 2:
                here.T @ part

    return run


def job_of(work: roofline.Work, head: Head, labels: torch.Tensor) -> Callable[[], object]:
    """The same calls that the model counts."""
    n, v = len(labels), head.weight.shape
    dw = None
    if not work.frozen:
        dw = torch.zeros(v, dtype=head.weight.dtype if work.sixteen else torch.float32, device="cuda")
    most, head, gradients = roofline.kept(work, head, Gradients(torch.zeros_like(head.hidden), dw, None))
    _, lse = TritonBackend().logprob(head, labels)
    jobs = []
    for step in roofline.steps(work, head, most):
        c = torch.full((n,), 1e-3, device="cuda")
        c[step.dead.start : step.dead.stop] = 0.0
        of_rows = {}
        for rows in (step.rows, step.kept):
            scored = torch.full_like(labels, IGNORE_INDEX)
            for part in rows:
                scored[part.start : part.stop] = labels[part.start : part.stop]
            of_rows[rows] = scored
        jobs.append((step, of_rows, c))

    def run() -> None:
        for step, of_rows, c in jobs:
            roofline.call(step, head, of_rows.__getitem__, c, lse, gradients)

    return run


def kernel_times(job: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """Launches and milliseconds of every kernel of one run, and the time in which none ran ("idle")."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        job()
        torch.cuda.synchronize()
    found = {event.key: (event.count, event.device_time_total / 1e3) for event in profile.key_averages()}
    ranges = [e.time_range for e in profile.events() if e.device_type.name == "CUDA"]
    if ranges:
        span = max(r.end for r in ranges) - min(r.start for r in ranges)
        found["idle"] = (0, (span - sum(r.end - r.start for r in ranges)) / 1e3)
    return found


def table(rows: Sequence[dict[str, Any]], shape: tuple[int, int, int]) -> report.Table:
    """A row a line of the model."""
    cells = [
        [
            r["work"],
            f"{1e3 * median(r['seconds']):.2f}",
            f"± {spread(r['seconds']):.1%}",
            f"{1e3 * median(r['bare_seconds']):.2f}",
            f"{median(r['seconds']) / median(r['bare_seconds']):.2f}",
            r["model"],
            f"{r['mib_beyond']:.0f}",
            str(r["bare_rows"]),
        ]
        for r in rows
    ]
    n, h, v = shape
    title = f"bfloat16, {n} rows, hidden size {h}, vocabulary {v}; medians of {REPETITIONS}"
    figures = ["ms", "spread", "bare products, ms", "ratio", "ratio by the model", "MiB beyond", "bare rows at a time"]
    return report.Table(RECORD, title, ["work", *figures], cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the record, show it."""
    parser = records.parser(RECORD, __doc__, Path("out/bench"))
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151936)
    arguments = parser.parse_args(argv)
    gpu = torch.device("cuda")
    reason = TritonBackend().unsupported_reason(gpu, torch.bfloat16)
    if reason is not None:
        print(f"This benchmark needs a GPU: {reason}", file=sys.stderr)
        return 2
    n, h, v = arguments.rows, arguments.hidden, arguments.vocabulary
    machine, console = environment("cuda"), report.console()
    console.print(*report.machine(machine), sep="\n", highlight=False)
    torch.manual_seed(0)
    hidden = torch.randn(n, h, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(v, h, device="cuda", dtype=torch.bfloat16) / h**0.5
    labels = torch.randint(0, v, (n,), device="cuda")
    device = next((d for d in roofline.DEVICES if d.name in machine["gpu"]), None)
    rows: list[dict[str, Any]] = []
    for work in roofline.WORK:
        head = Head(hidden, weight, None, None, 1.0, work.workspace_mib << 20)
        at_a_time = bare_rows(head)
        calls = {"bare": bare_products(head, work.products, at_a_time), "own": job_of(work, head, labels)}
        interleave(calls, 3, float("inf"), gpu)  # warms up
        each = interleave(calls, REPETITIONS, float("inf"), gpu)
        model = "-"
        if device is not None:
            prediction = roofline.predict(device, roofline.calls(work, device, n, h, v))
            model = f"{prediction.seconds / roofline.bare(device, work, n, h, v):.2f}"
        rows.append(
            {
                "work": work.name,
                "seconds": each["own"],
                "bare_seconds": each["bare"],
                "bare_rows": at_a_time,
                "model": model,
                "mib_beyond": watch(calls["own"], gpu).peak_mib,
                "kernels": kernel_times(calls["own"]),
            }
        )
    records.save(arguments.output, RECORD, machine, rows, shape=[n, h, v])
    report.render(console, [table(rows, (n, h, v))])
    for row in rows:
        kernels = sorted(row["kernels"].items(), key=lambda item: -item[1][1])
        cells = [[name[:60], str(count), f"{time:.3f}"] for name, (count, time) in kernels if time > 0]
        report.render(console, [report.Table(RECORD, row["work"], ["kernel", "launches", "ms"], cells)])
    return 0
