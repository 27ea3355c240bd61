"""Corrections of the coefficients for single rows of matrices (`groups: tensor+row` and `block+row`)."""

from twa_scale.average.rows.corrections import RowCorrections, row_bytes, row_moments
from twa_scale.average.rows.exchange import exchanged_bytes
from twa_scale.average.rows.make import make_rows
from twa_scale.average.rows.shapes import row_lengths
from twa_scale.average.rows.slots import Part

__all__ = ["Part", "RowCorrections", "exchanged_bytes", "make_rows", "row_bytes", "row_lengths", "row_moments"]
