"""The backends: one module each behind the protocol of `base`, loaded by `infopo_kernels.dispatch` on first use."""
