"""Temporary names next to an output, each owned by one process, and the removal of those whose owner has died.

The owner holds a lock on a file next to the temporary name. The kernel releases this lock when the process ends, so the
next writer of the same output can recognize and remove what a killed process has left. A lock file without a temporary
file says that the process was killed around the publication of the output, so that the rest of its work can be done.
"""

import fcntl
import os
import re
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal, TypeVar

Kind = Literal["tmp", "old"]
Self = TypeVar("Self", bound="TemporaryName")

_LOCK_NAME = re.compile(r"\.(?P<target>.+)\.(?P<kind>tmp|old)-[0-9a-f]{8}\.lock")
_UNCHANGED = 24 * 3600.0  # seconds without a change, after which the owner of a lock that cannot be seen counts as dead
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class TemporaryName:
    """A temporary name next to `target` for a file or directory, with a lock.

    `discard`, or the end of a `with` block, removes the file or directory. While the main thread uses a temporary name,
    handlers of SIGTERM and SIGHUP remove it before the process dies, unless the process has its own handlers. A name
    that another thread uses is left to `remove_leftovers`: Python runs signal handlers only in the main thread, and
    only when it executes Python code, and the other thread could publish a directory that is being removed.

    Args:
        target: the output that is prepared.
        kind: "tmp" for an output that is not finished or no longer needed; "old" for an output that is replaced, which
            gets its name back unless another output has this name.

    Raises:
        OSError: the directory cannot be written.
    """

    def __init__(self, target: Path, kind: Kind = "tmp") -> None:
        self._target = target
        self._kind: Kind = kind
        self._handle: int | None = None
        while self._handle is None:
            self.path = target.parent / f".{target.name}.{kind}-{secrets.token_hex(4)}"
            self._lock = _lock_path(self.path)
            self._handle = _create_lock(self._lock)
        _OWNED.add(self)

    def discard(self) -> None:
        """Remove the file or directory with this name, and release the lock."""
        if self._handle is None:
            return
        clear(self.path, self._target, self._kind)
        with suppress(OSError):  # `remove_leftovers` removes what remains.
            if not self.path.exists():
                self._lock.unlink(missing_ok=True)
        self.close_lock()
        _OWNED.remove(self)

    def leave_to_next_start(self) -> None:
        """Keep the name and its lock file when a signal ends the process. `remove_leftovers` removes them."""
        _OWNED.stop_handling_signals(self)

    def close_lock(self) -> None:
        """Close the lock file without removing anything."""
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def remove_leftovers(directory: Path, name: str | None = None, published: Callable[[Path], None] | None = None) -> None:
    """Remove temporary files of dead processes in `directory`, and give an output that one was replacing its name back.

    A process is alive if it holds its lock. On some file systems a lock that was taken on another host, or before this
    host started, is not visible here. In this case files are removed only if they have not changed for a day.

    Args:
        directory: the directory of the outputs; it may be missing.
        name: the name of the output whose temporary files are removed; None for all outputs.
        published: called with each output that a dead process had published while it still held the lock. The lock file
            is removed afterwards, so that a process that is killed in this call is followed by another call.
    """
    try:
        locks = sorted(path for path in directory.iterdir() if path.name.endswith(".lock"))  # "old" before "tmp"
    except OSError:
        return
    for lock in locks:
        match = _LOCK_NAME.fullmatch(lock.name)
        if match and name in (None, match["target"]):
            with suppress(OSError):
                kind: Kind = "old" if match["kind"] == "old" else "tmp"
                _remove_leftover(lock, directory / match["target"], kind, published)


def _remove_leftover(lock: Path, target: Path, kind: Kind, published: Callable[[Path], None] | None) -> None:
    path = lock.with_name(lock.name.removesuffix(".lock"))
    handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if _is_dead(handle, path):
            if published and target.exists() and not path.exists():
                published(target)
            clear(path, target, kind)
            if not path.exists():
                lock.unlink(missing_ok=True)
    finally:
        os.close(handle)


def clear(path: Path, target: Path, kind: Kind) -> None:
    """Remove the file or directory at a temporary path. One of kind "old" is renamed to `target` if that is free."""
    if kind == "old" and path.exists() and not target.exists():
        with suppress(OSError):
            path.rename(target)
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _lock_path(path: Path) -> Path:
    """Return the path of the lock file. It is next to the temporary directory, so that it is never published."""
    return path.with_name(f"{path.name}.lock")


def _create_lock(lock: Path) -> int | None:
    """Create and lock a file. Return None if another process removed it as a leftover before it was locked."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with suppress(OSError):  # Some file systems have no locks.
            fcntl.flock(handle, fcntl.LOCK_EX)
        os.write(handle, _host(handle))
        if lock.exists():
            return handle
    except BaseException:
        lock.unlink(missing_ok=True)
        os.close(handle)
        raise
    os.close(handle)
    return None


def _is_dead(handle: int, temporary: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # This file system has no locks.
        lock_is_visible = False
    else:
        host = os.pread(handle, 100, 0)
        lock_is_visible = host == _host(handle) if host else not temporary.exists()
    return lock_is_visible or time.time() - _last_change(handle, temporary) > _UNCHANGED


def _last_change(handle: int, temporary: Path) -> float:
    times = [os.fstat(handle).st_mtime]
    for path in (temporary, *temporary.rglob("*")):
        with suppress(FileNotFoundError):
            times.append(path.lstat().st_mtime)
    return max(times)


def _host(handle: int) -> bytes:
    """Return an identifier that is equal only for processes that see each other's locks; empty if it is unknown.

    It contains the boot id of this host and the device of the mount, because containers may have their own mounts.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return b""
    return f"{boot} {os.fstat(handle).st_dev}".encode()


class _OwnedNames:
    """The temporary names of this process. Handles SIGTERM and SIGHUP while the main thread uses one of them."""

    def __init__(self) -> None:
        self._names: set[TemporaryName] = set()
        self._in_main_thread: set[TemporaryName] = set()

    def add(self, name: TemporaryName) -> None:
        self._names.add(name)
        if threading.current_thread() is threading.main_thread():
            self._in_main_thread.add(name)
            for number in _SIGNALS:
                if signal.getsignal(number) is signal.SIG_DFL:
                    signal.signal(number, self._discard_and_die)

    def remove(self, name: TemporaryName) -> None:
        self._names.discard(name)
        self.stop_handling_signals(name)

    def stop_handling_signals(self, name: TemporaryName) -> None:
        """Restore the signal handlers if the main thread uses no other name."""
        self._in_main_thread.discard(name)
        if not self._in_main_thread and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) == self._discard_and_die:
                    signal.signal(number, signal.SIG_DFL)

    def close_locks(self) -> None:
        """Close all locks in a forked child, which would otherwise hold them after its parent has ended."""
        self._in_main_thread.clear()
        while self._names:
            self._names.pop().close_lock()

    def _discard_and_die(self, number: int, frame: FrameType | None) -> None:
        for name in list(self._in_main_thread):
            name.discard()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


_OWNED = _OwnedNames()
os.register_at_fork(after_in_child=_OWNED.close_locks)
