"""The targets of the C++ kernels: time over bare products, memory, long context, accuracy, equal repetitions.

    python -m benchmarks cpu-targets [--shapes smollm,llama] [--dtypes bfloat16] [--parts speed,memory,long,accuracy]

All figures come from whole InfoPO steps on two pairs, at the sizes below. The floor is the time of bare `torch.mm`
calls of full size: three for a chosen row, four for a rejected row (its weight is known only after its
log-probability). Repetitions are interleaved, and figures are medians. Values are checked before the timing. The record
is merged by case, so you may run one part at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks import records, report
from benchmarks.cases import CASES, DTYPES, MAIN_SHAPE, SHAPES, Shape, make_batch
from benchmarks.contenders import CONTENDERS, OURS, floor
from benchmarks.measure.environment import environment
from benchmarks.measure.timing import interleave
from benchmarks.parts.memory import Setup, measure_step
from benchmarks.plan import among
from benchmarks.truth import check, run, truth
from infopo_kernels.backends import cpp

RECORD = "cpu-targets"
PARTS = ("speed", "memory", "long", "accuracy")
LENGTHS = {"SmolLM2-135M": 512, "Llama-3.2-1B": 128}
"""Number of tokens in each of the four sequences, for each head."""
PEERS = ("naive PyTorch", "torch.compile", "F.linear_cross_entropy", "TRL")
REPETITIONS = 5
LONG = 131072
CPU = torch.device("cpu")


def _row(
    case: str, what: str, figure: float, unit: str, target: float | None, at_least: bool = False
) -> dict[str, Any]:
    met = None if target is None else (figure >= target if at_least else figure <= target)
    return {"case": case, "what": what, "figure": figure, "unit": unit, "target": target, "met": met}


def _speed(case: str, shape: Shape, dtype: str) -> list[dict[str, Any]]:
    step = make_batch(CASES["step"], shape, 2, LENGTHS[shape.name], DTYPES[dtype], CPU)
    right, ours = truth(step, torch.float32), CONTENDERS[OURS]
    peers = [name for name in PEERS if CONTENDERS[name].unsupported_reason(step.case, CPU, DTYPES[dtype]) is None]
    for name in (OURS, *peers):
        if wrong := check(CONTENDERS[name], step, right):
            raise RuntimeError(f"{case}: {name} is not timed: {wrong}")
    del right
    batches = {name: step.as_case(CASES[name]) for name in ("step", "frozen", "forward", "underflowed")}
    floors = {name: floor(batches[name], 4 if name == "step" else None) for name in ("step", "frozen", "forward")}
    calls: dict[str, Callable[[], Any]] = {f"bare products: {name}": job for name, job in floors.items()}
    calls |= {name: partial(run, ours, batch) for name, batch in batches.items()}
    calls |= {name: partial(run, CONTENDERS[name], step) for name in peers}
    each = interleave(calls, REPETITIONS, float("inf"), CPU)
    m = {name: median(seconds) for name, seconds in each.items()}

    def over_floor(what: str, name: str) -> dict[str, Any]:
        return _row(case, what, m[name] / m[f"bare products: {name}"], "ratio", 1.10)

    first = [batches["step"].hidden.grad, batches["step"].weight.grad]
    batches["step"].clear()
    run(ours, batches["step"])
    second = [batches["step"].hidden.grad, batches["step"].weight.grad]
    differ = not all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None)
    return [
        over_floor("trainable head / bare products (3 chosen, 4 rejected)", "step"),
        over_floor("frozen head / 2 bare products", "frozen"),
        over_floor("forward / 1 bare product", "forward"),
        _row(case, "all rejected weights underflowed / exact", m["underflowed"] / m["step"], "ratio", 0.70),
        *(_row(case, f"times faster than {name}", m[name] / m["step"], "x", 1.0, at_least=True) for name in peers),
        *(_row(case, f"seconds: {name}", m[name], "s", None) | {"each": each[name]} for name in m),
        _row(case, "gradients of two runs differ (0: bitwise equal)", float(differ), "", 0.0),
    ]


def _memory(case: str, shape: Shape, dtype: str) -> list[dict[str, Any]]:
    rows = []
    for name, target in ((OURS, 32.0), ("naive PyTorch", None)):
        setup = Setup(name, shape, dtype, 2, LENGTHS[shape.name], "cpu", torch.get_num_threads())
        found = measure_step(setup, memory_gib=16.0)
        if "peak_mib" not in found:
            raise RuntimeError(f"{case}: {name}: {found}")
        rows.append(_row(case, f"peak memory beyond inputs and gradients, {name}", found["peak_mib"], "MiB", target))
    return rows


def _long() -> list[dict[str, Any]]:
    """One call on LONG tokens (one repetition), with short runs before and after it."""
    shape, case, ours = SHAPES[MAIN_SHAPE], f"{MAIN_SHAPE}, bfloat16: long context", CONTENDERS[OURS]
    make = partial(make_batch, CASES["step"], shape, dtype=torch.bfloat16, device=CPU)
    short, long = make(pairs=2, length=LENGTHS[shape.name]), make(pairs=1, length=LONG // 2)
    run(ours, short)
    each: list[float] = []
    for batch, repetitions in ((short, REPETITIONS), (long, 1), (short, REPETITIONS)):
        each += interleave({"": partial(run, ours, batch)}, repetitions, float("inf"), CPU)[""]
    seconds = each.pop(REPETITIONS)
    per_token = median(each) / short.labels.numel()
    return [
        _row(case, f"seconds: {LONG} tokens, trainable head, one call", seconds, "s", None),
        _row(
            case, f"time per token, {LONG} / {short.labels.numel()} tokens", seconds / LONG / per_token, "ratio", 1.10
        ),
    ]


def _accuracy() -> list[dict[str, Any]]:
    """Sequence log-probability of 4096 bfloat16 tokens against float64 of the same inputs."""
    batch = make_batch(CASES["forward"], SHAPES[MAIN_SHAPE], 1, 4096, torch.bfloat16, CPU)
    with torch.no_grad():
        got = CONTENDERS[OURS].sequence_logps(batch).double()
    error = (got - batch.sequence_sums(truth(batch, torch.float64).token_logps)).abs().max()
    what = "error of a sequence log-probability, 4096 tokens"
    return [_row(f"{MAIN_SHAPE}, bfloat16: accuracy", what, float(error), "nats", 1e-3)]


def table(record: records.Record) -> report.Table:
    """A row for each figure with a target; the title describes the machine."""
    rows = []
    for row in record.rows[record.rows["target"].notna()].to_dict("records"):
        unit = "" if row["unit"] == "ratio" else f" {row['unit']}".rstrip()
        sign = "≥" if row["what"].startswith("times faster") else "≤"
        target = f"{sign} {row['target']:g}{unit}{'' if row['met'] else ' (missed)'}"
        rows.append([row["case"], row["what"], f"{row['figure']:.3g}{unit}", target])
    m = record.machine
    title = (
        f"{m['cpu']}, {m['threads']} threads, {m['isa']}, torch {m['versions']['torch']}; medians of "
        f"{record.settings['repetitions']}, side by side in one process."
    )
    return report.Table(RECORD, title, ["case", "what", "figure", "target"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, merge the rows into the record, show the table."""
    parser = records.parser(RECORD, __doc__)
    for name, known in (("shapes", tuple(LENGTHS)), ("dtypes", tuple(DTYPES)[:2]), ("parts", PARTS)):
        parser.add_argument(f"--{name}", default=",".join(known), help=f"of: {', '.join(known)} (default: all)")
    args = parser.parse_args(argv)
    parts = among("parts", args.parts, PARTS)
    rows: list[dict[str, Any]] = []
    for shape in (SHAPES[name] for name in among("shapes", args.shapes, tuple(LENGTHS))):
        for dtype in among("dtypes", args.dtypes, tuple(DTYPES)):
            case = f"{shape.name}, N {4 * LENGTHS[shape.name]}, H {shape.hidden}, V {shape.vocab}, {dtype}"
            rows += _speed(f"{case}: speed", shape, dtype) if "speed" in parts else []
            rows += _memory(f"{case}: memory", shape, dtype) if "memory" in parts else []
    rows += _long() if "long" in parts else []
    rows += _accuracy() if "accuracy" in parts else []
    machine = environment() | {"isa": f"{cpp.isa()} (bfloat16: {cpp.isa(torch.bfloat16)})"}
    record = records.merge(args.output, RECORD, machine, rows, by=("case",), repetitions=REPETITIONS)
    report.render(report.console(), [table(record)])
    return 0
