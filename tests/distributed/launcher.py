"""Functions on several processes at once: gloo, one process group for all calls of a test session.

    def case(rank: int, size: int, shared: Group, wide: int) -> torch.Tensor: ...       # at the head of a module
    results = on_ranks(2, case, 7)                                      # one result of each rank

A group of processes starts when it is first asked for and ends with the session. An error on any rank is raised in the
test, with the ranks that it came from. A call that takes longer than `timeout` ends all of the group's processes.
"""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]


class RankError(AssertionError):
    """What each rank of a call raised; None for a rank that returned."""

    def __init__(self, errors: list[BaseException | None], texts: list[str]) -> None:
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text))
        self.errors = errors


@dataclass
class _Group:
    processes: list[subprocess.Popen[bytes]]
    connections: list[Connection]

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float) -> list[Any]:
        if any(process.poll() is not None for process in self.processes):  # a crash in an earlier test
            _groups.cache_clear()
            self.stop()
            return on_ranks(len(self.processes), function, *arguments, timeout=timeout)
        task = pickle.dumps((function.__module__, function.__qualname__, arguments))
        for connection in self.connections:
            connection.send_bytes(task)
        end = time.monotonic() + timeout
        there = [connection.poll(max(0.0, end - time.monotonic())) for connection in self.connections]
        answers = [c.recv() if ok else (None, "no answer", None) for c, ok in zip(self.connections, there, strict=True)]
        if not all(there):
            _groups.cache_clear()
            self.stop()
            what = "".join(f"\nrank {rank}: {text or 'returned'}" for rank, (_, text, _) in enumerate(answers))
            raise TimeoutError(f"{function.__qualname__}{arguments} took longer than {timeout} s:{what}")
        if any(text for _, text, _ in answers):
            raise RankError([error for _, _, error in answers], [text for _, text, _ in answers])
        return [value for value, _, _ in answers]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@cache
def _groups(size: int) -> _Group:
    store = tempfile.mkdtemp(prefix="gloo-")
    listener = Listener(str(Path(store) / "tests"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.distributed.launcher", store, str(size)]
    processes = [subprocess.Popen([*command, str(rank)], env=environment, cwd=ROOT) for rank in range(size)]
    by_rank = {}
    for _ in range(size):
        connection = listener.accept()
        by_rank[connection.recv()] = connection
    group = _Group(processes, [by_rank[rank] for rank in range(size)])
    atexit.register(group.stop)
    return group


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """`function(*arguments)` on each of `size` processes that share a process group; their results.

    The function is found by its name in its module. Arguments and results are pickled. `dist.get_rank()` tells the
    processes apart.

    Raises:
        RankError: a rank raised.
        TimeoutError: a rank did not answer in time; the processes are ended, and a next call starts new ones.
    """
    return _groups(size).call(function, arguments, timeout)


def _serve(store: str, size: int, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}/ranks", rank=rank, world_size=size)
    connection = Client(str(Path(store) / "tests"))
    connection.send(rank)
    while True:
        try:
            module, name, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            function: Any = sys.modules.get(module) or __import__(module, fromlist=["_"])
            for part in name.split("."):
                function = getattr(function, part)
            answer = (function(*arguments), "", None)
        except Exception as error:
            answer = (None, traceback.format_exc(), error)
        try:
            connection.send(answer)
        except Exception:
            connection.send((None, traceback.format_exc(), None))


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
