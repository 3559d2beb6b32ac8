"""A MODEL of the GPU backend's time, from the launches that it makes: operations, bytes, epilogues, waves, launches.

The backend runs on tensors without storage; every launch that it asks for is counted from its own arguments (rows,
columns, tiles, slices), and a device is the figures of `DEVICES`, of which `source` says what was measured. Per launch

    time = max(operations / (rate * share of the last wave that is filled), bytes / bandwidth, SERIAL of the kernel)
           + SUMS_SHOWN * bytes of sums / bandwidth + waves * (epilogue of a tile + FILL_SECONDS)

and for the work START_SECONDS + LAUNCH_SECONDS * launches in which the device idles.

- The rate of a product is the bare products' for the library, and `Device.triton` of it for a Triton kernel. Such a
  rate was measured with the operands' traffic from L2, so that has no term of its own; operands that do not stay in L2
  are read from memory as often as their tiles are passed over.
- Sums are what a product of the library adds to: it reads them before its first and writes them behind its last step.
- An epilogue is the instructions behind the loop over the sum (EPILOGUE), one an issue slot and cycle: one program has
  a multiprocessor to itself, so that nothing hides them. FILL_SECONDS is what a program waits for its first operands.
  Logits by descriptors have neither: `Device.described` was measured with both.
- The bare products' time has none of these terms.
- How many columns a pooled tail keeps is not known from arguments: a share is given (KEPT).

Where a term was measured, RECORD is the file, and "it" below one H100. `recorded` holds the model against it. The
clocks of one work's profile there are not those of another's: a row of `logprob_kernel` took 1.60 us in the first
profile and 1.76 us in the later ones, which are the device under load. Terms are of the latter.

    python -m benchmarks roofline [--rows 8192 --hidden 4096 --vocabulary 151936] [--kept 0.089] [--details H100]
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, Final
from unittest import mock

import torch

from benchmarks import records, report
from benchmarks.gpu import offline
from benchmarks.gpu.offline import Launched
from infopo_kernels.backends.base import Gradients, Head, with_memory_for_logits
from infopo_kernels.backends.triton import TritonBackend
from infopo_kernels.backends.triton import gradients as gradients_from
from infopo_kernels.backends.triton.tiles import TARGETS
from infopo_kernels.schedule import hidden_gradient_apart

SHARE_OF_PEAK = 3 * 2 * 8192 * 151936 * 4096 / 42e-3 / 989e12
"""Bare products over peak: 3 x 2 N V H operations in 42 ms on an H100 (TRL issue 7244) are 0.736 of 989 TFLOP/s.

Taken for every device, for want of a measurement of each.
"""

RECORD: Final = records.RESULTS / "nvidia-h100-80gb-hbm3" / "first-contact.json"
"""What an H100 showed, with PyTorch 2.11 and Triton 3.6."""

BANDWIDTH = 2.98 / 3.35
"""Share of a data sheet's bandwidth: a copy of 1 GiB on it (2.98 TB/s); taken for every device."""

LAUNCH_SECONDS = 3.5e-6
START_SECONDS = 3.7e-4
"""Idle time, between kernels and before the host is ahead: a line through its six "idle" figures, from 0.38 ms for 5
launches to 1.55 ms for 310. A product of the library is two launches where it has a workspace to clear (`Memset`)."""

SUMS_SHOWN = 0.6
"""Share of the pass over float32 sums that a product of the library does not hide. It took 8.32 ms for 50 pieces of
3072 words and 4096 rows, where the operations are 7.0 ms and the passes 2.25."""

SERIAL: Final = {"merge": 4.5e-5}
"""Seconds of a kernel that few rows take as well: 11 launches of `merge` took 0.48 ms, where their bytes take 0.1."""

ONE_PROGRAM = 18e9
"""Bytes a second of a kernel of one program: `live_rows` 0.0085 ms for 8192 rows, `kept_rows` 0.027."""

FILL_SECONDS = 1e-6
"""Start of a program and latency of its first loads from memory; assumed."""

EPILOGUE = {"logprob": 900, "softmax_tile": 1200, "gradient_tile": 1100, "hidden_product": 500, "weight_product": 500}
"""Instructions of a thread behind the loop of a 128 x 256 tile in 8 warps, bfloat16, sm_90, Triton 3.9.

The first three have two variants, for tiles with and without the special columns: half of what is outside the loop
(`make kernels` disassembles it; 1937, 2558 and 2554 instructions in all), less what only special columns need. Of the
other two, the sums' way to memory: assumed.
"""

