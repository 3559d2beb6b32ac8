"""Without a GPU Triton's kernels run in the interpreter. This must be set before any test imports Triton."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-case", action="store_true", help="the whole matrix of tests/distributed, not a sample")
