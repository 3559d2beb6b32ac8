"""A function in a process of its own, under a limit of memory: what it returns, or how it failed.

Processes are forked from a server that has imported everything and computed nothing, so that each starts with the same
memory. On a CPU, memory is the resident set, and the C library is told to give freed blocks back at once: what is
counted is what is alive. A process may allocate so much and no more; asking for more is a failure of what runs in it,
never of the machine. Variables of the environment are read by libraries when they load: a process that needs its own
starts from nothing instead.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, Final, TypeVar

import torch

from benchmarks.measure import memory, timing

_PRELOADED: Final = ["benchmarks.measure.preload"]
_STARTING: Final = threading.Lock()
_Argument = TypeVar("_Argument")


def _describe(error: BaseException, memory_gib: float | None) -> str:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate" in str(error):
        return f"out of memory (limit {memory_gib:g} GiB)" if memory_gib else "out of memory"
    return timing.message(error)


def _child(connection: Connection, function: Callable[[Any], Any], argument: Any, memory_gib: float | None) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (warnings of peers; the process ends soon)
    memory.give_back_at_once()
    if memory_gib is not None:
        memory.limit(torch.device(getattr(argument, "device", "cpu")), memory_gib)
    try:
        connection.send(function(argument))
    except BaseException as error:  # whatever happens in it is its result
        connection.send({"failed": _describe(error, memory_gib), "traceback": traceback.format_exc()})


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def in_fresh_process(
    function: Callable[[_Argument], Any],
    argument: _Argument,
    *,
    memory_gib: float | None = None,
    timeout: float = 300.0,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """`function(argument)` in a fresh process; {"failed": reason, "traceback": ...} if it does not come back.

    Both must be found by name there: a function of a module, and what `pickle` takes.

    Args:
        memory_gib: what it may allocate, on `argument.device` (the CPU if it has none).
        timeout: seconds.
        environment: variables that it starts with, beside this process' own.
    """
    context: Any = multiprocessing.get_context("forkserver" if environment is None else "spawn")
    if environment is None:
        context.set_forkserver_preload(_PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, argument, memory_gib))
    with _STARTING, _environment(environment or {}):
        process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            return {"failed": f"took longer than {timeout:g} s"}
        return receiver.recv()
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
