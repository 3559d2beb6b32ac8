"""How everything here is measured: interleaved timing, peak memory, fresh processes, and the machine's description."""
