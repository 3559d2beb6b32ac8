"""The GPU kernels: compiled and checked without a GPU, modelled without a GPU, measured on one."""
