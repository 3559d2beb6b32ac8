"""Without a GPU Triton's kernels run in the interpreter. This must be set before any test imports Triton."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-case", action="store_true", help="the whole matrix of tests/distributed, not a sample")


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted kernels load aligned 16-bit rows by tensor descriptors, as on Hopper, also from a small workspace."""
    from dataclasses import replace

    from infopo_kernels.backends.triton import launch
    from infopo_kernels.backends.triton.tiles import INTERPRETER

    monkeypatch.setattr(launch, "target_of", lambda device: replace(INTERPRETER, descriptors=True))
    monkeypatch.setattr(launch, "MIN_GATHERED", 16)
