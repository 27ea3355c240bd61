"""Kernels for CPUs, compiled by numba on their first use. Start with `compiled.py`."""
