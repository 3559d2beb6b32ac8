"""The targets of the native CPU kernels, measured side by side in one process.

    python benchmarks/cpu_targets.py [--shape smollm2|llama] [--dtype float32|bfloat16]
                                     [--part speed|memory|long|accuracy]

Every contender is the whole InfoPO step on the same padded batch of two pairs: loss, and gradients of the hidden states
and (trainable head) of the weight. The floor is what bare full-size `torch.mm` calls of the products take: three a
chosen row, four a rejected one (its weight is known only after its log-probability). Repetitions are interleaved;
figures are medians. A contender is timed after its loss and gradients were compared with those of float32 logits.
Results go into benchmarks/results/cpu_targets.json, merged by case, so parts may be run one at a time.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from infopo_kernels import infopo_loss, linear_infopo_loss, linear_logps
from infopo_kernels.backends import cpp
from infopo_kernels.bench.contenders import torch_chunked_by_sequence, torch_chunked_nll

RESULTS = Path(__file__).parent / "results" / "cpu_targets.json"
THREADS = 2
REPETITIONS = 5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BETA = 0.1


@dataclass(frozen=True)
class Shape:
    name: str
    tokens: int  # of each of the four sequences
    H: int
    V: int


SHAPES = {
    "smollm2": Shape("SmolLM2-135M", 512, 576, 49152),
    "llama": Shape("Llama-3.2-1B", 128, 2048, 128256),
}


@dataclass
class Batch:
    """Two pairs, chosen first; `ref_logps` are the policy's own, so that every rejected weight is beta / e."""

    hidden: Tensor
    """[4, T, H]."""
    weight: Tensor
    """[V, H]."""
    labels: Tensor
    """[4, T]."""
    ref_logps: Tensor
    """[4] float64."""

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, tokens: int | None = None, sequences: int = 4) -> Batch:
        generator = torch.Generator().manual_seed(0)
        T = tokens or shape.tokens
        hidden = torch.empty(sequences, T, shape.H, dtype=dtype).normal_(generator=generator)
        weight = torch.empty(shape.V, shape.H, dtype=dtype).normal_(std=2 / math.sqrt(shape.H), generator=generator)
        labels = torch.randint(shape.V, (sequences, T), generator=generator)
        return cls(hidden, weight, labels, torch.zeros(sequences, dtype=torch.float64))

    def live(self) -> Batch:
        with torch.no_grad():
            self.ref_logps = linear_logps(self.hidden, self.weight, self.labels, reduction="sum").double()
        return self

    def underflowed(self) -> Batch:
        """The policy has left the rejected responses: exp(beta * ratio) is 0 in float32."""
        shift = torch.tensor([0.0, 0.0, 1e5, 1e5], dtype=torch.float64)
        return Batch(self.hidden, self.weight, self.labels, self.ref_logps + shift)


LogpsOf = Callable[[Tensor, Tensor, Tensor], Tensor]


def naive_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    z = torch.nn.functional.linear(hidden, weight).float()
    return z.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def trl_logps() -> LogpsOf:
    from trl.kernels import ChunkedLogProbFunction

    def logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        rows = ChunkedLogProbFunction.apply(
            hidden.flatten(0, 1), weight, None, labels.flatten(), 1.0, 32768, None, 1.0, ()
        )[0]
        return rows.view(labels.shape)

    return logps


def torch_chunked_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    if torch_chunked_by_sequence(hidden.dtype, labels.shape[1]):
        sums = [torch_chunked_nll(x, weight, y, "sum") for x, y in zip(hidden, labels, strict=True)]
        return -torch.stack(sums).unsqueeze(1)
    return -torch_chunked_nll(hidden.flatten(0, 1), weight, labels.flatten(), "none").view(labels.shape)


def step_over(logps_of: LogpsOf) -> Callable[[Batch], Tensor]:
    """The loss of a contender that brings log-probabilities of tokens (or their sums) only."""

    def loss(batch: Batch) -> Tensor:
        sums = logps_of(batch.hidden, batch.weight, batch.labels).double().sum(1)
        chosen, rejected = sums.chunk(2)
        return infopo_loss(chosen, rejected, *batch.ref_logps.chunk(2), beta=BETA).loss

    return loss


def fused_loss(batch: Batch) -> Tensor:
    return linear_infopo_loss(
        batch.hidden, batch.weight, batch.labels, ref_logps=batch.ref_logps, beta=BETA, backend="cpp"
    ).loss


def with_gradients(loss_of: Callable[[Batch], Tensor], batch: Batch, head: bool) -> Callable[[], Tensor]:
    def run() -> Tensor:
        batch.hidden.grad = batch.weight.grad = None
        batch.hidden.requires_grad_()
        batch.weight.requires_grad_(head)
        loss = loss_of(batch)
        loss.backward()
        return loss.detach()

    return run


