"""Options of `pytest benchmarks --benchmark-only`, and the context that its record carries."""

from infopo_kernels.bench.pytest_cases import SpeedPlugin

_plugin = SpeedPlugin()
pytest_addoption = _plugin.pytest_addoption
pytest_generate_tests = _plugin.pytest_generate_tests
pytest_benchmark_update_machine_info = _plugin.pytest_benchmark_update_machine_info
pytest_benchmark_update_commit_info = _plugin.pytest_benchmark_update_commit_info
pytest_benchmark_update_json = _plugin.pytest_benchmark_update_json
