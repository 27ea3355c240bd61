"""The trainable average. Start with `attach.py`, which builds it, then read `average.py`, which defines it."""
