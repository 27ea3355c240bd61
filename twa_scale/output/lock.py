"""The right to write into a directory: one process has it at a time, and it ends with that process."""

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
from twa_scale.output.publish import reported

LOCK = ".lock"
_BEGIN = b'{"host": "'  # of the file, whoever has the lock
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: set[int] = set()
Self = TypeVar("Self", bound="DirectoryLock")


def _let_go() -> None:
    """Close the locks in a forked child, which would otherwise hold them longer than the process that took them."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


class DirectoryLock:
    """A lock (`flock`) on `directory`/.lock, which says who has it. The file goes when the lock is released.

    The kernel releases the lock when the process ends, however it ends; the file may then remain, and means nothing. On
    NFS the server holds the lock, so that it works between hosts, unless the mount says `nolock` or `local_lock=flock`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / LOCK
        self._handle: int | None = None

    def take(self) -> None:
        """Take the lock in a directory that exists.

        Raises:
            OutputError: another process has it, which is named; or the file cannot be written, or is not ours.
        """
        with reported(self._directory):
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
                    if self._handle is None:  # the owner before may have removed the file after it was opened here
                        os.close(handle)
            self._sign()

    def _locked(self, handle: int) -> bool:
        """Lock an open file. Return False where there are no locks, and say so."""
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
                f"{self._path}: is not the file of this name that a run writes, which would replace it. Move it away, "
                "or choose another output."
            )

    def _sign(self) -> None:
        assert self._handle is not None
        said = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        try:
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps(said).encode(), 0)
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Remove the file and the lock. Without a lock it does nothing."""
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


def _owner(handle: int) -> str:
    try:
        said = json.loads(os.pread(handle, 1000, 0))
        return f"process {int(said['pid'])} on host {str(said['host'])[:80]}, started {str(said['started'])[:40]}"
    except (OSError, ValueError, TypeError, KeyError):
        return "a process that has not written down its name"
