"""`pytest benchmarks --benchmark-only`: every contender on every case.

pytest-benchmark runs the repetitions of one test after the other, which lets a slow minute of the machine fall on one
implementation. So the repetitions of a point are taken interleaved when its first test runs, and each test hands its
own to pytest-benchmark through a timer that replays them.
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
    """A clock that an action moves on by seconds measured before."""

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


@lru_cache(maxsize=1)  # tests of a point follow each other; an earlier one's are over
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
