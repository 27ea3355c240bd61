"""Writing safetensors by all ranks at once, without gathering and never half-written."""

from twa_scale.writer.shards import TensorSpec, parse_size
from twa_scale.writer.write import Files, Writer, writing

__all__ = ["Files", "TensorSpec", "Writer", "parse_size", "writing"]
