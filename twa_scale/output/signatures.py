"""Signatures of files that cannot hold a provenance: weight files of other formats, and training state."""

import hashlib
from pathlib import Path

_END_BYTES = 64 << 10


def signature(path: Path) -> str:
    """Return a hash of the size of a file, and of its first and last 64 KiB.

    It tells which file is meant, and does not protect from damage: files that differ only between these bytes have the
    same signature. The last bytes of a file of torch.save are its directory, with the CRC-32 of its last tensors.

    Raises:
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    hasher = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        hasher.update(file.read(_END_BYTES))
        file.seek(max(0, size - _END_BYTES))
        hasher.update(file.read(_END_BYTES))
    return hasher.hexdigest()
