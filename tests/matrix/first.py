"""What must work in every environment, in a minute: the import, a loss, Triton's import, one kernel compiled, and what
`make first-contact` would run on a GPU.

Named so that pytest runs it only when asked: `make test-matrix` does, in environments that lack what other tests need.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: what is compiled is not interpreted

import pytest
import torch

import infopo_kernels
from infopo_kernels import InfoPO, linear_infopo_loss, naive


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_loss_and_gradients(backend: str) -> None:
    if (reason := infopo_kernels.available_backends()[backend]) is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    labels = torch.randint(50, (4, 7))
    leaves = [torch.randn(*shape, dtype=torch.float64) for shape in ((4, 7, 16), (50, 16))]
    results = []
    for dtype, loss in (
        (torch.float64, lambda x, w: naive.linear_preference_loss(x, w, labels, objective=InfoPO())),
        (torch.float32, lambda x, w: linear_infopo_loss(x, w, labels, backend=backend).loss),
    ):
        hidden, weight = (leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves)
        value = loss(hidden, weight)
        value.backward()
        results.append((value.detach().double(), hidden.grad.double(), weight.grad.double()))
    for truth, got in zip(*results, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_compiles_for_a_gpu(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu import offline  # needs Triton, and must not be imported before the environment is set above
    from infopo_kernels.backends.triton.tiles import TARGETS

    target = TARGETS["sm_90"]
    kernels = offline.compiled(target, [offline.Shape(64, 64, 500, dtype, False)])
    assert any("logprob" in kernel.name for kernel in kernels)
    assert all(kernel.compiled.asm["cubin"] for kernel in kernels)


def test_first_contact_would_run() -> None:
    """It imports what it needs and lists its sections, without a GPU."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks", "first-contact", "--dry-run"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for section in ("cases", "products", "kernels", "variants", "steps"):
        assert f"\n{section} " in done.stdout
    assert "tests collected" in done.stdout
