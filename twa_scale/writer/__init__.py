"""Writing safetensors by all ranks at once, without gathering and never half-written."""

from twa_scale.writer.appended import Appended
from twa_scale.writer.background import BackgroundWrite
from twa_scale.writer.lock import DirectoryLock
from twa_scale.writer.shards import TensorSpec, parse_size, spec_of, stored_as
from twa_scale.writer.write import Files, Writer, begin, check_tiling, writing

__all__ = [
    "Appended",
    "BackgroundWrite",
    "DirectoryLock",
    "Files",
    "TensorSpec",
    "Writer",
    "begin",
    "check_tiling",
    "parse_size",
    "spec_of",
    "stored_as",
    "writing",
]
