"""Kernels in plain torch for any device, the reference for the other kernels."""
