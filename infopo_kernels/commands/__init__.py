"""What `python -m infopo_kernels` runs."""
