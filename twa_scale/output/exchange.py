"""Exchanging two directory names in one system call, on systems and file systems that support it."""

import ctypes
import errno
import os
import sys
from pathlib import Path

_AT_FDCWD = -100
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2, and RENAME_SWAP of renamex_np
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names on one file system atomically, so that both exist at any time.

    Returns:
        True if the names were exchanged; False if the system or the file system does not support it, as some network
        file systems do not.

    Raises:
        OSError: the exchange failed.
    """
    ctypes.set_errno(0)
    if _exchange(os.fsencode(first), os.fsencode(second)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _exchange(first: bytes, second: bytes) -> int:
    library = ctypes.CDLL(None, use_errno=True)
    result = -1
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        result = library.renamex_np(first, second, ctypes.c_uint(_EXCHANGE))
    elif hasattr(library, "renameat2"):
        result = library.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, ctypes.c_uint(_EXCHANGE))
    else:
        ctypes.set_errno(errno.ENOSYS)
    return result
