"""A MODEL of the Triton backend's time on GPUs, from the launches that it makes: bytes, operations, waves, launches.

Nothing here is measured. The backend runs on tensors without storage; every launch that it asks for is counted from its
own arguments (rows, columns, tiles, slices), and a device is two data-sheet numbers. Per launch

    time = max(operations / (rate * share of the last wave that is filled), bytes / bandwidth)       (overlapped)
    time = operations / (rate * ...) + bytes / bandwidth                                              (serial)

Real kernels lie between the two. The bare products' time takes the same rate, so that their ratio depends on bytes and
waves, not on how good a product is; `--efficiency` says how much slower Triton's products may be than the bare ones.

    python -m benchmarks roofline [--rows 8192 --hidden 4096 --vocabulary 151936 --efficiency 1.0] [--details H100]
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch

from benchmarks import records, report
from benchmarks.gpu import offline
from benchmarks.gpu.offline import Launched
from infopo_kernels.backends.base import Gradients, Head
from infopo_kernels.backends.triton import TritonBackend
from infopo_kernels.backends.triton.tiles import TARGETS
from infopo_kernels.schedule import hidden_gradient_apart

SHARE_OF_PEAK = 3 * 2 * 8192 * 151936 * 4096 / 42e-3 / 989e12
"""Bare products over peak: 3 x 2 N V H operations in 42 ms on an H100 (TRL issue 7244) are 0.736 of 989 TFLOP/s.

