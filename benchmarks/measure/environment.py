"""The machine of a measurement: processor, threads, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any, Final

import torch

from infopo_kernels import __version__
from infopo_kernels.backends import dispatch

_PACKAGES: Final = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "flash-attn", "transformers")
_VENDORS: Final = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}


def _cpu() -> tuple[str, str]:
    """The processor's usual name, and a short name for folders.

    Cloud machines hide the model behind names such as "Intel(R) Xeon(R) Processor". Family, model and stepping identify
    it, and whether the machine lets programs use AMX: torch multiplies bfloat16 several times faster then.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = found.get("model name") or platform.processor() or platform.machine()
    if "cpu family" not in found:
        return name, _slug(name)
    numbers = [found.get(key, "?") for key in ("cpu family", "model", "stepping")]
    vendor = found.get("vendor_id", "")
    amx = ["amx"] if "amx_bf16" in found.get("flags", "").split() else []
    described = ", ".join([f"family/model/stepping {'/'.join(numbers)}", *(each.upper() for each in amx)])
    return f"{name} ({described})", _slug("-".join([_VENDORS.get(vendor, vendor), *numbers, *amx]))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Machine, threads and versions, ready for JSON. `processor` is the name of the folder for its records."""
    installed = {package.name.replace("_", "-"): package.version for package in importlib.metadata.distributions()}
    cpu, processor = _cpu()
    result = {
        "infopo_kernels": __version__,
        "processor": processor,
        "device": device,
        "backend": dispatch.resolve("auto", torch.device(device), torch.float32).name,
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: installed.get(name, "not installed") for name in _PACKAGES},
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        result["processor"] = _slug(properties.name)
        result["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        result["cuda"] = torch.version.cuda
        result["driver"], result["clock, power limit"] = _nvidia_smi()
    return result


def _nvidia_smi() -> tuple[str, str]:
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown", "unknown"
    driver, _, rest = line.partition(", ")
    return driver, rest
