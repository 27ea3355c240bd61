"""Writing safetensors by all ranks at once, without gathering and never half-written."""

from twa_scale.output.append import Appended
from twa_scale.output.background import BackgroundWrite
from twa_scale.output.file_layout import TensorSpec, check_dtype, parse_size, spec_of, stored_as
from twa_scale.output.lock import DirectoryLock
from twa_scale.output.ranks_writer import Writer, begin, check_tiling, writing
from twa_scale.output.small_files import Files, check_files

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
