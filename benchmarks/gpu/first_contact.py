"""The first ten minutes on a GPU: what is right, what the products can do, where the time of a step goes.

Runs straight from a checkout with PyTorch, Triton and pytest; nothing is built or installed. Sections run one after the
other, each in a process of its own with a time limit, so that a failure on the device ends that section and no other;
the record is written after each. It is made to be committed: `results/GPU/first-contact.json`.

    python -m benchmarks first-contact [--dry-run] [--only SECTION ...] [--show FILE] [--output FOLDER]

`--dry-run` needs no GPU: it imports everything, lists what would run, and collects the tests.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

from benchmarks import report
from benchmarks.measure.timing import interleave
from benchmarks.records import Record

ROOT: Final = Path(__file__).parents[2]
RESULTS: Final = ROOT / "benchmarks" / "results"
RECORD: Final = "first-contact"
VARIANTS: Final = "first-contact-variants"
"""The section `variants` of a run of its own."""

N, H, V = 8192, 4096, 151936
"""The peer's shape (TRL issue 7244): bare products 42 ms on an H100."""

SMALL: Final = (256, 576, 49152)
"""SmolLM2's head and 256 rows: bound by launches."""

REPETITIONS: Final = 8

BARE_ROWS: Final = "bare rows at a time"
"""The column that says how many rows the bare products took at a time."""

SPLIT_ROWS: Final = (1 << 30) // (2 * V)
"""As many as in records without that column: a gigabyte of logits."""

WORKERS: Final = 8
"""Processes that run the cases."""

CORE: Final = (
    "test_three_primitives and (plain or bias-softcap or odd-strided or large) or test_kept_logits and large or "
    "test_infopo_loss_and_gradients or test_objective or test_library or test_wrong_bounds or test_cuda_graph or "
    "test_nothing_waits or test_small_workspace"
)
"""Of tests/gpu, as pytest's -k takes it: the core of the tables of cases. `make test-gpu` runs all of them."""

LIBRARY: Final = re.compile("nvjet|gemm|cublas|cutlass|Cijk", re.IGNORECASE)
"""Names of the kernels behind the library's products: cuBLAS' and hipBLASLt's."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """Something to find out."""

    name: str
    seconds: int
    """Time limit."""
    text: str
    columns: tuple[str, ...]
    run: Callable[[], Iterator[Row]]


# --- measuring --------------------------------------------------------------------------------------------------------


def milliseconds(job: Callable[[], object]) -> float:
    """Median of REPETITIONS runs by the device's own clock, after two to warm up."""
    for _ in range(2):
        job()
    times = []
    for _ in range(REPETITIONS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        job()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times)


