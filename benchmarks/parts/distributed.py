"""A head that ranks share: what each rank receives and holds in a step, counted and measured, and a model of more.

    python -m benchmarks distributed --ranks 4

On gloo, on a CPU: hidden states and head trained, InfoPO and DPO, float32. `received` is counted by a dispatch mode,
`formula` is that of `infopo_kernels.distributed.choice`, and `peak` is the memory of the
rank that needs most, beyond its inputs and the gradients that it keeps. "full_tensor" is the head gathered by hand,
which a sharded head takes without any of these ways.

The second table is a model, not a measurement: the formulas for 8 ranks, bfloat16, and an objective whose weights are
not known beforehand.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard

from benchmarks import records, report
from benchmarks.measure import memory
from benchmarks.measure.collectives import Counted
from benchmarks.measure.environment import environment
from infopo_kernels import DPO, InfoPO, linear_preference_loss
from infopo_kernels.distributed import VocabShard
from infopo_kernels.distributed.choice import Sizes, Work, cheapest, received_bytes

RECORD = "distributed"
MIB: Final = float(1 << 20)
OBJECTIVES: Final = {"InfoPO": InfoPO(), "DPO": DPO()}
WAYS: Final = ("full_tensor", "gather", "ring", "rows", "same_rows")
WORK: Final = Work(logits=True, known=False, hidden=True, weight=True)

MODELS: Final = {"Llama-3-8B": (128256, 4096), "256k vocabulary": (256000, 3584)}
"""V and H."""
MODEL_RANKS: Final = 8
MODEL_ROWS: Final = 4096
"""Scored rows on a rank."""
MODEL_WORKSPACE: Final = 256 << 20


@dataclass(frozen=True)
class Setup:
    """A step on every rank."""

    way: str
    objective: str
    ranks: int
    vocab: int
    hidden: int
    sequences: int
    length: int


def _step(setup: Setup, vocab: int) -> tuple[Any, tuple[torch.Tensor, torch.Tensor]]:
    """The step as a function, and what it trains: this rank's rows, and its part of a head of `vocab` entries."""
    rank, same = dist.get_rank(), setup.way == "same_rows"
    g = torch.Generator().manual_seed(0 if same else rank)
    hidden = torch.randn(setup.sequences, setup.length, setup.hidden, generator=g).requires_grad_()
    labels = torch.randint(0, vocab, hidden.shape[:2], generator=g)
    part = torch.randn(vocab // setup.ranks, setup.hidden, generator=torch.Generator().manual_seed(rank)).mul_(0.02)
    weight = part.requires_grad_()
    ref_logps = torch.full((setup.sequences,), -11.0 * setup.length, dtype=torch.float64)
    arguments: dict[str, Any] = {"objective": OBJECTIVES[setup.objective], "ref_logps": ref_logps}

    def step() -> float:
        if setup.way == "full_tensor":
            mesh = init_device_mesh("cpu", (setup.ranks,))
            head = DTensor.from_local(weight, mesh, [Shard(0)]).full_tensor(grad_placements=[Partial()])
            loss = linear_preference_loss(hidden, head, labels, **arguments).loss
        else:
            shared = VocabShard(dist.group.WORLD, way=setup.way)  # type: ignore[arg-type]
            loss = linear_preference_loss(hidden, weight, labels, vocab=shared, **arguments).loss
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    return step, (hidden, weight)


def _rank(rank: int, setups: list[Setup], store: str, results: Any) -> None:
    memory.give_back_at_once()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}/ranks", rank=rank, world_size=setups[0].ranks)
    try:
        results.put([_measured_here(setup) for setup in setups])
    except Exception:  # the others would wait for this rank
        results.put(traceback.format_exc())
    dist.destroy_process_group()  # a process with a group may not end otherwise


def _measured_here(setup: Setup) -> tuple[float, float, float]:
    """Peak beyond inputs and gradients and bytes received, in MiB, and the loss."""
    small, _ = _step(setup, 64 * setup.ranks)  # loads libraries
    small()
    step, trained = _step(setup, setup.vocab)
    dist.barrier()
    use = memory.watch(step, torch.device("cpu"))
    kept = sum(tensor.numel() * tensor.element_size() for tensor in trained) / MIB
    del step, trained
    again, _ = _step(setup, setup.vocab)
    with Counted() as counted:
        again()
    return use.peak_mib - kept, counted.received_bytes / MIB, use.result