def without_gradients(batch: Batch) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return fused_loss(batch)

    return run


def contenders() -> dict[str, Callable[[Batch], Tensor]]:
    peers: dict[str, Callable[[Batch], Tensor]] = {"naive": step_over(naive_logps)}
    peers["torch.compile of naive"] = step_over(torch.compile(naive_logps, dynamic=False))
    try:
        peers["trl ChunkedLogProbFunction"] = step_over(trl_logps())
    except ImportError as error:
        print(f"trl is left out: {error}")
    peers["F.linear_cross_entropy(options)"] = step_over(torch_chunked_logps)
    return peers


def check_values(name: str, run: Callable[[], Tensor], batch: Batch, truth: dict[str, Tensor]) -> None:
    """A contender whose values are wrong is not timed."""
    loss = run()
    assert torch.isfinite(loss), f"{name}: loss {loss}"
    for key, got in (("hidden", batch.hidden.grad), ("weight", batch.weight.grad)):
        assert got is not None
        error = (got.float() - truth[key]).norm() / truth[key].norm()
        assert error < 0.05, f"{name}: gradient of {key} is off by {float(error):.3f}"


def measure(jobs: dict[str, Callable[[], object]], repetitions: int = REPETITIONS) -> dict[str, list[float]]:
    """Seconds of each job, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repetitions):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def row(what: str, figure: float, unit: str, target: float | None, below: bool = True) -> dict[str, object]:
    met = None if target is None else (figure <= target if below else figure >= target)
    return {"what": what, "figure": figure, "unit": unit, "target": target, "met": met}


def speed(shape: Shape, dtype: torch.dtype) -> list[dict[str, object]]:
    batch = Batch.make(shape, dtype).live()
    gone = batch.underflowed()
    N = batch.labels.numel()
    x, w = batch.hidden.detach().flatten(0, 1), batch.weight.detach()
    z, dx, dw = torch.empty(N, shape.V, dtype=dtype), torch.empty_like(x), torch.empty_like(w)
    floor = {
        "mm logits": lambda: torch.mm(x, w.T, out=z),
        "mm dX": lambda: torch.mm(z, w, out=dx),
        "mm dW": lambda: torch.mm(z.T, x, out=dw),
    }
    ours: dict[str, Callable[[], object]] = {
        "fused trainable": with_gradients(fused_loss, batch, head=True),
        "fused underflowed": with_gradients(fused_loss, gone, head=True),
        "fused frozen head": with_gradients(fused_loss, batch, head=False),
        "fused forward": without_gradients(batch),
    }
    peers = {name: with_gradients(loss, batch, head=True) for name, loss in contenders().items()}
    with_gradients(step_over(naive_logps), batch, head=True)()
    assert batch.hidden.grad is not None
    assert batch.weight.grad is not None
    truth = {"hidden": batch.hidden.grad.float(), "weight": batch.weight.grad.float()}
    for name, job in {"fused": with_gradients(fused_loss, batch, head=True), **peers}.items():
        check_values(name, job, batch, truth)
    del truth
    samples = measure({**floor, **ours, **peers})
    m = {name: statistics.median(values) for name, values in samples.items()}
    Z, three = m["mm logits"], m["mm logits"] + m["mm dX"] + m["mm dW"]
    best = min((m[name], name) for name in peers)
    rows = [
        row(
            "trainable head / bare products (3 chosen, 4 rejected)",
            m["fused trainable"] / (three + Z / 2),
            "ratio",
            1.10,
        ),
        row("frozen head / 2 bare products", m["fused frozen head"] / (Z + m["mm dX"]), "ratio", 1.10),
        row("forward / 1 bare product", m["fused forward"] / Z, "ratio", 1.10),
        row(
            "all rejected weights underflowed / exact",
            m["fused underflowed"] / m["fused trainable"],
            "ratio",
            0.70,
        ),
    ]
    rows += [row(f"times faster than {name}", m[name] / m["fused trainable"], "x", 1.0, below=False) for name in peers]
    rows += [row(f"seconds: {name}", value, "s", None) for name, value in m.items()]
    for entry in rows[-len(m) :]:
        values = samples[str(entry["what"]).removeprefix("seconds: ")]
        entry["least"], entry["most"] = min(values), max(values)
    print(f"best contender: {best[1]}, {best[0]:.2f} s")
    with_gradients(fused_loss, batch, head=True)()
    first = batch.weight.grad.clone(), batch.hidden.grad.clone()
    with_gradients(fused_loss, batch, head=True)()
    equal = torch.equal(first[0], batch.weight.grad) and torch.equal(first[1], batch.hidden.grad)
    rows.append(row("gradients of two runs differ (0: bitwise equal)", float(not equal), "", 0.0))
    return rows


def resident_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {key}")


def peak_beyond(shape: Shape, dtype: torch.dtype, what: str) -> float:
    """MiB by which the resident set's high-water mark exceeds inputs and gradients; run in a fresh process."""
    batch = Batch.make(shape, dtype)
    losses = {"fused": fused_loss, "naive": step_over(naive_logps)}
    small = Batch(batch.hidden[:, :1].clone(), batch.weight[:64].clone(), batch.labels[:, :1] % 64, batch.ref_logps)
    with_gradients(losses[what], small, head=True)()  # threads, code and autograd's own memory
    gc.collect()
    gradients = [torch.ones_like(batch.hidden), torch.ones_like(batch.weight)]  # their pages counted, then given back
    size = sum(g.numel() * g.element_size() for g in gradients)
    del gradients
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    with_gradients(losses[what], batch, head=True)()
    return (resident_bytes("VmHWM") - before - size) / 2**20