def in_turns(jobs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of jobs that take turns, warmed up before.

    A GPU under load lowers its clocks within a tenth of a second, so that figures taken one after the other, or after a
    pause, are not those of the same device.
    """
    gpu = torch.device("cuda")
    interleave(jobs, 2, float("inf"), gpu)
    times = interleave(jobs, REPETITIONS, float("inf"), gpu)
    return {name: 1e3 * median(seconds) for name, seconds in times.items()}


def attempt(job: Callable[[], Row]) -> Row:
    """The figures of a row, or why there are none."""
    try:
        return job()
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return {"failed": f"{type(error).__name__}: {lines[0][:160] if lines else ''}"}


def random(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*size, device="cuda", dtype=dtype)


def inputs(n: int = N, h: int = H, v: int = V) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return random(n, h), random(v, h) / h**0.5, torch.randint(0, v, (n,), device="cuda")


# --- sections ---------------------------------------------------------------------------------------------------------


def cases() -> Iterator[Row]:
    """The core of the tables of cases, in parallel where pytest-xdist is there."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # Each worker with its share of the cores: the truth is formed on them.
        threads = str(max(1, (os.cpu_count() or 1) // WORKERS))
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        subprocess.run([*pytest_command(), f"--junitxml={report}"], cwd=ROOT, env=environment, check=False)
        tree = ElementTree.parse(report)
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for case in tree.iter("testcase"):
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        kind = "failed" if bad is not None else "skipped" if case.find("skipped") is not None else "passed"
        counts[kind] += 1
        if bad is not None:
            failures.append({"case": case.get("name"), "result": str(bad.get("message"))[:300]})
    yield {"case": "all", "result": ", ".join(f"{count} {kind}" for kind, count in counts.items())}
    yield from failures


def pytest_command(*, parallel: bool = True) -> list[str]:
    workers = ["-n", str(WORKERS)] if parallel and importlib.util.find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-m", "gpu", "-k", CORE, *workers]


def products() -> Iterator[Row]:
    """Products at full size, results in 16 bits and in float32, assigned and added; copies."""
    x, w, _ = inputs()
    flops = 2 * N * H * V
    z = torch.empty(N, V, dtype=torch.bfloat16, device="cuda")
    g = random(N, 1536)
    dx, dw = torch.zeros(N, H, device="cuda"), torch.zeros(V, H, device="cuda")
    single, half = torch.float32, torch.empty(V, H, dtype=torch.bfloat16, device="cuda")
    part = w[:1536]
    calls: list[tuple[str, float, Callable[[], object]]] = [
        ("X W^T -> bfloat16 [N, V]", flops, lambda: torch.mm(x, w.T, out=z)),
        ("G W -> bfloat16 [N, H]", flops, lambda: z @ w),
        ("G^T X -> bfloat16 [V, H]", flops, lambda: torch.mm(z.T, x, out=half)),
        ("G W -> float32 [N, H]", flops, lambda: torch.mm(z, w, out_dtype=single, out=dx)),
        ("G W += float32 [N, H]", flops, lambda: torch.addmm(dx, z, w, out_dtype=single, out=dx)),
        ("G^T X -> float32 [V, H]", flops, lambda: torch.mm(z.T, x, out_dtype=single, out=dw)),
        ("G^T X += float32 [V, H]", flops, lambda: torch.addmm(dw, z.T, x, out_dtype=single, out=dw)),
        ("X W^T -> float32, 1536 words", 2 * N * H * 1536, lambda: torch.mm(x, part.T, out_dtype=single)),
        ("G W += float32, 1536 words", 2 * N * H * 1536, lambda: torch.addmm(dx, g, part, out_dtype=single, out=dx)),
        ("G^T X -> bfloat16, 1536 words", 2 * N * H * 1536, lambda: torch.mm(g.T, x, out=half[:1536])),
    ]
    for name, operations, call in calls:

        def measured(call: Callable[[], object] = call, operations: float = operations) -> Row:
            ms = milliseconds(call)
            return {"ms": ms, "TFLOP/s": operations / ms / 1e9}

        yield {"product": name, **attempt(measured)}
    for name, size in (("copy of 1 GiB", 1 << 30), ("copy of 16 MiB, in L2", 1 << 24)):
        source = torch.empty(size, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        ms = milliseconds(lambda source=source, target=target: target.copy_(source))  # type: ignore[misc]
        yield {"product": name, "ms": ms, "TB/s": 2 * size / ms / 1e9}


def kernels() -> Iterator[Row]:
    """The longest kernels of each work beside their model; the library's products, together, beside theirs."""
    from benchmarks.gpu import gpu_kernels, roofline
    from infopo_kernels.backends.base import Head

    x, w, labels = inputs()
    device = model_of(torch.cuda.get_device_properties(0).name)
    for work in roofline.WORK:
        head = Head(x, w, None, None, 1.0, work.workspace_mib << 20)
        job = gpu_kernels.job_of(work, head, labels)
        at_a_time = gpu_kernels.bare_rows(head)
        turns = in_turns({"own": job, "bare": gpu_kernels.bare_products(head, work.products, at_a_time)})
        row: Row = {"kernel": f"{work.name}: all", "ms": turns["own"], "bare products, ms": turns["bare"]}
        row |= {"ratio": turns["own"] / turns["bare"], BARE_ROWS: at_a_time}
        expected: dict[str, list[float]] = {}
        if device is not None:
            expected = roofline.predict(device, roofline.calls(work, device, N, H, V)).by_kernel
            row["model, ms"] = 1e3 * sum_of(expected)
        yield row
        seen = gpu_kernels.kernel_times(job)
        library = [times for name, times in seen.items() if LIBRARY.search(name)]
        if library:
            total = {"launches": sum(count for count, _ in library), "ms": sum(ms for _, ms in library)}
            theirs = [entry[5] for name, entry in expected.items() if name.startswith("library")]
            yield {"kernel": "the library's products", **total, **({"model, ms": 1e3 * sum(theirs)} if theirs else {})}
        for name, (count, ms) in sorted(seen.items(), key=lambda item: -item[1][1])[:14]:
            if ms > 0:
                own = expected.get(name.removesuffix("_kernel"))
                model = {"model, ms": 1e3 * own[5]} if own else {}
                yield {"kernel": name[:60], "launches": count, "ms": ms, **model}


def model_of(name: str) -> Any:
    """The model's row for a device, None if it has none."""
    from benchmarks.gpu import roofline

    return next((device for device in roofline.DEVICES if device.name in name), None)


def sum_of(by_kernel: dict[str, list[float]]) -> float:
    return sum(entry[5] for entry in by_kernel.values()) if by_kernel else float("nan")


@contextmanager
def tiles(descriptors: bool | None = None, **changes: Any) -> Iterator[None]:
    """The table's row of this device with another tile for the logits of 16-bit inputs."""
    from infopo_kernels.backends.triton import launch

    find = launch.target_of
    row = find(torch.device("cuda"))
    changed = replace(row, half=replace(row.half, logits=replace(row.half.logits, **changes)))
    if descriptors is not None:
        changed = replace(changed, descriptors=descriptors)
    launch.target_of = lambda device: changed
    try:
        yield
    finally:
        launch.target_of = find


def variants() -> Iterator[Row]:
    """Logits with other stages, parts and groups; dX and dW by the library and by Triton; a head bound by launches."""
    from benchmarks.gpu import gpu_kernels, offline, roofline
    from infopo_kernels.backends.base import Gradients, Head
    from infopo_kernels.backends.triton import TritonBackend

    x, w, labels = inputs()
    head, backend = Head(x, w, None, None, 1.0, 256 << 20), TritonBackend()
    yield {"variant": "logprob as the table says", **attempt(lambda: timed(lambda: backend.logprob(head, labels)))}
    changes: tuple[Row, ...] = ({"descriptors": False}, {"stages": 2}, {"stages": 4}, {"part": 128}, {"group": 8})
    for change in changes:
        with tiles(**change):
            yield {"variant": f"logprob, {change}", **attempt(lambda: timed(lambda: backend.logprob(head, labels)))}
    for change in ({"descriptors": False}, {"stages": 4}, {"group": 8}):
        with tiles(**change):
            for work in roofline.WORK[:3]:
                job = gpu_kernels.job_of(work, head, labels)
                yield {"variant": f"{work.name}: {change}", **attempt(lambda job=job: timed(job))}  # type: ignore[misc]
    for which in ("library", "triton"):
        with offline.products(which):
            for work in roofline.WORK[:3]:
                job = gpu_kernels.job_of(work, head, labels)
                yield {"variant": f"{work.name}: dX and dW by {which}", **attempt(lambda job=job: timed(job))}  # type: ignore[misc]
    n, h, v = SMALL
    x, w, labels = inputs(n, h, v)
    head, c = Head(x, w, None, None, 1.0, 256 << 20), torch.rand(n, device="cuda")
    dx, dw = torch.zeros_like(x), torch.zeros_like(w)

    def step() -> None:
        _, lse = backend.logprob(head, labels)
        backend.backward(head, labels, lse, c, Gradients(dx, dw, None))

    yield {"variant": "256 rows of SmolLM2's head, one call after the other", **attempt(lambda: timed(step))}
    with offline.products("triton"):
        yield {"variant": "the same as a CUDA graph", **attempt(lambda: timed(captured(step)))}


def timed(job: Callable[[], object]) -> Row:
    return {"ms": milliseconds(job)}


def captured(job: Callable[[], object]) -> Callable[[], None]:
    """The job as a CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        job()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job()
    return graph.replay


def steps() -> Iterator[Row]:
    """The whole step of every implementation that is there, in turns, and its peak of memory beyond inputs and
    gradients."""
    from benchmarks.cases import CASES, Shape, make_batch
    from benchmarks.contenders import CONTENDERS
    from benchmarks.gpu import gpu_kernels
    from infopo_kernels.backends.base import Head

    device = torch.device("cuda")
    for case in ("step", "frozen", "underflowed"):
        batch = make_batch(CASES[case], Shape("peer", H, V), 2, N // 4, torch.bfloat16, device)
        jobs: dict[str, Callable[[], object]] = {}
        rows: dict[str, Row] = {}
        for contender in CONTENDERS.values():

            def job(contender: Any = contender, batch: Any = batch) -> None:
                batch.clear()
                contender.loss(batch).backward()

            def memory(job: Callable[[], None] = job, batch: Any = batch) -> Row:
                job()
                batch.clear()
                torch.cuda.synchronize()
                held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                job()
                torch.cuda.synchronize()
                return {"MiB beyond": (torch.cuda.max_memory_allocated() - held) / 2**20 - batch.gradients_mib}

            reason = contender.unsupported_reason(batch.case, device, torch.bfloat16)
            rows[contender.name] = {"failed": reason} if reason is not None else attempt(memory)
            if "failed" not in rows[contender.name]:
                jobs[contender.name] = job
        products = 2 if case == "frozen" else 3
        head = Head(batch.rows[0].detach(), batch.weight.detach(), None, None, 1.0, 0)
        bare, at_a_time = f"{products} bare products", gpu_kernels.bare_rows(head)
        rows[bare], jobs[bare] = {BARE_ROWS: at_a_time}, gpu_kernels.bare_products(head, products, at_a_time)
        for name, ms in in_turns(jobs).items():
            rows[name]["ms"] = ms
        for name, row in rows.items():
            yield {"step": f"{case}: {name}", **row}
        batch.clear()
        torch.cuda.empty_cache()


KERNEL_COLUMNS: Final = ("kernel", "launches", "ms", "bare products, ms", "ratio", "model, ms", BARE_ROWS)

SECTIONS: Final = {
    section.name: section
    for section in (
        Section("cases", 240, "right values: the core of the tables of cases", ("case", "result"), cases),
        Section("products", 60, "bare products and copies", ("product", "ms", "TFLOP/s", "TB/s", "failed"), products),
        Section("kernels", 90, "kernels beside their model", KERNEL_COLUMNS, kernels),
        Section("variants", 100, "what the table could say instead", ("variant", "ms", "failed"), variants),
        Section("steps", 100, "whole steps", ("step", "ms", "MiB beyond", BARE_ROWS, "failed"), steps),
    )
}
"""Limits add up to less than ten minutes."""


# --- running and showing ----------------------------------------------------------------------------------------------


def run_section(name: str, file: Path) -> None:
    """In a process of its own: rows are written as they come."""
    rows = []
    for row in SECTIONS[name].run():
        rows.append(row)
        file.write_text(json.dumps(rows))


def start_section(section: Section) -> Row:
    """A section's rows, and what ended it early if something did."""
    with tempfile.TemporaryDirectory() as folder:
        file, begin = Path(folder) / "rows.json", time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.gpu.first_contact", "--section", section.name, "--file", str(file)]
        # No interpreter: on a GPU its tests have nothing to say.
        environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(python_path())}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=section.seconds, check=False
            )
            last = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
            ended = None if done.returncode == 0 else f"exit code {done.returncode}: {last}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {section.seconds} s"
        rows = json.loads(file.read_text()) if file.exists() else []
        return {"rows": rows, "seconds": time.perf_counter() - begin, "ended": ended}


def python_path() -> list[str]:
    return [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]


def page(record: Row) -> str:
    """The record as Markdown."""
    lines = ["# First contact", ""]
    lines += [f"- {key}: {value}" for key, value in record["machine_info"].items()]
    for name, found in record["sections"].items():
        section = SECTIONS[name]
        rows = [row for row in record["rows"] if row["section"] == name]
        used = [column for column in section.columns if any(column in row for row in rows)]
        lines += ["", f"## {section.text} ({found['seconds']:.0f} s)", ""]
        if found["ended"]:
            lines += [f"Not finished: {found['ended']}", ""]
        cells = [[_cell(row.get(column)) for column in used] for row in rows]
        lines.append(report.markdown(report.Table(RECORD, "", used or list(section.columns[:1]), cells)))
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    """Three digits; nothing for what was not measured."""
    if value is None or value != value:
        return ""
    return str(value) if not isinstance(value, float) else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def bare_text(rows: Any) -> str:
    """The bare products of the rows of a record."""
    found = rows[BARE_ROWS].dropna() if BARE_ROWS in rows else ()
    least = int(min(found)) if len(found) else SPLIT_ROWS
    return "bare products" if least >= N else f"bare products of {least} rows at a time"


def works_table(record: Record) -> report.Table:
    """The backend's calls over bare products, which took turns with them."""
    rows = record.rows[record.rows["kernel"].str.endswith(": all", na=False)]
    figures = ("ms", "bare products, ms", "ratio", "model, ms")
    cells = [
        [r["kernel"].removesuffix(": all"), *(_cell(r[name]) for name in figures)] for r in rows.to_dict("records")
    ]
    title = (
        f"Calls of the backend on an {record.machine['gpu']}, medians of {REPETITIONS}, in turns with "
        f"{bare_text(rows)}:"
    )
    return report.Table(RECORD, title, ["work", *figures], cells)


def steps_table(record: Record) -> report.Table:
    """Whole steps of every implementation."""
    cases: dict[str, dict[str, list[str]]] = {}
    steps = record.rows[record.rows["section"] == "steps"]
    for row in steps.to_dict("records"):
        case, name = row["step"].split(": ")
        if row["ms"] == row["ms"]:
            name = "bare products" if name.endswith("bare products") else name
            cases.setdefault(name, {})[case] = [_cell(row["ms"]), _cell(row["MiB beyond"])]
    names = list(dict.fromkeys(case for found in cases.values() for case in found))
    cells = [[name, *(cell for case in names for cell in found.get(case, ["", ""]))] for name, found in cases.items()]
    columns = ["", *(f"{case}, {unit}" for case in names for unit in ("ms", "MiB beyond"))]
    title = (
        f"Whole steps through public functions on an {record.machine['gpu']}, medians of {REPETITIONS}, in turns with "
        f"{bare_text(steps)}:"
    )
    return report.Table(RECORD, title, columns, cells)


def products_table(record: Record) -> report.Table:
    """Bare products and copies."""
    rows = record.rows[record.rows["section"] == "products"].to_dict("records")
    columns = ["product", "ms", "TFLOP/s", "TB/s"]
    title = f"Bare products and copies on an {record.machine['gpu']}, medians of {REPETITIONS}:"
    return report.Table(RECORD, title, columns, [[_cell(row[name]) for name in columns] for row in rows])


def variants_table(record: Record) -> report.Table:
    """What the table of tiles could say instead."""
    rows = record.rows[record.rows["section"] == "variants"].to_dict("records")
    title = f"Variants on an {record.machine['gpu']}, medians of {REPETITIONS}, each measured alone:"
    cells = [[row["variant"], _cell(row["ms"])] for row in rows]
    return report.Table(VARIANTS, title, ["variant", "ms"], cells)


def dry_run(names: Sequence[str]) -> int:
    """Import everything, list the sections, collect the tests; 1 if a test file cannot be imported."""
    import triton

    for module in ("benchmarks.contenders", "benchmarks.gpu.gpu_kernels", "benchmarks.gpu.roofline"):
        importlib.import_module(module)
    print(f"torch {torch.__version__}, triton {triton.__version__}, {torch.cuda.device_count()} GPU")
    for name in names:
        section = SECTIONS[name]
        print(f"{name:9} {section.seconds:4d} s  {section.run.__doc__}")
    found = subprocess.run(
        [*pytest_command(parallel=False), "--collect-only"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(python_path())},
    )  # fmt: skip
    print((found.stdout.strip().splitlines() or [found.stderr])[-1])
    return int(found.returncode != 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections, write the record, print the page."""
    parser = argparse.ArgumentParser("python -m benchmarks first-contact", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="sections")
    parser.add_argument("--dry-run", action="store_true", help="import everything and list what would run")
    parser.add_argument("--show", type=Path, help="print the page of this record")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"folder of folders by processor ({RESULTS})")
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.section is not None:
        run_section(arguments.section, arguments.file)
        return 0
    if arguments.show is not None:
        print(page(json.loads(arguments.show.read_text())))
        return 0
    if arguments.dry_run:
        return dry_run(arguments.only)
    from benchmarks.measure.environment import environment
    from infopo_kernels.backends.triton import TritonBackend

    reason = TritonBackend().unsupported_reason(torch.device("cuda"), torch.bfloat16)
    if reason is not None:
        print(f"first-contact needs a GPU: {reason} `--dry-run` lists what it would run.", file=sys.stderr)
        return 2
    record: Row = {"machine_info": environment("cuda"), "shape": [N, H, V], "sections": {}, "rows": []}
    path = arguments.output / str(record["machine_info"]["processor"]) / f"{RECORD}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        found = start_section(SECTIONS[name])
        record["rows"] += [{"section": name, **row} for row in found.pop("rows")]
        record["sections"][name] = found
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{name}: {record['sections'][name]['seconds']:.0f} s", file=sys.stderr, flush=True)
    print(page(record))
    print(f"written to {path}", file=sys.stderr)
    wrong = [row for row in record["rows"] if row["section"] == "cases"][1:]
    return int(bool(wrong) or any(found["ended"] for found in record["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
