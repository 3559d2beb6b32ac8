"""`pytest benchmarks --benchmark-only`: every contender on every case.

pytest-benchmark runs all repetitions of a test before the next test, so a slow minute of the machine would hit a single
implementation. Therefore the first test of a point measures all implementations, interleaved. Each test then passes its
own repetitions to pytest-benchmark through a timer that replays them.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from typing import Any

import pytest

from benchmarks.contenders import OURS
from benchmarks.parts.speed import SKIPPED, Measured, measure
from benchmarks.plan import Plan, SpeedPoint


class Replay:
    """A clock that an action moves forward by the seconds measured before."""

    def __init__(self) -> None:
        self._now = 0.0
        self._seconds: list[float] = []

    def __call__(self) -> float:
        return self._now

    def load(self, seconds: list[float]) -> None:
        self._seconds = list(seconds)

    def act(self) -> None:
        self._now += self._seconds.pop(0)


REPLAY = Replay()


@lru_cache(maxsize=1)  # the tests of a point follow each other, so one point is enough
def _measured(point: SpeedPoint, plan: Plan) -> Measured:
    return measure(point, plan)


@pytest.mark.benchmark(timer=REPLAY, disable_gc=False)
def test_speed(benchmark: Any, point: SpeedPoint, contender: str, plan: Plan) -> None:
    measured = _measured(point, plan)
    if contender in measured.skipped:
        reason = measured.skipped[contender]
        SKIPPED.append({**asdict(point), "contender": contender, "reason": reason})
        assert not (contender == OURS and reason.startswith("wrong")), reason
        pytest.skip(reason)
    seconds = measured.seconds[contender]
    benchmark.group = str(point)
    benchmark.extra_info.update(asdict(point), contender=contender)
    REPLAY.load(seconds)
    benchmark.pedantic(REPLAY.act, rounds=len(seconds), iterations=1)
