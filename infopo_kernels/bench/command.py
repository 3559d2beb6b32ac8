"""`python -m infopo_kernels bench`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from infopo_kernels.bench.plan import Plan

SPEED: Final = "speed.json"
"""pytest-benchmark's own record; the other parts have a file of theirs beside it."""


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m infopo_kernels bench",
        description="Speed, memory, long context, accuracy and training steps of this library, of other "
        "implementations of the same loss, and of the bare matrix products, in one run.",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="a sample, in 3 minutes on 2 cores")
    for name, what in (
        ("parts", "speed, memory, long-context, accuracy, training"),
        ("peers", "names or their beginnings, such as naive,TRL; this library always takes part in speed and accuracy"),
        ("shapes", "models whose heads are timed, such as SmolLM2-135M"),
        ("dtypes", "float32, bfloat16, float16"),
        ("cases", "timed cases, such as step,frozen"),
    ):
        flags = ("--dtypes", "--dtype") if name == "dtypes" else (f"--{name}",)
        parser.add_argument(*flags, metavar="LIST", help=what)
    parser.add_argument("--threads", type=int, help="CPU threads (default: one for each core)")
    parser.add_argument("--product-gflop", type=float, help="size of one product of a timed case")
    parser.add_argument("--seconds", type=float, help="timed seconds for each contender and case")
    parser.add_argument("--rounds", type=int, help="most repetitions of each")
    parser.add_argument("--memory-length", type=int, help="tokens of a sequence whose step's peak is compared")
    parser.add_argument("--long-seconds", type=float, help="longest row of the long-context part")
    parser.add_argument("--long-lengths", help="tokens of its rows")
    parser.add_argument("--accuracy-lengths", help="tokens of a sequence in the accuracy part")
    parser.add_argument("--training-length", type=int, help="tokens of a sequence in the training part")
    parser.add_argument("--training-dtypes", metavar="LIST", help="types of the model in the training part")
    parser.add_argument("--training-steps", type=int, help="timed steps")
    parser.add_argument("--memory-gib", type=float, help="what an isolated process may allocate")
    parser.add_argument("--output", type=Path, default=Path("out/bench"), help="folder of the records and plots")
    parser.add_argument("--show", type=Path, metavar="DIR", help="measure nothing: tables and plots of DIR's records")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="also write the tables to FILE as Markdown")
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("OLD", "NEW"),
        help="measure nothing: what became slower by its ratio to the floor between two speed records; exit code 1 if "
        "this library did",
    )  # fmt: skip
    return parser


def _among(name: str, given: str, known: Sequence[str]) -> tuple[str, ...]:
    """The known names that begin with the given ones."""
    found: list[str] = []
    for word in given.split(","):
        matches = [k for k in known if k.lower().startswith(word.strip().lower())]
        if not word.strip() or not matches:
            raise ValueError(f"--{name}: {word!r} is none of {', '.join(known)}.")
        found += [k for k in matches if k not in found]
    return tuple(found)


def plan_of(args: argparse.Namespace) -> Plan:
    """The default plan with what the command line says otherwise.

    Raises:
        ValueError: an unknown name or device.
    """
    import torch

    from infopo_kernels.bench.batches import CASES
    from infopo_kernels.bench.contenders import CONTENDERS, OURS
    from infopo_kernels.bench.plan import DTYPES, PARTS, Plan, default_plan
    from infopo_kernels.bench.shapes import SHAPES

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch sees no CUDA device here; use --device cpu.")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    plan = default_plan(args.device, args.quick)
    known = {"parts": PARTS, "peers": CONTENDERS, "shapes": SHAPES, "dtypes": DTYPES, "cases": CASES}
    chosen: dict[str, Any] = {
        name: _among(name, given, list(words)) for name, words in known.items() if (given := getattr(args, name))
    }
    if "peers" in chosen and {"speed", "accuracy"} & set(chosen.get("parts", plan.parts)):
        chosen["peers"] = (OURS, *(name for name in chosen["peers"] if name != OURS))
    for field in fields(Plan):
        given = getattr(args, field.name, None)
        if field.name in (*known, "training_dtypes") or given is None:
            continue
        lengths = isinstance(getattr(plan, field.name), tuple)
        chosen[field.name] = tuple(int(word) for word in given.split(",")) if lengths else given
    if args.memory_gib:
        chosen["long_memory_gib"] = None
    if args.training_dtypes:
        chosen["training_dtypes"] = _among("training-dtypes", args.training_dtypes, list(DTYPES))
    return replace(plan, **chosen)


def _speed(plan: Plan, output: Path) -> int:
    """pytest-benchmark over the timing cases; its exit code."""
    import pytest

    from infopo_kernels.bench import pytest_cases

    return int(
        pytest.main(
            [
                str(Path(pytest_cases.__file__)), "-c", os.devnull, "--rootdir", str(output), "-q", "--tb=short",
                "--benchmark-only", "-p", "no:cacheprovider", "-W", "ignore", "--benchmark-quiet",
                f"--benchmark-json={output / SPEED}",
            ],
            plugins=[pytest_cases.SpeedPlugin(plan)],
        )
    )  # fmt: skip


def _isolated(plan: Plan, part: str, output: Path, progress: Callable[[str], None]) -> None:
    from infopo_kernels.bench import accuracy, sweeps, train_steps
    from infopo_kernels.bench.environment import environment

    measure = {
        "memory": sweeps.memory,
        "long-context": sweeps.long_context,
        "accuracy": accuracy.accuracy,
        "training": train_steps.training,
    }[part]
    rows = measure(plan, progress)
    record = {"machine_info": environment(plan.device), "memory_gib": plan.limit_gib(part), "rows": rows}
    (output / f"{part}.json").write_text(json.dumps(record, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit code: 0, 1 where values were wrong or a comparison found a regression, 2 for bad input."""
    args = _arguments().parse_args(argv)
    missing = next(
        (name for name in ("rich", "matplotlib", "pytest_benchmark") if not importlib.util.find_spec(name)), 0
    )
    if missing:
        print(f"bench needs the package `{missing}`; run: pip install 'infopo_kernels[bench]'", file=sys.stderr)
        return 2
    from rich.console import Console

    from infopo_kernels.bench import compare, plots, report

    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        if args.compare:
            changes = compare.compare(*args.compare)
            report.render(console, [compare.table(changes)])
            return int(any(change.is_ours and change.is_regression for change in changes))
        code, folder = 0, args.show
        if folder is None:
            plan, folder = plan_of(args), args.output
            folder.mkdir(parents=True, exist_ok=True)
            for part in plan.parts:
                start = time.perf_counter()
                if part == "speed":
                    code = _speed(plan, folder)
                else:
                    with console.status(part) as status:
                        _isolated(plan, part, folder, status.update)
                console.print(f"{part}: {time.perf_counter() - start:.0f} s")
        records = report.load(folder)
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    report.render(console, report.tables(records))
    for path in plots.draw(records, folder):
        console.print(f"wrote {path}")
    if args.docs is not None:
        args.docs.write_text(report.markdown(records))
        console.print(f"wrote {args.docs}")
    return code
