"""What a run measures: sizes, types, devices and time limits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

import torch

from infopo_kernels.bench.batches import CASES
from infopo_kernels.bench.contenders import CONTENDERS
from infopo_kernels.bench.shapes import SHAPES, Shape

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARTS: Final = ("speed", "memory", "long-context", "accuracy", "training")
MAIN_SHAPE: Final = "SmolLM2-135M"
NARROW: Final = Shape("narrow head", 64, 49152)
"""A head with SmolLM2's vocabulary and few hidden units, so that memory ends a sweep on a CPU, not its products."""


@dataclass(frozen=True)
class SpeedPoint:
    """One group of timings: contenders and floor, side by side."""

    shape: str
    case: str
    dtype: str
    pairs: int
    length: int

    def __str__(self) -> str:
        return f"{self.shape}-{self.case}-{self.dtype}-{2 * self.pairs}x{self.length}"


@dataclass(frozen=True)
class Plan:
    """The sizes of a run. `default_plan` makes one for a device."""

    device: str = "cpu"
    parts: tuple[str, ...] = PARTS
    peers: tuple[str, ...] = tuple(CONTENDERS)
    shapes: tuple[str, ...] = tuple(SHAPES)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    cases: tuple[str, ...] = tuple(CASES)
    step_only: frozenset[str] = field(default_factory=lambda: frozenset(SHAPES) - {MAIN_SHAPE})
    """Shapes that run the case "step" in the last type only."""
    product_gflop: float = 15.0
    """Size of one product of a timed case; it sets the number of tokens."""
    fit_gib: float | None = None
    """Fewer tokens where a naive step would need more than this; None keeps the number the same on every machine."""
    seconds: float = 0.6
    """Timed seconds for each contender and case."""
    rounds: int = 5
    """Most repetitions."""
    memory_length: int = 768
    """Tokens of each of the four sequences of a step whose peak is compared."""
    memory_cases: tuple[str, ...] = ("step", "frozen")
    memory_tokens: tuple[int, ...] = (512, 4096)
    """Of two pairs, at SmolLM2's vocabulary; the first is also where the sweeps of vocabulary and pairs begin."""
    memory_vocab: tuple[int, ...] = (NARROW.vocab, 262144)
    memory_pairs: tuple[int, ...] = (2, 8)
    """Of sequences of one length."""
    accuracy_lengths: tuple[int, ...] = (64, 256)
    long_lengths: tuple[int, ...] = tuple(2**k for k in range(10, 21))
    long_seconds: float = 2.5
    """A row that is expected to take longer is not run."""
    training_dtypes: tuple[str, ...] = ("float32",)
    training_length: int = 96
    training_steps: int = 3
    memory_gib: float = 8.0
    """What a process may allocate; an implementation that asks for more has failed."""
    long_memory_gib: float | None = None
    """The same in the long-context part, if it is less there."""

    def limit_gib(self, part: str) -> float:
        """What a process of `part` may allocate."""
        return self.long_memory_gib or self.memory_gib if part == "long-context" else self.memory_gib

    def tokens(self, shape: Shape) -> int:
        """Tokens of a timed batch."""
        tokens = shape.tokens_for(self.product_gflop)
        while self.fit_gib is not None and tokens > 64 and shape.step_gib(tokens, 4) > self.fit_gib:
            tokens //= 2
        return tokens

    def speed_points(self) -> list[SpeedPoint]:
        """Every group of timings."""
        points = []
        for name in self.shapes:
            restricted = name in self.step_only
            tokens = self.tokens(SHAPES[name])
            for dtype in self.dtypes[-1:] if restricted else self.dtypes:
                for case in self.cases:
                    if not restricted or case == "step":
                        points.append(SpeedPoint(name, case, dtype, 2, max(16, tokens // 4)))  # noqa: PERF401
        return points


def available_gib(device: str) -> float:
    """Memory that is free now."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(device)[0]) / 2**30
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


def default_plan(device: str = "cpu", quick: bool = False) -> Plan:
    """About 13 minutes on 2 cores, 3 if `quick`; on a GPU sizes that fill it."""
    plan = Plan(
        device=device,
        memory_gib=round(min(available_gib(device) * 0.6, 8.0 if device == "cpu" else 1e4), 1),
        # On a CPU memory is to end the sweep before patience does.
        long_memory_gib=1.0 if device == "cpu" else None,
    )
    if device.startswith("cuda"):
        return replace(
            plan,
            dtypes=("float32", "bfloat16"),
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
            training_length=64,
            training_steps=1,
        )
    return plan
