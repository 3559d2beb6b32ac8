"""Everything that is measured of infopo_kernels: `python -m benchmarks --help`. Not part of the installed package."""