TAIL_EPILOGUE = 700
"""What the statistics of a tail add to that of `gradient_tile`: 128 elements a thread, each compared with a label and
with itself, chosen, added and taken into a maximum; assumed."""

KEPT = (0.089, 0.29)
"""Shares of the columns that are kept at a threshold of 2^-13: seen with chunks of 512 rows, and what chunks of 8192
rows, as they are here, would keep if that grew as from 64 to 512 rows (by the power 0.43 of the rows; extrapolated)."""

PROGRAMS_AT_ONCE = 8
"""Programs of 8 warps on a multiprocessor, where registers allow it."""

EPILOGUE_BEFORE = {**EPILOGUE, "logprob": 2240, "softmax_tile": 2410, "gradient_tile": 2140}
"""Of the same kernels with a mask, a comparison, a scale and a shift of its own for every element, counted alike."""


@dataclass(frozen=True)
class Device:
    """Figures of one GPU: of data sheets, but for `triton`."""

    name: str
    target: str
    tflops: float
    """Dense bfloat16."""
    terabytes: float
    """Memory bandwidth a second."""
    gigahertz: float
    """Boost clock."""
    l2_mib: int
    triton: float
    """Rate of a plain Triton product over the library's."""
    source: str
    """Of `triton`, and of `described` where there is one."""
    described: Mapping[str, float] = field(default_factory=dict)
    """By kernel, the rate of logits by descriptors over the library's product, with all that follows a tile."""


DESCRIBED: Final = {"logprob": 0.98, "softmax_tile": 0.98, "gradient_tile": 0.92}
"""7.43 and 7.44 ms for 4224 rows, 6.93 and 6.94 for 3968, 7.90 for 4224: under load, over 14.0 ms for 8192."""

DEVICES = [
    Device("A100", "sm_80", 312, 2.039, 1.41, 40, 0.96, "measured elsewhere: triton-lang/triton issue 6523"),
    Device("H100", "sm_90", 989, 3.35, 1.83, 50, 0.87, "measured: RECORD", DESCRIBED),
    Device("H200", "sm_90", 989, 4.8, 1.83, 50, 0.87, "as H100", DESCRIBED),
    Device("B200", "sm_100", 2250, 8.0, 1.85, 126, 0.45, "assumed"),
    Device("MI300X", "gfx942", 1307, 5.3, 2.1, 256, 0.8, "assumed"),
]


@dataclass
class Cost:
    """Operations and bytes of one launch, or of many."""

    operations: float = 0.0
    bytes: float = 0.0
    programs: float = 0.0
    elements: float = 0.0
    """Of the tile that a program's epilogue takes."""
    again: float = 0.0
    """Bytes of an operand that is read once more for every `passes` over it, if it does not stay in L2."""
    passes: int = 0
    sums: float = 0.0
    """Of the bytes, those of sums that are added to."""
    launches: int = 1
    waits: float = 0.0
    """Loads that wait for one another, one program after the other on its place."""


@dataclass(frozen=True)
class Live:
    """Rows that a call computes."""

    rows: int
    kept: int = 0
    """Those among them whose logits are kept."""
    share: float = 1.0
    """Of the columns that a pooled tail leaves."""


def _size(tensor: torch.Tensor) -> int:
    return tensor.element_size()


def _here(a: dict[str, Any], live: Live) -> int:
    """Rows of the chunk that exist."""
    return max(0, min(live.rows - a["row0"], a["C"]))


def _stats(a: dict[str, Any], rows: int, columns: int) -> float:
    """Bytes of the maxima and sums that a pooled tail chooses words from."""
    return 8 * ceil(rows / a["BLOCK_N"]) * columns if a["TAIL"] else 0.0


def _kept_columns(a: dict[str, Any], live: Live) -> int:
    """Columns of a product: all, or those that a pooled tail leaves."""
    return ceil(live.share * a["columns"]) if a["TAIL"] else a["columns"]


