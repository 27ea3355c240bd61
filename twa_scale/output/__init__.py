"""Output directories: all ranks write safetensors files together, without gathering, and publish them atomically.

Start with `ranks_writer.py` (the writer), `publish.py` (atomic replacement) and `snapshots.py` (candidates that are
written during training).
"""

from twa_scale.output.append import AppendedFile
from twa_scale.output.background import BackgroundWrite
from twa_scale.output.file_layout import TensorSpec, check_dtype, parse_size, spec_of, stored_as
from twa_scale.output.lock import DirectoryLock
from twa_scale.output.ranks_writer import Writer, check_tiling, open_writer, writing
from twa_scale.output.small_files import Files, check_files

__all__ = [
    "AppendedFile",
    "BackgroundWrite",
    "DirectoryLock",
    "Files",
    "TensorSpec",
    "Writer",
    "check_dtype",
    "check_files",
    "check_tiling",
    "open_writer",
    "parse_size",
    "spec_of",
    "stored_as",
    "writing",
]
