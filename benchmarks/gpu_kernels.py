"""On a GPU: the Triton backend's primitives against the bare products and against the model of `roofline.py`.

Prints device, driver and versions, then for every line of the model's table the measured time, its ratio to the bare
products' time measured beside it, what the model said, and the peak of memory beyond inputs and results; then the time
of every kernel. `python -m infopo_kernels bench --device cuda` measures against other libraries.

    python benchmarks/gpu_kernels.py [--rows 8192 --hidden 4096 --vocabulary 151936] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import roofline

from infopo_kernels.backends.base import Gradients, Head
from infopo_kernels.backends.triton import TritonBackend
from infopo_kernels.options import IGNORE_INDEX

REPETITIONS = 20


def environment() -> dict[str, str]:
    """What a figure depends on."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    tool = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        driver = subprocess.run(tool, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {
        "device": properties.name,
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "driver, clock, power": driver,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def milliseconds(job: Callable[[], object]) -> list[float]:
    """Lower quartile, median and upper quartile of REPETITIONS runs, after 3 to warm up."""
    for _ in range(3):
        job()
    times = []
    for _ in range(REPETITIONS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        job()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    times.sort()
    return [times[len(times) // 4], times[len(times) // 2], times[3 * len(times) // 4]]


def peak_beyond(job: Callable[[], object]) -> float:
    """MiB that a run takes beyond what is allocated when it begins."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    job()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def bare_products(head: Head, count: int) -> Callable[[], object]:
    """The products that no implementation can do without, on operands of a gigabyte at a time."""
    x, w = head.hidden, head.weight
    rows = max(1, min(len(x), (1 << 30) // (2 * len(w))))
    g = torch.zeros(rows, len(w), dtype=x.dtype, device=x.device)

    def run() -> None:
        for part in x.split(rows):
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
    gradients = Gradients(torch.zeros_like(head.hidden), dw, None)
    _, lse = TritonBackend().logprob(head, labels)
    jobs = []
    for step in roofline.steps(work, head, dw):
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
    """Launches and milliseconds of every kernel of one run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        job()
        torch.cuda.synchronize()
    return {event.key: (event.count, event.device_time_total / 1e3) for event in profile.key_averages()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--json", type=Path, help="write the record here")
    arguments = parser.parse_args()
    reason = TritonBackend().unsupported_reason(torch.device("cuda"), torch.bfloat16)
    if reason is not None:
        print(f"This benchmark needs a GPU: {reason}", file=sys.stderr)
        return 2
    n, h, v = arguments.rows, arguments.hidden, arguments.vocabulary
    record: dict[str, Any] = {"environment": environment(), "shape": [n, h, v], "rows": []}
    for key, value in record["environment"].items():
        print(f"{key}: {value}")
    torch.manual_seed(0)
    hidden = torch.randn(n, h, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(v, h, device="cuda", dtype=torch.bfloat16) / h**0.5
    labels = torch.randint(0, v, (n,), device="cuda")
    device = next((d for d in roofline.DEVICES if d.name in record["environment"]["device"]), None)
    print(f"\nbfloat16, {n} rows, hidden size {h}, vocabulary {v}; medians of {REPETITIONS} (quartiles)\n")
    print("| work | ms | bare products, ms | ratio | model | MiB beyond |")
    print("| --- | --: | --: | --: | --: | --: |")
    for work in roofline.WORK:
        head = Head(hidden, weight, None, None, 1.0, work.workspace_mib << 20)
        job = job_of(work, head, labels)
        floor, times = milliseconds(bare_products(head, work.products)), milliseconds(job)
        model = "-"
        if device is not None:
            prediction = roofline.predict(device, roofline.calls(work, device, n, h, v), 1.0)
            bare = roofline.bare(device, work, n, h, v)
            model = f"{prediction.overlapped / bare:.2f} - {prediction.serial / bare:.2f}"
        row = {
            "work": work.name,
            "milliseconds": times,
            "bare_milliseconds": floor,
            "ratio": times[1] / floor[1],
            "model": model,
            "mib_beyond": peak_beyond(job),
            "kernels": kernel_times(job),
        }
        record["rows"].append(row)
        spread = f"{times[1]:.2f} ({times[0]:.2f}, {times[2]:.2f})"
        print(f"| {work.name} | {spread} | {floor[1]:.2f} | {row['ratio']:.2f} | {model} | {row['mib_beyond']:.0f} |")
    for row in record["rows"]:
        print(f"\n{row['work']}: kernel, launches, ms")
        for name, (count, time) in sorted(row["kernels"].items(), key=lambda item: -item[1][1]):
            if time > 0:
                print(f"  {name[:60]:60s} {count:5d} {time:9.3f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
