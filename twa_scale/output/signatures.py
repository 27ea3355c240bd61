"""Signatures of weight files that cannot say themselves that this program wrote them, as safetensors files do."""

import hashlib
from pathlib import Path

_END_BYTES = 64 << 10


def signature(path: Path) -> str:
    """Return a text that another file with this name has not: a hash of the size, and of the first and last bytes.

    The last bytes of an archive of torch.save are its directory, which has the CRC-32 of every tensor.

    Raises:
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        found.update(file.read(_END_BYTES))
        file.seek(max(0, size - _END_BYTES))
        found.update(file.read(_END_BYTES))
    return found.hexdigest()
