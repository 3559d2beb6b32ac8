"""From a backend's name to the backend. A backend is loaded when it is first used."""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from typing import Final

import torch

from infopo_kernels.backends.base import Backend
from infopo_kernels.options import BACKENDS

_CLASSES: Final = {
    "cpp": ("infopo_kernels.backends.cpp", "CppBackend"),
    "triton": ("infopo_kernels.backends.triton", "TritonBackend"),
    "torch": ("infopo_kernels.backends.torch_chunked", "TorchBackend"),
}


@cache
def load(name: str) -> Backend | str:
    """The backend called `name`, or the reason why its module cannot be imported."""
    module, attribute = _CLASSES[name]
    try:
        backend: Backend = getattr(importlib.import_module(module), attribute)()
    except ImportError as error:
        return f"{error}."
    return backend


def unavailable_reason(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if backend `name` takes inputs of this device and type, else a sentence that says why not."""
    backend = load(name)
    return backend if isinstance(backend, str) else backend.unsupported_reason(device, dtype)


def available_backends(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str | None]:
    """For each backend's name: None if it takes inputs of this device and type, else the reason why not."""
    return {name: unavailable_reason(name, torch.device(device), dtype) for name in _CLASSES}


@cache
def _warn_of_fallback(preferred: str, reason: str) -> None:
    warnings.warn(
        f"the {preferred!r} backend cannot run here, so backend='auto' takes plain PyTorch, which is slower. "
        f"Reason: {reason} Pass backend='torch' to choose it without this warning.",
        stacklevel=4,
    )


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend to run. A named backend runs or raises. "auto" takes the kernels made for the device; if they cannot
    run, it warns and takes PyTorch.

    Raises:
        ValueError: the name is unknown, or the named backend cannot take these inputs (with the reason).
    """
    if name not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}.")
    wanted = name if name != "auto" else "cpp" if device.type == "cpu" else "triton"
    reason = unavailable_reason(wanted, device, dtype)
    if reason is not None and name != "auto":
        raise ValueError(f"`backend={name!r}` cannot run: {reason}")
    if reason is not None:
        if dtype != torch.float64:  # float64 is for checking, and PyTorch is its only backend
            _warn_of_fallback(wanted, reason)
        wanted = "torch"
    backend = load(wanted)
    assert not isinstance(backend, str), backend
    return backend
