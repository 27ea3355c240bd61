"""One file for each format of a candidate, and what several of them share. Start with `stored_tensors.py`."""
