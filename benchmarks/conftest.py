"""The points of `pytest benchmarks --benchmark-only`, and what its record says of the machine."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.contenders import FLOOR
from benchmarks.measure.environment import environment
from benchmarks.parts.speed import PLAN, SKIPPED
from benchmarks.plan import Plan, default_plan


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("infopo_kernels benchmarks")
    group.addoption("--device", default="cpu")
    group.addoption("--quick", action="store_true")


def _plan(config: pytest.Config) -> Plan:
    return config.stash.setdefault(PLAN, default_plan(config.getoption("device"), config.getoption("quick")))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function.__name__ != "test_speed":
        return
    plan = _plan(metafunc.config)
    pairs = [(point, name) for point in plan.speed_points() for name in (*plan.peers, FLOOR)]
    metafunc.parametrize(("point", "contender"), pairs, ids=[f"{point}-{name}" for point, name in pairs])
    metafunc.parametrize("plan", [plan], ids=[plan.device])


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    # The host's name and the like have no influence on a figure and no place in a record that is published.
    machine_info.clear()
    machine_info.update(environment(_plan(config).device))


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    for key in set(commit_info) - {"id", "dirty"}:
        del commit_info[key]


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["skipped"] = SKIPPED
    for entry in output_json["benchmarks"]:  # objects that JSON cannot hold, as text: extra_info says it all
        del entry["params"]
