"""Exchanging the names of two directories in one system call, where the system and the file system have one."""

import ctypes
import errno
import os
import sys
from pathlib import Path

_HERE = -100  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2, and RENAME_SWAP of renamex_np
_MISSING = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names of one file system; neither is ever absent.

    Returns:
        Whether it was done. False: the system or this file system (some network file systems) has no such call.

    Raises:
        OSError: it has one, which failed.
    """
    ctypes.set_errno(0)
    if _exchange(os.fsencode(first), os.fsencode(second)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _MISSING:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _exchange(first: bytes, second: bytes) -> int:
    library = ctypes.CDLL(None, use_errno=True)
    result = -1
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        result = library.renamex_np(first, second, ctypes.c_uint(_EXCHANGE))
    elif hasattr(library, "renameat2"):
        result = library.renameat2(_HERE, first, _HERE, second, ctypes.c_uint(_EXCHANGE))
    else:
        ctypes.set_errno(errno.ENOSYS)
    return result
