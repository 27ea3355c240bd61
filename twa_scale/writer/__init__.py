"""Writing safetensors by all ranks at once, without gathering and never half-written."""

from twa_scale.writer.shards import TensorSpec, parse_size, stored_as
from twa_scale.writer.write import Files, Writer, writing

__all__ = ["Files", "TensorSpec", "Writer", "parse_size", "stored_as", "writing"]
