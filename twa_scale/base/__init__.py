"""Utilities of all other packages: spans, tensor names, paths, bounded reading of files, timing and memory."""
