"""The matrix of ways, tunings and extras (`tests.distributed.matrix`): weights after three steps are one process's.

`make test-distributed` runs all of it, on 2 and 4 processes. Elsewhere a sample runs that holds every value.
"""

from __future__ import annotations

import importlib.util

import pytest

for needed in ("transformers", "peft", "accelerate"):
    pytest.importorskip(needed)

from tests.distributed import matrix  # noqa: E402
from tests.distributed.launcher import on_ranks  # noqa: E402


def sample() -> list[tuple[int, matrix.Case]]:
    """Each way with the next tuning and the next extra, so all pairs of these; every third one on 4 processes too."""
    tunings, extras = matrix.TUNINGS, matrix.EXTRAS
    chosen = [
        matrix.Case(way, tunings[index % len(tunings)], extras[index % len(extras)])
        for index, way in enumerate(matrix.WAYS)
    ]
    return [(2, case) for case in chosen] + [(4, case) for case in chosen[::3]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.config.getoption("--every-case"):
        cases = [(size, case) for size in (2, 4) for case in matrix.CASES]
    else:
        cases = sample()
    metafunc.parametrize(("size", "case"), cases, ids=[f"{size}-{case.name}" for size, case in cases])


def test_three_steps_are_those_of_one_process(size: int, case: matrix.Case) -> None:
    if case.way.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    for found in on_ranks(size, matrix.compare, case, timeout=300):
        assert found["moved"] > 1e-2, found
        assert found["difference"] < 5e-5, found
