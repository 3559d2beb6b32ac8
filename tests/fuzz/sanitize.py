"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: python tests/fuzz/sanitize.py LIBRARY.

LIBRARY is an extension that was built with INFOPO_KERNELS_SANITIZE=1 (`make sanitize` does both). A fixed set of cases
runs through the ops: every instruction set, type, way and kind of size, exact gradients and pooled tails. Each tensor
has its own allocation, so that the sanitizer's red zones surround it. The first fault ends the process with a report.
tests/test_fuzz.py runs one size with the extension as it is, so that the calls here stay those of the ops.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

SIZES = [
    # N, H, V, softcap, scale, bytes of workspace
    (5, 1, 7, None, 1.0, 1 << 25),
    (70, 83, 397, 3.0, -0.5, 1 << 25),
    (300, 65, 600, None, 1.0, 1 << 20),
    (37, 130, 301, None, 0.5, 1 << 20),
    (17, 64, 5000, 2.0, 1.0, 1 << 20),
    (90, 96, 97, None, 1.0, 1 << 22),
]
WANTED = ["xwb", "x", "w", "b", "xb"]
THRESHOLDS = [0.0, 0.01]
"""Of the pooled tail; 0 for exact gradients."""


def preload() -> str:
    """The sanitizers' libraries, which have to be loaded before Python's first allocation."""
    names = ("libasan.so", "libubsan.so")
    found = (subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in names)
    return " ".join(found)


def main(library: str) -> int:
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        # Python and torch free some memory only at the end of the process; this run does not look for leaks. GCC 12
        # aligns the fake stack of detect_stack_use_after_return to less than an AVX-512 vector, and stores to it fault.
        asan = "detect_leaks=0:detect_stack_use_after_return=0:strict_init_order=1"
        environment = {
            **os.environ,
            "LD_PRELOAD": preload(),
            "ASAN_OPTIONS": asan,
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        return subprocess.call([sys.executable, __file__, library], env=environment)
    import torch  # only under the sanitizers

    torch.ops.load_library(library)
    ops, calls = torch.ops.infopo_kernels_cpp, 0
    for name, dtypes in {
        "portable": [torch.float32, torch.bfloat16, torch.float16],
        "avx2": [torch.float32, torch.bfloat16, torch.float16],
        "avx512": [torch.float32, torch.bfloat16, torch.float16],
        "avx512_bf16": [torch.bfloat16],
        "amx": [torch.bfloat16],
    }.items():
        os.environ["INFOPO_KERNELS_CPU_ISA"] = name
        try:
            ops.isa(torch.bfloat16)
        except RuntimeError as error:
            print(f"{name}: not here ({error})")
            continue
        for dtype in dtypes:
            calls += sum(run(ops, dtype, *size) for size in SIZES)
        print(f"{name}: clean after {calls} calls", flush=True)
    return 0


def run(ops: Any, dtype: Any, N: int, H: int, V: int, softcap: float | None, scale: float, workspace: int) -> int:
    """Run all ways through the primitives for one size. Returns the number of calls."""
    import torch

    g, calls = torch.Generator().manual_seed(N), 0
    x, w = torch.randn(N, H, generator=g).to(dtype), torch.randn(V, H, generator=g).to(dtype)
    b, c = torch.randn(V, generator=g).to(dtype), torch.randn(N, generator=g)
    y = torch.randint(V, (N,), generator=g)
    y[torch.rand(N, generator=g) < 0.3] = -100
    y[0], y[-1], c[N // 2] = V + 3, V - 1, 0.0  # a label outside the vocabulary reads nothing
    options = (softcap, scale, workspace)
    for threads, threshold in itertools.product((1, 3), THRESHOLDS):
        torch.set_num_threads(threads)
        _, lse = ops.logprob(x, w, b, y, None, None, *options)
        lse = lse.nan_to_num(0)
        pool = (torch.full((N,), torch.nan), torch.zeros(2, dtype=torch.float64)) if threshold else (None, None)
        for weight_dtype in [dtype] if dtype == torch.float32 else [dtype, torch.float32]:
            for wanted in WANTED:
                dX = torch.zeros_like(x) if "x" in wanted else None
                dW = torch.zeros(V, H, dtype=weight_dtype) if "w" in wanted else None
                db = torch.zeros(V) if "b" in wanted else None
                ops.logprob_and_grad(x, w, b, y, c, dX, dW, db, *pool, *options, threshold)
                ops.backward(x, w, b, y, lse, c, dX, dW, db, *pool, None, None, *options, threshold)
                calls += 2
            dW = torch.empty(V, H, dtype=weight_dtype)
            most = ops.kept_rows(x, w, dW, *options, threshold)
            if most:
                scored = y != -100
                kept = torch.where(scored & (scored.cumsum(0) <= most), y, -100)
                numbers = ops.numbers_for_logits(x, dW, most)
                logits = torch.empty(numbers, dtype=torch.int16) if numbers else None
                dX = torch.zeros_like(x)
                ops.logprob(x, w, b, kept, dW, logits, *options)
                ops.backward(x, w, b, y, lse, c, dX, dW, None, *pool, kept, logits, *options, threshold)
                calls += 2
    return calls


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
