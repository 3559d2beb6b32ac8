"""values *= factor, interpreted: values, strides, sizes around the blocks, and that a factor of 1 touches nothing."""

from __future__ import annotations

import pytest
import torch

from tests import triton_support as ts

# isort: split
# Triton is imported by the module above.

from infopo_kernels.backends.base import scale_in_parts
from infopo_kernels.backends.triton.kernels import scale

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, scale.BLOCK - 1, 3 * scale.BLOCK + 5, 70 * scale.BLOCK + 1])
def test_one_factor(size: int, dtype: torch.dtype) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    expected = (values.double() * 0.3125).to(dtype)
    with ts.checked_addresses():
        ts.backend().scale_(values, torch.tensor(0.3125))
    assert torch.equal(values, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "h"), [(1, 1), (5, scale.ROW_BLOCK + 3), (40, 17)])
def test_rows(n: int, h: int, dtype: torch.dtype) -> None:
    """As in plain PyTorch, rows apart in memory included; gaps are not touched."""
    g = torch.Generator().manual_seed(n)
    wide = torch.full((n, h + 3), float("nan"), dtype=dtype)
    wide[:, :h] = torch.randn(n, h, generator=g)
    factor = torch.randn(n, generator=g)
    expected = wide.clone()
    scale_in_parts(expected[:, :h], factor)
    with ts.checked_addresses():
        ts.backend().scale_(wide[:, :h], factor)
    torch.testing.assert_close(wide, expected, rtol=0, atol=0, equal_nan=True)


def test_a_factor_of_one_touches_nothing() -> None:
    values = torch.randn(9, 40)
    with ts.checked_addresses() as spaces:
        ts.backend().scale_(values, torch.tensor(1.0))
        assert (spaces.loads, spaces.stores) == (1, 0), "the factor alone"
        ts.backend().scale_(values, torch.ones(9))
        assert (spaces.loads, spaces.stores) == (1 + 9, 0)


def test_nan_is_not_one() -> None:
    values = torch.ones(3, 4)
    ts.backend().scale_(values, torch.tensor([1.0, float("nan"), 0.0]))
    assert values[0].eq(1).all()
    assert values[1].isnan().all()
    assert values[2].eq(0).all()


def test_nothing_to_scale() -> None:
    ts.backend().scale_(torch.empty(0, 4), torch.empty(0))
    ts.backend().scale_(torch.empty(0), torch.tensor(2.0))
