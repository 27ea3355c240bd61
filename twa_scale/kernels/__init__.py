"""Kernels, the operations on data of the size of the model: making deltas, project and combine.

Start with `kernels.py` (the interface), `rows.py` and `packed_rows.py` (the layouts of rows), `segments.py` (the output
rows of a matrix), and `torch/reference.py` (the reference implementation).
"""

from twa_scale.kernels.backend import choose_kernels
from twa_scale.kernels.coding import Coding, RowMap, Trajectory, of_deltas, of_increments
from twa_scale.kernels.kernels import Differences, Kernels, Rows, Sources, Target, new_sums
from twa_scale.kernels.packed_rows import Packed, packed_bytes
from twa_scale.kernels.rows import Allocate, Dense
from twa_scale.kernels.segments import Segments

__all__ = [
    "Allocate",
    "Coding",
    "Dense",
    "Differences",
    "Kernels",
    "Packed",
    "RowMap",
    "Rows",
    "Segments",
    "Sources",
    "Target",
    "Trajectory",
    "choose_kernels",
    "new_sums",
    "of_deltas",
    "of_increments",
    "packed_bytes",
]
