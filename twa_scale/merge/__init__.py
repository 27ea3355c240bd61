"""Averages that are computed from the candidates alone, streamed and without the code of the model."""

from twa_scale.merge.combination import Combination, Weights
from twa_scale.merge.fixed_weights import average_fixed
from twa_scale.merge.run_export import export_run
from twa_scale.merge.streamed import Checksums, merge

__all__ = ["Checksums", "Combination", "Weights", "average_fixed", "export_run", "merge"]
