"""Peak memory of a piece of work: from the allocator on a GPU, from the resident set on a CPU."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

MIB: Final = 1 << 20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Parameters of glibc's mallopt: the sizes from which freed blocks and the free end of the heap go back to the system,
# and the number of arenas.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def status_mib(field: str) -> float:
    """A field of /proc/self/status in MiB: VmRSS, VmHWM (resident, its peak), VmData (private), VmPeak (mapped), ...

    Raises:
        OSError: this system has no such file.
    """
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def present_mib(device: torch.device) -> float:
    """Present use."""
    return torch.cuda.memory_allocated(device) / MIB if device.type == "cuda" else status_mib("VmRSS")


def available_gib(device: torch.device) -> float:
    """Memory that is free now."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0]) / 2**30
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


def limit(device: torch.device, gib: float) -> None:
    """Allow this process `gib` more than it has. Asking for more fails at once, even if the machine has more memory."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        share = (torch.cuda.memory_reserved(device) + gib * 2**30) / whole
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    elif sys.platform == "linux":  # other systems do not count it
        most = int((status_mib("VmData") + 1024 * gib) * MIB)
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))


def _mallopt(**options: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # other C libraries do not keep large blocks
        for option, value in options.items():
            mallopt(globals()[option], value)


def give_back_at_once() -> None:
    """Make the C library return freed memory (large blocks, the end of its heap) at once: only live memory counts."""
    _mallopt(_M_MMAP_THRESHOLD=MIB, _M_TRIM_THRESHOLD=2 * MIB)


def keep_what_is_freed() -> None:
    """The opposite, for timing: set the thresholds that glibc reaches by itself."""
    _mallopt(_M_MMAP_THRESHOLD=32 * MIB, _M_TRIM_THRESHOLD=64 * MIB)


def one_arena() -> None:
    """Use a single arena: the arena of another thread reserves 64 MiB of addresses, which would count as mapped."""
    _mallopt(_M_ARENA_MAX=1)


def settle() -> None:
    """Give free memory back to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@dataclass(frozen=True)
class Use:
    """Time and memory of a piece of work."""

    result: Any
    seconds: float
    peak_mib: float
    """Peak memory beyond the use at the start."""


def watch(job: Callable[[], Any], device: torch.device) -> Use:
    """Do the job once. Call `give_back_at_once` before any allocation, and run a small job first to load libraries.

    Raises:
        OSError: on this system a process cannot reset its peak (on Linux it can).
    """
    settle()
    before = present_mib(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _CLEAR.write_text("5")  # the high-water mark falls to the present resident set
    start = time.perf_counter()
    result = job()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) / MIB if device.type == "cuda" else status_mib("VmHWM")
    return Use(result, seconds, peak - before)
