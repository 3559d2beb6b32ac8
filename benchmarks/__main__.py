"""`python -m benchmarks`: this library against others, side by side, and every other measurement of it."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from benchmarks.plan import Plan

_COMMANDS: Final = {
    "show": ("benchmarks.report", "tables and plots of records, without measuring"),
    "compare": ("benchmarks.compare", "what became slower between two speed records"),
    "pages": ("benchmarks.pages", "write the figures of README and docs from the committed records"),
    "cpu-targets": ("benchmarks.parts.cpu_targets", "the targets of the C++ kernels"),
    "packing": ("benchmarks.parts.packing", "what packs and shared prompts save"),
    "distributed": ("benchmarks.parts.distributed", "what travels, and what a rank holds, where ranks share a head"),
    "long-context-training": ("benchmarks.parts.long_context_training", "training steps of up to 128k tokens"),
    "tuning-sweep": ("benchmarks.parts.tuning_sweep", "which beta and learning rate to start from"),
    "real-text": ("benchmarks.parts.real_text", "time and error of a pooled tail on real text"),
    "tail-training": ("benchmarks.parts.tail_training", "training with and without a pooled tail"),
    "kernels": ("benchmarks.gpu.kernel_report", "compile the GPU kernels for every target; no GPU needed"),
    "roofline": ("benchmarks.gpu.roofline", "a model of the GPU kernels' time; no GPU needed"),
    "first-contact": ("benchmarks.gpu.first_contact", "ten minutes on a GPU: what is right, and where the time goes"),
    "gpu-kernels": ("benchmarks.gpu.gpu_kernels", "the GPU kernels against bare products, on a GPU"),
}
"""Commands, each a module with a `main(words)`, imported when it is run."""


# Functions import here what they use: a command that needs one part does not wait for the import of all.


def _parser() -> argparse.ArgumentParser:
    from benchmarks.plan import add_options

    commands = "\n".join(f"  {name:22} {text}" for name, (_, text) in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Without a command: speed, memory, long context, accuracy and training steps of this library, of "
        "other implementations of the same loss, and of the bare matrix products, in one run.",
        epilog=f"commands (`python -m benchmarks COMMAND --help`):\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("out/bench"), help="folder of folders by processor")
    add_options(parser)
    return parser


def _measure(plan: Plan, part: str, output: Path, progress: Callable[[str], None]) -> int:
    """Write the record of a part; 1 where this library's values were wrong."""
    from benchmarks import records
    from benchmarks.measure.environment import environment
    from benchmarks.parts.accuracy import accuracy
    from benchmarks.parts.long_context import long_context
    from benchmarks.parts.memory import memory
    from benchmarks.parts.speed import speed
    from benchmarks.parts.training import training

    machine = environment(plan.device)
    if part == "speed":
        return speed(plan, records.path_of(output, part, machine))
    measure: dict[str, Callable[[Plan, Any], list[dict[str, Any]]]] = {
        "memory": memory, "long-context": long_context, "accuracy": accuracy, "training": training,
    }  # fmt: skip
    rows = measure[part](plan, progress)
    records.save(output, part, machine, rows, memory_gib=plan.limit_gib(part))
    return 0


def _run(words: Sequence[str]) -> int:
    from benchmarks import report
    from benchmarks.measure.environment import environment
    from benchmarks.plan import plan_of

    args = _parser().parse_args(words)
    plan, console, code = plan_of(args), report.console(), 0
    for part in plan.parts:
        start = time.perf_counter()
        if part == "speed":  # pytest writes to the terminal by itself
            code |= _measure(plan, part, args.output, console.print)
        else:
            with console.status(part) as status:
                code |= _measure(plan, part, args.output, status.update)
        console.print(f"{part}: {time.perf_counter() - start:.0f} s")
    folder = args.output / environment(plan.device)["processor"]
    if importlib.util.find_spec("pandas") is None:
        console.print(f"pandas is not installed; where it is, show these records: python -m benchmarks show {folder}")
        return code
    report.show(folder, console)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit code: 0, 1 where values were wrong or a comparison found a regression, 2 for bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words and words[0] in _COMMANDS:
            return int(importlib.import_module(_COMMANDS[words[0]][0]).main(words[1:]))
        return _run(words)
    except ModuleNotFoundError as error:
        print(f"benchmarks: {error}; run: pip install -e '.[bench,train,triton]'", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