def _logits_bytes(a: dict[str, Any], rows: int, columns: int) -> float:
    """X once, and the head once for every group of row blocks that passes over it together."""
    groups = ceil(ceil(rows / a["BLOCK_N"]) / a["GROUP"])
    x = a["x"].base if a["DESCRIPTORS"] else a["x"]
    return (rows + groups * columns) * a["H"] * _size(x)


def logprob(a: dict[str, Any], live: Live) -> Cost:
    rows = _here(a, live)
    programs, tile = ceil(rows / a["BLOCK_N"]) * a["slices"], a["BLOCK_N"] * a["BLOCK_V"] * a["slice_tiles"]
    return Cost(2 * rows * a["V"] * a["H"], _logits_bytes(a, rows, a["V"]) + 8 * rows * a["slices"], programs, tile)


def merge(a: dict[str, Any], live: Live) -> Cost:
    rows = _here(a, live)
    targets = 2 * rows * a["H"] * _size(a["x_ptr"])
    return Cost(0, rows * (8 * a["parts"] + 24) + targets, ceil(rows / a["BLOCK_N"]))


def softmax_tile(a: dict[str, Any], live: Live) -> Cost:
    rows = _here(a, live)
    kept = rows * a["num_parts"] * (a["PART"] * _size(a["q_ptr"]) + 8)
    programs = ceil(rows / a["BLOCK_N"]) * ceil(a["V"] / a["BLOCK_V"])
    tile = a["BLOCK_N"] * a["BLOCK_V"]
    return Cost(2 * rows * a["V"] * a["H"], _logits_bytes(a, rows, a["V"]) + kept, programs, tile)


def normalise(a: dict[str, Any], live: Live) -> Cost:
    rows = _here(a, live)
    return Cost(0, rows * a["ld"] * (2 * _size(a["q_ptr"]) + 4 / a["BLOCK_V"]) + _stats(a, rows, a["ld"]), rows)


def kept_gradient(a: dict[str, Any], live: Live) -> Cost:
    rows, columns = min(live.kept, a["C"]), min(a["ld"], a["V"] - a["part0"] * a["PART"])
    size = rows * columns * (_size(a["q_ptr"]) + 4 / a["PART"] + _size(a["g_ptr"]))
    return Cost(0, size + _stats(a, rows, columns), rows)


def gradient_tile(a: dict[str, Any], live: Live) -> Cost:
    rows, columns = _here(a, live) - min(max(0, live.kept - a["row0"]), a["C"]), a["columns"]
    written = rows * columns * _size(a["g_ptr"]) + _stats(a, rows, columns)
    programs = ceil(rows / a["BLOCK_N"]) * ceil(columns / a["BLOCK_V"])
    tile = a["BLOCK_N"] * a["BLOCK_V"]
    return Cost(2 * rows * columns * a["H"], _logits_bytes(a, rows, columns) + written, programs, tile)


def hidden_product(a: dict[str, Any], live: Live) -> Cost:
    """G and the piece of the head once (a slice runs side by side), the sums written, or read and written."""
    rows, columns, slices = _here(a, live), _kept_columns(a, live) + a["pools"], a["part_ptr"].shape[0]
    if not rows:
        return Cost()
    operands = (rows + a["H"]) * columns * _size(a["g_ptr"])
    sums = 4 * slices * rows * a["H"] * (2 if a["ADD"] else 1)
    programs = ceil(rows / a["BLOCK_N"]) * ceil(a["H"] / a["BLOCK_H"]) * slices
    return Cost(2 * rows * columns * a["H"], operands + sums, programs, a["BLOCK_N"] * a["BLOCK_H"])


def store_hidden(a: dict[str, Any], live: Live) -> Cost:
    rows = _here(a, live)
    return Cost(0, rows * a["H"] * (4 * a["SLICES"] + _size(a["dx_ptr"])), rows)


def gather_rows(a: dict[str, Any], live: Live) -> Cost:
    rows = _here(a, live)
    return Cost(0, 2 * rows * a["H"] * _size(a["x_ptr"]), rows)


