"""One step of one contender in a process of its own: peak memory, seconds, or how it failed.

Processes are forked from a server that has imported everything and computed nothing, so that each starts with the same
memory. On a CPU, memory is the resident set, and the C library is told to give freed blocks back at once: what is
counted is what is alive. A process may allocate so much and no more; asking for more is a failure of the contender,
never of the machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Final

import torch

from infopo_kernels.bench.batches import CASES, make_batch
from infopo_kernels.bench.contenders import CONTENDERS
from infopo_kernels.bench.plan import DTYPES
from infopo_kernels.bench.shapes import Shape
from infopo_kernels.bench.truth import run
from infopo_kernels.training.memory import peak_mib, present_mib, reset_peak

# glibc's mallopt: from which size on freed blocks, and the free end of the heap, go back to the system.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _MIB = -1, -3, 1 << 20
_PRELOADED: Final = ("infopo_kernels.bench.preload",)


@dataclass(frozen=True)
class Setup:
    """One contender on one batch."""

    contender: str
    shape: Shape
    case: str
    dtype: str
    pairs: int
    length: int
    device: str
    threads: int
    memory_gib: float


def _limit_memory(gib: float) -> None:
    """Let private memory grow by `gib` and no more."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as status:
        used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (used + int(gib * 2**30),) * 2)


def _set_thresholds(mib: int) -> None:
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # other C libraries do not keep large blocks
            mallopt(_M_MMAP_THRESHOLD, mib * _MIB)
            mallopt(_M_TRIM_THRESHOLD, 2 * mib * _MIB)


def give_back_at_once() -> None:
    """Count what is alive: have the C library return what is freed, large blocks and the end of its heap."""
    _set_thresholds(1)


def keep_what_is_freed() -> None:
    """The opposite, for timing: the thresholds that glibc comes to by itself."""
    _set_thresholds(32)


def settle() -> None:
    """Give back what is free."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _step(setup: Setup) -> dict[str, Any]:
    device, case = torch.device(setup.device), CASES[setup.case]
    torch.set_num_threads(setup.threads)
    give_back_at_once()
    contender = CONTENDERS[setup.contender]
    if reason := contender.unsupported_reason(case, device, DTYPES[setup.dtype]):
        return {"skipped": reason}
    # Libraries, threads and compiled code come in with a first run, which is small unless code is compiled for a shape.
    length = setup.length if contender.compiles else min(setup.length, 16)
    for T in (length, setup.length):
        batch = make_batch(case, setup.shape, setup.pairs, T, DTYPES[setup.dtype], device)
        settle()
        before = present_mib(device)
        reset_peak(device)
        start = time.perf_counter()
        loss = run(contender, batch)
        float(loss)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        peak = peak_mib(device)
        inputs = (batch.hidden, batch.weight)
        gradients = sum(t.numel() * t.element_size() for t in inputs if t.requires_grad) / 2**20
        batch.clear()
        del inputs, batch
    return {"peak_mib": max(0.0, peak - before - gradients), "seconds": seconds}


def _describe(error: BaseException, memory_gib: float) -> str:
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate" in text:
        return f"out of memory (limit {memory_gib:g} GiB)"
    return f"{type(error).__name__}: {text.splitlines()[0][:160] if text else ''}"


def _child(connection: Connection, function: Callable[[Any], dict[str, Any]], argument: Any, memory_gib: float) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (warnings of peers; the process ends soon)
    if not str(getattr(argument, "device", "cpu")).startswith("cuda"):
        _limit_memory(memory_gib)
    try:
        connection.send(function(argument))
    except BaseException as error:  # whatever happens to a contender is its row
        connection.send({"failed": _describe(error, memory_gib)})


def in_fresh_process(
    function: Callable[[Any], dict[str, Any]], argument: Any, memory_gib: float, timeout: float
) -> dict[str, Any]:
    """`function(argument)` in a fresh process; {"failed": reason} if it does not come back."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, argument, memory_gib))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            return {"failed": f"took longer than {timeout:.0f} s"}
        result: dict[str, Any] = receiver.recv()
        return result
    except EOFError:
        process.join()
        return {"failed": f"the process died (exit code {process.exitcode})"}
    finally:
        if process.is_alive():
            process.join(2)
        if process.is_alive():
            process.kill()
        process.join()
        receiver.close()


def measure_step(setup: Setup, timeout: float = 300.0) -> dict[str, Any]:
    """{"peak_mib", "seconds"}, or {"failed"} or {"skipped"} with the reason.

    `peak_mib` is beyond inputs and gradients.
    """
    return in_fresh_process(_step, setup, setup.memory_gib, timeout)
