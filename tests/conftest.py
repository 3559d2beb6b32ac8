"""Before any test imports Triton: without a GPU its kernels run in the interpreter, which has to be said that early."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
