"""The parts of the benchmarks, each in its own file. A part writes a record. Tables and plots use only the records."""
