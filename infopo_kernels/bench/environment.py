"""What was measured on: machine, threads, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any, Final

import torch

from infopo_kernels import __version__
from infopo_kernels.backends import dispatch

_PACKAGES: Final = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "flash-attn", "transformers")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    family = "/".join(found.get(key, "?") for key in ("cpu family", "model", "stepping"))
    return f"{found.get('model name', platform.processor())} (family/model/stepping {family})"


def environment(device: str) -> dict[str, Any]:
    """Machine, threads and versions, as JSON takes them."""
    installed = {package.name.replace("_", "-"): package.version for package in importlib.metadata.distributions()}
    result = {
        "infopo_kernels": __version__,
        "device": device,
        "backend": dispatch.resolve("auto", torch.device(device), torch.float32).name,
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: installed.get(name, "not installed") for name in _PACKAGES},
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        result["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        result["cuda"] = torch.version.cuda
        result["driver"] = _driver()
    return result


def _driver() -> str:
    import subprocess

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