def measured(setups: list[Setup]) -> list[dict[str, Any]]:
    """The rows of the record."""
    spawn = multiprocessing.get_context("spawn")
    results, ranks = spawn.Queue(), setups[0].ranks
    with tempfile.TemporaryDirectory() as store:
        processes = [spawn.Process(target=_rank, args=(rank, setups, store, results)) for rank in range(ranks)]
        for process in processes:
            process.start()
        got = []
        try:
            for _ in processes:
                got.append(results.get(timeout=600))
                if isinstance(got[-1], str):
                    raise RuntimeError(got[-1])
        finally:
            for process in processes:
                process.join(5)
                process.kill()
    rows = []
    for setup, each in zip(setups, zip(*got, strict=True), strict=True):
        peaks, received, losses = zip(*each, strict=True)
        row = {**vars(setup), "peak_mib": max(peaks), "received_mib": max(received), "loss": sum(losses) / len(losses)}
        rows.append({**row, "formula_mib": _formula(setup) / MIB})
    return rows


def _formula(setup: Setup) -> float:
    rows = setup.sequences * setup.length
    sizes = Sizes(setup.ranks, rows, setup.vocab, setup.hidden, 4)
    f = (setup.ranks - 1) / setup.ranks
    if setup.way == "same_rows":
        return 8 * rows * (setup.ranks - 1) + 2 * f * rows * setup.hidden * 4
    return received_bytes("gather" if setup.way == "full_tensor" else setup.way, sizes, WORK)  # type: ignore[arg-type]


def table(record: records.Record) -> report.Table:
    """A row for each way."""
    first = record.rows.iloc[0]
    cells = [
        [r.objective, r.way, f"{r.received_mib:.1f}", f"{r.formula_mib:.1f}", f"{r.peak_mib:.0f}"]
        for r in record.rows.itertuples()
    ]
    head = first.vocab * first.hidden * 4 / MIB
    title = (
        f"{first.ranks} ranks on gloo, a head of {head:.0f} MiB ({first.vocab:,} x {first.hidden}, float32), "
        f"{first.sequences * first.length} rows a rank; {record.machine['cpu']}."
    )
    columns = ["objective", "way", "received, MiB", "formula, MiB", "peak, MiB"]
    return report.Table(RECORD, title, columns, cells)


def model() -> report.Table:
    """Bytes and memory for large models, by the formulas."""
    cells = []
    for name, (V, H) in MODELS.items():
        sizes = Sizes(MODEL_RANKS, MODEL_ROWS, V, H, 2)
        R, head = MODEL_RANKS, V * H
        held = {
            "gather": f"{head * 4 / 1e9:.2f}",
            "ring": f"{2 * head / R * 6 / 1e9:.2f}",
            "rows": f"{MODEL_WORKSPACE / 1e9:.2f}",
        }
        for way in ("gather", "ring", "rows"):
            received = received_bytes(way, sizes, WORK)  # type: ignore[arg-type]
            chosen = "chosen" if cheapest(sizes, WORK, MODEL_WORKSPACE) == way else ""
            cells.append([name, way, f"{received / 1e9:.2f}", held[way], chosen])
        same = 8 * MODEL_ROWS * (R - 1) + 2 * (R - 1) / R * MODEL_ROWS * H * 4
        cells.append([name, "same_rows", f"{same / 1e9:.2f}", f"{4 * (1 << 22) / 1e9:.2f}", "of the same rows"])
    title = (
        f"Modelled: GB that a rank receives in a step and holds beyond its own part, {MODEL_RANKS} ranks, {MODEL_ROWS} "
        f"scored rows a rank, bfloat16."
    )
    return report.Table(f"{RECORD}-model", title, ["head", "way", "received, GB", "held, GB", ""], cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and show."""
    parser = records.parser(RECORD, __doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args(argv)
    setup = partial(
        Setup, ranks=args.ranks, vocab=args.vocab, hidden=args.hidden, sequences=args.sequences, length=args.length
    )
    rows = measured([setup(way, objective) for objective in OBJECTIVES for way in WAYS])
    record = records.write(args.output, RECORD, environment(), rows)
    report.render(report.console(), [table(record), model()])
    return 0
