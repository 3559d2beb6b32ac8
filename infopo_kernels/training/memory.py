"""Peak memory of a stretch of work: the allocator's on a GPU, the resident set's on a CPU."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_MIB = 1 << 20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> bool:
    """Start anew; False where the system cannot (then `peak_mib` is that of the whole process so far)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text("5")  # Linux: the high-water mark falls to the present resident set
    except OSError:
        return False
    return True


def _status_mib(field: str) -> float | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":")), None)


def peak_mib(device: torch.device) -> float:
    """Highest use since `reset_peak`, MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    peak = _status_mib("VmHWM")
    if peak is None:
        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = usage / _MIB if sys.platform == "darwin" else usage / 1024
    return peak


def present_mib(device: torch.device) -> float:
    """Present use, MiB; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / _MIB
    return _status_mib("VmRSS") or 0.0
