"""Measurements of the library; run with ``python -m benchmarks``."""
