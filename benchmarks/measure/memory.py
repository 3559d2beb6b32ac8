"""Peak memory of a stretch of work: the allocator's on a GPU, the resident set's on a CPU."""

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
# glibc's mallopt: from which size on freed blocks, and the free end of the heap, go back to the system; arenas.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def status_mib(field: str) -> float:
    """A field of /proc/self/status in MiB: VmRSS, VmHWM (resident, its peak), VmData (private), VmPeak (mapped), ...

    Raises:
        OSError: this system has none.
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
    """Let this process take `gib` more than it has; asking for more fails there and then, whatever the machine has."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        share = (torch.cuda.memory_reserved(device) + gib * 2**30) / whole
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    elif sys.platform == "linux":  # elsewhere the system does not count it
        most = int((status_mib("VmData") + 1024 * gib) * MIB)
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))


def _mallopt(**options: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # other C libraries do not keep large blocks
        for option, value in options.items():
            mallopt(globals()[option], value)


def give_back_at_once() -> None:
    """Count what is alive: have the C library return what is freed, large blocks and the end of its heap."""
    _mallopt(_M_MMAP_THRESHOLD=MIB, _M_TRIM_THRESHOLD=2 * MIB)


def keep_what_is_freed() -> None:
    """The opposite, for timing: the thresholds that glibc comes to by itself."""
    _mallopt(_M_MMAP_THRESHOLD=32 * MIB, _M_TRIM_THRESHOLD=64 * MIB)


def one_arena() -> None:
    """Another thread's arena reserves 64 MiB of addresses, which would count as mapped."""
    _mallopt(_M_ARENA_MAX=1)


def settle() -> None:
    """Give back what is free."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@dataclass(frozen=True)
class Use:
    """What a stretch of work took."""

    result: Any
    seconds: float
    peak_mib: float
    """Beyond what was in use when it began."""


def watch(job: Callable[[], Any], device: torch.device) -> Use:
    """Do the job once. Call `give_back_at_once` before anything is allocated, and let a small job bring in libraries.

    Raises:
        OSError: the system lets no process reset its peak (Linux does).
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
