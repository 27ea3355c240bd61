"""CRC-32 checksums of bytes that are read in pieces and in any order."""

import threading
import zlib
from functools import lru_cache

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31  # the polynomial 1; the highest bit is the lowest power
_BYTE = 1 << 23  # x^8


class PiecewiseCrc:
    """Computes the CRC-32 of a range of bytes from the CRCs of its pieces. A piece may be read more than once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pieces: dict[int, tuple[int, int]] = {}  # stop and CRC of the longest piece, by first byte
        self._num_bytes = 0  # bytes of all pieces

    def add(self, start: int, data: memoryview, nbytes: int) -> int | None:
        """Add the bytes that begin at `start`. Return the CRC of all `nbytes` bytes when they are complete."""
        crc, stop = zlib.crc32(data), start + len(data)
        with self._lock:
            known = self._pieces.get(start, (start, 0))[0]
            if stop > known:
                self._pieces[start] = stop, crc
                self._num_bytes += stop - known
            return self._combined(nbytes) if self._num_bytes >= nbytes else None

    def _combined(self, nbytes: int) -> int | None:
        pieces, position = [], 0
        while position < nbytes and position in self._pieces:
            stop, crc = self._pieces[position]
            pieces.append((crc, stop - position))
            position = stop
        if position != nbytes:
            return None
        self._pieces, self._num_bytes = {}, 0
        value = 0
        for crc, count in pieces:
            value = combine(value, crc, count)
        return value


def combine(first: int, second: int, nbytes: int) -> int:
    """Return the CRC-32 of two consecutive pieces from their CRCs. The second piece has `nbytes` bytes."""
    return _multiply(_power(nbytes), first) ^ second


@lru_cache(maxsize=1024)
def _power(nbytes: int) -> int:
    """Return x^(8 nbytes) modulo the polynomial."""
    result, factor = _ONE, _BYTE
    while nbytes:
        if nbytes & 1:
            result = _multiply(factor, result)
        factor = _multiply(factor, factor)
        nbytes >>= 1
    return result


def _multiply(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product