def weight_product(a: dict[str, Any], live: Live) -> Cost:
    """G once, dW written, or read and written; the gathered rows once for every group of blocks of dW's rows."""
    rows, columns = _here(a, live), _kept_columns(a, live)
    if not rows and a["ADD"]:
        return Cost()
    x = rows * a["H"] * _size(a["g_ptr"])
    result = columns * a["H"] * _size(a["dw_ptr"]) * (2 if a["ADD"] else 1) + 4 * a["pools"] * a["H"]
    blocks, columns = ceil(columns / a["BLOCK_V"]) + ceil(a["pools"] / a["BLOCK_V"]), columns + a["pools"]
    programs = blocks * ceil(a["H"] / a["BLOCK_H"])
    return Cost(
        2 * rows * columns * a["H"], rows * columns * _size(a["g_ptr"]) + x + result, programs,
        a["BLOCK_V"] * a["BLOCK_H"], x, ceil(blocks / a["GROUP"]),
    )  # fmt: skip


def library_hidden(a: dict[str, Any], live: Live) -> Cost:
    """As `hidden_product`, of exactly the live rows and without slices."""
    rows, columns = _here(a, live), a["columns"]
    operands = (rows + a["H"]) * columns * _size(a["g_ptr"]) * (rows > 0)
    written = 4 * rows * a["H"]
    size, sums = operands + written * (2 if a["ADD"] else 1), 2 * written if a["ADD"] else 0
    return Cost(2 * rows * columns * a["H"], size, sums=sums, launches=2)


def library_weight(a: dict[str, Any], live: Live) -> Cost:
    """As `weight_product`; the library passes over the gathered rows once for every 2048 rows of dW, it is assumed."""
    rows, columns = _here(a, live), a["columns"]
    if not rows and a["ADD"]:
        return Cost()
    x = rows * a["H"] * _size(a["g_ptr"])
    result = columns * a["H"] * _size(a["dw_ptr"]) * (2 if a["ADD"] else 1)
    operands = rows * columns * _size(a["g_ptr"]) + x
    return Cost(
        2 * rows * columns * a["H"], operands + result, again=x, passes=ceil(columns / 2048),
        sums=result if a["ADD"] else 0, launches=2,
    )  # fmt: skip


def choose_words(a: dict[str, Any], live: Live) -> Cost:
    rows, columns = _here(a, live), a["columns"]
    blocks = ceil(rows / a["BLOCK_N"])
    return Cost(0, (8 * blocks + 4) * columns, ceil(columns / a["BLOCK"]), waits=ceil(blocks / a["ROWS"]))


def place_words(a: dict[str, Any], live: Live) -> Cost:
    return Cost(0, 12 * a["columns"], ceil(a["columns"] / a["BLOCK"]))


def compact_columns(a: dict[str, Any], live: Live) -> Cost:
    """G once, its kept columns and the pools once more; a program takes the steps of its row one after the other."""
    rows, columns = max(0, min(live.rows - a["row0"], len(a["g_ptr"]))), a["columns"]
    moved = columns + ceil(live.share * columns) + ceil(columns / a["BLOCK"])
    return Cost(0, rows * moved * _size(a["g_ptr"]), rows, waits=ceil(columns / a["STEP"]))


def mean_words(a: dict[str, Any], live: Live) -> Cost:
    """The tail's rows of W once."""
    words = (1 - live.share) * a["columns"] + ceil(a["columns"] / a["BLOCK"])
    return Cost(0, words * a["H"] * _size(a["w_ptr"]), ceil(a["columns"] / a["BLOCK"]))


def spread_tail(a: dict[str, Any], live: Live) -> Cost:
    """The tail's rows of dW written, or read and written."""
    words = (1 - live.share) * a["columns"]
    return Cost(0, words * a["H"] * _size(a["dw_ptr"]) * (2 if a["ADD"] else 1), ceil(a["columns"] / a["BLOCK_V"]))


def live_rows(a: dict[str, Any], live: Live) -> Cost:
    return Cost(0, 20 * a["N"], 1)


def kept_rows(a: dict[str, Any], live: Live) -> Cost:
    return Cost(0, 56 * a["N"], 1)


def objective(a: dict[str, Any], live: Live) -> Cost:
    return Cost(0, 24 * a["N"], 1)


def total(a: dict[str, Any], live: Live) -> Cost:
    return Cost(0, 16 * a["S"], 1)


MODELS: dict[str, Callable[[dict[str, Any], Live], Cost]] = {
    model.__name__: model
    for model in (
        logprob, merge, softmax_tile, normalise, gradient_tile, hidden_product, store_hidden, gather_rows,
        weight_product, live_rows, kept_rows, kept_gradient, objective, total, library_hidden, library_weight,
        choose_words, place_words, compact_columns, mean_words, spread_tail,
    )
}  # fmt: skip


