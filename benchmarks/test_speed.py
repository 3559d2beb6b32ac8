"""`pytest benchmarks --benchmark-only`: every contender on every case (`infopo_kernels.bench`)."""

from infopo_kernels.bench.pytest_cases import test_speed

__all__ = ["test_speed"]
