"""The backends: one module each behind the protocol of `base`; `dispatch` loads them on first use."""
