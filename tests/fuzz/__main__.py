"""Random cases against float64: python -m tests.fuzz [--minutes M] [--cases N] [--seed S] [--backends ...].

The run ends at either limit, and fails if a case failed. Each failure prints its seed; `--seed S --cases 1` with the
same --backends runs that case again. Triton's interpreter is slow: beside other backends it gets one case of 200.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import warnings

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from infopo_kernels.backends import dispatch
from infopo_kernels.backends.base import Backend
from tests import support
from tests.fuzz import cases, functions

MOST_FAILURES = 10
TRITON_EVERY = 200
"""A case of the interpreter takes some 0.3 s, as long as 5 to 50 others."""


def backend_of(name: str) -> Backend:
    if name == "triton":  # interpreted, it serves a CPU
        from infopo_kernels.backends.triton import TritonBackend

        return TritonBackend()
    return dispatch.resolve(name.partition("-")[0], torch.device("cpu"), torch.float32)


def drawn_from(seed: int, backends: list[str]) -> list[str]:
    """The backends that a seed chooses from: Triton alone for one seed of TRITON_EVERY, else the others."""
    others = [name for name in backends if name != "triton"]
    if len(others) in (0, len(backends)):
        return backends
    return ["triton"] if seed % TRITON_EVERY == TRITON_EVERY // 2 else others


def run(seed: int, backends: list[str]) -> str | None:
    """Two cases of three call the primitives, one a public function. The description of the case if it failed."""
    backends, primitives = drawn_from(seed, backends), seed % 3 != 0
    case = cases.draw(seed, backends) if primitives else functions.draw(seed, backends)
    name = case.backend
    try:
        with pytest.MonkeyPatch.context() as patch:
            if name != "triton":
                support.use_backend(name, patch)
            if isinstance(case, cases.Case):
                cases.check(case, backend_of(name))
            else:
                functions.check(case, name.partition("-")[0])
    except Exception as error:  # any kind is a finding
        if not isinstance(error, AssertionError):
            traceback.print_exc(limit=-4)
        return f"{case}\n  {type(error).__name__}: {error}"
    return None


def main() -> int:
    here = [name for name in (*support.CPU_BACKENDS, "triton") if support.missing(name) is None]
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="run no longer than this (default 2)")
    parser.add_argument("--cases", type=int, default=1_000_000, help="and no more cases than this")
    parser.add_argument("--seed", type=int, default=None, help="seed of the first case (default: from the clock)")
    parser.add_argument("--backends", nargs="+", default=here, help=f"of {', '.join(here)}")
    args = parser.parse_args()
    seed = int(time.time()) * 1000 if args.seed is None else args.seed
    print(f"fuzz: seed {seed}, backends {', '.join(args.backends)}", flush=True)
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns of log(0) in lanes that Triton masks
    start, done, failed = time.monotonic(), 0, 0
    while done < args.cases and time.monotonic() - start < 60 * args.minutes and failed < MOST_FAILURES:
        failure = run(seed + done, args.backends)
        done += 1
        if failure is not None:
            failed += 1
            print(f"\nFAILED {failure}", flush=True)
    print(f"fuzz: {done} cases, {failed} failed, {time.monotonic() - start:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
