"""Triton's interpreter for tests. It is switched on before Triton is imported, and every access is checked.

Import this module before any other module that imports Triton. If other tests import Triton first on a machine without
a GPU, `tests/conftest.py` or the environment has to set TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "Triton's interpreter would take the place of the GPU; set TRITON_INTERPRET=1 to run it, or make test-gpu",
        allow_module_level=True,
    )
if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
from triton.runtime import interpreter

from infopo_kernels.backends.triton import TritonBackend, launch
from tests.triton_problems import (
    KEPT_PROBLEMS,
    PROBLEMS,
    WORKSPACE,
    FreshMemory,
    Inputs,
    Problem,
    assert_gradients,
    assert_logp,
    buffers,
    first_rows,
    fresh_buffers,
    keep_and_backward,
    make,
    plain,
)

if not launch.INTERPRETED:
    raise RuntimeError(
        "Triton was imported without TRITON_INTERPRET=1, so its kernels cannot be interpreted in this process; "
        "set TRITON_INTERPRET=1 in the environment or in tests/conftest.py."
    )

__all__ = [
    "KEPT_PROBLEMS",
    "PROBLEMS",
    "WORKSPACE",
    "AddressSpaces",
    "FreshMemory",
    "Inputs",
    "OutOfBounds",
    "Problem",
    "assert_gradients",
    "assert_logp",
    "backend",
    "buffers",
    "checked_addresses",
    "first_rows",
    "fresh_buffers",
    "interpreter",
    "keep_and_backward",
    "make",
    "plain",
]


def backend() -> TritonBackend:
    return TritonBackend()


class OutOfBounds(AssertionError):
    """A kernel accessed an address outside the elements of its tensor."""


@dataclass
class AddressSpaces:
    """Gives each tensor argument its own address, 2^48 bytes from the next. Only this address reaches the tensor.

    So a pointer that leaves its tensor cannot reach another one unnoticed (the workspace is one allocation, cut into
    parts), and the gaps of a tensor with strides are outside it.
    """

    tensors: list[torch.Tensor] = field(default_factory=list)
    loads: int = 0
    stores: int = 0

    SHIFT = 48

    def register(self, tensor: torch.Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) << self.SHIFT

    def real(self, pointers: np.ndarray, mask: np.ndarray, what: str) -> np.ndarray:
        """The true addresses; those of masked lanes are never used."""
        mask = np.broadcast_to(mask, pointers.shape)
        real = np.zeros_like(pointers)
        for space in np.unique(pointers[mask] >> np.uint64(self.SHIFT)):
            lanes = mask & ((pointers >> np.uint64(self.SHIFT)) == space)
            if not 1 <= space <= len(self.tensors):
                raise OutOfBounds(f"{what} at {hex(int(pointers[lanes][0]))}, which is no tensor's")
            tensor = self.tensors[int(space) - 1]
            offset = (pointers[lanes] & np.uint64((1 << self.SHIFT) - 1)).astype(np.int64)
            self._check(tensor, offset, what)
            real[lanes] = np.uint64(tensor.data_ptr()) + offset.astype(np.uint64)
        return real

    @staticmethod
    def _check(tensor: torch.Tensor, offset: np.ndarray, what: str) -> None:
        size = tensor.element_size()
        rest, wrong = offset // size, offset % size != 0
        order = sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True)
        for stride, length in order:
            if stride > 0:
                wrong |= rest // stride >= length
                rest = rest % stride
        wrong |= rest != 0
        if wrong.any() or tensor.numel() == 0:
            at = int(offset[wrong][0]) // size if wrong.any() else int(offset[0]) // size
            raise OutOfBounds(f"{what} of element {at} of a tensor {tuple(tensor.shape)} strides {tensor.stride()}")


@contextmanager
def checked_addresses() -> Iterator[AddressSpaces]:
    """Check every access of every kernel that runs inside."""
    spaces = AddressSpaces()
    builder = interpreter.InterpreterBuilder
    load, store, convert = builder.create_masked_load, builder.create_masked_store, interpreter._implicit_cvt
    restore = interpreter.GridExecutor._restore_args_dev

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        spaces.loads += 1
        real = spaces.real(ptrs.data, mask.data, "load")
        return load(self, interpreter.TensorHandle(real, ptrs.dtype), mask, *rest, **named)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        spaces.stores += 1
        real = spaces.real(ptrs.data, mask.data, "store")
        return store(self, interpreter.TensorHandle(real, ptrs.dtype), value, mask, *rest)

    def implicit(arg: Any) -> Any:
        converted = convert(arg)
        if hasattr(arg, "data_ptr"):
            converted.handle.data = np.array([spaces.register(arg)], dtype=np.uint64)
        return converted

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    interpreter._implicit_cvt = implicit
    # All data is on the CPU, so nothing has to be copied back; a copy would touch every page of a huge tensor.
    interpreter.GridExecutor._restore_args_dev = lambda *args: None
    try:
        yield spaces
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        interpreter._implicit_cvt = convert
        interpreter.GridExecutor._restore_args_dev = restore
