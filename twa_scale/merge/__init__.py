"""Averages computed from the candidates alone: streamed, without the model's code."""

from twa_scale.merge.named import average_fixed, export_run
from twa_scale.merge.streamed import Checksums, Weights, merge

__all__ = ["Checksums", "Weights", "average_fixed", "export_run", "merge"]
