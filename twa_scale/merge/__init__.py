"""Averages that are computed from the candidates alone, streamed and without the code of the model."""

from twa_scale.merge.named import average_fixed, export_run
from twa_scale.merge.streamed import Checksums, Weights, merge

__all__ = ["Checksums", "Weights", "average_fixed", "export_run", "merge"]
