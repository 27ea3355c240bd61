"""Writing safetensors by all ranks at once, without gathering and never half-written."""

from twa_scale.writer.appended import Appended
from twa_scale.writer.background import BackgroundWrite
from twa_scale.writer.files import Files, check_files
from twa_scale.writer.lock import DirectoryLock
from twa_scale.writer.shards import TensorSpec, check_dtype, parse_size, spec_of, stored_as
from twa_scale.writer.write import Writer, begin, check_tiling, writing

__all__ = [
    "Appended",
    "BackgroundWrite",
    "DirectoryLock",
    "Files",
    "TensorSpec",
    "Writer",
    "begin",
    "check_dtype",
    "check_files",
    "check_tiling",
    "parse_size",
    "spec_of",
    "stored_as",
    "writing",
]
