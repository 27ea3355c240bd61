"""The trainable average. Start with `attach.py`, which builds it, then `average.py`, which is it."""
