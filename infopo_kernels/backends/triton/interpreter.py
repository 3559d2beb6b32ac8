"""What Triton's interpreter (TRITON_INTERPRET=1) gets wrong: bfloat16, and bounds of loops with a recent numpy.

It truncates on the way to bfloat16 and multiplies its bits. `repair` gives it the arithmetic of a device: float32
rounds to nearest, ties to even, and products of 16-bit operands are formed in float32, where they are exact. A scalar
is an array of one entry there, which Triton 3.6 gives to numpy as a number; numpy 2.4 refuses that. Kernels need not
know that they are interpreted.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@cache
def repair() -> None:
    """Patch the interpreter, once."""
    convert = interpreter._convert_float
    dot = interpreter.InterpreterBuilder.create_dot
    patch = interpreter._patch_lang_tensor

    def convert_float(data: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            return _to_bfloat16(data)
        if source == tl.bfloat16 and target == tl.float32:
            return _to_float32(data)
        return convert(data, source, target, rounding_mode)

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_to_float32(operand.data), tl.float32)
        if operand.dtype.scalar == tl.float16:
            return interpreter.TensorHandle(operand.data.astype(np.float32), tl.float32)
        return operand

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
