"""One module for each file format of candidates, and modules that several formats share.

Start with `stored_tensors.py`.
"""
