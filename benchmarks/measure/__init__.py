"""The one way to measure: turns in time, peak memory, fresh processes, and what was measured on."""
