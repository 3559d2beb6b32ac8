"""The timing cases as pytest-benchmark tests; `benchmarks/test_speed.py` collects them.

pytest-benchmark runs the repetitions of one test after the other, which lets a slow minute of the machine fall on one
implementation. So the repetitions of a point are taken interleaved when its first test runs, and each test hands its
own to pytest-benchmark through a timer that replays them.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from typing import Any

import pytest

from infopo_kernels.bench.batches import CASES
from infopo_kernels.bench.contenders import CONTENDERS, FLOOR, OURS
from infopo_kernels.bench.environment import environment
from infopo_kernels.bench.plan import DTYPES, Plan, SpeedPoint, default_plan
from infopo_kernels.bench.shapes import SHAPES
from infopo_kernels.bench.timing import Measured, measure

SKIPPED: list[dict[str, str]] = []
"""What could not be timed, for the record."""


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
        SKIPPED.append({"point": str(point), "contender": contender, "reason": measured.skipped[contender]})
        reason = measured.skipped[contender]
        assert not (contender == OURS and reason.startswith("wrong")), reason
        pytest.skip(reason)
    seconds = measured.seconds[contender]
    benchmark.group = str(point)
    benchmark.extra_info.update(asdict(point), contender=contender)
    REPLAY.load(seconds)
    benchmark.pedantic(REPLAY.act, rounds=len(seconds), iterations=1)


class SpeedPlugin:
    """Hooks that give the tests a plan and the record its context."""

    def __init__(self, plan: Plan | None = None) -> None:
        self._plan = plan

    def pytest_addoption(self, parser: Any) -> None:
        group = parser.getgroup("infopo_kernels benchmarks")
        for name, known in (("peers", CONTENDERS), ("shapes", SHAPES), ("dtypes", DTYPES), ("cases", CASES)):
            group.addoption(f"--{name}", default="", help=f"comma-separated, of: {', '.join(known)}")
        group.addoption("--device", default="cpu")
        group.addoption("--quick", action="store_true")

    def _of(self, config: Any) -> Plan:
        if self._plan is None:
            plan = default_plan(config.getoption("device"), config.getoption("quick"))
            chosen = {
                name: tuple(given.split(","))
                for name in ("peers", "shapes", "dtypes", "cases")
                if (given := config.getoption(name))
            }
            self._plan = Plan(**{**vars(plan), **chosen})
        return self._plan

    def pytest_generate_tests(self, metafunc: Any) -> None:
        if metafunc.function.__name__ != "test_speed":
            return
        plan = self._of(metafunc.config)
        pairs = [(point, name) for point in plan.speed_points() for name in (*plan.peers, FLOOR)]
        metafunc.parametrize(("point", "contender"), pairs, ids=[f"{point}-{name}" for point, name in pairs])
        metafunc.parametrize("plan", [plan], ids=[plan.device])

    def pytest_benchmark_update_machine_info(self, config: Any, machine_info: dict[str, Any]) -> None:
        # The host's name and the like have no influence on a figure and no place in a record that is published.
        machine_info.clear()
        machine_info.update(environment(self._of(config).device))

    def pytest_benchmark_update_commit_info(self, config: Any, commit_info: dict[str, Any]) -> None:
        for key in set(commit_info) - {"id", "dirty"}:
            del commit_info[key]

    def pytest_benchmark_update_json(self, config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
        output_json["skipped"] = SKIPPED
