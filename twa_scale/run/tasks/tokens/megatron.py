"""Token files of Megatron-LM: PREFIX.bin, whose index PREFIX.idx has the dtype and the documents.

The index consists of the magic, a version (uint64, 1), the code of the dtype (uint8), the numbers of sequences and of
document boundaries (uint64 each), the length of each sequence (int32), the byte at which each begins (int64), and the
boundaries (int64): the document i has the sequences boundaries[i] to boundaries[i+1] - 1. Numbers are little-endian.
"""

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from twa_scale.base.inputs import named_errors, open_regular
from twa_scale.errors import ConfigError
from twa_scale.run.tasks.tokens.sequence import Array

MAGIC = b"MMIDIDX\x00\x00"
_OLD = b"TNTIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")  # after the magic
# Megatron's code 8 is uint16. DeepSpeed's copy of the format has uint16, uint32 and uint64 as 6, 7 and 8; Megatron's 6
# and 7 are floats. The sizes of the sequences in bytes tell which one it is.
_DTYPES: dict[int, tuple[str, ...]] = {
    1: ("uint8",),
    2: ("int8",),
    3: ("int16",),
    4: ("int32",),
    5: ("int64",),
    6: ("uint16",),
    7: ("uint32",),
    8: ("uint16", "uint64"),
}
_FIX = "Write it again with tools/preprocess_data.py of Megatron-LM."


def index_of(path: Path) -> Path | None:
    """Return the index of a .bin file, if it exists next to it."""
    index = path.with_suffix(".idx")
    return index if index.exists() else None


def read_index(index: Path, size: int) -> tuple["np.dtype[Any]", Array]:
    """Return the dtype of the tokens, and the positions of the first tokens of the documents (int64).

    Args:
        index: the .idx file.
        size: the size of the .bin file in bytes.

    Raises:
        ConfigError: the index cannot be read, has another format, or does not belong to a file of this size.
    """
    with named_errors(ConfigError, _FIX):
        with os.fdopen(open_regular(index, ConfigError), "rb") as file:
            start = file.read(len(MAGIC) + _HEADER.size)
        length = index.stat().st_size
    if not start.startswith(MAGIC) or len(start) < len(MAGIC) + _HEADER.size:
        old = " but one of the older kind without mapping" if start.startswith(_OLD) else ""
        raise ConfigError(f"{index}: is not an index of Megatron-LM's mapped files{old}. {_FIX}")
    version, code, sequences, boundaries = _HEADER.unpack(start[len(MAGIC) :])
    wanted = len(start) + 12 * sequences + 8 * boundaries
    if version != 1 or code not in _DTYPES or length < wanted:
        raise ConfigError(
            f"{index}: has version {version}, dtype code {code} and {length} bytes. The version must be 1, the code "
            f"that of integers, 1 to 8, and {sequences} sequences need {wanted} bytes. {_FIX}"
        )
    lengths = np.memmap(index, "<i4", "r", len(start), (sequences,)) if sequences else np.zeros(0, np.int32)
    pointers = np.memmap(index, "<i8", "r", len(start) + 4 * sequences, (sequences,)) if sequences else lengths
    ends = np.memmap(index, "<i8", "r", len(start) + 12 * sequences, (boundaries,)) if boundaries else lengths
    if (lengths < 0).any():
        raise ConfigError(f"{index}: has a sequence of {lengths.min()} tokens. {_FIX}")
    dtype = _dtype(index, _DTYPES[code], int(lengths.sum(dtype=np.int64)), size)
    firsts = np.append(np.asarray(pointers), size)
    if boundaries == 0 or ends[0] or ends[-1] != sequences or (np.diff(ends) < 0).any():
        raise ConfigError(f"{index}: its boundaries of documents do not fit its {sequences} sequences. {_FIX}")
    if firsts[0] or (np.diff(firsts) != lengths.astype(np.int64) * dtype.itemsize).any():
        raise ConfigError(f"{index}: its sequences are not consecutive in the .bin file. {_FIX}")
    starts = firsts[ends[:-1]] // dtype.itemsize
    return dtype, np.unique(starts[starts < size // dtype.itemsize])  # without empty documents


def _dtype(index: Path, names: tuple[str, ...], tokens: int, size: int) -> "np.dtype[Any]":
    for name in names:
        if tokens * np.dtype(name).itemsize == size:
            return np.dtype(f"<{np.dtype(name).str[1:]}")
    raise ConfigError(
        f"{index}: has {tokens} tokens of type {' or '.join(names)}, but its .bin file has {size} bytes. Copy both "
        "files again: one of them is of another data set, or incomplete."
    )
