"""`python -m infopo_kernels demo`."""
