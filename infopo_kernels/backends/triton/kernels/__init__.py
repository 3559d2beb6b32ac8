"""The Triton kernels: each file states the equations of its kernels and launches them."""
