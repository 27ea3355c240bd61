"""Kernels in plain torch, on any device: the reference for the others."""
