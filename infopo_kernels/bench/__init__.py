"""Measurements against other implementations, side by side: `python -m infopo_kernels bench`."""

from infopo_kernels.bench.command import main

__all__ = ["main"]
