"""The plan of a comparison: sizes, types, devices and time limits. Each field is an option of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

import torch

from benchmarks.cases import CASES, DTYPES, MAIN_SHAPE, NARROW, SHAPES, Shape
from benchmarks.contenders import CONTENDERS, OURS
from benchmarks.measure.memory import available_gib

Progress = Callable[[str], None]
"""A function that gets a line of text about the current measurement."""

PARTS: Final = ("speed", "memory", "long-context", "accuracy", "training")


def _names(known: Iterable[str], default: tuple[str, ...], text: str) -> Any:
    return field(default=default, metadata={"known": tuple(known), "help": text})


def _size(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class SpeedPoint:
    """One group of timings: all contenders and the floor on the same batch."""

    shape: str
    case: str
    dtype: str
    pairs: int
    length: int

    def __str__(self) -> str:
        return f"{self.shape}-{self.case}-{self.dtype}-{2 * self.pairs}x{self.length}"


@dataclass(frozen=True)
class Plan:
    """The sizes of a run. `default_plan` makes the plan for a device."""

    device: str = _size("cpu", "cpu, cuda or cuda:N")
    parts: tuple[str, ...] = _names(PARTS, PARTS, "what is measured")
    peers: tuple[str, ...] = _names(
        CONTENDERS, tuple(CONTENDERS), "names or their beginnings; this library always takes part in speed and accuracy"
    )
    shapes: tuple[str, ...] = _names(SHAPES, tuple(SHAPES), "models whose heads are timed")
    dtypes: tuple[str, ...] = _names(DTYPES, ("float32", "bfloat16"), "types of hidden states and head")
    cases: tuple[str, ...] = _names(CASES, tuple(CASES), f"timed cases; of heads other than {MAIN_SHAPE} step only")
    product_gflop: float = _size(15.0, "size of one product of a timed case; it sets the number of tokens")
    seconds: float = _size(0.6, "timed seconds for each contender and case")
    rounds: int = _size(5, "most repetitions of each")
    memory_length: int = _size(768, "tokens of each of the four sequences in the comparison of peaks")
    memory_cases: tuple[str, ...] = _names(CASES, ("step", "frozen"), "cases in the comparison of peaks")
    memory_tokens: tuple[int, ...] = _size(
        (512, 4096), "tokens of two pairs; the next two sweeps begin at the first number"
    )
    memory_vocab: tuple[int, ...] = _size((NARROW.vocab, 262144), "growing vocabulary")
    memory_pairs: tuple[int, ...] = _size((2, 8), "growing numbers of pairs; all sequences have one length")
    accuracy_lengths: tuple[int, ...] = _size((64, 256), "tokens of a sequence in the accuracy part")
    long_lengths: tuple[int, ...] = _size(tuple(2**k for k in range(10, 21)), "tokens of the long-context rows")
    long_seconds: float = _size(2.5, "the long-context part skips a row that would take longer than this")
    long_memory_gib: float | None = _size(None, "memory limit of a process there, if less than --memory-gib")
    training_dtypes: tuple[str, ...] = _names(
        DTYPES, ("float32", "bfloat16"), "types of the model in the training part"
    )
    training_length: int = _size(96, "tokens of a sequence in the training part")
    training_steps: int = _size(5, "timed steps of the training part")
    memory_gib: float = _size(8.0, "memory limit of a process; an implementation that asks for more fails")
    fit_gib: float | None = _size(None, "use fewer tokens where a naive step needs more (None: the same everywhere)")

    def limit_gib(self, part: str) -> float:
        """Memory limit of a process of `part`."""
        return self.long_memory_gib or self.memory_gib if part == "long-context" else self.memory_gib

    def tokens(self, shape: Shape) -> int:
        """Tokens of a timed batch."""
        tokens = shape.tokens_for(self.product_gflop)
        while self.fit_gib is not None and tokens > 64 and shape.step_gib(tokens, 4) > self.fit_gib:
            tokens //= 2
        return tokens

    def speed_points(self) -> list[SpeedPoint]:
        """All groups of timings. Heads other than the main one run only the case "step", in the last type."""
        return [
            SpeedPoint(shape, case, dtype, 2, max(16, self.tokens(SHAPES[shape]) // 4))
            for shape in self.shapes
            for dtype in (self.dtypes if shape == MAIN_SHAPE else self.dtypes[-1:])
            for case in self.cases
            if shape == MAIN_SHAPE or case == "step"
        ]


def default_plan(device: str = "cpu", quick: bool = False) -> Plan:
    """A plan of about 15 minutes on 2 cores, of 3 minutes if `quick`; on a GPU the sizes are larger."""
    on_gpu = device.startswith("cuda")
    plan = Plan(
        device=device,
        memory_gib=round(min(available_gib(torch.device(device)) * 0.6, 1e4 if on_gpu else 8.0), 1),
        # On a CPU the limit of memory should end the sweep, not the time.
        long_memory_gib=None if on_gpu else 1.0,
    )
    if on_gpu:
        return replace(
            plan,
            product_gflop=10_000.0,
            fit_gib=torch.cuda.get_device_properties(device).total_memory / 2**30 * 0.6,
            rounds=20,
            seconds=3.0,
            memory_tokens=(2048, 8192, 32768),
            accuracy_lengths=(256, 1024, 4096),
            long_seconds=20.0,
            training_dtypes=("bfloat16",),
            training_length=2048,
            training_steps=5,
        )
    if quick:
        return replace(
            plan,
            shapes=(MAIN_SHAPE,),
            dtypes=("float32",),
            cases=("step", "frozen"),
            memory_length=128,
            memory_cases=("step",),
            memory_tokens=(512,),
            memory_vocab=(NARROW.vocab,),
            memory_pairs=(2,),
            accuracy_lengths=(256,),
            long_lengths=(1024, 8192),
            long_seconds=1.0,
            training_dtypes=("float32",),
            training_length=64,
            training_steps=1,
        )
    return plan


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add one option for each field of a plan."""
    parser.add_argument("--quick", action="store_true", help="a sample, in 3 minutes on 2 cores")
    parser.add_argument("--threads", type=int, help="CPU threads (default: one for each core)")
    for entry in fields(Plan):
        default, known = entry.default, entry.metadata.get("known")
        text = f"{entry.metadata['help']}{': ' + ', '.join(known) if known else ''} (default: {_shown(default)})"
        flags = [f"--{entry.name.replace('_', '-')}", *(["--dtype"] if entry.name == "dtypes" else [])]
        kind = str if isinstance(default, (str, tuple)) else float if default is None else type(default)
        parser.add_argument(*flags, metavar="LIST" if isinstance(default, tuple) else None, type=kind, help=text)