@dataclass
class Prediction:
    """Modelled seconds of a sequence of launches."""

    seconds: float = 0.0
    launches: int = 0
    cost: Cost = field(default_factory=Cost)
    by_kernel: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0] * 6))
    """Launches, operations, bytes; seconds of operations, of bytes, of both with all else."""


@dataclass(frozen=True)
class Assumed:
    """What a prediction takes for granted beside the device."""

    epilogue: Mapping[str, float] = field(default_factory=lambda: EPILOGUE)
    descriptors: bool = True
    """Where the table has them."""
    live: bool = True
    """Whether `backward` plans its pieces for the rows that are live, once the host knows their number."""
    beside: bool = True
    """Whether the workspace keeps logits beside dW, in works where it does."""


def predict(device: Device, calls: list[tuple[list[Launched], Live]], assumed: Assumed | None = None) -> Prediction:
    """Sum over launches; each list comes with the rows that are live in it."""
    assumed = assumed or Assumed()
    bare_rate, result = device.tflops * 1e12 * SHARE_OF_PEAK, Prediction()
    slots, bandwidth = TARGETS[device.target].multiprocessors, device.terabytes * 1e12 * BANDWIDTH
    for launches, live in calls:
        for launched in launches:
            name = launched.name.removesuffix("_kernel")
            cost = MODELS[name](launched.arguments, live)
            waves = ceil(cost.programs / slots)
            filled = cost.programs / (waves * slots) if cost.programs else 1.0
            described = launched.arguments.get("DESCRIPTORS", False)
            share = 1.0 if name.startswith("library") else device.described[name] if described else device.triton
            rate = bare_rate * share
            compute = cost.operations / (rate * filled)
            again = cost.again * max(0, cost.passes - 1) if cost.again > device.l2_mib * 2**20 / 2 else 0.0
            memory = (cost.bytes + again) / (bandwidth if cost.programs != 1 else min(bandwidth, ONE_PROGRAM))
            tail = 0.0
            if cost.operations and cost.elements and not described:
                # 8 warps on 4 schedulers: 2 cycles an instruction.
                instructions = assumed.epilogue[name]
                if name == "gradient_tile" and launched.arguments["TAIL"]:
                    instructions += TAIL_EPILOGUE
                cycles = 2 * instructions * cost.elements / (128 * 256)
                tail = waves * (cycles / (device.gigahertz * 1e9) + FILL_SECONDS)
            compute += SUMS_SHOWN * cost.sums / bandwidth
            waiting = cost.waits * ceil(cost.programs / (slots * PROGRAMS_AT_ONCE)) * FILL_SECONDS
            seconds = max(compute, memory, waiting, SERIAL.get(name, 0.0) if cost.bytes else 0.0) + tail
            result.seconds += seconds
            result.launches += cost.launches
            result.cost.operations += cost.operations
            result.cost.bytes += cost.bytes + again
            entry = result.by_kernel[name]
            for i, x in enumerate((1, cost.operations, cost.bytes + again, compute, memory, seconds)):
                entry[i] += x
    idle = START_SECONDS + LAUNCH_SECONDS * result.launches
    result.seconds += idle
    result.by_kernel["idle"] = [0, 0, 0, 0, 0, idle]
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
    """What the call may take, less a float32 copy of dW where that lies in it."""
    beside: bool = True
    """Whether the workspace keeps logits beside dW."""


WORK = [
    Work("default setting, every weight live", 3, "infopo", sixteen=True),
    Work("default setting, rejected weights underflowed", 3, "infopo", sixteen=True, underflowed=True),
    Work("frozen head", 2, "logprob_and_grad", frozen=True),
    Work("no gradient (reference, evaluation)", 1, "logprob"),
    Work("workspace_mib=1024, every weight live", 3, "infopo", sixteen=True, workspace_mib=1024),
    Work("workspace_mib=1640: every row's logits are kept", 3, "infopo", sixteen=True, workspace_mib=1640),
]
"""Rows that a user reaches: a step of `linear_infopo_loss` on bfloat16 inputs, first as it is by default."""

RECORDED = [
    *WORK[:4],
    replace(WORK[4], beside=False),
    Work("workspace_mib=5120: a float32 dW lies in it", 3, "infopo", workspace_mib=5120 - 2374, beside=False),
]
"""What the record measured, before logits were kept beside dW."""


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


