"""The backends. Each is a module that implements the protocol of `base`; `dispatch` loads it on first use."""
