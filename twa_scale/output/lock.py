"""A lock on an output directory, held by one process until it releases it or ends."""

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from twa_scale.base.notices import notice
from twa_scale.errors import OutputError
from twa_scale.output.publish import output_errors

LOCK = ".lock"
_BEGIN = b'{"host": "'  # the first bytes of every lock file
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: set[int] = set()
Self = TypeVar("Self", bound="DirectoryLock")


def _close_all() -> None:
    """Close the lock files in a forked child, which would otherwise hold the locks after its parent has ended."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_close_all)


class DirectoryLock:
    """A lock (`flock`) on `directory`/.lock, a file that names its owner and is removed on release.

    The kernel releases the lock when the process ends in any way. A lock file that remains after that has no effect. On
    NFS the server holds the lock, so that it works between hosts, unless the mount has `nolock` or `local_lock=flock`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / LOCK
        self._handle: int | None = None

    def take(self) -> None:
        """Take the lock. The directory has to exist.

        Raises:
            OutputError: another process holds the lock, the file cannot be written, or another program wrote it.
        """
        with output_errors(self._directory):
            while self._handle is None:
                handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
                try:
                    if not self._locked(handle):
                        return
                    if self._is_current(handle):
                        self._require_ours(handle)
                        self._handle = handle
                        _held.add(handle)
                finally:
                    if self._handle is None:  # The previous owner may have removed the file after it was opened here.
                        os.close(handle)
            self._write_owner()

    def _locked(self, handle: int) -> bool:
        """Lock an open file. Return False, with a notice, if the file system has no locks."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise OutputError(
                f"{self._directory}: another run is writing here: {_owner(handle)}. An output directory belongs to one "
                "run at a time. Wait until that run has ended, stop it, or choose another output."
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            notice(
                f"{self._directory}: its file system has no locks ({error.strerror}), so that a second run in the "
                "same directory would not be noticed. Start one at a time."
            )
            return False
        return True

    def _require_ours(self, handle: int) -> None:
        content = os.pread(handle, len(_BEGIN), 0)
        if not _BEGIN.startswith(content):
            raise OutputError(
                f"{self._path}: was written by another program, and a run would replace it. Move it away, or choose "
                "another output."
            )

    def _write_owner(self) -> None:
        assert self._handle is not None
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        try:
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps(owner).encode(), 0)
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Remove the file and release the lock. Do nothing if the lock is not held."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        with suppress(OSError):
            os.unlink(self._path)
        _held.discard(handle)
        os.close(handle)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _is_current(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), self._path.stat())
        except FileNotFoundError:
            return False


def owner_of(directory: Path) -> str | None:
    """Return the process that the lock file of a directory names, as text; None if there is none, or it has ended.

    It takes no lock, so that a run which starts at the same moment is not refused. A process on another host is not
    known to have ended.
    """
    try:
        handle = os.open(directory / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return _owner(handle) if _may_run(handle) else None
    finally:
        os.close(handle)


def _may_run(handle: int) -> bool:
    """Return False if a lock file names a process of this host that has ended."""
    try:
        owner = json.loads(os.pread(handle, 1000, 0))
        if owner["host"] == socket.gethostname():
            os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, TypeError, KeyError, OverflowError):  # such as a process of another user
        return True
    return True


def _owner(handle: int) -> str:
    try:
        owner = json.loads(os.pread(handle, 1000, 0))
        return f"process {int(owner['pid'])} on host {str(owner['host'])[:80]}, started {str(owner['started'])[:40]}"
    except (OSError, ValueError, TypeError, KeyError):
        return "a process that has not written its name"