def memory(shape_name: str, dtype_name: str) -> list[dict[str, object]]:
    rows = []
    for what, target in (("fused", 32.0), ("naive", None)):
        command = [sys.executable, __file__, "--peak-of", what, "--shape", shape_name, "--dtype", dtype_name]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
        rows.append(
            row(f"peak memory beyond inputs and gradients, {what}", float(done.stdout.split()[-1]), "MiB", target)
        )
    return rows


def long_context() -> list[dict[str, object]]:
    """131072 tokens in one call (one repetition), between two short runs."""
    shape = SHAPES["smollm2"]
    short = with_gradients(fused_loss, Batch.make(shape, torch.bfloat16).live(), head=True)
    batch = Batch.make(shape, torch.bfloat16, tokens=65536, sequences=2).live()
    long = with_gradients(fused_loss, batch, head=True)
    short()
    before = measure({"short": short})["short"]
    start = time.perf_counter()
    long()
    seconds = time.perf_counter() - start
    after = measure({"short": short})["short"]
    per_token = statistics.median(before + after) / (4 * shape.tokens)
    return [
        row("seconds: 131072 tokens, trainable head, one call", seconds, "s", None),
        row("time per token, 131072 / 2048 tokens", seconds / batch.labels.numel() / per_token, "ratio", 1.10),
    ]


def accuracy() -> list[dict[str, object]]:
    """Sequence log-probability of 4096 bfloat16 tokens against float64 of the same inputs."""
    shape = SHAPES["smollm2"]
    batch = Batch.make(shape, torch.bfloat16, tokens=4096, sequences=1)
    with torch.no_grad():
        got = linear_logps(batch.hidden, batch.weight, batch.labels, reduction="sum", backend="cpp")
        w = batch.weight.double()
        truth = torch.zeros((), dtype=torch.float64)
        for x, y in zip(batch.hidden[0].split(256), batch.labels[0].split(256), strict=True):
            truth += (x.double() @ w.T).log_softmax(-1).gather(-1, y[:, None]).sum()
    return [row("error of a sequence log-probability, 4096 tokens", float((got[0] - truth).abs()), "nats", 1e-3)]


def show(results: dict[str, list[dict[str, object]]]) -> None:
    table = Table("case", "what", "figure", "target", "met", title="Native CPU kernels")
    for case, rows in results.items():
        for entry in rows:
            target = entry["target"]
            met = {True: "[green]met", False: "[red]missed", None: ""}[entry["met"]]  # type: ignore[index]
            table.add_row(
                case,
                str(entry["what"]),
                f"{entry['figure']:.3g} {entry['unit']}",
                "" if target is None else f"{target:g}",
                met,
            )
        table.add_section()
    Console(width=150).print(table)


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--part", choices=("speed", "memory", "long", "accuracy"))
    parser.add_argument("--peak-of", choices=("fused", "naive"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    if args.peak_of:
        print(peak_beyond(SHAPES[args.shape], DTYPES[args.dtype], args.peak_of))
        return
    results: dict[str, list[dict[str, object]]] = {}
    parts = [args.part] if args.part else ["speed", "memory", "long", "accuracy"]
    for shape_name in [args.shape] if args.shape else SHAPES:
        for dtype_name in [args.dtype] if args.dtype else DTYPES:
            shape = SHAPES[shape_name]
            case = f"{shape.name}, N {4 * shape.tokens}, H {shape.H}, V {shape.V}, {dtype_name}"
            if "speed" in parts:
                results[f"{case}: speed"] = speed(shape, DTYPES[dtype_name])
            if "memory" in parts:
                results[f"{case}: memory"] = memory(shape_name, dtype_name)
    if "long" in parts:
        results["SmolLM2-135M, bfloat16: long context"] = long_context()
    if "accuracy" in parts:
        results["SmolLM2-135M, bfloat16: accuracy"] = accuracy()
    show(results)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    record["machine"] = {
        "cpu": cpu_model(),
        "threads": THREADS,
        "isa": cpp.isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "repetitions": REPETITIONS,
    }
    record.setdefault("cases", {}).update(results)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
