"""The page "Beyond one device": its Python runs on two ranks, and its commands are those that other tests run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("trl")

from tests.distributed.launcher import on_ranks
from tests.distributed.test_trainers import accelerate_on_a_cpu

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "distributed.md").read_text()


def run_page() -> float:
    """All blocks one after the other, as a reader would put them together."""
    names: dict[str, object] = {}
    with accelerate_on_a_cpu("cp"):
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(block, names)
    weight = names["weight"]
    dist.all_reduce(weight.grad)  # type: ignore[attr-defined]
    return float(weight.grad.norm()) / dist.get_world_size()  # type: ignore[attr-defined]


def test_python_of_the_page_runs() -> None:
    norms = on_ranks(2, run_page)
    assert norms[0] == norms[1] > 0


def test_commands_of_the_page_are_those_that_run() -> None:
    tests = (ROOT / "tests" / "test_launch.py").read_text()
    files = set(re.findall(r"--config_file examples/accelerate/(\S+)", PAGE))
    assert files == {path.name for path in (ROOT / "examples" / "accelerate").glob("*.yaml")}
    for file in files:
        assert f'"{file}"' in tests, file
    makefile = (ROOT / "Makefile").read_text()
    assert "make test-distributed" in PAGE
    assert "\ntest-distributed:" in makefile
