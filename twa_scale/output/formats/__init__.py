"""The formats of weight files. Each defines the positions of the elements of a tensor in its files.

Start with `format.py` (the interface) and `choose.py`.
"""

from twa_scale.output.formats.format import OutputFormat, PlaceFunction, Run, WeightFiles
from twa_scale.output.formats.safetensors import SafetensorsFormat

__all__ = ["OutputFormat", "PlaceFunction", "Run", "SafetensorsFormat", "WeightFiles"]