Taken for every device, for want of a measurement of each.
"""

LAUNCH_SECONDS = 2e-6
"""Between two kernels of a stream, the host being ahead."""


@dataclass(frozen=True)
class Device:
    """Data-sheet figures of one GPU."""

    name: str
    target: str
    tflops: float
    """Dense bfloat16."""
    terabytes: float
    """Memory bandwidth a second."""


DEVICES = [
    Device("A100", "sm_80", 312, 2.039),
    Device("H100", "sm_90", 989, 3.35),
    Device("H200", "sm_90", 989, 4.8),
    Device("B200", "sm_100", 2250, 8.0),
    Device("MI300X", "gfx942", 1307, 5.3),
]


@dataclass
class Cost:
    """Operations and bytes of one launch, or of many."""

    operations: float = 0.0
    bytes: float = 0.0
    programs: float = 0.0


@dataclass(frozen=True)
class Live:
    """Rows that a call computes."""

    rows: int
    kept: int = 0
    """Those among them whose logits are kept."""


def _size(tensor: torch.Tensor) -> int:
    return tensor.element_size()


def _here(a: dict[str, Any], live: Live) -> int:
    """Rows of the chunk that exist."""
    return max(0, min(live.rows - a["row0"], a["C"]))


def _logits_bytes(a: dict[str, Any], rows: int, columns: int) -> float:
    """X once, and the head once for every group of row blocks that passes over it together."""
    groups = ceil(ceil(rows / a["BLOCK_N"]) / a["GROUP"])
    return (rows + groups * columns) * a["H"] * _size(a["x_ptr"])


def logprob(a: dict[str, Any], live: Live) -> Cost:
    tiles = ceil(live.rows / a["BLOCK_N"])
    partial = 8 * live.rows * a["slices"]
    return Cost(2 * live.rows * a["V"] * a["H"], _logits_bytes(a, live.rows, a["V"]) + partial, tiles * a["slices"])


def merge(a: dict[str, Any], live: Live) -> Cost:
    rows = _here(a, live)
    return Cost(0, rows * (8 * a["parts"] + 24), ceil(rows / a["BLOCK_N"]))


def softmax_tile(a: dict[str, Any], live: Live) -> Cost:
    rows = _here(a, live)
    kept = rows * a["num_parts"] * (a["PART"] * _size(a["q_ptr"]) + 8)
    programs = ceil(rows / a["BLOCK_N"]) * ceil(a["V"] / a["BLOCK_V"])
    return Cost(2 * rows * a["V"] * a["H"], _logits_bytes(a, rows, a["V"]) + kept, programs)


def normalise(a: dict[str, Any], live: Live) -> Cost:
    rows = _here(a, live)
    return Cost(0, rows * a["ld"] * (2 * _size(a["q_ptr"]) + 4 / a["BLOCK_V"]), rows)


def kept_gradient(a: dict[str, Any], live: Live) -> Cost:
    rows, columns = min(live.kept, a["C"]), min(a["ld"], a["V"] - a["part0"] * a["PART"])
    return Cost(0, rows * columns * (_size(a["q_ptr"]) + 4 / a["PART"] + _size(a["g_ptr"])), rows)


def gradient_tile(a: dict[str, Any], live: Live) -> Cost:
    rows, columns = _here(a, live) - min(max(0, live.kept - a["row0"]), a["C"]), a["columns"]
    written = rows * columns * _size(a["g_ptr"])
    programs = ceil(rows / a["BLOCK_N"]) * ceil(columns / a["BLOCK_V"])
    return Cost(2 * rows * columns * a["H"], _logits_bytes(a, rows, columns) + written, programs)


def hidden_product(a: dict[str, Any], live: Live) -> Cost:
    """G and the piece of the head once (a slice runs side by side), the sums written, or read and written."""
    rows, columns, slices = _here(a, live), a["columns"], a["part_ptr"].shape[0]
    if not rows:
        return Cost()
    operands = (rows + a["H"]) * columns * _size(a["g_ptr"])
    sums = 4 * slices * rows * a["H"] * (2 if a["ADD"] else 1)
    programs = ceil(rows / a["BLOCK_N"]) * ceil(a["H"] / a["BLOCK_H"]) * slices
    return Cost(2 * rows * columns * a["H"], operands + sums, programs)


def store_hidden(a: dict[str, Any], live: Live) -> Cost:
    rows = _here(a, live)
    return Cost(0, rows * a["H"] * (4 * a["SLICES"] + _size(a["dx_ptr"])), rows)


def gather_rows(a: dict[str, Any], live: Live) -> Cost:
    rows = _here(a, live)
    return Cost(0, 2 * rows * a["H"] * _size(a["x_ptr"]), rows)


def weight_product(a: dict[str, Any], live: Live) -> Cost:
    """G once, the gathered rows once (they stay in L2), dW written, or read and written."""
    rows, columns = _here(a, live), a["columns"]
    if not rows and a["ADD"]:
        return Cost()
    operands = rows * (columns + a["H"]) * _size(a["g_ptr"])
    result = columns * a["H"] * _size(a["dw_ptr"]) * (2 if a["ADD"] else 1)
    programs = ceil(columns / a["BLOCK_V"]) * ceil(a["H"] / a["BLOCK_H"])
    return Cost(2 * rows * columns * a["H"], operands + result, programs)


def live_rows(a: dict[str, Any], live: Live) -> Cost:
    return Cost(0, 20 * a["N"], 1)


def kept_rows(a: dict[str, Any], live: Live) -> Cost:
    return Cost(0, 56 * a["N"], 1)


def objective(a: dict[str, Any], live: Live) -> Cost:
    return Cost(0, 24 * a["N"], 1)


MODELS: dict[str, Callable[[dict[str, Any], Live], Cost]] = {
    f"{model.__name__}_kernel": model
    for model in (
        logprob, merge, softmax_tile, normalise, gradient_tile, hidden_product, store_hidden, gather_rows,
        weight_product, live_rows, kept_rows, kept_gradient, objective,
    )
}  # fmt: skip


@dataclass
class Prediction:
    """Modelled seconds of a sequence of launches."""

    overlapped: float = 0.0
    serial: float = 0.0
    launches: int = 0
    cost: Cost = field(default_factory=Cost)
    by_kernel: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0] * 5))


def predict(device: Device, calls: list[tuple[list[Launched], Live]], efficiency: float) -> Prediction:
    """Sum over launches; each list comes with the rows that are live in it."""
    rate = device.tflops * 1e12 * SHARE_OF_PEAK * efficiency
    slots = TARGETS[device.target].multiprocessors
    result = Prediction()
    for launches, live in calls:
        for launched in launches:
            cost = MODELS[launched.name](launched.arguments, live)
            filled = cost.programs / (ceil(cost.programs / slots) * slots) if cost.programs else 1.0
            compute = cost.operations / (rate * filled)
            memory = cost.bytes / (device.terabytes * 1e12)
            result.overlapped += max(compute, memory) + LAUNCH_SECONDS
            result.serial += compute + memory + LAUNCH_SECONDS
            result.launches += 1
            result.cost.operations += cost.operations
            result.cost.bytes += cost.bytes
            entry = result.by_kernel[launched.name.removesuffix("_kernel")]
            for i, x in enumerate((1, cost.operations, cost.bytes, compute, memory)):
                entry[i] += x
    return result


@dataclass(frozen=True)
class Work:
    """Something to predict, and the bare products that it is held against."""

    name: str
    products: int
    what: str
    """A primitive for all rows, or "infopo": what `infopo_kernels.schedule` asks for, half of the rows being chosen."""
    sixteen: bool = False
    """A 16-bit dW."""
    frozen: bool = False
    underflowed: bool = False
    """No rejected row has a weight."""
    workspace_mib: int = 256


WORK = [
    Work("log-probabilities", 1, "logprob"),
    Work("frozen head: log-probabilities and dX", 2, "logprob_and_grad", frozen=True),
    Work("known weights (every chosen row), float32 dW", 3, "logprob_and_grad"),
    Work("the same, workspace of 1 GiB", 3, "logprob_and_grad", workspace_mib=1024),
    Work("known weights, 16-bit dW", 3, "logprob_and_grad", sixteen=True),
    Work("InfoPO step, float32 dW, every rejected weight live", 3, "infopo"),
    Work("InfoPO step, float32 dW, rejected weights underflowed", 3, "infopo", underflowed=True),
    Work("InfoPO step, 16-bit dW, every weight live", 3, "infopo", sixteen=True),
    Work("InfoPO step, 16-bit dW, rejected underflowed", 3, "infopo", sixteen=True, underflowed=True),
    Work("InfoPO step, 16-bit dW, every weight live, 1 GiB", 3, "infopo", sixteen=True, workspace_mib=1024),
]


@dataclass(frozen=True)
class Step:
    """One call of a primitive."""

    primitive: str
    rows: tuple[range, ...]
    """Scored rows."""
    kept: tuple[range, ...] = ()
    """Rows whose logits `logprob` keeps in the memory of dW, or `backward` finds there."""
    dead: range = range(0)
    """Rows of weight zero."""
    hidden: bool = True
    weight: bool = True

    @property
    def live(self) -> Live:
        def count(ranges: tuple[range, ...]) -> int:
            return sum(len(r) - len(range(max(r.start, self.dead.start), min(r.stop, self.dead.stop))) for r in ranges)

        return Live(count(self.rows), count(self.kept) if self.primitive == "backward" else 0)


def steps(work: Work, head: Head, weight_gradient: torch.Tensor | None) -> list[Step]:
    """The calls that `work` takes; chosen rows come first, as they do in a padded batch."""
    n = len(head.hidden)
    every = (range(n),)
    if work.what != "infopo":
        return [Step(work.what, every, weight=not work.frozen)]
    assert weight_gradient is not None
    chosen, rejected = range(n // 2), range(n // 2, n)
    dead = rejected if work.underflowed else range(0)
    most = TritonBackend().kept_rows(head, weight_gradient)
    if work.sixteen and hidden_gradient_apart(head, most):
        return [
            Step("logprob_and_grad", every, weight=False),
            Step("backward", every, dead=dead, hidden=False),
        ]
    if work.sixteen:
        first = (range(min(n, most)),)
        return [
            Step("logprob", first, first),
            Step("logprob", (range(first[0].stop, n),)),
            Step("backward", every, first, dead),
        ]
    of_rejected = range(rejected.start, min(n, rejected.start + most))
    of_chosen = range(max(0, min(len(chosen), most - len(rejected))))
    return [
        Step("logprob", (of_rejected, of_chosen), (of_rejected, of_chosen)),
        Step("logprob", (range(of_rejected.stop, n),)),
        Step("backward", (rejected, of_chosen), (of_rejected, of_chosen), dead),
        Step("logprob_and_grad", (range(of_chosen.stop, len(chosen)),)),
    ]


def call(
    step: Step, head: Head, labels: Callable[[tuple[range, ...]], torch.Tensor], c: torch.Tensor, lse: torch.Tensor,
    gradients: Gradients,
) -> None:  # fmt: skip
    """Make the call; `labels` gives those of some rows."""
    backend = TritonBackend()
    wanted = Gradients(gradients.hidden if step.hidden else None, gradients.weight if step.weight else None, None)
    if step.primitive == "logprob":
        backend.logprob(head, labels(step.rows), gradients.weight if step.kept else None)
    elif step.primitive == "logprob_and_grad":
        backend.logprob_and_grad(head, labels(step.rows), c, wanted)
    else:
        backend.backward(head, labels(step.rows), lse, c, wanted, labels(step.kept) if step.kept else None)


def calls(work: Work, device: Device, n: int, h: int, v: int) -> list[tuple[list[Launched], Live]]:
    """The launches of `work` on `device`, with the live rows of each call."""

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    half = torch.bfloat16
    head = Head(empty(n, h, dtype=half), empty(v, h, dtype=half), None, None, 1.0, work.workspace_mib << 20)
    labels, vector = empty(n, dtype=torch.int64), empty(n)
    weight = None if work.frozen else empty(v, h, dtype=half if work.sixteen else torch.float32)
    gradients = Gradients(empty(n, h, dtype=half), weight, None)
    result = []
    with offline.recorded(TARGETS[device.target]):
        which = steps(work, head, weight)
    for step in which:
        with offline.recorded(TARGETS[device.target]) as launches:
            call(step, head, lambda rows: labels, vector, vector, gradients)
        result.append((launches, step.live))
    return result


def bare(device: Device, work: Work, n: int, h: int, v: int) -> float:
    return work.products * 2 * n * h * v / (device.tflops * 1e12 * SHARE_OF_PEAK)


def overview(shape: tuple[int, int, int], efficiency: float) -> report.Table:
    """Every work on every device, overlapped - serial, over the bare products (milliseconds in brackets)."""
    rows = []
    for work in WORK:
        cells = []
        for device in DEVICES:
            p, floor = predict(device, calls(work, device, *shape), efficiency), bare(device, work, *shape)
            ratios = f"{p.overlapped / floor:.2f} - {p.serial / floor:.2f}"
            cells.append(f"{ratios} ({p.overlapped * 1e3:.1f} - {p.serial * 1e3:.1f})")
        rows.append([work.name, str(work.products), *cells])
    title = (
        f"MODEL, nothing measured: bfloat16, {shape[0]} rows, hidden size {shape[1]}, vocabulary {shape[2]};\n"
        f"products at {SHARE_OF_PEAK:.3f} of peak, Triton's at {efficiency:g} of that. Time over the bare\n"
        "products' time, overlapped - serial (milliseconds in brackets):"
    )
    return report.Table("roofline", title, ["work", "bare products", *(device.name for device in DEVICES)], rows)


def details(work: Work, device: Device, shape: tuple[int, int, int], efficiency: float) -> report.Table:
    """Every kernel of a work on a device."""
    prediction = predict(device, calls(work, device, *shape), efficiency)
    rows = []
    for name, (count, operations, size, compute, memory) in prediction.by_kernel.items():
        figures = (operations / 1e12, size / 1e9, compute * 1e3, memory * 1e3)
        rows.append([name, f"{count:.0f}", *(f"{figure:.2f}" for figure in figures)])
    columns = ["kernel", "launches", "TFLOP", "GB", "ms of operations", "ms of bytes"]
    return report.Table("roofline", f"{work.name}, {device.name}: {prediction.launches} launches", columns, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the model's tables."""
    parser = records.parser("roofline", __doc__, None)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--efficiency", type=float, default=1.0, help="Triton's product rate over the bare one")
    parser.add_argument("--details", choices=[d.name for d in DEVICES], help="count every kernel on this device")
    arguments = parser.parse_args(argv)
    shape, efficiency = (arguments.rows, arguments.hidden, arguments.vocabulary), arguments.efficiency
    tables = [overview(shape, efficiency)]
    for device in DEVICES:
        if device.name == arguments.details:
            tables += [details(work, device, shape, efficiency) for work in WORK]
    print("\n\n".join(f"{table.title}\n\n{report.markdown(table)}" for table in tables))
    return 0
