"""The GPU backend. Importing it needs torch only; Triton is imported when a kernel is first launched."""

from infopo_kernels.backends.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