def _shown(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def among(flag: str, given: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """All known names that begin with one of the given words."""
    found: list[str] = []
    for word in given.split(","):
        matches = [name for name in known if name.lower().startswith(word.strip().lower())]
        if not word.strip() or not matches:
            raise ValueError(f"--{flag}: {word!r} is not one of {', '.join(known)}.")
        found += [name for name in matches if name not in found]
    return tuple(found)


def plan_of(args: argparse.Namespace) -> Plan:
    """The default plan with the changes from the command line.

    Raises:
        ValueError: an unknown name or device.
    """
    device = args.device or "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no CUDA device here; use --device cpu.")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    plan = default_plan(device, args.quick)
    chosen: dict[str, Any] = {}
    for entry in fields(Plan):
        given, flag = getattr(args, entry.name), entry.name.replace("_", "-")
        if given is None:
            continue
        if "known" in entry.metadata:
            given = among(flag, given, entry.metadata["known"])
        elif isinstance(entry.default, tuple):
            given = tuple(int(word) for word in given.split(","))
        chosen[entry.name] = given
    if "memory_gib" in chosen:
        chosen.setdefault("long_memory_gib", None)
    if "peers" in chosen and {"speed", "accuracy"} & set(chosen.get("parts", plan.parts)):
        chosen["peers"] = (OURS, *(name for name in chosen["peers"] if name != OURS))
    return replace(plan, **chosen)
