"""What the Triton backend needs: versions, a device, a type; or a sentence that says which of them is missing.

The floors are those of the package, and the oldest that are tested: PyTorch 2.10 brings Triton 3.6.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from functools import cache
from typing import Final

import torch

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)

OLDEST_TORCH: Final = (2, 10)
OLDEST_TRITON: Final = (3, 6)

OLDEST_CUDA: Final = (8, 0)
"""Compute capability: bfloat16 products and asynchronous copies to shared memory begin here."""

AMD_ARCHITECTURES: Final = ("gfx942", "gfx950")

_DISTRIBUTIONS: Final = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm")
"""Names under which the module `triton` is published."""


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if inputs of this device and type can be served, else why not and what to do, as a sentence."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install triton` (it comes with PyTorch's builds for GPUs)."
    if device.type not in ("cuda", "cpu"):
        return f"Triton kernels run on CUDA and ROCm devices, not on {device.type!r}; use backend='torch'."
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        what = "move the inputs to it" if torch.cuda.is_available() else "none is present here"
        return f"Triton kernels need a GPU and the inputs are on the CPU ({what}); use backend='cpp' or 'torch'."
    if dtype not in DTYPES:
        return f"Triton kernels take float32, bfloat16 and float16, not {dtype}; use backend='torch'."
    return version_reason(torch.__version__, triton_version()) or (
        device_reason(device) if device.type == "cuda" else None
    )


def version_reason(torch_version: str, triton_version: str) -> str | None:
    """None if both versions are new enough."""
    for name, version, oldest in (
        ("PyTorch", torch_version, OLDEST_TORCH),
        ("Triton", triton_version, OLDEST_TRITON),
    ):
        if release(version) < oldest:
            return (
                f"Triton kernels need {name} {oldest[0]}.{oldest[1]} or newer, this is {version}; install "
                f"PyTorch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer, which brings its own Triton, or use "
                "backend='torch'."
            )
    return None


@cache
def triton_version() -> str:
    """From the package's metadata, because importing Triton takes half a second; from the module where it has none."""
    for name in _DISTRIBUTIONS:
        for found in importlib.metadata.distributions(name=name):
            return found.version
    import triton

    return str(triton.__version__)


def release(version: str) -> tuple[int, int]:
    """Its first two numbers; zeros where it has none."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@cache
def device_reason(device: torch.device) -> str | None:
    """None if the kernels are made for this GPU."""
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU; install a driver and a PyTorch build for it."
    if torch.version.hip is not None:
        arch = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        if arch not in AMD_ARCHITECTURES:
            return f"Triton kernels are tuned and compiled for {', '.join(AMD_ARCHITECTURES)}, not {arch}; use 'torch'."
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CUDA:
        return (
            f"Triton kernels need compute capability 8.0 or newer, this device has {capability[0]}.{capability[1]}; "
            "use backend='torch'."
        )
    return None