def kept(work: Work, head: Head, gradients: Gradients) -> tuple[int, Head, Gradients]:
    """How many rows' logits are kept, the head with the rest of the workspace, and buffers with memory for them."""
    backend, weight = TritonBackend(), gradients.weight
    with nullcontext() if work.beside else mock.patch(f"{gradients_from.__name__}.rows_beside", return_value=0):
        most = 0 if weight is None else backend.kept_rows(head, weight)
    return most, *with_memory_for_logits(backend, head, gradients, min(most, len(head.hidden)))


def steps(work: Work, head: Head, most: int) -> list[Step]:
    """The calls that `work` takes where `most` rows can be kept; chosen rows come first, as in a padded batch."""
    n = len(head.hidden)
    every = (range(n),)
    if work.what != "infopo":
        return [Step(work.what, every, weight=not work.frozen)]
    chosen, rejected = range(n // 2), range(n // 2, n)
    dead = rejected if work.underflowed else range(0)
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
    wanted = replace(
        gradients, hidden=gradients.hidden if step.hidden else None, weight=gradients.weight if step.weight else None
    )
    if step.primitive == "logprob":
        backend.logprob(head, labels(step.rows), gradients if step.kept else None)
    elif step.primitive == "logprob_and_grad":
        backend.logprob_and_grad(head, labels(step.rows), c, wanted)
    else:
        backend.backward(head, labels(step.rows), lse, c, wanted, labels(step.kept) if step.kept else None)


def calls(
    work: Work,
    device: Device,
    n: int,
    h: int,
    v: int,
    assumed: Assumed | None = None,
    *,
    share: float | None = None,
) -> list[tuple[list[Launched], Live]]:
    """The launches of `work` on `device`, with the live rows of each call; `share`: with a pooled tail that leaves this
    share of the columns."""
    assumed = assumed or Assumed()
    work = replace(work, beside=work.beside and assumed.beside)
    target = TARGETS[device.target]
    target = replace(target, descriptors=target.descriptors and assumed.descriptors)

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    half = torch.bfloat16
    limit, threshold = work.workspace_mib << 20, 0.0 if share is None else 2.0**-13
    head = Head(empty(n, h, dtype=half), empty(v, h, dtype=half), None, None, 1.0, limit, threshold)
    labels, vector = empty(n, dtype=torch.int64), empty(n)
    weight = None if work.frozen else empty(v, h, dtype=half if work.sixteen else torch.float32)
    gradients = Gradients(empty(n, h, dtype=half), weight, None)
    result = []
    with offline.recorded(target):
        most, head, gradients = kept(work, head, gradients)
        which = steps(work, head, most)
    for step in which:
        known = step.live.rows if assumed.live else n
        with offline.recorded(target, known) as launches:
            call(step, head, lambda rows: labels, vector, vector, gradients)
        result.append((launches, replace(step.live, share=1.0 if share is None else share)))
    return result


def bare(device: Device, work: Work, n: int, h: int, v: int) -> float:
    return work.products * 2 * n * h * v / (device.tflops * 1e12 * SHARE_OF_PEAK)


def overview(shape: tuple[int, int, int]) -> report.Table:
    """Every work on every device, over the bare products (milliseconds in brackets)."""
    rows = []
    for work in WORK:
        cells = []
        for device in DEVICES:
            p, floor = predict(device, calls(work, device, *shape)), bare(device, work, *shape)
            cells.append(f"{p.seconds / floor:.2f} ({p.seconds * 1e3:.1f})")
        rows.append([work.name, str(work.products), *cells])
    title = (
        f"MODEL, not a measurement: bfloat16, {shape[0]} rows, hidden size {shape[1]}, vocabulary {shape[2]};\n"
        f"bare products at {SHARE_OF_PEAK:.3f} of peak. Time over theirs (milliseconds in brackets):"
    )
    return report.Table("roofline", title, ["work", "bare products", *(device.name for device in DEVICES)], rows)


def pooled(shape: tuple[int, int, int], kept: Sequence[float]) -> report.Table:
    """Every work with gradients, with a pooled tail, over the exact one (milliseconds in brackets)."""
    rows = []
    for work in WORK:
        for share in kept if work.products > 1 else ():
            cells = []
            for device in DEVICES:
                exact = predict(device, calls(work, device, *shape)).seconds
                seconds = predict(device, calls(work, device, *shape, share=share)).seconds
                cells.append(f"{seconds / exact:.2f} ({seconds * 1e3:.1f})")
            rows.append([work.name, f"{100 * share:.3g} %", *cells])
    title = "MODEL, not a measurement: the same with a pooled tail, over the exact ones (milliseconds in brackets):"
    return report.Table("roofline", title, ["work", "columns kept", *(device.name for device in DEVICES)], rows)


LEVERS: Final = (
    (
        "Triton's products, masks and comparisons at every element",
        "triton",
        Assumed(EPILOGUE_BEFORE, descriptors=False, live=False, beside=False),
    ),
    ("lean epilogues", "triton", Assumed(descriptors=False, live=False, beside=False)),
    ("dX and dW by the library", "library", Assumed(descriptors=False, live=False, beside=False)),
    ("logits by descriptors, tile after tile", "library", Assumed(live=False, beside=False)),
    ("logits kept in the workspace beside dW", "library", Assumed(live=False)),
    ("pieces planned for the live rows: as it is", "library", Assumed()),
)


def recorded() -> report.Table:
    """The works of RECORD by the model, and as they were measured."""
    rows = json.loads(RECORD.read_text())["rows"]
    seen = {row["kernel"].removesuffix(": all"): row for row in rows if str(row.get("kernel")).endswith(": all")}
    h100 = next(device for device in DEVICES if device.name == "H100")
    cells = []
    for work in RECORDED:
        row, then = seen[work.name], calls(work, h100, 8192, 4096, 151936, Assumed(live=False))
        model = 1e3 * predict(h100, then).seconds
        cells.append([work.name, f"{row['ms']:.1f}", f"{model:.1f}", f"{model / row['ms'] - 1:+.1%}"])
    title = "The record of an H100 against the model of what ran then"
    return report.Table("roofline", title, ["work", "measured, ms", "model, ms", "difference"], cells)


def levers(device: Device, shape: tuple[int, int, int]) -> report.Table:
    """What each change brings on `device`, one after the other."""
    rows = []
    for name, products, assumed in LEVERS:
        with offline.products(products):
            each = [
                predict(device, calls(work, device, *shape, assumed), assumed).seconds / bare(device, work, *shape)
                for work in WORK
            ]
        rows.append([name, *(f"{ratio:.2f}" for ratio in each)])
    return report.Table("roofline", f"{device.name}, change by change", ["", *(work.name for work in WORK)], rows)


def details(work: Work, device: Device, shape: tuple[int, int, int], kept: float | None = None) -> report.Table:
    """Every kernel of a work on a device."""
    prediction = predict(device, calls(work, device, *shape, share=kept))
    rows = []
    for name, (count, operations, size, *seconds) in prediction.by_kernel.items():
        figures = (operations / 1e12, size / 1e9, *(1e3 * each for each in seconds))
        rows.append([name, f"{count:.0f}", *(f"{figure:.2f}" for figure in figures)])
    columns = ["kernel", "launches", "TFLOP", "GB", "ms of operations", "ms of bytes", "ms"]
    name = work.name if kept is None else f"{work.name}, {100 * kept:.3g} % of the columns kept"
    return report.Table("roofline", f"{name}, {device.name}: {prediction.launches} launches", columns, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the model's tables."""
    parser = records.parser("roofline", __doc__, None)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--kept", type=float, nargs="+", default=KEPT, help="shares of columns that a tail leaves")
    parser.add_argument("--details", choices=[d.name for d in DEVICES], help="count every kernel on this device")
    arguments = parser.parse_args(argv)
    shape = (arguments.rows, arguments.hidden, arguments.vocabulary)
    tables = [overview(shape), pooled(shape, arguments.kept), recorded()]
    tables.append(levers(next(d for d in DEVICES if d.name == "H100"), shape))
    for device in DEVICES:
        if device.name == arguments.details:
            tables += [details(work, device, shape) for work in WORK]
            tables += [details(work, device, shape, arguments.kept[0]) for work in WORK if work.products > 1]
    print("\n\n".join(f"{table.title}\n\n{report.markdown(table)}" for table in tables))
    return 0
